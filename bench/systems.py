"""The paper's systems as the benchmark builds them, and the columns that the paper prints beside them."""

import copy
from dataclasses import dataclass, replace

import torch

from bench.bench_patch_embed import GRIDS
from bench.measure import holds
from fftp import ast_model, aum_model
from fftp.patching import PatchGrid
from kernels import dispatch

MODELS = {"ast": (ast_model.ASTConfig, ast_model.SIZES), "aum": (aum_model.AuMConfig, aum_model.SIZES)}
SIZE = {"cpu": "tiny", "cuda": "base"}  # what a machine can do in minutes; the paper's is base
CLASSES = 527  # AudioSet
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of products
PROOF_LAYERS = 2  # of the model that a row's check compares: each layer is the same code


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of the paper's Table III, AST-base on an A100: what it calls GFLOPs, hours, milliseconds, mAP in percent."""

    gflops: float
    hours: float
    ms: float
    map: float


TABLE_III = {
    "(16, 16)/10": Published(gflops=103.35, hours=5.3, ms=14.50, map=11.25),
    "(128, 50)/10": Published(gflops=4.15, hours=2.3, ms=0.96, map=14.54),
    "(128, 25)/5": Published(gflops=17.30, hours=2.5, ms=2.18, map=17.15),
    "(128, 10)/4": Published(gflops=21.48, hours=2.6, ms=2.62, map=17.67),
    "(128, 10)/2": Published(gflops=42.79, hours=2.8, ms=5.38, map=18.01),
    "(128, 10)/1": Published(gflops=85.32, hours=5.2, ms=11.62, map=18.32),
}
assert TABLE_III.keys() == GRIDS.keys()


def config(model: str, size: str, grid: PatchGrid, depth: int | None = None):
    """The configuration of "ast" or "aum" with AudioSet's classes; depth: layers, where not the size's own."""
    made, sizes = MODELS[model]
    return made(grid=grid, classes=CLASSES, **sizes[size] | ({"depth": depth} if depth else {}))


def build(model: str, size: str, grid: PatchGrid, device: str, depth: int | None = None) -> torch.nn.Module:
    """The model for inference, with fresh weights, always the same."""
    torch.manual_seed(0)
    given = config(model, size, grid, depth)
    return {"ast": ast_model.AST, "aum": aum_model.AuM}[model](given).to(device).eval()


def forward(network: torch.nn.Module, log_mel: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits as train.evaluate computes them: products in this type, without gradients."""
    with torch.inference_mode(), torch.autocast(log_mel.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return network(log_mel)


def agrees(model: str, size: str, grid: PatchGrid, dtype: torch.dtype, device: str) -> bool:
    """The 2x rule for one clip's logits: the backends of `--fused` beside the references, and these in float64."""
    network = build(model, size, grid, device, PROOF_LAYERS)
    log_mel = torch.randn(1, grid.T, grid.F, device=device)

    def logits(fused, exact):
        dispatch.use_fused(fused)
        if exact:
            return [forward(copy.deepcopy(network).double(), log_mel.double(), torch.float64)]
        return [forward(network, log_mel, dtype)]

    try:
        return holds(logits(True, False), logits(False, False), logits(False, True))
    finally:
        dispatch.use_fused(True)


def lengthened(grid: PatchGrid, seconds: float) -> PatchGrid:
    """The grid for clips of so many seconds, 100 frames each."""
    return replace(grid, T=round(100 * seconds))
