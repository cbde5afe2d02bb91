"""How `python -m train.run` ends: an exit code, and one sentence for everything but success and our own mistakes."""

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from fftp import checkpoint
from fftp.errors import UserError
from kernels.dispatch import BackendError
from train import parallel

MENDABLE, LOST, INTERRUPTED, TERMINATED = 2, 1, 130, 143  # exit codes; the last two are a shell's 128 + signal


class Terminated(BaseException):
    """SIGTERM came: from `kill PID`, or from torchrun when another process of the run has ended."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """In here, the first SIGTERM raises Terminated in the main thread, and later ones do not disturb what follows."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals can only be heard there
        return

    def heard(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, heard)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def begun(out: Path | None) -> bool:
    """Whether there is a run to go on with."""
    return out is not None and (out / "settings.json").exists()


def go_on(out: Path) -> str:
    """The command that goes on with a run, with as many processes as it has."""
    processes = parallel.asked()[1]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    several = f"torchrun --nproc-per-node {here}" + (" ..." if here != processes else "")
    return f"{several if processes > 1 else 'python'} -m train.run --resume --out {shlex.quote(str(out))}"


def told(error: BaseException, out: Path | None) -> int:
    """Say how a run ended, and return the exit code. Raises the error where it is a mistake of ours.

    What all processes agree on is said by the first alone.
    """
    then = f"go on with `{go_on(out)}`" if begun(out) else "nothing had been written yet"
    if isinstance(error, UserError | BackendError):
        code, sentence = MENDABLE, f"error: {error}"
    elif isinstance(error, OSError) and checkpoint.disk_full(error):
        again = f"`{go_on(out)}`" if begun(out) else "run this command again"
        code, sentence = MENDABLE, f"error: The disk of {out or '.'} is full: make room, then {again}."
    elif isinstance(error, KeyboardInterrupt):
        code, sentence = INTERRUPTED, f"\ninterrupted: {then}."
    elif isinstance(error, Terminated):
        code, sentence = TERMINATED, f"\nterminated (SIGTERM): {then}."
    elif parallel.lost(error):
        code, sentence = LOST, f"\nerror: another process of this run ended, so this one ends too: {then}."
    else:
        raise error
    if parallel.asked()[0] == 0 or code in (TERMINATED, LOST):
        print(sentence, file=sys.stderr)
    return code
