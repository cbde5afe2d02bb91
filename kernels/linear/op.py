"""The public door of a linear layer's product: checks, and the choice of backend."""

import torch

from kernels import dispatch
from kernels.linear import native


def linear(x: torch.Tensor, weight: torch.Tensor, panels: torch.Tensor | None = None) -> torch.Tensor:
    """x `[..., K]` times the transpose of weight `[N, K]`: `[..., N]`, in x's type, or autocast's where it is on.

    panels: `linear_panels(weight)`, for a weight that stays as it is; the result is the same. Raises ValueError for
    other shapes.
    """
    if not x.ndim or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x (..., K) takes a weight (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    check_panels(panels, weight)
    return dispatch.choose("linear", x)(x, weight, panels)


def check_panels(panels: torch.Tensor | None, weight: torch.Tensor) -> None:
    """Raises ValueError for panels that cannot be this weight's."""
    if panels is None or (
        panels.dtype == torch.bfloat16 and panels.numel() == weight.numel() and panels.is_contiguous()
    ):
        return
    raise ValueError(
        f"panels are `linear_panels` of this weight, {weight.numel()} numbers in bfloat16 side by side, got {panels.numel()} "
        f"in {panels.dtype}"
    )


def panels_of(panels: torch.Tensor | None, weight: torch.Tensor, part: slice) -> torch.Tensor | None:
    """`linear_panels(weight[part])` from `linear_panels(weight)`; None where part would cut a panel in two."""
    first, end, _ = part.indices(len(weight))
    if panels is None or first % native.BLOCK or end % native.BLOCK:
        return None
    return panels[first * weight.shape[1] : end * weight.shape[1]]  # they stand in the order of the outputs


def linear_panels(weight: torch.Tensor) -> torch.Tensor | None:
    """A weight `[N, K]` laid out once for `linear` in bfloat16, where its backend would else do so at every call; or None."""
    backend = dispatch.select("linear", weight.device.type, "bfloat16")
    return native.panels(weight) if backend.name == "native" else None
