"""The residual addition of AuM and its RMSNorm (bench/norms.py)."""

from collections.abc import Iterator

import torch

from bench import norms
from bench.measure import Case


def cases(device: str) -> Iterator[Case]:
    if device == "cpu":
        sizes, dtypes = ((128, 31, 192), (32, 249, 192)), (torch.float32, torch.bfloat16)
    else:
        sizes, dtypes = ((32, 992, 768), (32, 97, 768), (1, 992, 768), (1, 97, 768)), (torch.bfloat16,)
    yield from norms.cases("rms_norm", sizes, dtypes, device)
