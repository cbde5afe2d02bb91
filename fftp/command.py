"""What the commands share: flags from a dataclass, one sentence for a word that is none of them, closed pipes."""

import contextlib
import difflib
import io
import os
import re
import select
import sys
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any

from fftp.errors import UserError


def parse(target: Callable, arguments: list[str], prog: str, options: type, takes: tuple[str, ...] = ()) -> Any:
    """tyro's reading of the arguments. `--help` prints the flags and ends the program.

    options: the dataclass whose fields are the flags. takes: what the words are that belong to no flag, in their order and
    anywhere among the flags; those in brackets may be left out. Raises UserError for what cannot be understood.
    """
    import tyro

    words = list(arguments)
    helped = any(word in ("-h", "--help") for word in words)
    if not helped:
        _check_flags(words, prog, options)
        if takes:
            words = _apart(words, prog, options, takes)
    try:
        # A value of the wrong type is reported past console_outputs, on stderr.
        with contextlib.redirect_stderr(sys.stderr if helped else io.StringIO()):
            return tyro.cli(target, args=words, prog=prog, console_outputs=helped)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    given = " ".join(map(str, arguments))
    raise UserError(f"{prog} cannot make sense of {given!r}: `{prog} --help` shows what it takes.")


def flat(options: type) -> Any:
    """The type of a command's argument whose fields are its flags, without a name or a group of its own."""
    import tyro

    return Annotated[options, tyro.conf.arg(name="", help="")]


def positional(kind: Any, name: str) -> Any:
    """The type of an argument without a flag, by what `--help` calls it."""
    import tyro

    return tyro.conf.Positional[Annotated[kind, tyro.conf.arg(metavar=name)]]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_flags(words: list[str], prog: str, options: type) -> None:
    """Raises UserError for a flag that there is not, naming the nearest, and for one that has to be given and is not."""
    known = [_flag(field.name) for field in fields(options)]
    named = [word.partition("=")[0] for word in words if word.startswith("--")]
    for word in named:
        if re.sub("^--no-", "--", word) not in known and word not in known:
            close = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"`{prog} --help` lists what there is."
            raise UserError(f"{prog} has no flag {word!r}: {hint}")
    for field in fields(options):
        if field.default is MISSING and field.default_factory is MISSING and _flag(field.name) not in named:
            raise UserError(f"{prog} needs {_flag(field.name)}: `{prog} --help` shows what it takes.")


def _apart(words: list[str], prog: str, options: type, takes: tuple[str, ...]) -> list[str]:
    """The words that belong to no flag, and behind them the flags with their values. Raises UserError where some lack."""
    hints = typing.get_type_hints(options)
    switches = {_flag(name) for name, hint in hints.items() if hint is bool}
    switches |= {f"--no-{name[2:]}" for name in switches}
    alone, flags, i = [], [], 0
    while i < len(words):
        taken = 1
        if words[i].startswith("--"):
            taken = 1 if "=" in words[i] or words[i] in switches else 2
            flags += words[i : i + taken]
        else:
            alone.append(words[i])
        i += taken
    if lacking := [name for name in takes if not name.startswith("[")][len(alone) :]:
        raise UserError(
            f"{prog} needs {' and '.join(lacking)}: {prog} {' '.join(takes)}; `{prog} --help` shows its flags."
        )
    return alone + flags


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
