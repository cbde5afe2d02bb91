"""Cost as work grows: AST beside AuM, log-mel to logits, against the clip's length and against the batch."""

import statistics
from collections.abc import Iterator

import torch

from bench import memory, systems
from bench.bench_patch_embed import GRIDS
from bench.measure import Figures, in_turn
from kernels import dispatch

GRID = "(128, 10)/4"
LENGTHS = (1, 2, 5, 10, 20, 30, 60, 120, 300)  # seconds of one clip
BATCHES = {"cpu": (1, 2, 4, 8, 16, 32, 64, 128), "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 256)}
BATCH_SECONDS = {"cpu": 1, "cuda": 10}  # of the clips in a batch
SECONDS = {"cpu": 1.5, "cuda": 0.7}  # of rounds, for each row
LONGEST_CHECKED = 60  # seconds: the plain scan takes a step a token, and longer clips run the same code
TYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


def cases(device: str) -> Iterator[Figures]:
    dispatch.use_fused(True)
    for seconds in LENGTHS:
        yield _row("length", seconds, 1, device)
    for B in BATCHES[device]:
        yield _row("batch", BATCH_SECONDS[device], B, device)


def _row(against, seconds, B, device):
    size, dtype = systems.SIZE[device], TYPE[device]
    grid = systems.lengthened(GRIDS[GRID], seconds)
    checked = systems.lengthened(grid, min(seconds, LONGEST_CHECKED))
    return Figures(
        part="scale",
        case={"against": against, "size": size, "grid": GRID, "seconds": seconds, "B": B, "dtype": str(dtype)[6:]},
        backend=dispatch.select("selective_scan", device, "float32").name,
        correct=lambda: all(systems.agrees(model, size, checked, dtype, device) for model in systems.MODELS),
        figures=lambda: figures(size, grid, B, dtype, device),
    )


def figures(size: str, grid, B: int, dtype: torch.dtype, device: str) -> dict:
    """Latency and memory of both models, and the median of their paired ratios."""
    networks = {model: systems.build(model, size, grid, device) for model in systems.MODELS}
    clips = torch.randn(B, grid.T, grid.F, device=device)
    calls = {name: lambda net=net: systems.forward(net, clips, dtype) for name, net in networks.items()}
    growth = {name: memory.peak(call, device) for name, call in calls.items()}
    ms = in_turn(calls, device, SECONDS[device])
    return {
        "patches": grid.N,
        "ms": {name: statistics.median(times) for name, times in ms.items()},
        "ast_over_aum": statistics.median(a / b for a, b in zip(ms["ast"], ms["aum"], strict=True)),
        "peak_bytes": {
            name: None if bytes is None else bytes + memory.held(networks[name]) for name, bytes in growth.items()
        },
    }
