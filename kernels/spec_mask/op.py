"""The public door of masking: checks, and the choice of backend."""

import torch

from kernels import dispatch

FULL_SHARE = 0.7  # of the draws are full height (paper, Algorithm 1, line 9)
SHAPES = 64  # rectangles drawn at most: at the paper's widths more than 21 have a chance below 1e-15
MOST_CELLS = 2**30  # of a clip: SpecAugment's area counts both rectangles, and is an int32
ATTEMPTS = 100  # tries for a place (paper, section III-B)


def draw_spec_mask(
    seed,
    epoch,
    tickets: torch.Tensor,
    T: int,
    F: int,
    *,
    budget: int,
    max_width: int,
    max_height: int,
    full_share: float = FULL_SHARE,
    shapes: int = SHAPES,
    attempts: int = ATTEMPTS,
    clip: bool = False,
    snap: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SpecMask's rectangles (paper, Algorithm 1): full-height and smaller ones without overlap, under a budget of area.

    seed: 64-bit integer or int64 tensor of one element; epoch: integer or tensor of one element; tickets: int64 `[B]`, a
    number for each clip: its place in the epoch's order, or any other that no two clips of an epoch share.
    T, F: frames and mel bins. budget: cells to reach; drawing stops when the area is there, so that the last rectangle
    may exceed it. max_width, max_height: largest width in frames and height in bins, cut to T and F.
    clip: narrow the last rectangle so that it ends on the column that reaches the budget.
    snap: start and width become multiples of so many frames (the patch's time stride, say; a width is cut to T).

    Returns rectangles int32 `[B, shapes, 4]` as (t0, t1, f0, f1), half open; count int32 `[B]`; area int32 `[B]`.
    Raises ValueError for sizes below 1, tickets of another shape or type, or a probability outside 0..1.
    """
    settings = {"budget": budget, "max_width": max_width, "max_height": max_height, "full_share": full_share}
    settings |= {"shapes": shapes, "attempts": attempts, "clip": clip, "snap": snap}
    _check_spec_mask(tickets, T, F, **settings)
    return dispatch.choose("spec_mask", tickets)(seed, epoch, tickets, T, F, **settings)


def apply_spec_mask(
    log_mel: torch.Tensor,
    fill: torch.Tensor,
    seed,
    epoch,
    tickets: torch.Tensor,
    *,
    budget: int,
    max_width: int,
    max_height: int,
    full_share: float = FULL_SHARE,
    shapes: int = SHAPES,
    attempts: int = ATTEMPTS,
    clip: bool = False,
    snap: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw SpecMask's rectangles and paint them: log_mel `[B, T, F]` is set to fill `[B]` inside them, in place.

    log_mel has to be the caller's own buffer, as in training. Other arguments, the result (what was drawn) and errors as
    in `draw_spec_mask`.
    """
    settings = {"budget": budget, "max_width": max_width, "max_height": max_height, "full_share": full_share}
    settings |= {"shapes": shapes, "attempts": attempts, "clip": clip, "snap": snap}
    _check_target(log_mel, fill, tickets)
    _check_spec_mask(tickets, *log_mel.shape[1:], **settings)
    return dispatch.choose("apply_spec_mask", log_mel)(log_mel, fill, seed, epoch, tickets, **settings)


def draw_spec_augment(
    seed, epoch, tickets: torch.Tensor, T: int, F: int, *, max_frequency: int, max_time: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SpecAugment's two rectangles: row 0 a frequency mask, row 1 a time mask; they may overlap.

    max_frequency, max_time: widths are uniform on 0..max-1 bins and frames, as torchaudio's; cut to F and T.
    Other arguments and the result as in `draw_spec_mask`, with M = 2; area is the sum of both.
    """
    _check_spec_augment(tickets, T, F, max_frequency, max_time)
    return dispatch.choose("spec_augment", tickets)(
        seed, epoch, tickets, T, F, max_frequency=max_frequency, max_time=max_time
    )


def apply_spec_augment(
    log_mel: torch.Tensor, fill: torch.Tensor, seed, epoch, tickets: torch.Tensor, *, max_frequency: int, max_time: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw SpecAugment's two rectangles and paint them: `apply_spec_mask` with the arguments of `draw_spec_augment`."""
    _check_target(log_mel, fill, tickets)
    _check_spec_augment(tickets, *log_mel.shape[1:], max_frequency, max_time)
    return dispatch.choose("apply_spec_augment", log_mel)(
        log_mel, fill, seed, epoch, tickets, max_frequency=max_frequency, max_time=max_time
    )


def paint(log_mel: torch.Tensor, rectangles: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Set log_mel `[B, T, F]` to fill `[B]` inside each sample's rectangles int32 `[B, M, 4]`, in place.

    log_mel has to be the caller's own buffer, as in training. Returns it. Raises ValueError when shapes disagree.
    """
    B = log_mel.shape[0] if log_mel.ndim == 3 else -1
    if rectangles.ndim != 3 or rectangles.shape[0] != B or rectangles.shape[2] != 4 or fill.shape != (B,):
        raise ValueError(
            "paint takes log_mel (B, T, F), rectangles (B, M, 4) and fill (B,); "
            f"got {tuple(log_mel.shape)}, {tuple(rectangles.shape)} and {tuple(fill.shape)}"
        )
    return dispatch.choose("paint", log_mel)(log_mel, rectangles, fill)


def _check_draw(tickets, T, F):
    if not isinstance(tickets, torch.Tensor):
        raise ValueError(f"tickets is an int64 tensor (B,), got {tickets!r}")
    if tickets.ndim != 1 or tickets.dtype != torch.int64:
        raise ValueError(f"tickets is int64 (B,), got {tickets.dtype} {tuple(tickets.shape)}")
    if T < 1 or F < 1:
        raise ValueError(f"T and F are at least 1, got T={T} and F={F}")
    if T * F > MOST_CELLS:
        raise ValueError(f"areas are counted in 32 bits: a clip has {MOST_CELLS} cells at most, got T={T} x F={F}")


def _check_spec_mask(tickets, T, F, *, budget, max_width, max_height, full_share, shapes, attempts, clip, snap):
    _check_draw(tickets, T, F)
    for name, value in (("budget", budget), ("max_width", max_width), ("max_height", max_height), ("snap", snap)):
        if value < (0 if name == "budget" else 1):
            raise ValueError(f"{name} is a positive number of cells, frames or bins, got {value}")
    if not 0 <= full_share <= 1:
        raise ValueError(f"full_share is a probability in 0..1, got {full_share}")
    if snap > T:
        raise ValueError(f"snap={snap} frames is longer than the clip of T={T}")


def _check_spec_augment(tickets, T, F, max_frequency, max_time):
    _check_draw(tickets, T, F)
    if max_frequency < 1 or max_time < 1:
        raise ValueError(f"max_frequency and max_time are at least 1, got {max_frequency} and {max_time}")


def _check_target(log_mel, fill, tickets):
    if not isinstance(fill, torch.Tensor) or not isinstance(tickets, torch.Tensor):
        raise ValueError(f"fill is a float32 tensor (B,) and tickets an int64 one, got {fill!r} and {tickets!r}")
    B = log_mel.shape[0] if log_mel.ndim == 3 else -1
    if fill.shape != (B,) or tickets.shape != (B,):
        raise ValueError(
            "masks are applied to log_mel (B, T, F) with fill (B,) and tickets (B,); "
            f"got {tuple(log_mel.shape)}, {tuple(fill.shape)} and {tuple(tickets.shape)}"
        )
