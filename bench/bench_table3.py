"""The paper's Table III, put right: each of its six patchings with AST and with AuM, beside the paper's columns.

Latency and throughput are of the model alone, log-mel to logits; a training step is the whole of it, data to optimiser.
"""

import statistics
from collections.abc import Iterator
from dataclasses import asdict

import torch

from bench import memory, systems, training
from bench.bench_patch_embed import GRIDS
from bench.measure import Figures, in_turn
from kernels import dispatch

RECIPE_STEPS, RECIPE_CLIPS = 14600, 32  # 25 epochs of AudioSet-18k's 18,685 clips, 32 a step
CLIPS = {"cpu": 4, "cuda": 32}  # of the throughput; the paper does not say
SECONDS = {"cpu": 1.0, "cuda": 1.0}  # of rounds, for each of latency and throughput
# A GPU's time ends at some point: the paper's best, cheapest and square rows come first, and AST's before AuM's.
BY_WORTH = ("(128, 10)/1", "(128, 50)/10", "(16, 16)/10", "(128, 10)/4", "(128, 25)/5", "(128, 10)/2")


def cases(device: str) -> Iterator[Figures]:
    dispatch.use_fused(True)
    for model in systems.MODELS:
        for name in sorted(BY_WORTH, key=lambda name: GRIDS[name].N) if device == "cpu" else BY_WORTH:
            yield _row(model, name, device)


def _row(model, name, device):
    size, grid = systems.SIZE[device], GRIDS[name]
    return Figures(
        part="table3",
        case={"model": model, "size": size, "grid": name, "frames": grid.T, "patches": grid.N},
        backend=dispatch.select("patch_embed" if model == "ast" else "selective_scan", device, "float32").name,
        correct=lambda: all(systems.agrees(model, size, grid, dtype, device) for dtype in systems.TYPES.values()),
        figures=lambda: figures(model, size, name, device),
    )


def figures(model: str, size: str, name: str, device: str) -> dict:
    """All columns of a row."""
    grid = GRIDS[name]
    network = systems.build(model, size, grid, device)
    one, many = (torch.randn(B, grid.T, grid.F, device=device) for B in (1, CLIPS[device]))
    latency, batch = (_by_type(network, clips, device) for clips in (one, many))
    growth = memory.peak(lambda: systems.forward(network, many, torch.bfloat16), device)
    step = training.measured(model, size, grid, device)
    return {
        "macs": systems.config(model, size, grid).macs()._asdict(),
        "base_macs": systems.config(model, "base", grid).macs()._asdict(),
        "published": asdict(systems.TABLE_III[name]),
        "latency_ms": latency,
        "throughput_batch": CLIPS[device],
        "clips_per_second": {dtype: 1000 * CLIPS[device] / ms for dtype, ms in batch.items()},
        "peak_bytes": None if growth is None else growth + memory.held(network),
        "step": step,
        "recipe": {"steps": RECIPE_STEPS, "clips": RECIPE_CLIPS},
        "train_hours": hours(step),
    }


def _by_type(network, clips, device):
    calls = {name: lambda dtype=dtype: systems.forward(network, clips, dtype) for name, dtype in systems.TYPES.items()}
    return {name: statistics.median(ms) for name, ms in in_turn(calls, device, SECONDS[device]).items()}


def hours(step: dict) -> float:
    """Of the recipe's training, from one measured step: as many clips, at this step's clips a second."""
    return RECIPE_STEPS * RECIPE_CLIPS / step["batch"] * step["step_ms"] / 3.6e6
