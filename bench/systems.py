"""The paper's systems as the benchmark builds them, and the columns that the paper prints beside them."""

import copy
from dataclasses import dataclass, replace

import torch

from bench.bench_patch_embed import GRIDS
from bench.measure import holds
from fftp import ast_model, aum_model
from fftp.patching import PatchGrid
from kernels import dispatch
from train import tables

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


def _grid_of(row: tables.System) -> str:
    """Its name as GRIDS has it: "(128, 50) / (128, 10)" is "(128, 50)/10" there."""
    patch, stride = row.name.split(" / ")
    return f"{patch}/{stride.rstrip(')').split()[-1]}"


TABLE_III = {
    _grid_of(row): Published(
        gflops=row.paper["gmacs"], hours=row.paper["hours"], ms=row.paper["latency"], map=row.paper["map"]
    )
    for row in tables.TABLE2
}
assert TABLE_III.keys() == GRIDS.keys()


def config(model: str, size: str, grid: PatchGrid, depth: int | None = None):
    """The configuration of "ast" or "aum" with AudioSet's classes; depth: layers, where not the size's own."""
    made, sizes = MODELS[model]
    return made(grid=grid, classes=CLASSES, **sizes[size] | ({"depth": depth} if depth else {}))


def build(model: str, size: str, grid: PatchGrid, device: str, depth: int | None = None) -> torch.nn.Module:
    """The model for inference, with fresh weights, always the same on a device."""
    torch.manual_seed(0)
    given = config(model, size, grid, depth)
    with torch.device(device):  # weights are drawn where they stay
        return {"ast": ast_model.AST, "aum": aum_model.AuM}[model](given).eval()


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
