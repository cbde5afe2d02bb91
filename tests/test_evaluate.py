"""train.evaluate: a checkpoint's figures are the run's own; other classes and splits are refused."""

import json

import pytest

from train import evaluate, run

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


def test_other_classes_are_refused(out, tmp_path, capsys):
    (tmp_path / "cat").mkdir()
    code = evaluate.main([str(out), "--data", "folder", "--data-root", str(tmp_path)])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--split", "tst"], ["--split"], ["--lr", "x"]], ids=["word", "no value", "flag"]
)
def test_bad_words(out, arguments, capsys):
    assert evaluate.main([str(out), *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_no_checkpoint(tmp_path, capsys):
    assert evaluate.main([str(tmp_path / "absent")]) == 2
    assert "no checkpoint" in capsys.readouterr().err
