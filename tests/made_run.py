"""A run's out folder as train.run leaves it, without training: for tests of what reads one."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from fftp import checkpoint, scores
from fftp.ast_model import ASTConfig
from fftp.aum_model import AuMConfig
from fftp.frontend import FrontEndSettings
from fftp.patching import PatchGrid
from fftp.scores import Scores
from kernels import FbankSettings
from tests.made_data import RATE
from train import metrics, scored
from train.settings import Settings

CLASSES = ("low", "middle", "high")


def make(
    folder: Path,
    *,
    classes: tuple[str, ...] = CLASSES,
    n: int = 12,
    seconds: float = 0.5,
    multi_label: bool = False,
    model: str = "ast",
    names: tuple[str, ...] | None = None,
    kept: bool = True,
    epochs: int = 3,
    **changed,
) -> Scores:
    """A finished run of n test clips of noise in turn of each class; returns its scores. changed: settings."""
    rng = np.random.default_rng(0)
    settings = Settings(model=model, frames=round(100 * seconds), epochs=epochs, depth=2, out=str(folder), **changed)
    C, W = len(classes), round(RATE * seconds)
    targets = np.eye(C, dtype=np.float32)[np.arange(n) % C]
    if multi_label:
        targets = np.maximum(targets, rng.random((n, C)) < 0.3).astype(np.float32)
    p = rng.random((n, C)).astype(np.float32) + 0.5 * targets
    p = p / 2 if multi_label else p / p.sum(1, keepdims=True)
    figures = metrics.multi_label(p, targets) if multi_label else metrics.single_label(p, targets)
    held = Scores(
        split="test", multi_label=multi_label, figures={"loss": 1.0, **figures}, pack="",
        spread=metrics.spread(p, targets, multi_label), names=names or tuple(f"test/{i}" for i in range(n)),
        per_class=(metrics.average_precisions if multi_label else metrics.confusion)(p, targets),
        probabilities=p, targets=targets.astype(np.uint8), losses=scored.losses_of(p, targets, multi_label),
        start=np.arange(n) * W, length=np.full(n, W), kept=np.arange(n if kept else 0),
        samples=rng.integers(-9000, 9000, n * W if kept else 0, dtype=np.int16),
    )  # fmt: skip
    folder.mkdir(parents=True)
    scores.write(folder, held)
    _files(folder, settings, classes, held)
    _weights(folder, settings, classes, multi_label, W)
    return held


def _files(folder, settings, classes, held):
    counts = {"train": 60, "validation": 20, "test": len(held.names)}
    key = "map" if held.multi_label else "accuracy"
    about = {
        "settings": asdict(settings), "resolved": {"classes": list(classes), "clips": counts}, "defaults": asdict(Settings()),
        "versions": {"python": "3.12", "torch": "2.13"}, "commit": "0123456789ab", "machine": "a machine",
        "backends": {"fbank": "reference"},
    }  # fmt: skip
    lines = [
        {"epoch": i + 1, "step": 3 * i + 3, "train_loss": 2.0 / (i + 1), "seconds": 10.0 * (i + 1),
         "losses": {f"{3 * i + 2}": 1.5}, "validation_loss": 1.9 / (i + 1), f"validation_{key}": 1 - 0.5 / (i + 1)}
        for i in range(settings.epochs)
    ]  # fmt: skip
    result = {
        "metrics": held.figures, "validation": {key: 0.7}, "reported_epoch": settings.epochs, "seconds": 30.0,
        "macs": {"all": 2e8}, "samples_per_second": 99.0, "parameters": 5_000_000, "precision": "float32",
        "machine": "a machine",
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(about))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "result.json").write_text(json.dumps(result))


def _weights(folder, settings, classes, multi_label, W):
    torch.manual_seed(0)
    grid = PatchGrid(T=settings.frames, F=128, pt=10, pf=128, st=10, sf=128)
    size = {"dim": 24, "depth": 2, "heads": 3} if settings.model == "ast" else {"dim": 16, "depth": 1}
    model = {"ast": ASTConfig, "aum": AuMConfig}[settings.model](grid=grid, classes=len(classes), **size)
    front_end = FrontEndSettings(T=grid.T, clip_samples=W, mean=-6.0, std=4.0, fbank=FbankSettings())
    config = checkpoint.CheckpointConfig(
        model=model, front_end=front_end, labels=classes, multi_label=multi_label, settings=asdict(settings)
    )
    network = config.build()
    if settings.model == "ast":  # from scratch attention is nearly even: sharpen it
        for block in network.blocks:
            torch.nn.init.normal_(block.attention.qkv.weight, std=0.5)
    (folder / "best").mkdir()
    checkpoint.save(folder / "best", network, config)
