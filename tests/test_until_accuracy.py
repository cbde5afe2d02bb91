"""--until-accuracy: a run ends in the epoch that reaches the mark, is the longer run up to there, and says how long it took."""

import re

import pytest

from fftp.errors import UserError
from tests import runs
from train import loop, pictures, run, settings

FLAGS = ("--epochs", 4, "--synth-validation", 40, "--seed", 2)


@pytest.fixture
def whole(tmp_path, capsys):
    """(out folder of a run of all epochs, the best figure before its last epoch, the epoch that first reaches it)."""
    runs.train(capsys, tmp_path / "whole", *FLAGS)
    seen = [line["validation_accuracy"] for line in runs.history(tmp_path / "whole")]
    mark = max(seen[:-1])
    assert mark > 0
    return tmp_path / "whole", mark, 1 + seen.index(mark)


def cut_off(*_):
    raise KeyboardInterrupt


def test_a_run_ends_where_the_mark_is_reached_also_when_it_was_cut_off(whole, tmp_path, capsys, monkeypatch):
    longer, mark, epoch = whole
    out = tmp_path / "run"
    flags = [*runs.TINY, *FLAGS, "--until-accuracy", mark, "--out", out]
    monkeypatch.setattr(run, "draw", cut_off)
    assert runs.run(capsys, *flags).code == 130  # trained, not reported
    monkeypatch.undo()
    ended = runs.run(capsys, "--resume", "--out", out)
    assert ended.code == 0, ended.err
    lines = runs.history(out, loop.TIME_FIELDS)
    assert lines == runs.history(longer, loop.TIME_FIELDS)[:epoch]
    result = runs.result(out)
    assert (result["epochs"], result["reported_epoch"]) == (epoch, epoch)
    seconds = runs.history(out)[-1]["seconds"]
    assert result["stopped_at"] == {"mark": mark, "score": mark, "epoch": epoch, "seconds": seconds}
    assert result["seconds_to"][str(mark)] == seconds
    said = f"validation accuracy {100 * mark:.2f} % reached {100 * mark:g} % in epoch {epoch}, {seconds:.1f} s from data to"
    assert len(re.findall(re.escape(said), ended.out)) == 1
    again = runs.run(capsys, "--resume", "--out", out)
    assert f"The run in {out} is finished" in again.out
    assert runs.result(out) == result


def test_a_mark_that_is_not_reached(tmp_path, capsys):
    ended = runs.run(capsys, *runs.TINY, "--epochs", 1, "--until-accuracy", 1, "--out", tmp_path)
    best = runs.history(tmp_path)[-1]["validation_accuracy"]
    assert f"validation accuracy did not reach 100 % by epoch 1: the best was {100 * best:.2f} %." in ended.out
    assert runs.result(tmp_path)["stopped_at"] is None
    assert "1.0" not in runs.result(tmp_path)["seconds_to"]


def test_it_knows_no_last_epochs():
    with pytest.raises(UserError, match="--average-last needs to know which epochs are the last"):
        settings.from_flags(["--until-accuracy", "0.9", "--average-last", "2"])
    with pytest.raises(UserError, match="--until-accuracy has to be from 0 to 1, not 96"):
        settings.from_flags(["--until-accuracy", "96"])


def test_curves_of_seeds_that_stopped_in_other_epochs(tmp_path):
    def history(epochs):
        return [{"train_loss": 1 / n, "validation_accuracy": n / 9} for n in range(1, epochs + 1)]

    pictures.systems_curves({"one": [history(5), history(3)], "other": [history(2)]}, tmp_path / "curves.png")
    assert runs.drawn(tmp_path / "curves.png")
