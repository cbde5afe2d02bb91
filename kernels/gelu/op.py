"""The public door of the GELU: checks, types, and the choice of backend."""

import torch

from kernels import dispatch


def gelu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """z Phi(z) with z = x + bias: the exact GELU of a linear layer's product x `[..., D]`, made without its bias `[D]`.

    bias may be None. z is float32, autocast or not (float64 where x is), and the result comes in x's type. At infinities
    our own backends give the limits (0 and inf; derivatives 0 and 1), where PyTorch gives NaN. Raises ValueError when
    shapes disagree.
    """
    if not x.ndim or (bias is not None and (bias.ndim != 1 or x.shape[-1:] != bias.shape)):
        raise ValueError(
            f"x (..., D) takes a bias (D,) or None, got {tuple(x.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    if bias is not None and bias.device != x.device:
        raise ValueError(f"x is on {x.device} and bias on {bias.device}: put both on one device")
    with dispatch.unmixed(x.device.type):
        return dispatch.choose("gelu", x)(x, bias, torch.promote_types(x.dtype, torch.float32))
