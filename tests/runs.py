"""Small training runs for tests: in this process, or as the command that a user types."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.run import main

ROOT = Path(__file__).parents[1]
TRAINING = 60  # clips of a tiny run: three steps of 20 an epoch
TINY = [
    *("--synth-train", str(TRAINING), "--synth-validation", "20", "--synth-test", "20", "--batch-size", "20"),
    *("--depth", "1", "--epochs", "2", "--device", "cpu", "--precision", "float32"),
]  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """What a refused command said. Fails unless it ended with code 2, one line on stderr, and no traceback."""
        lines = self.err.strip().splitlines()
        assert self.code == 2, (self.code, self.err)
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        assert "Traceback" not in self.out
        return lines[0].removeprefix("error: ")


def run(capsys, *flags: object, command=main) -> Ended:
    """A command in this process."""
    if command is main:
        _needs_the_command_line()
    capsys.readouterr()
    try:
        code = command([str(flag) for flag in flags])
    except SystemExit as stop:
        code = stop.code or 0
    printed = capsys.readouterr()
    return Ended(code, printed.out, printed.err)


def train(capsys, out: Path, *flags: object) -> dict[str, Any]:
    """A tiny run that has to succeed, in `out`; returns result.json. Later flags win over TINY's."""
    ended = run(capsys, *TINY, "--out", out, *flags)
    assert ended.code == 0, ended.err
    return result(out)


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def history(out: Path, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without some of their fields."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in without} for line in lines]


def start(*flags: object, module: str = "train.run", code: str = "", **changed: str) -> subprocess.Popen:
    """`python -m module flags` (or `python -c code flags`) as a process of its own, on one thread.

    changed: environment variables.
    """
    if not code and module == "train.run":
        _needs_the_command_line()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | changed
    command = [sys.executable, *(("-c", code) if code else ("-m", module)), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where the tests themselves run in the background, a shell has handed down that Ctrl-C is to be ignored.
    return subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=_heed_ctrl_c, **pipes)


def start_several(processes: int, *flags: object, code: str = "", **changed: str) -> list[subprocess.Popen]:
    """As `start`, the processes that torchrun would start, without torchrun to watch over them; by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    meeting |= {"LOCAL_WORLD_SIZE": str(processes)} | changed
    return [start(*flags, code=code, RANK=str(i), LOCAL_RANK=str(i), **meeting) for i in range(processes)]


def _needs_the_command_line() -> None:
    """A machine with a GPU may have no tyro: its GPU cases hand over Settings, and need none."""
    pytest.importorskip("tyro", reason="the tyro package, which reads train.run's flags, is not installed")


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen, seconds: float = 120) -> Ended:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Ended(process.returncode, out, err)


def drawn(path: Path) -> bool:
    """Whether a picture has something on it: a share of its pixels, in several colours, is not white."""
    from matplotlib.image import imread

    picture = imread(path)[..., :3]
    return (picture.min(-1) < 0.9).mean() > 0.01 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def files(folder: Path) -> list[str]:
    """Everything below a folder, for comparing before and after."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
