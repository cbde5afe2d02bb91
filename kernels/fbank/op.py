"""The public door of the front end's kernel: checks, and the choice of backend."""

import torch

from kernels import dispatch
from kernels.fbank.reference import FbankSettings


def fbank(
    waveform: torch.Tensor,
    length: torch.Tensor | None = None,
    settings: FbankSettings | None = None,
    T: int | None = None,
    roll: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-mel of a batch of clips, `[B, T, F]`, time-major.

    waveform: `[B, W]` float32 or float64 in -1..1 at settings.sample_rate, each clip's own mean already taken off where
    that is wanted (`kernels.waveforms` and `kernels.remove_mean` do). length: int64 `[B]`, samples of each clip; None means
    all W. T: frames to return, padded with zeros or cut at the end; None means as many as W holds. roll: int64 `[B]`,
    frames to roll each clip by, round the end of its T frames.

    Equal to torchaudio.compliance.kaldi.fbank with AST's parameters (AST, src/dataloader.py); row b is the same bits
    whatever else is in the batch. Raises ValueError for another shape, type or a clip shorter than one window.
    """
    settings = settings or FbankSettings()
    if waveform.ndim != 2 or waveform.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"waveform is float32 or float64 (B, W), got {waveform.dtype} {tuple(waveform.shape)}")
    B, W = waveform.shape
    if length is None:
        length = torch.full((B,), W, dtype=torch.int64, device=waveform.device)
    if length.shape != (B,) or (roll is not None and roll.shape != (B,)):
        raise ValueError(
            f"length and roll are (B,) = ({B},), got {tuple(length.shape)} and {roll if roll is None else tuple(roll.shape)}"
        )
    if settings.frame > W:
        raise ValueError(f"a clip needs {settings.frame} samples for one window, got W={W}")
    T = settings.frames(W) if T is None else T
    return dispatch.choose("fbank", waveform)(waveform, length, settings, T, roll)


def normalise(
    log_mel: torch.Tensor,
    mean: float,
    std: float,
    noise: tuple[int | torch.Tensor, int | torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """(log_mel - mean) / (2 std), AST's convention, in place; `[B, T, F]`, which has to be the caller's own buffer.

    noise: (seed, epoch, tickets int64 `[B]`), to add `kernels.draws.draw_noise` on the way. Returns log_mel.
    Raises ValueError for another shape, a std that is not above 0, or tickets that are not int64 `[B]`.
    """
    if log_mel.ndim != 3 or not std > 0:
        raise ValueError(f"normalise takes log_mel (B, T, F) and std above 0, got {tuple(log_mel.shape)} and std={std}")
    if noise is not None and (noise[2].shape != log_mel.shape[:1] or noise[2].dtype != torch.int64):
        raise ValueError(f"tickets is int64 ({log_mel.shape[0]},), got {noise[2].dtype} {tuple(noise[2].shape)}")
    return dispatch.choose("normalise", log_mel)(log_mel, mean, std, noise)
