"""The public door of the norm: checks, types, and the choice of backend."""

import torch

from kernels import dispatch


def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x to the residual stream and normalise the sum: (normed, total), both `[..., D]`.

    total = residual + x, or x where residual is None; normed = total / sqrt(mean(total^2) + eps) * weight, the mean over D.
    x, residual `[..., D]`; weight `[D]`. Everything is computed in float32, autocast or not (float64 where residual, or x
    without one, is), and total comes in that type. normed comes in dtype: without it in autocast's where that is on, as
    the next product takes it, else in total's. Raises ValueError when shapes disagree.
    """
    if weight.ndim != 1 or x.shape[-1:] != weight.shape or (residual is not None and residual.shape != x.shape):
        raise ValueError(
            "x (..., D) takes a residual of its own shape and weight (D,), "
            f"got {tuple(x.shape)}, {None if residual is None else tuple(residual.shape)} and {tuple(weight.shape)}"
        )
    stream, device = x if residual is None else residual, x.device.type
    wide = torch.promote_types(stream.dtype, torch.float32)
    if dtype is None:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else wide
    with dispatch.unmixed(device):
        return dispatch.choose("rms_norm", stream)(x, residual, weight, eps, dtype, wide)
