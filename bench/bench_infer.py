"""AST-base, log-mel to logits, beside transformers' AST: float32 and bfloat16, square and full-frequency patches.

On a CPU memory is kept between calls, for all candidates alike, as python -m fftp.predict keeps it.
"""

from collections.abc import Iterator
from functools import cache, partial

import torch

from bench import systems, transformers_ast
from bench.bench_patch_embed import GRIDS
from bench.measure import Case, holds
from fftp import allocator
from fftp.inference import Prepared
from kernels import dispatch

SQUARE, SHORT = "(16, 16)/10", "(128, 50)/10"  # the names of GRIDS: (bins, frames) / stride in time
GRIDS_ON_A_GPU = ("(128, 10)/1", SHORT, SQUARE)
ROUNDS = {1: 9, 8: 3}  # by batch, on a CPU
BOUND = 1e-4  # float32 logits of both implementations: two orders of sums in twelve blocks (tests/test_ast_model.py)


def cases(device: str) -> Iterator[Case]:
    dispatch.use_fused(True)
    if device == "cuda":
        for name in GRIDS_ON_A_GPU:
            for B in (1, 32):
                for precision in ("bfloat16", "float32"):
                    peers = {"transformers": partial(_theirs, B, device, precision)} if name == SQUARE else {}
                    yield _case(name, B, device, precision, peers)
        return
    allocator.keep_memory()
    for B in (1, 8):
        for precision in ("bfloat16", "float32"):
            square = {"square patches": partial(_ours, SQUARE, B, device, precision)}
            yield _case(SHORT, B, device, precision, square)
    for B in (1, 8):
        for precision in ("bfloat16", "float32"):
            peers = {"transformers": partial(_theirs, B, device, precision)}
            if precision == "bfloat16":
                peers["ours in float32"] = partial(_ours, SQUARE, B, device, "float32")
            yield _case(SQUARE, B, device, precision, peers)


def _case(name, B, device, precision, peers):
    grid = GRIDS[name]
    macs = systems.config("ast", "base", grid)
    return Case(
        part="infer",
        case={"model": "AST-base", "grid": name, "patches": grid.N, "B": B, "dtype": precision},
        backend=f"attention {dispatch.select('attention', device, precision).name}",
        ours=partial(_ours, name, B, device, precision),
        peers=peers,
        correct=lambda: _correct(name, device, precision),
        set_bytes=4 * B * grid.T * grid.F,
        bytes=systems.TYPES[precision].itemsize * 86e6,
        flops=2.0 * B * (macs.macs().all - macs.spared()),
        rounds=ROUNDS.get(B, 0) if device == "cpu" else 0,
    )


@cache
def _model(name, device):
    return systems.build("ast", "base", GRIDS[name], device)


@cache
def _inputs(name, B, device, sets):
    grid = GRIDS[name]
    return [torch.randn(B, grid.T, grid.F, device=device) for _ in range(sets)]


def _ours(name, B, device, precision, sets):
    prepared, inputs = Prepared(_model(name, device), systems.TYPES[precision]), _inputs(name, B, device, sets)
    return lambda i: prepared(inputs[i])


def _theirs(B, device, precision, sets):
    dtype = systems.TYPES[precision]
    their = transformers_ast.like(_model(SQUARE, device), dtype)
    inputs = [x.to(dtype) for x in _inputs(SQUARE, B, device, sets)]

    def run(i):
        with torch.inference_mode():
            return their(inputs[i]).logits

    return run


def _correct(name, device, precision):
    """float32 against transformers' logits where it has such patches, else the backends against the references; bfloat16 at
    most twice as far from float32 as the same model under SDPA and autocast."""
    if precision == "float32" and name != SQUARE:
        return systems.agrees("ast", "base", GRIDS[name], torch.float32, device)
    found = _ours(name, 1, device, precision, 1)(0).float()
    if precision == "float32":
        return float((found - _theirs(1, device, precision, 1)(0)).abs().max()) < BOUND
    exact = _ours(name, 1, device, "float32", 1)(0)
    try:
        dispatch.use_fused(False)
        plain = systems.forward(_model(name, device), _inputs(name, 1, device, 1)[0], torch.bfloat16)
    finally:
        dispatch.use_fused(True)
    return holds([found.bfloat16()], [plain.float()], [exact.double()])
