"""The public door of patch embedding: checks, and the choice of backend."""

import torch

from kernels import dispatch
from kernels.linear.op import check_panels


def patch_embed(
    log_mel: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stride: tuple[int, int],
    position: torch.Tensor | None,
    tokens: torch.Tensor | None,
    place: int,
    rectangles: torch.Tensor | None = None,
    fill: torch.Tensor | None = None,
    panels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-mel to the encoder's input (paper, section III-A; square patches are the same with pf < F).

    log_mel `[B, T, F]`; weight `[D, 1, pt, pf]`, time-major; bias `[D]`; stride (st, sf) in frames and bins;
    position `[N, D]` in patch order or None; tokens `[c, D]`, class tokens with their positions already added, or None;
    place: how many patches stand before them (0 for AST, N // 2 for AuM).
    rectangles int32 `[B, M, 4]` as (t0, t1, f0, f1), half open, with fill float32 `[B]` in the units of log_mel: embed the
    masked spectrogram and leave log_mel itself as it is; what would stand outside the clip is cut off. A hidden cell has
    no gradient, weight's gradient sees the fill, and fill itself gets none.
    panels: `linear_panels(weight.flatten(1))`, for a weight that stays as it is; the result is the same.

    Returns `[B, N + c, D]`. Patches are in the order of AST and AuM: frequency band outer, time inner; a full-frequency
    patch leaves time alone. Raises ValueError when a patch does not fit or shapes disagree.
    """
    if log_mel.ndim != 3 or weight.ndim != 4 or weight.shape[1] != 1:
        raise ValueError(
            f"log_mel is (B, T, F) and weight (D, 1, pt, pf), got {tuple(log_mel.shape)} and {tuple(weight.shape)}"
        )
    _, T, F = log_mel.shape
    D, _, pt, pf = weight.shape
    if pt > T or pf > F:
        raise ValueError(f"a patch of {pt} frames x {pf} bins does not fit a clip of {T} frames x {F} bins")
    if min(stride) < 1:
        raise ValueError(f"a stride is at least 1 frame and 1 bin, got {tuple(stride)}")
    if tokens is None:
        tokens = weight.new_empty(0, D)
    N = ((T - pt) // stride[0] + 1) * ((F - pf) // stride[1] + 1)
    if (position is not None and position.shape != (N, D)) or tokens.shape[1:] != (D,) or not 0 <= place <= N:
        raise ValueError(
            f"N={N} patches of width D={D} take position (N, D), tokens (c, D) and a place in 0..N, "
            f"got {None if position is None else tuple(position.shape)}, {tuple(tokens.shape)} and {place}"
        )
    check_panels(panels, weight)
    if rectangles is not None or fill is not None:
        _check_masks(log_mel, rectangles, fill)
    return dispatch.choose("patch_embed", log_mel)(
        log_mel, weight, bias, stride, position, tokens, place, rectangles, fill, panels
    )


def _check_masks(log_mel, rectangles, fill):
    if rectangles is None or fill is None:
        raise ValueError(f"rectangles and fill go together, got no {'rectangles' if rectangles is None else 'fill'}")
    B = log_mel.shape[0]
    if rectangles.ndim != 3 or (rectangles.shape[0], rectangles.shape[2]) != (B, 4) or fill.shape != (B,):
        raise ValueError(
            f"{B} clips take rectangles (B, M, 4) and fill (B,), got {tuple(rectangles.shape)} and {tuple(fill.shape)}"
        )
    if rectangles.dtype != torch.int32:
        raise ValueError(f"rectangles are int32 numbers of frames and bins, got {rectangles.dtype}")
