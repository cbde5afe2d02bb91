"""python -m bench.gpu [--minutes N] [--rehearse]: everything that only a GPU can show, in one call of a few minutes.

First the tests of the kernels, each file a process of its own, so that many kernels compile at once; then the benchmark's
parts by worth; then a short training run with every fused backend. Each figure is on disk as soon as it is measured: a
call that is cut off loses nothing, and a second one goes on with the rows that are missing. Installs nothing: a folder
.wheels/ beside the project is unpacked into a temporary one and put on the path. --rehearse: the same on a CPU, small.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

from bench import collect, measure

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.5
TESTS_SECONDS = 180
TESTS = (
    "test_triton_patch_embed.py",
    "test_triton_spec_mask.py",
    "test_triton_selective_scan.py",
    "test_triton_rms_norm.py",
    "test_triton_training.py",
    "test_patch_embed.py test_spec_mask.py test_draws.py test_philox.py",
    "test_selective_scan.py",
    "test_ast_model.py test_aum_model.py",
    "test_fbank.py",
)
SHARES = {
    "patch_embed": 0.4,
    "spec_mask": 0.1,
    "selective_scan": 0.35,
    "fbank": 0.1,
    "rms_norm": 0.05,
}  # of the benchmark's time
TRAINING = {
    "data": "synth", "model": "ast", "size": "tiny", "depth": 4, "augment": "specmask", "time_stride": 4,
    "epochs": 3, "batch_size": 32, "synth_train": 2000, "fused": True, "warmup_epochs": 0.5,
}  # fmt: skip
REHEARSED = {"synth_train": 40, "synth_validation": 20, "synth_test": 20, "depth": 1, "epochs": 1, "batch_size": 8}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 1 when something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything together (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder of the lines")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with few rows and small sizes")
    wanted = parser.parse_args(arguments)
    if not wanted.rehearse and not torch.cuda.is_available():
        print("error: this machine has no GPU that torch can use: --rehearse runs the same on a CPU.", file=sys.stderr)
        return 2
    ends = time.monotonic() + 60 * wanted.minutes
    with tempfile.TemporaryDirectory() as folder:
        environment = environment_with_wheels(Path(folder))
        faults = test(environment, wanted.rehearse, min(TESTS_SECONDS, 20 * wanted.minutes))
        faults += benchmark(environment, wanted, ends - 60)
        faults += train(environment, wanted, Path(folder) / "run", ends)
    print(f"{len(faults)} of the stages had something wrong{': ' if faults else ''}{'; '.join(faults)}")
    return 1 if faults else 0


def environment_with_wheels(folder: Path) -> dict[str, str]:
    """The environment of the stages; packages of .wheels/ are importable in it."""
    path = [str(ROOT)]
    for wheel in sorted((ROOT / ".wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder / "site")
        path[1:] = [str(folder / "site")]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "TRITON_DEFAULT_FP_FUSION": "1"}


def test(environment: dict[str, str], rehearse: bool, seconds: float) -> list[str]:
    """All test files at once, for so many seconds at most. Returns what failed or was not finished."""
    if rehearse:
        files = [TESTS[4]]
    else:
        files = [each for each in TESTS if (ROOT / "tests" / each.split()[0]).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *([] if rehearse else ["--gpu"])]
    with contextlib.ExitStack() as stack:
        started, running, faults = time.monotonic(), [], []
        for group in files:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [*command, *(f"tests/{name}" for name in group.split())], cwd=ROOT,
                env=environment | {"OMP_NUM_THREADS": "2"}, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            running.append((group, process, log))
        for group, process, log in running:
            code = _ended(process, started + seconds)
            log.seek(0)
            text = log.read().strip() or "nothing was printed"
            last = "not finished in time" if code is None else text.splitlines()[-1]
            print(f"tests {group}: {last}", flush=True)
            if code != 0:
                faults.append(f"tests {group}")
                print(text[-3000:], flush=True)
    return faults


def _ended(process, deadline):
    """The exit code; None for a process that had to be killed at the deadline, with all that it had started."""
    try:
        return process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def benchmark(environment: dict[str, str], wanted: argparse.Namespace, ends: float) -> list[str]:
    """Every part for its share of the time that is left. Returns the parts with wrong rows."""
    faults, shares = [], dict(SHARES)
    for part in SHARES:
        left = ends - time.monotonic()
        seconds = left * shares[part] / sum(shares.values())
        shares.pop(part)
        flags = ["--only", part, "--seconds", f"{max(0.0, seconds):.0f}", "--missing", "--results", str(wanted.results)]
        flags += ["--device", "cpu", "--first", "1"] if wanted.rehearse else ["--device", "cuda"]
        command = [sys.executable, "-W", "ignore", "-m", "bench.run", *flags]
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment, timeout=max(5.0, seconds + 60)).returncode
        except subprocess.TimeoutExpired:
            code = None
        if code != 0:
            faults.append(f"{part} ({'cut off in a row' if code is None else 'wrong rows'})")
    return faults


TRAIN = """
import json, sys
from dataclasses import replace
from pathlib import Path
from train import run
from train.settings import Settings
out = Path(sys.argv[1])
run.run(replace(Settings(**json.loads(sys.argv[2])), out=str(out)), out)
"""


def train(environment: dict[str, str], wanted: argparse.Namespace, out: Path, ends: float) -> list[str]:
    """A short real run, its figures appended to train.jsonl."""
    values = TRAINING | {"device": "cuda"}
    if wanted.rehearse:
        values |= REHEARSED | {"device": "cpu"}
    command = [sys.executable, "-c", TRAIN, str(out), json.dumps(values)]
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=max(30.0, ends - time.monotonic())).returncode
    except subprocess.TimeoutExpired:
        code = None
    if code != 0:
        return ["the training run"]
    measure.append(collect.line_of(out), wanted.results)
    return []


if __name__ == "__main__":
    sys.exit(main())
