"""predict and explain refuse words that are none of theirs in one sentence, with exit code 2, and survive a closed pipe."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from fftp import command, convert, explain, predict

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("main", "arguments", "named"),
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
def test_one_sentence(main, arguments, named, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert named in shown.err


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (predict.main, [], "needs CHECKPOINT and FILE-OR-FOLDER: "),
        (predict.main, ["run", "--csv"], "needs FILE-OR-FOLDER: "),
        (convert.main, ["weights.pth", "--heads", "3"], "needs FOLDER: "),
        (explain.main, ["figure1"], "figure1 needs --file"),
    ],
    ids=["nothing", "no file", "no folder", "no recording"],
)
def test_what_is_lacking_is_named(main, arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_words_may_come_among_flags(capsys):
    """Of the words only the last is wrong, so they were understood up to there."""
    arguments = [
        "run",
        "a.wav",
        "--csv",
        "--top",
        "2",
        "b.wav",
        "--device=cpu",
        "c.wav",
        "--skip-bad-files",
        "absent.wav",
    ]
    takes = ("CHECKPOINT", "FILE-OR-FOLDER", "[MORE...]")
    apart = command._apart(arguments, "predict", predict.Options, takes)
    words, flags = apart[:5], apart[5:]
    assert words == ["run", "a.wav", "b.wav", "c.wav", "absent.wav"]
    assert flags == ["--csv", "--top", "2", "--device=cpu", "--skip-bad-files"]
    assert predict.main(arguments) == 2
    assert "no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["fftp.env", "bench.report", "bench.collect"])
def test_help_of_commands_without_flags(module, capsys):
    main = importlib.import_module(module).main
    assert main(["--help"]) == 0
    assert f"python -m {module}" in capsys.readouterr().out


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
