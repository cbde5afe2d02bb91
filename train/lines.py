"""What is kept of a finished run, as a line of JSON: its case, figures, time, and what it ran on."""

import json
from datetime import UTC, datetime
from pathlib import Path

from train.settings import FREE_ON_RESUME, Settings, read_recipe, to_dict

CASE = (
    "data",
    "model",
    "size",
    "depth",
    "patch",
    "patch_time",
    "time_stride",
    "augment",
    "epochs",
    "max_steps",
    "batch_size",
    "csv",
    "test_fold",
    "fused",
    "seed",
)


def line_of(out: Path) -> dict:
    """The line of the run in `out`.

    Raises ValueError for a folder without a finished run.
    """
    try:
        result = json.loads((out / "result.json").read_text())
        about = json.loads((out / "settings.json").read_text())
        history = history_of(out)
    except FileNotFoundError as error:
        raise ValueError(f"{out} holds no finished run: {error.filename} is missing.") from None
    return {
        "part": "train",
        "case": {name: result["settings"][name] for name in CASE},
        "recipe": result["settings"]["recipe"],
        "changed": changed(result["settings"]),
        "metrics": result["metrics"],
        "validation": result["validation"],
        "loss": {"first": history[0]["first_loss"], "last": history[-1]["last_loss"]},
        "seconds": result["seconds"],
        "samples_per_second": result["samples_per_second"],
        "step_ms": result["step_ms"],
        "seconds_to": result["seconds_to"],
        "parameters": result["parameters"],
        "macs": result["macs"],
        "clips": result["clips"],
        "backends": result["backends"],
        "precision": result["precision"],
        "machine": result["machine"],
        "software": about["versions"],
        "commit": result["commit"],
        "date": datetime.now(UTC).date().isoformat(),
    }


def changed(settings: dict) -> dict:
    """The settings of a run that are neither its recipe's nor of the case above, nor of where and how fast it ran."""
    recipe = read_recipe(settings["recipe"], settings["data"])
    plain = {name: recipe.get(name, value) for name, value in to_dict(Settings()).items()}
    apart = {*CASE, *FREE_ON_RESUME, "recipe", "precision", "skip_bad_files", "log_every", "deterministic"}
    there = [name for name in plain if name in settings]  # a run from before there was such a flag went without
    return {name: settings[name] for name in there if name not in apart and settings[name] != plain[name]}


def curve_of(out: Path) -> list[dict]:
    """What a run's learning curve is drawn from: each epoch's loss, validation figures, and seconds so far."""
    kept = ("epoch", "train_loss", "seconds")
    return [
        {name: value for name, value in line.items() if name in kept or name.startswith("validation_")}
        for line in history_of(out)
    ]


def history_of(out: Path) -> list[dict]:
    """A run's epochs, as metrics.jsonl has them."""
    return [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
