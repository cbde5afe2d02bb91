"""What a run begins from: another checkpoint's weights, fitted to the run's own model (`--init`)."""

import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from fftp import ast_model, aum_model, checkpoint, fitting
from fftp.errors import UserError

Config = ast_model.ASTConfig | aum_model.AuMConfig
_NAMES = {ast_model.ASTConfig: "AST", aum_model.AuMConfig: "AuM"}
# May differ: positions and kernels are resized, the head is replaced, and the eps of the norms is the checkpoint's.
_FITTED = ("grid", "classes", "eps")


def check(path: str, asked: Config) -> None:
    """Raises UserError where there is no checkpoint at path, and where its model is of another make than the one asked for."""
    folder = checkpoint.find(path)
    held = checkpoint.read_config(folder).model
    if _make(held) == _make(asked):
        return
    cure = _flags(held, asked)
    cure = f"give {cure}" if cure else "give another checkpoint: no flags lead to this model"
    raise UserError(f"--init {path} holds {_described(held)}, and this run would train {_described(asked)}: {cure}.")


def about(path: str, asked: Config, labels: tuple[str, ...]) -> dict[str, Any]:
    """What settings.json and result.json say of the beginning: the folder, a digest of its weights, what is changed in them.

    Raises UserError as `check` does.
    """
    check(path, asked)
    folder = checkpoint.find(path)
    config = checkpoint.read_config(folder)
    return {
        "checkpoint": path,
        "digest": _digest(folder),
        "eps": getattr(config.model, "eps", None),
        "changes": fitting.changes(config.model, asked, config.labels == labels),
        "cost": fitting.cost(config.model.grid, asked.grid),
    }


def adopted(asked: Config, begun: dict[str, Any]) -> Config:
    """The run's model with what it takes over from the checkpoint besides weights: the eps of its norms."""
    return asked if begun["eps"] is None else replace(asked, eps=begun["eps"])


def fill(network: torch.nn.Module, path: str, labels: tuple[str, ...], begun: dict[str, Any], out: Path) -> None:
    """Fill a freshly initialised network with the checkpoint's weights, unless the run in out goes on from weights of its own.

    Raises UserError when the checkpoint is not the one that the run began from any more.
    """
    if any((out / name).is_dir() for name in ("last", "last.old")):
        return
    folder = checkpoint.find(path)
    if _digest(folder) != begun["digest"]:
        raise UserError(f"--init {path} holds other weights than when the run began: restore them, or start anew.")
    with torch.random.fork_rng(devices=[]):
        source, config = checkpoint.load(folder)
    fitting.fit(source, network, config.labels == labels)


def line(begun: dict[str, Any]) -> str:
    """One of the first lines of a run."""
    cost = f"\nwarning: {begun['cost']}" if begun["cost"] else ""
    return f"begins from {begun['checkpoint']}: {'; '.join(begun['changes']) or 'weights as they are'}{cost}"


def _make(config):
    """What two models have to agree in."""
    return type(config), *(getattr(config, field.name) for field in fields(config) if field.name not in _FITTED)


def _described(c):
    shared = f"{_NAMES[type(c)]} of {c.depth} layers, {c.dim} wide, positions {c.positions}"
    if isinstance(c, ast_model.ASTConfig):
        return f"an {shared}, {c.heads} heads, class tokens: {c.tokens}"
    return f"an {shared}, {c.state} states, directions {c.directions}, class token {c.place}"


def _flags(held, asked):
    """The flags that would make the run's model the checkpoint's, or "" where none do."""
    ast = isinstance(held, ast_model.ASTConfig)
    sizes = ast_model.SIZES if ast else aum_model.SIZES
    size = next(
        (n for n, s in sizes.items() if s["dim"] == held.dim and s.get("heads") == getattr(held, "heads", None)), ""
    )
    if not size or (not ast and held.state != aum_model.AuMConfig.state):
        return ""
    wanted = {"--model": "ast" if ast else "aum", "--size": size}
    wanted["--depth"] = str(held.depth) if held.depth != sizes[size]["depth"] else "0"
    names = ("tokens", "positions") if ast else ("directions", "place", "positions")
    wanted |= {f"--{name}": str(getattr(held, name)) for name in names}
    if type(held) is type(asked):
        same = {"--model": True, "--size": held.dim == asked.dim, "--depth": held.depth == asked.depth}
        same |= {f"--{name}": getattr(held, name) == getattr(asked, name) for name in names}
        wanted = {flag: value for flag, value in wanted.items() if not same[flag]}
    return " ".join(f"{flag} {value}" for flag, value in wanted.items())


def _digest(folder):
    try:
        with open(folder / "model.safetensors", "rb") as handle:
            return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        raise UserError(
            f"{folder / 'model.safetensors'} is missing: the checkpoint is not whole, take another."
        ) from None
