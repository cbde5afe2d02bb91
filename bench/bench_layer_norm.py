"""The residual addition of AST, the bias before it and its LayerNorm (bench/norms.py)."""

from collections.abc import Iterator

import torch

from bench import norms
from bench.measure import Case


def cases(device: str) -> Iterator[Case]:
    if device == "cpu":
        sizes, dtypes = ((128, 32, 192), (32, 250, 192)), (torch.float32, torch.bfloat16)
    else:
        sizes, dtypes = ((32, 993, 768), (32, 98, 768), (1, 993, 768), (1, 98, 768)), (torch.bfloat16,)
    yield from norms.cases("layer_norm", sizes, dtypes, device)
