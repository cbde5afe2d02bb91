"""The front end in C (native.c): log-mel of float32 waveforms and its normalisation. No gradients."""

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

from kernels import philox as keyed
from kernels.fbank import reference
from kernels.fbank.reference import FbankSettings
from kernels.native import Library

LIBRARY = Library(
    Path(__file__).parent, ("native.c", "native_lanes.h", "../philox.h", "../native.h"), ("fbank", "normalise")
)


class _Fbank(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("batch", "W", "stride_b", "T", "F", "frame", "hop", "half", "most_frames")),
        ("preemphasis", ctypes.c_double),
        *((n, ctypes.c_void_p) for n in ("waveform", "window", "twiddle", "weights")),
        *((n, ctypes.c_void_p) for n in ("length", "roll", "place", "first", "count", "from")),
        ("out", ctypes.c_void_p),
    ]


class _Normalise(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("cells", ctypes.c_int64),
        ("mean", ctypes.c_double),
        ("divisor", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("epoch", ctypes.c_uint64),
        ("tickets", ctypes.c_void_p),
        ("log_mel", ctypes.c_void_p),
    ]


def refuses() -> str | None:
    """Why this backend cannot run, or None."""
    return LIBRARY.refuses()


@lru_cache(maxsize=16)
def _tables(settings: FbankSettings) -> dict[str, torch.Tensor]:
    """What native.c reads beside the samples: window, twiddles, places, and the filters' entries that are not 0."""
    points = max(2, settings.n_fft)
    half = points // 2
    bits = half.bit_length() - 1
    n = torch.arange(points)
    pair, reversed_pair = n // 2, torch.zeros_like(n)
    for bit in range(bits):
        reversed_pair |= (pair >> bit & 1) << (bits - 1 - bit)
    angle = n.double() * (2 * torch.pi / points)
    filters = reference.mel_matrix(settings)
    used = filters > 0
    count = torch.where(used.any(1), filters.shape[1] - used.flip(1).int().argmax(1) - used.int().argmax(1), 0)
    first = torch.where(used.any(1), used.int().argmax(1), 0)
    spans = zip(filters, first.tolist(), count.tolist(), strict=True)
    return {
        "window": reference.window(settings, torch.float64) / 2,
        "twiddle": torch.stack([angle.cos(), -angle.sin()], 1),
        "weights": torch.cat([row[a : a + k] for row, a, k in spans]).double(),
        "place": 2 * reversed_pair + n % 2,
        "first": first,
        "count": count,
        "from": count.cumsum(0) - count,
    }


def fbank(waveform, length, settings, T, roll):
    """As `reference.fbank`, for float32."""
    scales = (settings.frame_ms, settings.hop_ms, settings.low_hz, settings.high_hz, settings.preemphasis)
    return log_mel(waveform, length, roll, T, settings.sample_rate, settings.n_mels, *scales)


@torch.library.custom_op("fftp::native_fbank", mutates_args=(), device_types="cpu")
def log_mel(
    waveform: torch.Tensor,
    length: torch.Tensor,
    roll: torch.Tensor | None,
    T: int,
    sample_rate: int,
    n_mels: int,
    frame_ms: float,
    hop_ms: float,
    low_hz: float,
    high_hz: float,
    preemphasis: float,
) -> torch.Tensor:
    """`[B, T, n_mels]`; the last seven are the fields of FbankSettings."""
    settings = FbankSettings(
        sample_rate=sample_rate,
        n_mels=n_mels,
        frame_ms=frame_ms,
        hop_ms=hop_ms,
        low_hz=low_hz,
        high_hz=high_hz,
        preemphasis=preemphasis,
    )
    tables = _tables(settings)
    B, W = waveform.shape
    waveform = waveform if waveform.stride(1) == 1 else waveform.contiguous()
    length = length.to(torch.int64).contiguous()
    roll = None if roll is None else roll.to(torch.int64).contiguous()
    out = torch.empty(B, T, n_mels, dtype=torch.float32, device="cpu")
    sizes = (T, n_mels, settings.frame, settings.hop, max(1, settings.n_fft // 2), min(settings.frames(W), T))
    work = _Fbank(B, W, waveform.stride(0), *sizes, preemphasis)
    for name, tensor in tables.items():
        setattr(work, name, tensor.data_ptr())
    work.waveform, work.length, work.out = waveform.data_ptr(), length.data_ptr(), out.data_ptr()
    work.roll = None if roll is None else roll.data_ptr()
    LIBRARY.call("fbank", work)
    return out


@log_mel.register_fake
def _(waveform, length, roll, T, sample_rate, n_mels, frame_ms, hop_ms, low_hz, high_hz, preemphasis):
    return waveform.new_empty(waveform.shape[0], T, n_mels)


def normalise(log_mel, mean, std, noise):
    """As `reference.normalise`, bit for bit, for float32."""
    seed, epoch, tickets = (0, 0, None) if noise is None else noise
    keys = (keyed.on_device(number, log_mel.device) for number in (seed, epoch))
    normalise_(log_mel, mean, 2 * std, *keys, tickets)
    return log_mel


@torch.library.custom_op("fftp::native_normalise", mutates_args=("log_mel",), device_types="cpu")
def normalise_(
    log_mel: torch.Tensor,
    mean: float,
    divisor: float,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    tickets: torch.Tensor | None,
) -> None:
    """(log_mel - mean) / divisor and, with tickets, their noise, in place; seed and epoch int64 `[1]`."""
    cells = log_mel.contiguous()
    tickets = None if tickets is None else tickets.contiguous()
    work = _Normalise(cells.shape[0], cells[0].numel() if len(cells) else 0, mean, divisor)
    work.seed, work.epoch = seed.item() % 2**64, epoch.item() % 2**32
    work.tickets, work.log_mel = None if tickets is None else tickets.data_ptr(), cells.data_ptr()
    LIBRARY.call("normalise", work)
    if cells is not log_mel:
        log_mel.copy_(cells)


@normalise_.register_fake
def _(log_mel, mean, divisor, seed, epoch, tickets):
    return None
