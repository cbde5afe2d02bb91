"""SpecMask and SpecAugment in C (native.c), the reference's bits: a clip's rectangles are drawn and painted in one task."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch

from kernels import philox as keyed
from kernels.native import Library

LIBRARY = Library(
    Path(__file__).parent, ("native.c", "../philox.h", "../native.h"), ("spec_mask", "spec_augment")
)  # fmt: skip
CELLS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of a log-mel that is painted
SIZES = ("budget", "max_width", "max_height", "full_threshold", "shapes", "attempts", "clip", "snap")  # native.c's


class _Masks(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "T", "F", *SIZES)),
        *((name, ctypes.c_uint64) for name in ("seed", "epoch")),
        *((name, ctypes.c_void_p) for name in ("tickets", "rectangles", "count", "area")),
        ("bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("fill", "log_mel")),
    ]


def refuses() -> str | None:
    """Why this backend cannot run, or None."""
    return LIBRARY.refuses()


def draw_spec_mask(seed, epoch, tickets, T, F, **settings):
    """As `reference.draw_spec_mask`."""
    return draw("spec_mask", *_keys(seed, epoch, tickets), T, F, _spec_mask(T, F, **settings))


def apply_spec_mask(log_mel, fill, seed, epoch, tickets, **settings):
    """As `reference.apply_spec_mask`. Raises ValueError where log_mel wants gradients."""
    return _apply("spec_mask", log_mel, fill, seed, epoch, tickets, _spec_mask(*log_mel.shape[1:], **settings))


def draw_spec_augment(seed, epoch, tickets, T, F, **settings):
    """As `reference.draw_spec_augment`."""
    return draw("spec_augment", *_keys(seed, epoch, tickets), T, F, _spec_augment(T, F, **settings))


def apply_spec_augment(log_mel, fill, seed, epoch, tickets, **settings):
    """As `reference.apply_spec_augment`. Raises ValueError where log_mel wants gradients."""
    return _apply("spec_augment", log_mel, fill, seed, epoch, tickets, _spec_augment(*log_mel.shape[1:], **settings))


@torch.library.custom_op("fftp::native_draw_masks", mutates_args=(), device_types="cpu")
def draw(
    name: str, seed: torch.Tensor, epoch: torch.Tensor, tickets: torch.Tensor, T: int, F: int, sizes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rectangles int32 `[B, shapes, 4]`, count `[B]`, area `[B]` of "spec_mask" or "spec_augment", with SIZES; seed and epoch
    int64 `[1]`."""
    return _call(name, seed, epoch, tickets, T, F, sizes)


@torch.library.custom_op("fftp::native_apply_masks", mutates_args=("log_mel",), device_types="cpu")
def apply(
    log_mel: torch.Tensor,
    fill: torch.Tensor,
    name: str,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    tickets: torch.Tensor,
    sizes: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `draw`; log_mel `[B, T, F]` is set to fill `[B]` inside the rectangles."""
    cells = log_mel.contiguous()
    drawn = _call(name, seed, epoch, tickets, *log_mel.shape[1:], sizes, cells, fill.to(log_mel.dtype).contiguous())
    if cells is not log_mel:
        log_mel.copy_(cells)
    return drawn


@draw.register_fake
def _(name, seed, epoch, tickets, T, F, sizes):
    return _results(tickets, sizes)


@apply.register_fake
def _(log_mel, fill, name, seed, epoch, tickets, sizes):
    return _results(tickets, sizes)


def _apply(name, log_mel, fill, seed, epoch, tickets, sizes):
    if log_mel.dtype not in CELLS:
        raise ValueError(
            f"apply_{name}=native paints {', '.join(str(t).removeprefix('torch.') for t in CELLS)}; log_mel is "
            f"{str(log_mel.dtype).removeprefix('torch.')}: FFTP_BACKEND=apply_{name}=reference takes it"
        )
    if log_mel.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"apply_{name}=native has no gradients, and log_mel wants one: FFTP_BACKEND=apply_{name}=reference has"
        )
    return apply(log_mel, fill, name, *_keys(seed, epoch, tickets), sizes)


def _keys(seed, epoch, tickets):
    return (*(keyed.on_device(number, tickets.device) for number in (seed, epoch)), tickets)


def _spec_mask(T, F, *, budget, max_width, max_height, full_share, shapes, attempts, clip, snap):
    """SIZES of SpecMask."""
    full_threshold = round(full_share * 2**32)
    return [budget, min(max_width, T), min(max_height, F), full_threshold, shapes, attempts, int(clip), snap]


def _spec_augment(T, F, *, max_frequency, max_time):
    """SIZES of SpecAugment."""
    return [0, min(max_time, T), min(max_frequency, F), 0, 2, 0, 0, 1]


def _results(tickets, sizes):
    """Memory for rectangles, count and area."""
    B, shapes = tickets.shape[0], sizes[SIZES.index("shapes")]
    return tuple(tickets.new_empty(shape, dtype=torch.int32) for shape in ((B, shapes, 4), (B,), (B,)))


def _call(name, seed, epoch, tickets, T, F, sizes, cells=None, fill=None):
    tickets, drawn = tickets.contiguous(), _results(tickets, sizes)
    work = _Masks(len(tickets), T, F, *sizes, seed.item() % 2**64, epoch.item() % 2**32)
    work.tickets = tickets.data_ptr()
    work.rectangles, work.count, work.area = (tensor.data_ptr() for tensor in drawn)
    if cells is not None:
        work.bytes, work.fill, work.log_mel = cells.element_size(), fill.data_ptr(), cells.data_ptr()
    LIBRARY.call(name, work)
    return drawn
