"""What the commands share: flags from a dataclass, one sentence for a word that is none of them, closed pipes."""

import contextlib
import difflib
import io
import os
import re
import select
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from fftp.errors import UserError


def parse(target: Callable, arguments: list[str], prog: str, options: type, config: tuple = ()) -> Any:
    """tyro's reading of the arguments. `--help` prints the flags and ends the program.

    options: the dataclass whose fields are the flags, for naming the nearest. Raises UserError for what cannot be understood.
    """
    import tyro

    helped = any(word in ("-h", "--help") for word in arguments)
    try:
        # A value of the wrong type is reported past console_outputs, on stderr.
        with contextlib.redirect_stderr(sys.stderr if helped else io.StringIO()):
            return tyro.cli(target, args=arguments, prog=prog, config=config, console_outputs=helped)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    known = [f"--{field.name.replace('_', '-')}" for field in fields(options)]
    for word in (word.partition("=")[0] for word in arguments):
        plain = re.sub("^--no-", "--", word)
        if word.startswith("--") and plain not in known:
            close = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"`{prog} --help` lists what there is."
            raise UserError(f"{prog} has no flag {word!r}: {hint}")
    given = " ".join(arguments)
    raise UserError(f"{prog} cannot make sense of {given!r}: `{prog} --help` shows what it takes.")


def reader_gone() -> bool:
    """Whether a BrokenPipeError was of our output, not of another process's."""
    if not hasattr(select, "poll"):
        return True
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in output.poll(0))


def closed_pipe() -> int:
    """The exit code when whoever read our output went away (`| head`); output that is left goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
