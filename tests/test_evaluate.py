"""train.evaluate: a checkpoint's figures are the run's own; other classes and splits are refused."""

import json

import numpy as np
import pytest

from fftp import scores
from tests import runs
from tests.made_data import make_files
from train import evaluate, run, scored

TINY = ["--synth-train", "60", "--synth-validation", "20", "--synth-test", "30", "--depth", "1", "--epochs", "1"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert run.main([*TINY, "--batch-size", "20", "--device", "cpu", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(("split", "key"), [("test", "metrics"), ("validation", "validation")])
def test_figures_are_those_of_the_run(out, split, key, capsys):
    assert evaluate.main([str(out), "--split", split]) == 0
    shown = json.loads(capsys.readouterr().out)
    wanted = json.loads((out / "result.json").read_text())[key]
    assert {name: shown[name] for name in wanted} == wanted


def test_scores_of_each_clip_are_the_runs_own(out, tmp_path, capsys):
    """Written again by evaluate they are the same bytes, and what they hold gives the run's figures."""
    path = scores.file_of(out, "test")
    before = path.read_bytes()
    path.unlink()
    assert evaluate.main([str(out), "--scores"]) == 0
    assert path.read_bytes() == before
    held = scores.read(out, "test")
    wanted = json.loads((out / "result.json").read_text())["metrics"]
    assert held.figures == wanted
    assert np.trace(held.per_class) / len(held.names) == pytest.approx(wanted["accuracy"])
    assert held.losses.mean() == pytest.approx(wanted["loss"], rel=1e-5)  # float32 sums beside float64 ones
    assert list(held.losses[held.worst]) == sorted(held.losses, reverse=True)
    assert held.names == tuple(f"test/{i}" for i in range(30))
    assert len(held.samples) == 30 * 16_000
    assert scores.read(out, "validation") is None


def test_losses_of_clips_with_several_labels():
    p, targets = np.array([[0.9, 0.2], [0.5, 1.0]]), np.array([[1, 0], [0, 0]])
    expected = [-np.log(0.9) - np.log(0.8), -np.log(0.5) - np.log(1e-12)]
    np.testing.assert_allclose(scored.losses_of(p, targets, True), expected)


def test_other_classes_are_refused(out, tmp_path, capsys):
    (tmp_path / "cat").mkdir()
    code = evaluate.main([str(out), "--data", "folder", "--data-root", str(tmp_path)])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_all_clips(out, capsys):
    assert evaluate.main([str(out), "--split", "all"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["clips"], shown["split"]) == (110, "all")
    assert evaluate.main([str(out), "--split", "all", "--scores"]) == 2
    assert "--scores keeps those of one split" in capsys.readouterr().err


def test_other_recordings_of_which_only_some_are_judged(tmp_path, capsys):
    """A folder without splits, whose test split is a share of it: the command says so."""
    for name in ("a", "b"):
        make_files(tmp_path / "data" / name, 12)
    flags = ("--data", "folder", "--data-root", tmp_path / "data", "--frames", 64)
    runs.train(capsys, tmp_path / "run", *flags, "--max-steps", 1)
    words = [str(tmp_path / "run"), "--data-root", str(tmp_path / "data")]
    assert evaluate.main(words) == 0
    ended = capsys.readouterr()
    assert json.loads(ended.out)["clips"] == 2
    assert "2 of 24 clips are in the test split: --split all takes every one." in ended.err
    assert evaluate.main([*words, "--split", "all"]) == 0
    ended = capsys.readouterr()
    assert (json.loads(ended.out)["clips"], ended.err) == (24, "")


@pytest.mark.parametrize(
    "arguments", [["--split", "tst"], ["--split"], ["--lr", "x"]], ids=["word", "no value", "flag"]
)
def test_bad_words(out, arguments, capsys):
    assert evaluate.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert evaluate.main([str(out), *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_no_checkpoint(tmp_path, capsys):
    assert evaluate.main([str(tmp_path / "absent")]) == 2
    assert "no checkpoint" in capsys.readouterr().err
