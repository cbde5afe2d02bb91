"""What the tests of live sound share: small models as classifiers, and sound."""

import numpy as np
import torch

from fftp import AST, ASTConfig, AuM, AuMConfig, Classifier, FrontEndSettings, PatchGrid
from fftp.checkpoint import CheckpointConfig

LABELS = ("a", "b", "c", "d", "e")
CARRIED = {"directions": "none", "place": "end", "positions": "none"}
F = 128


def grid(T=98, pt=10, st=4, pf=F, sf=F) -> PatchGrid:
    return PatchGrid(T=T, F=F, pt=pt, pf=pf, st=st, sf=sf)


def aum(**changed) -> AuMConfig:
    """A forward AuM that can be carried on, unless changed."""
    return AuMConfig(**{"grid": grid(), "classes": 5, "dim": 16, "depth": 2} | CARRIED | changed)


def ast(**changed) -> ASTConfig:
    return ASTConfig(**{"grid": grid(T=128), "classes": 5, "dim": 16, "depth": 2, "heads": 2} | changed)


MODELS = {
    "carried": aum(),
    "carried, stride above patch": aum(grid=grid(pt=4, st=7)),
    "two ways": aum(directions="v1", place="middle", positions="learned"),
    "ast": ast(),
    "square": ast(grid=grid(T=128, pt=16, st=16, pf=16, sf=16)),
}


def classifier(config, precision="float32", **front_end) -> Classifier:
    """An untrained model whose weights are moved off their special values; its training clips had 98 frames."""
    torch.manual_seed(0)
    model = (AST if isinstance(config, ASTConfig) else AuM)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    settings = {"T": config.grid.T, "clip_samples": 16_000, "mean": -6.0, "std": 5.0} | front_end
    about = CheckpointConfig(
        model=config, front_end=FrontEndSettings(**settings), labels=LABELS, multi_label=False, settings={}
    )
    return Classifier(model, about, precision=precision)


def sound(seconds, rate=16_000, seed=0) -> np.ndarray:
    """int16 `[n]`: noise that swells and falls, over a tone that rises."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(t)) * (1 + np.sin(2 * np.pi * 1.3 * t))
    return (1500 * noise + 6000 * np.sin(2 * np.pi * (300 + 150 * t) * t)).astype(np.int16)
