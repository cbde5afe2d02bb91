"""python -m bench.gpu [--minutes N] [--rehearse]: everything that only a GPU can show, in one call of a few minutes.

First the tests that have GPU cases, each file a process of its own, and beside them processes that call every row of the
benchmark once, so that many kernels compile at the same time; then the benchmark's parts by worth; then a short training
run with every fused backend. Each figure is on disk as soon as it is measured: a call that is cut off loses nothing, and
a second one goes on with the test files, rows and run that are missing. Installs nothing: a folder .wheels/ beside the
project is unpacked into a temporary one and put on the path. --rehearse: the same on a CPU, small.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

from bench import measure
from bench.parts import PARTS
from train import lines

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.5
TESTS_SECONDS = 180
TESTS_SHARE = 0.5  # of a shorter call
TRAINING_SECONDS = 60  # kept for the training run
SAID = 12_000  # characters of a failed file's report
GRACE = 20.0  # seconds that a part may overrun with the row it is in
REHEARSED_TESTS = ("test_philox.py", "test_draws.py")
TRAINING = {
    "data": "synth", "model": "ast", "size": "tiny", "depth": 4, "augment": "specmask", "time_stride": 4,
    "epochs": 3, "batch_size": 32, "synth_train": 2000, "fused": True, "warmup_epochs": 0.5,
}  # fmt: skip
REHEARSED = {"synth_train": 40, "synth_validation": 20, "synth_test": 20, "depth": 1, "epochs": 1, "batch_size": 8}
# train.run without its command line, and without the library that reads that.
TRAIN = """
import json, sys
from dataclasses import replace
from pathlib import Path
from train import run
from train.settings import Settings
out = Path(sys.argv[1])
run.run(replace(Settings(**json.loads(sys.argv[2])), out=str(out)), out)
"""


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
        faults = test(environment, wanted, min(TESTS_SECONDS, 60 * TESTS_SHARE * wanted.minutes))
        faults += benchmark(environment, wanted, ends - TRAINING_SECONDS)
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


def test_files() -> list[str]:
    """Names of the test files that have cases for a GPU: those that ask for the device, or for --gpu."""
    asks = re.compile(r"def \w+\([^)]*\bdevice\b|run_cases\(|getoption\(\"--gpu\"\)")
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [path.name for path in files if asks.search(path.read_text())]


def test(environment: dict[str, str], wanted: argparse.Namespace, seconds: float) -> list[str]:
    """All test files at once and, beside them, what compiles the benchmark's kernels, for so many seconds at most.

    Returns the files that failed or were not finished. Those that passed have a line, and are not run again.
    """
    about = measure.about("cpu" if wanted.rehearse else "cuda")
    passed = {line["case"]["file"] for line in measure.lines("gpu_tests", wanted.results) if _same(line, about)}
    files = [name for name in (REHEARSED_TESTS if wanted.rehearse else test_files()) if name not in passed]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *([] if wanted.rehearse else ["--gpu"])]
    with contextlib.ExitStack() as stack:
        started, faults = time.monotonic(), []
        commands = {f"tests {name}": [*tests, f"tests/{name}"] for name in files} | _ahead(wanted.rehearse)
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        begun = [_begun(command, environment, log) for command, log in zip(commands.values(), logs, strict=True)]
        for name, process, log in zip(commands, begun, logs, strict=True):
            code = _ended(process, started + seconds)
            text = _text(log)
            last = "not finished in time" if code is None else text.splitlines()[-1]
            print(f"{name}: {last}", flush=True)
            if not name.startswith("tests "):
                continue
            if code == 0:
                line = {"part": "gpu_tests", "case": {"file": name.removeprefix("tests ")}, "said": last}
                measure.append(line | about, wanted.results)
                continue
            faults.append(name)
            print(text[-SAID:], flush=True)
    return faults


def _same(line, about):
    return all(line[name] == about[name] for name in ("machine", "commit"))


def _ahead(rehearse):
    """Commands, by name, that call rows of the benchmark once: many processes in all."""
    slices = [(name, i, part.ahead) for name, part in PARTS.items() for i in range(part.ahead)]
    if rehearse:
        slices = [("spec_mask", 0, 1)]
    command = [sys.executable, "-W", "ignore", "-m", "bench.ahead"]
    where = "cpu" if rehearse else "cuda"
    return {f"compiled ahead, {name} {i}/{of}": [*command, name, where, f"{i}/{of}"] for name, i, of in slices}


def _begun(command, environment, log):
    few = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment | few, stdout=log, stderr=log, start_new_session=True)


def _text(log):
    log.seek(0)
    return log.read().strip() or "nothing was printed"


def _ended(process, deadline):
    """The exit code; None for a process that had to be killed at the deadline, with all that it had started."""
    try:
        return process.wait(max(0.05, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def benchmark(environment: dict[str, str], wanted: argparse.Namespace, ends: float) -> list[str]:
    """Every part for its share of the time that is left. Returns the parts with wrong rows.

    The next part's process starts beside the running one, and waits to be told its seconds.
    """
    faults, shares = [], {name: part.gpu_share for name, part in PARTS.items()}
    coming = _waiting(next(iter(shares)), environment, wanted)
    for part in PARTS:
        process = coming
        seconds = max(0.0, (ends - time.monotonic()) * shares[part] / sum(shares.values()))
        shares.pop(part)
        with contextlib.suppress(BrokenPipeError):  # it ended already, and its exit code says so
            process.stdin.write(f"{seconds:.0f}\n".encode())
            process.stdin.close()
        coming = _waiting(next(iter(shares)), environment, wanted) if shares else None
        code = _ended(process, time.monotonic() + seconds + (600 if wanted.rehearse else GRACE))
        if code != 0:
            faults.append(f"{part} ({'cut off in a row' if code is None else 'wrong rows'})")
    return faults


def _waiting(part, environment, wanted):
    flags = ["--only", part, "--told", "--missing", "--results", str(wanted.results)]
    flags += ["--device", "cpu", "--first", "1"] if wanted.rehearse else ["--device", "cuda"]
    command = [sys.executable, "-W", "ignore", "-m", "bench.run", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, start_new_session=True)


def train(environment: dict[str, str], wanted: argparse.Namespace, out: Path, ends: float) -> list[str]:
    """A short real run, its figures appended to train.jsonl; not again where these are there."""
    values = TRAINING | {"device": "cuda"}
    if wanted.rehearse:
        values |= REHEARSED | {"device": "cpu"}
    about = measure.about(values["device"])
    case = {name: values[name] for name in lines.CASE if name in values}
    if any(
        _same(line, about) and case.items() <= line["case"].items() for line in measure.lines("train", wanted.results)
    ):
        return []
    command = [sys.executable, "-c", TRAIN, str(out), json.dumps(values)]
    try:
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=max(30.0, ends - time.monotonic())).returncode
    except subprocess.TimeoutExpired:
        code = None
    if code != 0:
        return ["the training run"]
    measure.append(lines.line_of(out), wanted.results)
    return []


if __name__ == "__main__":
    sys.exit(main())
