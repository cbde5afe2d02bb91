"""predict and explain refuse words that are none of theirs in one sentence, with exit code 2, and survive a closed pipe."""

import subprocess
import sys
from pathlib import Path

import pytest

from fftp import explain, predict

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("command", "arguments", "named"),
    [
        (predict.main, ["run", "--jso", "x.wav"], "--json"),
        (predict.main, ["run", "x.wav", "--top", "three"], "--top three"),
        (predict.main, [], "--help"),
        (explain.main, ["figure2", "--fil", "x.wav"], "--file"),
        (explain.main, ["figure2"], "--help"),
        (explain.main, ["figure9"], "figure1|figure2|figure3"),
    ],
    ids=["flag", "number", "nothing", "explain flag", "no file", "no such figure"],
)
def test_one_sentence(command, arguments, named, capsys):
    assert command(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert named in shown.err


def closed(*words):
    """Exit code and stderr of a command whose reader goes away before its first word; `| head -1` does after a line."""
    command = [sys.executable, "-m", *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        error = process.stderr.read()
        return process.wait(timeout=120), error


FEW = ("--synth-train", 60, "--synth-validation", 10, "--synth-test", 10)


@pytest.mark.parametrize("words", [("train.statistics", *FEW), ("train.run", "--help")], ids=["statistics", "help"])
def test_a_closed_pipe_is_no_error(words):
    code, error = closed(*words)
    assert code == 0
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "words",
    [("train.run", "--epochs", 1, "--depth", 1, *FEW), ("train.reproduce", "table1", "--data", "synth")],
    ids=["run", "reproduce"],
)
def test_a_run_whose_reader_is_gone_ends_with_a_sentence(words, tmp_path):
    code, error = closed(*words, "--out", tmp_path / "run")
    assert code == 1
    assert "nobody reads" in error
    assert error.count("\n") == 1
