"""Runs the cases of tests/interpreted in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
MOST_PROCESSES = 3  # of one file's cases on a GPU: several files run beside each other
TOGETHER = max(1, min(2, os.cpu_count() or 1))  # files in the interpreter, which is one thread
LONGEST = "selective_scan"  # which is begun first
SELECTED = pytest.StashKey[list[str]]()  # the test files of this run, in their order, as conftest.py found them

_begun: dict[str, Future] = {}


def run_cases(name: str, config) -> int:
    """How many cases of tests/interpreted/<name>.py passed; fails with their report when one did not.

    In the interpreter the other files of the run are begun as well, some at a time.
    """
    if config.getoption("--gpu") or "PYTEST_XDIST_WORKER" in os.environ:  # its processes divide the files themselves
        done = _run(name, config)
    else:
        if name not in _begun:
            pool = ThreadPoolExecutor(TOGETHER)
            files = [
                TESTS / "interpreted" / f"{stem.removeprefix('test_triton_')}.py" for stem in config.stash[SELECTED]
            ]
            names = sorted((file.stem for file in files if file.is_file()), key=lambda stem: stem != LONGEST)
            _begun.update({stem: pool.submit(_run, stem, config) for stem in names})
        done = _begun[name].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
    assert "skipped" not in done.stdout
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def _run(name, config):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(TESTS / "interpreted" / f"{name}.py"),
    ]
    environment = os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"}  # Triton 3.9 warns that the default is about to change
    if config.getoption("--gpu"):
        command.append("--gpu")
        environment.pop("TRITON_INTERPRET", None)
        if importlib.util.find_spec("xdist"):  # each case compiles kernels, on a core of its own
            # pytest-benchmark, where it is installed, warns of that, and a warning is an error here.
            command += ["-n", str(max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))), "-p", "no:benchmark"]
    else:
        threads = max(1, torch.get_num_threads() // TOGETHER)
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": str(threads)}
    if config.getoption("--slow"):
        command.append("--slow")
    return subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=environment)
