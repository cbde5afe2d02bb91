"""The front end's Triton kernels as operators of PyTorch: launches, and shapes for tracing.

No gradients: a log-mel is made of recordings, which carry none. Tested in the interpreter, compiled ahead of time
(bench/compile.py), and run on an H200 (LOG.md).
"""

from dataclasses import astuple
from functools import lru_cache

import torch
import triton
from triton import knobs

from kernels import philox as keyed
from kernels.fbank import kernel
from kernels.fbank.kernel import Tile
from kernels.fbank.reference import FbankSettings

MOST_PROGRAMS = 2**31 - 1  # of a launch


def fbank(waveform, length, settings, T, roll):
    """As `reference.fbank`, in float32.

    Raises ValueError for a window that needs a transform outside kernel.POINTS.
    """
    least, most = kernel.POINTS
    if not least <= settings.n_fft <= most:
        raise ValueError(
            f"the Triton front end transforms {least} to {most} points, a window of {settings.frame} samples "
            f"takes {settings.n_fft}: run without --fused, or with FFTP_BACKEND=fbank=reference"
        )
    return log_mel(waveform.float(), length, *astuple(settings), T, roll)


@torch.library.custom_op("fftp::log_mel", mutates_args=())
def log_mel(
    waveform: torch.Tensor,
    length: torch.Tensor,
    sample_rate: int,
    n_mels: int,
    frame_ms: float,
    hop_ms: float,
    low_hz: float,
    high_hz: float,
    preemphasis: float,
    T: int,
    roll: torch.Tensor | None,
) -> torch.Tensor:
    """Waveform float32 `[B, W]`, length and roll int64 `[B]` to log-mel `[B, T, n_mels]`, as `reference.fbank`."""
    settings = FbankSettings(
        sample_rate=sample_rate,
        n_mels=n_mels,
        frame_ms=frame_ms,
        hop_ms=hop_ms,
        low_hz=low_hz,
        high_hz=high_hz,
        preemphasis=preemphasis,
    )
    B, W = waveform.shape
    out = torch.empty(B, T, n_mels, dtype=torch.float32, device=waveform.device)
    if not out.numel():
        return out
    at = _tile(settings)
    tiles = triton.cdiv(T, at.frames)
    if B * tiles > MOST_PROGRAMS:
        raise ValueError(f"a launch takes {MOST_PROGRAMS} tiles of {at.frames} frames at most, got {B * tiles}")
    length = length.contiguous()
    kernel._fbank_kernel[(B * tiles,)](
        waveform.contiguous(), length, length if roll is None else roll.contiguous(),
        *_tables(settings, waveform.device), out,
        W, T, min(settings.frames(W), T), tiles, preemphasis,
        **kernel.constants(settings), ROLL=roll is not None, TILE_T=at.frames, num_warps=at.warps, num_stages=at.stages,
    )  # fmt: skip
    return out


@log_mel.register_fake
def _(waveform, length, sample_rate, n_mels, frame_ms, hop_ms, low_hz, high_hz, preemphasis, T, roll):
    return waveform.new_empty(waveform.shape[0], T, n_mels)


def normalise(log_mel, mean, std, noise):
    """As `reference.normalise`, in one pass."""
    seed, epoch, tickets = (None, None, None) if noise is None else noise
    if noise is not None:
        seed, epoch = (keyed.on_device(number, log_mel.device) for number in (seed, epoch))
    normalise_(log_mel, mean, 2 * std, seed, epoch, tickets)
    return log_mel


@torch.library.custom_op("fftp::normalise_", mutates_args=("log_mel",))
def normalise_(
    log_mel: torch.Tensor,
    mean: float,
    scale: float,
    seed: torch.Tensor | None,
    epoch: torch.Tensor | None,
    tickets: torch.Tensor | None,
) -> None:
    """(log_mel - mean) / scale in place, float32 `[B, T, F]`; seed and epoch int64 `[1]`, tickets int64 `[B]`, or None
    for all three and no noise."""
    B, T, F = log_mel.shape
    if not log_mel.numel():
        return
    blocks = triton.cdiv(T * F, kernel.CELLS)
    if B * blocks > MOST_PROGRAMS or T * F > MOST_PROGRAMS - kernel.CELLS:
        raise ValueError(f"a launch takes {MOST_PROGRAMS} cells of a clip at most, got log_mel {tuple(log_mel.shape)}")
    keys = (log_mel, log_mel, log_mel) if tickets is None else (seed, epoch, tickets.contiguous())
    kernel._normalise_kernel[(B * blocks,)](
        log_mel, *keys,
        *log_mel.stride(),
        T * F, F, blocks, mean, scale,
        NOISE=tickets is not None, BLOCK=kernel.CELLS, num_warps=kernel.WARPS, enable_fp_fusion=False,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _tables(settings: FbankSettings, device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(table.to(device) for table in kernel.tables(settings))


def _tile(settings: FbankSettings) -> Tile:
    return kernel.INTERPRETED if knobs.runtime.interpret else kernel.tile(settings.n_fft)
