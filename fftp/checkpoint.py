"""Checkpoints: a folder of model.safetensors and config.json. Loading one runs no code.

config.json: {"format", "model": "ast" | "aum", "architecture": the model's configuration, "grid", "front_end",
"labels": [...], "multi_label", "settings": of the run that trained it, "version"}, "model_type" for transformers
(`fftp.transformers_model`), and "metrics" where `save_pretrained` knew them.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fftp import __version__
from fftp.ast_model import AST, ASTConfig
from fftp.aum_model import AuM, AuMConfig
from fftp.errors import UserError
from fftp.frontend import FrontEndSettings
from fftp.patching import PatchGrid
from kernels import FbankSettings

FORMAT = "fftp-1"
MODELS = {"ast": (AST, ASTConfig), "aum": (AuM, AuMConfig)}


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a model needs besides its weights, and where it came from; metrics are of its run's test split, if known."""

    model: ASTConfig | AuMConfig
    front_end: FrontEndSettings
    labels: tuple[str, ...]
    multi_label: bool
    settings: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        architecture = asdict(self.model)
        grid = architecture.pop("grid")
        return {
            "format": FORMAT,
            "version": __version__,
            "model_type": "fftp",
            "model": "ast" if isinstance(self.model, ASTConfig) else "aum",
            "architecture": architecture,
            "grid": grid,
            "front_end": asdict(self.front_end),
            "labels": list(self.labels),
            "multi_label": self.multi_label,
            "settings": self.settings,
            **({"metrics": self.metrics} if self.metrics else {}),
        }

    @classmethod
    def from_json(cls, written: dict[str, Any]) -> "CheckpointConfig":
        config_class = MODELS[written["model"]][1]
        front_end = dict(written["front_end"])
        front_end["fbank"] = FbankSettings(**front_end["fbank"])
        return cls(
            model=config_class(grid=PatchGrid(**written["grid"]), **written["architecture"]),
            front_end=FrontEndSettings(**front_end),
            labels=tuple(written["labels"]),
            multi_label=bool(written["multi_label"]),
            settings=written["settings"],
            metrics=dict(written.get("metrics", {})),
        )

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[B, C]` to what the loss trained them for: sigmoids for several labels or BCE, else softmax."""
        sigmoid = self.multi_label or self.settings.get("loss") == "bce"
        return logits.float().sigmoid() if sigmoid else logits.float().softmax(-1)

    def build(self) -> AST | AuM:
        """A freshly initialised model."""
        model_class = AST if isinstance(self.model, ASTConfig) else AuM
        return model_class(self.model)


def save(folder: Path, model: torch.nn.Module, config: CheckpointConfig) -> None:
    """Write model.safetensors and config.json into an existing folder."""
    write(folder / "model.safetensors", pack_tensors(model.state_dict()))
    write(folder / "config.json", json.dumps(config.to_json(), indent=1).encode())


def find(path: Path | str) -> Path:
    """The checkpoint folder that a path stands for: itself, or an out folder's best/, or its last/.

    Raises UserError when there is none.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no checkpoint at {path}: give a checkpoint folder or the --out folder of a run.")
    recover(path / "best")
    recover(path / "last")
    # A run whose data has no validation list reports its last epoch: its best/ is never written.
    for folder in (path, path / "best", path / "last"):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path} is not a checkpoint of this library: a checkpoint is a folder with config.json in it.")


def read_config(folder: Path) -> CheckpointConfig:
    """config.json, read and understood. Raises UserError."""
    path = folder / "config.json"
    try:
        written = json.loads(path.read_text())
        if not isinstance(written, dict) or written.get("format") != FORMAT:
            raise UserError(f"{path} is not of a checkpoint of this library (format {FORMAT!r} is wanted).")
        return CheckpointConfig.from_json(written)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged or of another version: take another copy of the checkpoint.") from error


def load(path: Path | str) -> tuple[AST | AuM, CheckpointConfig]:
    """The model with its weights, in evaluation mode on the CPU, and its configuration. Raises UserError."""
    folder = find(path)
    config = read_config(folder)
    model = config.build()
    load_weights(model, folder / "model.safetensors")
    return model.eval(), config


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Fill the model from a file of tensors. Raises UserError when it is damaged or another model's."""
    state = read_tensors(path)
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in state or state[name].shape != tensor.shape:
            held = f"holds it as {tuple(state[name].shape)}" if name in state else "does not hold it"
            raise UserError(
                f"{path} is of another model: the configuration beside it wants {name} as {tuple(tensor.shape)}, "
                f"the file {held}."
            )
    model.load_state_dict({name: state[name] for name in wanted})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file. Raises UserError when it is missing or damaged."""
    try:
        return load_tensors(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint is not whole, take another copy.") from None
    except SafetensorError as error:
        raise UserError(
            f"{path} is truncated or not a safetensors file: take another copy of the checkpoint."
        ) from error


def pack_tensors(tensors: dict[str, torch.Tensor]) -> bytes:
    return save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def write(path: Path, content: bytes) -> None:
    """Write a file through to the disk."""
    with open(path, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill, finds the old one or the new one and nothing between."""
    beside = path.with_name(path.name + ".new")
    try:
        write(beside, content)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the old one's name when the block ends without an error.

    At every moment either `folder` or `folder.old` is whole; `recover` puts the latter back after a kill between.
    """
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        recover(folder)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Undo half a replacement: where only `folder.old` is left, it is `folder` again."""
    old = folder.with_name(folder.name + ".old")
    if old.is_dir() and not folder.exists():
        # On a read-only disk, or when another process was first, there is nothing to mend.
        with contextlib.suppress(OSError):
            old.rename(folder)


def disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
