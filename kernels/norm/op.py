"""The public doors of the norms: checks, types, and the choice of backend."""

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
    return _choose("rms_norm", x, residual, {"weight": weight}, eps, dtype)


def layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x and bias to the residual stream and normalise the sum: (normed, total), both `[..., D]`.

    total = residual + x + bias, without what is None; normed = (total - mean) / sqrt(var + eps) * weight + shift, mean and
    biased variance over D. x, residual `[..., D]`; bias, weight and shift `[D]`: bias is that of the product that made x,
    whose addition and gradient would be passes of their own. Types and errors as `rms_norm` has them.
    """
    return _choose("layer_norm", x, residual, {"bias": bias, "weight": weight, "shift": shift}, eps, dtype)


def _choose(operation, x, residual, vectors, eps, dtype):
    size = x.shape[-1:]
    for tensor in vectors.values():
        if tensor is not None and (tensor.shape != size or tensor.device != x.device):
            _refuse(x, residual, vectors)
    if not x.ndim or (residual is not None and (residual.shape != x.shape or residual.device != x.device)):
        _refuse(x, residual, vectors)
    stream, device = x if residual is None else residual, x.device.type
    wide = torch.promote_types(stream.dtype, torch.float32)
    if dtype is None:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else wide
    with dispatch.unmixed(device):
        return dispatch.choose(operation, stream)(x, residual, *vectors.values(), eps, dtype, wide)


def _refuse(x, residual, vectors):
    """Raise ValueError for shapes that disagree, or else for tensors on several devices."""
    sizes = {name: tuple(vector.shape) for name, vector in vectors.items() if vector is not None}
    if (
        x.ndim == 0
        or any(size != x.shape[-1:] for size in sizes.values())
        or (residual is not None and residual.shape != x.shape)
    ):
        given = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"x (..., D) takes a residual of its own shape and {', '.join(sizes)} (D,): got x {tuple(x.shape)}, "
            f"residual {None if residual is None else tuple(residual.shape)}, {given}"
        )
    devices = {t.device for t in (x, residual, *vectors.values()) if t is not None}
    raise ValueError(f"x, residual, {', '.join(sizes)} have to be on one device, not on {sorted(map(str, devices))}")
