"""The out folder of a run, as `python -m train.run` leaves it: settings.json, metrics.jsonl, result.json."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fftp.errors import UserError

FIGURES = {  # name in the files -> as it is called
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "map": "mAP",
    "auc": "AUC",
}

MASKS = {"specmask": "SpecMask", "specaugment": "SpecAugment", "none": "no masks"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, finished or not.

    defaults: each setting's own value, where the run wrote them down. history: a line an epoch. result: what result.json
    holds, None before the run has ended.
    """

    folder: Path
    settings: dict[str, Any]
    defaults: dict[str, Any]
    classes: tuple[str, ...]
    clips: dict[str, int]
    versions: dict[str, str]
    commit: str | None
    machine: str
    backends: dict[str, str]
    history: list[dict[str, Any]]
    result: dict[str, Any] | None

    @property
    def key(self) -> str:
        """The figure that chooses the epoch."""
        several = self.result and "map" in self.result["metrics"]
        return "map" if several or any("validation_map" in line for line in self.history) else "accuracy"


def read(folder: Path) -> Run:
    """Raises UserError for a folder without a run, and for files that are damaged."""
    about = _json(folder / "settings.json")
    if about is None:
        raise UserError(f"{folder} holds no run (no settings.json): give the --out folder of one.")
    with _understood(folder / "settings.json"):
        resolved = about["resolved"]
        known = {
            "settings": dict(about["settings"]),
            "defaults": dict(about.get("defaults", {})),
            "classes": tuple(map(str, resolved["classes"])),
            "clips": {name: int(n) for name, n in resolved["clips"].items()},
            "versions": dict(about["versions"]),
            "commit": about["commit"],
            "machine": str(about["machine"]),
            "backends": dict(about["backends"]),
        }
        s = known["settings"]
        if not {"model", "size", "data", "depth"} <= set(s) or s["augment"] not in MASKS:
            raise ValueError("not the settings of a run")
        s |= {name: int(s[name]) for name in ("seed", "epochs")}
    return Run(
        folder=folder, history=_history(folder / "metrics.jsonl"), result=_result(folder / "result.json"), **known
    )


@contextlib.contextmanager
def _understood(path):
    """What is wrong in here is the file's fault."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged or of another version: take another copy of the run.") from error


def _text(path):
    try:
        return path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a folder that can.") from None


def _json(path):
    with _understood(path):
        written = _text(path)
        held = None if written is None else json.loads(written)
        if held is not None and not isinstance(held, dict):
            raise ValueError("not an object")
        return held


def _history(path):
    with _understood(path):
        lines = [json.loads(line) for line in (_text(path) or "").splitlines()]
        for line in lines:
            line["epoch"], line["train_loss"], line["seconds"] = (
                int(line["epoch"]),
                float(line["train_loss"]),
                float(line["seconds"]),
            )
            line["losses"] = {int(step): float(loss) for step, loss in line.get("losses", {}).items()}
            line["step"] = int(line["step"])
            for name in line:
                if name.startswith("validation_"):
                    line[name] = float(line[name])
        return lines


def _result(path):
    result = _json(path)
    if result is None:
        return None
    with _understood(path):
        figures = {split: {k: float(v) for k, v in result[split].items()} for split in ("metrics", "validation")}
        numbers = {name: float(result[name]) for name in ("seconds", "samples_per_second", "parameters")}
        kept = {"reported_epoch": int(result["reported_epoch"]), "macs": float(result["macs"]["all"])}
        return (
            result
            | figures
            | numbers
            | kept
            | {"precision": str(result["precision"]), "machine": str(result["machine"])}
        )
