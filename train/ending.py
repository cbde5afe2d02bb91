"""How `python -m train.run` ends: an exit code, and one sentence for everything but success and our own mistakes."""

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from fftp import checkpoint, command
from fftp.errors import UserError
from kernels.dispatch import BackendError
from train import parallel

MENDABLE, LOST, INTERRUPTED, TERMINATED = 2, 1, 130, 143  # exit codes; the last two are a shell's 128 + signal
GRACE = 5.0  # seconds that the main thread has to hear of a SIGTERM


class Terminated(BaseException):
    """SIGTERM came: from `kill PID`, or from torchrun when another process of the run has ended."""


@contextlib.contextmanager
def terminable(out: Callable[[], Path | None]) -> Iterator[None]:
    """In here, the first SIGTERM raises Terminated in the main thread, and later ones do not disturb what follows.

    A main thread that waits for a GPU or for another process does not hear anything: after GRACE seconds a second
    thread says the sentence in its place and ends the process. out: the run's folder, as `told` takes it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals can only be heard there
        return
    raised = threading.Event()

    def heard(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raised.set()
        raise Terminated

    def watch():
        while number := os.read(arrivals, 1):
            if number[0] == signal.SIGTERM and not raised.wait(GRACE):
                code = told(Terminated(), out())
                sys.stderr.flush()
                os._exit(code)

    arrivals, sender = os.pipe()
    os.set_blocking(sender, False)
    watcher = threading.Thread(target=watch, name="sigterm", daemon=True)
    watcher.start()
    before = signal.signal(signal.SIGTERM, heard)
    previous = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        os.close(sender)  # ends the watcher
        watcher.join()
        os.close(arrivals)


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
    elif isinstance(error, BrokenPipeError) and command.reader_gone():
        quiet = command.closed_pipe()
        if out is None:  # --help | head
            return quiet
        code, sentence = LOST, f"error: nobody reads this run's output any more, so it ends: {then}."
    elif isinstance(error, KeyboardInterrupt):
        code, sentence = INTERRUPTED, f"\ninterrupted: {then}."
    elif isinstance(error, Terminated):
        code, sentence = TERMINATED, f"\nterminated (SIGTERM): {then}."
    elif parallel.lost(error):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        sentence = (
            f"\nerror: another process of this run ended or cannot be reached ({reason}), so this one ends too: {then}."
        )
        code = LOST
    else:
        raise error
    if parallel.asked()[0] == 0 or code in (TERMINATED, LOST):
        print(sentence, file=sys.stderr)
    return code
