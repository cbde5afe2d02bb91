"""Packed samples to waveforms in C (native.c)."""

import ctypes
from pathlib import Path

import torch

from kernels.native import Library

LIBRARY = Library(Path(__file__).parent, ("native.c", "native_lanes.h", "../native.h"), ("waveforms",))


class _Waveforms(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("W", ctypes.c_int64),
        *((n, ctypes.c_void_p) for n in ("samples", "start", "length", "gain")),
        *((n, ctypes.c_void_p) for n in ("other_start", "other_length", "weight")),
        ("out", ctypes.c_void_p),
    ]


def refuses() -> str | None:
    """Why this backend cannot run, or None."""
    return LIBRARY.refuses()


def waveforms(samples, start, length, W, gain, partner):
    """As `reference.waveforms`. Raises ValueError for a clip that does not lie within the samples."""
    return mixed(samples, start, length, W, gain, *(partner or (None, None, None)))


@torch.library.custom_op("fftp::native_waveforms", mutates_args=(), device_types="cpu")
def mixed(
    samples: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    W: int,
    gain: torch.Tensor | None,
    other_start: torch.Tensor | None,
    other_length: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    """`[B, W]`; the last three are the partner's."""
    given = [samples, start, length, gain, other_start, other_length, weight]
    given = [None if tensor is None else tensor.contiguous() for tensor in given]
    samples, start, length, _, other_start, other_length, _ = given
    _check_places(samples, start, length, W)
    if other_start is not None:
        _check_places(samples, other_start, other_length, W)
    out = torch.empty(len(start), W, dtype=torch.float32, device="cpu")
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (*given, out))
    LIBRARY.call("waveforms", _Waveforms(len(start), W, *pointers))
    return out


@mixed.register_fake
def _(samples, start, length, W, gain, other_start, other_length, weight):
    return samples.new_empty(start.shape[0], W, dtype=torch.float32)


def _check_places(samples, start, length, W):
    """What slices of the reference would raise for, C would read."""
    wrong = (start < 0) | (length < 0) | (start + length.clamp_max(W) > len(samples))
    if wrong.any():
        b = int(wrong.nonzero()[0])
        raise ValueError(
            f"clip {b}, {length[b]} samples from {start[b]} on, lies outside of the {len(samples)} samples"
        )
