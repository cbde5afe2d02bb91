"""The public door of a linear layer's product: checks, and the choice of backend."""

import torch

from kernels import dispatch


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x `[..., K]` times the transpose of weight `[N, K]`: `[..., N]`, in x's type, or autocast's where it is on.

    Raises ValueError for other shapes.
    """
    if not x.ndim or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x (..., K) takes a weight (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    return dispatch.choose("linear", x)(x, weight)
