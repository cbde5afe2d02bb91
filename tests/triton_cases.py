"""Runs the cases of tests/interpreted in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""

import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MOST_PROCESSES = 3  # of one file's cases on a GPU: several files run beside each other
LONGEST = "selective_scan"  # which is begun first


class Background:
    """The interpreter's files of a run, each a process of one thread, begun beside the run's other tests: one at a time, and
    two once a test waits for them."""

    def __init__(self, config, stems: list[str]):
        self._turns, self._config = threading.Semaphore(1), config
        self._environment = dict(os.environ)  # tests change it meanwhile
        self._running: set[subprocess.Popen] = set()
        self._pool, self._waited_for = ThreadPoolExecutor(2), False
        self._done = {
            stem: self._pool.submit(self._run, stem) for stem in sorted(stems, key=lambda stem: stem != LONGEST)
        }

    def __contains__(self, stem: str) -> bool:
        return stem in self._done

    def wait(self, stem: str) -> subprocess.CompletedProcess:
        if not self._waited_for and (os.cpu_count() or 1) > 1:
            self._turns.release()
        self._waited_for = True
        return self._done[stem].result()

    def stop(self) -> None:
        """What is under way ends, and nothing more is begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._running):
            process.kill()

    def _run(self, stem):
        with self._turns:
            return _run(stem, self._config, self._environment, self._running)


BACKGROUND = pytest.StashKey[Background]()


def begin(config, files: Iterable[str]) -> None:
    """Begin the interpreter's cases that belong to these test files, by their names without .py."""
    if config.getoption("--gpu") or "PYTEST_XDIST_WORKER" in os.environ:  # its processes divide the files themselves
        return
    stems = [file.removeprefix("test_triton_") for file in files if file.startswith("test_triton_")]
    config.stash[BACKGROUND] = Background(config, [s for s in stems if (TESTS / "interpreted" / f"{s}.py").is_file()])


def run_cases(name: str, config) -> int:
    """How many cases of tests/interpreted/<name>.py passed; fails with their report when one did not."""
    background = config.stash.get(BACKGROUND, ())
    done = background.wait(name) if name in background else _run(name, config, os.environ)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
    assert "skipped" not in done.stdout
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def _run(name, config, environment, running=None):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(TESTS / "interpreted" / f"{name}.py"),
    ]
    environment = {
        **environment,
        "TRITON_DEFAULT_FP_FUSION": "1",
    }  # Triton 3.9 warns that the default is about to change
    if config.getoption("--gpu"):
        command.append("--gpu")
        environment.pop("TRITON_INTERPRET", None)
        if importlib.util.find_spec("xdist"):  # each case compiles kernels, on a core of its own
            # pytest-benchmark, where it is installed, warns of that, and a warning is an error here.
            command += ["-n", str(max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))), "-p", "no:benchmark"]
    else:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if config.getoption("--slow"):
        command.append("--slow")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=TESTS.parent, env=environment, **pipes) as process:
        if running is not None:
            running.add(process)
        out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)
