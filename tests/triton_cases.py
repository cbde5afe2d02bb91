"""Runs the cases of tests/interpreted in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
MOST_PROCESSES = 3  # of one file's cases on a GPU: several files run beside each other


def run_cases(name: str, config) -> int:
    """How many cases of tests/interpreted/<name>.py passed; fails with their report when one did not."""
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
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    if config.getoption("--slow"):
        command.append("--slow")
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=environment)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
    assert "skipped" not in done.stdout
    return int(re.search(r"(\d+) passed", done.stdout)[1])
