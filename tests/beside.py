"""Long processes of a run's tests: begun with the run, one at a time beside everything else, two once a test waits for one.

They are Triton's: tests/interpreted, whose cases need a process of their own since Triton reads TRITON_INTERPRET when it is
imported, and the compiler's first pass, which must not have it set.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from oracles import needs_oracles

TESTS = Path(__file__).parent
MOST_PROCESSES = 3  # of one file's cases on a GPU: several files run beside each other
COMPILING = "bench.compile --first"
LONGEST = ("selective_scan", COMPILING)  # which are begun first

Started = Callable[[subprocess.Popen], None]  # told of each process when it has started


class Beside:
    """jobs: name -> what runs it, given a Started. The longest are begun first."""

    def __init__(self, jobs: dict[str, Callable[[Started], subprocess.CompletedProcess]]):
        self._turns, self._waited_for = threading.Semaphore(1), False
        self._running, self._stopped = set(), False
        self._pool = ThreadPoolExecutor(2)
        order = sorted(jobs, key=lambda name: LONGEST.index(name) if name in LONGEST else len(LONGEST))
        self._done: dict[str, Future] = {name: self._pool.submit(self._run, jobs[name]) for name in order}

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def wait(self, name: str) -> subprocess.CompletedProcess:
        if not self._waited_for and (os.cpu_count() or 1) > 1:
            self._turns.release()
        self._waited_for = True
        return self._done[name].result()

    def stop(self) -> None:
        """What is under way ends, and nothing more is begun."""
        self._stopped = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._running):
            process.kill()

    def _run(self, job):
        with self._turns:
            return None if self._stopped else job(self._started)

    def _started(self, process):
        self._running.add(process)
        if self._stopped:
            process.kill()


BESIDE = pytest.StashKey[Beside]()


def begin(config, files: Iterable[str]) -> None:
    """Begin the processes that belong to these test files, by their names without .py."""
    if config.getoption("--gpu") or "PYTEST_XDIST_WORKER" in os.environ:  # its processes divide the files themselves
        return
    environment, jobs = dict(os.environ), {}  # tests change it meanwhile
    for stem in (file.removeprefix("test_triton_") for file in files if file.startswith("test_triton_")):
        if (TESTS / "interpreted" / f"{stem}.py").is_file():
            jobs[stem] = partial(_cases, stem, config, environment)
    if "test_compile" in files and importlib.util.find_spec("triton"):
        jobs[COMPILING] = partial(_compiled, ["--first"], environment)
    config.stash[BESIDE] = Beside(jobs)


def run_cases(name: str, config) -> int:
    """How many cases of tests/interpreted/<name>.py passed; fails with their report when one did not, or was skipped for
    another reason than the oracles' absence."""
    done = _result(name, config, partial(_cases, name, config, os.environ))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    print(*skipped, done.stdout.splitlines()[-1], sep="\n")
    assert all(needs_oracles.kwargs["reason"] in line for line in skipped)
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def compiled(form: list[str], config) -> str:
    """What `python -m bench.compile` with these flags writes, JSON; fails with its report when it did not succeed."""
    name = " ".join(["bench.compile", *form])
    done = _result(name, config, partial(_compiled, form, os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _result(name, config, job):
    beside = config.stash.get(BESIDE, ())
    return beside.wait(name) if name in beside else job(lambda process: None)


def _cases(name, config, environment, started):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "interpreted" / f"{name}.py")]
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
    return _ended(command, environment, started)


def _compiled(form, environment, started):
    """With the table in place of what was printed."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.json"
        environment = {name: value for name, value in environment.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(Path(folder) / "cache")
        done = _ended(["-m", "bench.compile", "--json", str(table), *form], environment, started)
        if done.returncode == 0:
            done.stdout = table.read_text()
        return done


def _ended(command, environment, started):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *command], cwd=TESTS.parent, env=environment, **pipes) as process:
        started(process)
        out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)
