"""Waveform to normalised log-mel: the front end of AST and AuM, batched."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import nn

import kernels
from kernels import FbankSettings
from kernels.fbank.reference import LOG_FLOOR, mel_matrix, window

# (mean, standard deviation) of the log-mel of each data set's training clips.
STATISTICS = {
    "audioset": (-4.2677393, 4.5689974),  # AST, src/run.py
    "speechcommands": (-6.845978, 5.5654526),  # AST, src/run.py
    "esc50": (-6.6268077, 5.358466),  # AST, src/run.py
}


@dataclass(frozen=True, kw_only=True)
class FrontEndSettings:
    """What turns a waveform into the model's input.

    T: frames of the input; clips are padded with zero frames or cut at their end. fit: "pad", or "resize", which stretches
    the clip's own frames to T bilinearly (the paper says "resized" for Speech Commands; PAPER_NOTES D-23).
    mean, std: the log-mel is normalised as (x - mean) / (2 std), AST's convention.
    clip_samples: samples of a training clip; longer recordings are classified in windows of this length.
    """

    T: int
    clip_samples: int
    mean: float
    std: float
    fit: Literal["pad", "resize"] = "pad"
    fbank: FbankSettings = field(default_factory=FbankSettings)

    @property
    def F(self) -> int:
        return self.fbank.n_mels

    def windows(self, n: int) -> list[tuple[int, int]]:
        """(start, end) in samples of the windows of a recording of n: end to end, the last one ending with the recording."""
        W = self.clip_samples
        if n <= W:
            return [(0, n)]
        starts = list(range(0, n - W + 1, W))
        if starts[-1] + W < n:
            starts.append(n - W)
        return [(start, start + W) for start in starts]


def _published(data: str, T: int, seconds: int) -> FrontEndSettings:
    mean, std = STATISTICS[data]
    return FrontEndSettings(T=T, clip_samples=seconds * FbankSettings().sample_rate, mean=mean, std=std)


# "system-data set" -> its front end; a clip has the data set's own length, mean and std are AST's (AuM and, by
# PAPER_NOTES D-26, the paper take them too).
PRESETS = {
    "ast-audioset": _published("audioset", 1024, 10),  # AST, egs/audioset/run.sh
    "ast-esc50": _published("esc50", 512, 5),  # AST, egs/esc50/run_esc.sh
    "ast-speechcommands": _published("speechcommands", 128, 1),  # AST, egs/speechcommands/run_sc.sh
    "aum-audioset": _published("audioset", 1024, 10),  # AuM, exps/audioset
    "aum-speechcommands": _published("speechcommands", 128, 1),  # AuM, exps/speechcommands
    "fftp-audioset": _published("audioset", 1000, 10),  # the paper, section IV-A: 128 x 1000
    "fftp-speechcommands": _published("speechcommands", 128, 1),  # the paper, section IV-A: 128 x 128
}


class FrontEnd:
    """`front_end(waveform, length)`: `[B, W]` samples -> normalised log-mel `[B, T, F]`.

    The parts are public because training paints masks between them: `log_mel`, then `normalise`.
    """

    def __init__(self, settings: FrontEndSettings):
        self.settings = settings

    def log_mel(
        self,
        waveform: torch.Tensor,
        length: torch.Tensor,
        roll: torch.Tensor | None = None,
        centred: bool = False,
    ) -> torch.Tensor:
        """Un-normalised log-mel `[B, T, F]` in float32 (float64 for a float64 waveform).

        waveform `[B, W]` in -1..1, zero behind length `[B]` samples; roll `[B]` frames, round the end of the T frames.
        centred: each clip is without its mean already, as `kernels.waveforms` makes them.
        """
        s = self.settings
        shortest = s.fbank.frame
        if waveform.shape[1] < shortest:
            waveform = nnf.pad(waveform, (0, shortest - waveform.shape[1]))
        if not centred:
            waveform = kernels.remove_mean(waveform, length)
        if s.fit == "pad":
            return kernels.fbank(waveform, length, s.fbank, s.T, roll)
        log_mel = self._resized(kernels.fbank(waveform, length, s.fbank), s.fbank.frames(length))
        return log_mel if roll is None else _rolled(log_mel, roll)

    def _resized(self, log_mel, frames):
        """Each clip's own frames stretched to T, bilinear; one clip at a time, since their lengths differ."""
        out = log_mel.new_zeros(log_mel.shape[0], self.settings.T, log_mel.shape[2])
        for b, n in enumerate(frames.tolist()):
            if n:
                stretched = nnf.interpolate(log_mel[b : b + 1, :n].mT, size=self.settings.T, mode="linear")
                out[b] = stretched[0].T
        return out

    def fitted(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Un-normalised frames of sound `[B, n, F]` as the model's input `[B, T, F]`, a new tensor: followed by zeros or cut at
        the end, or stretched where that is the settings' fit."""
        if self.settings.fit == "resize":
            return self._resized(log_mel, torch.full(log_mel.shape[:1], log_mel.shape[1]))
        out = log_mel.new_zeros(log_mel.shape[0], self.settings.T, log_mel.shape[2])
        n = min(log_mel.shape[1], self.settings.T)
        out[:, :n] = log_mel[:, :n]
        return out

    def valid_frames(self, length: torch.Tensor) -> torch.Tensor:
        """Frames that hold sound rather than padding, int64 `[B]`."""
        if self.settings.fit == "resize":
            return torch.full_like(length, self.settings.T)
        return self.settings.fbank.frames(length).clamp_max(self.settings.T)

    def normalise(self, log_mel: torch.Tensor, noise: tuple | None = None) -> torch.Tensor:
        """(x - mean) / (2 std), in place; noise as `kernels.normalise` takes it."""
        return kernels.normalise(log_mel, self.settings.mean, self.settings.std, noise)

    def __call__(self, waveform: torch.Tensor, length: torch.Tensor | None = None) -> torch.Tensor:
        if waveform.ndim != 2:
            raise ValueError(f"waveform is (B, W), got {tuple(waveform.shape)}")
        if length is None:
            length = torch.full(waveform.shape[:1], waveform.shape[1], dtype=torch.int64, device=waveform.device)
        return self.normalise(self.log_mel(waveform, length))


class RealFrontEnd(nn.Module):
    """`FrontEnd` as a module of real products alone, `[B, W]` -> normalised log-mel `[B, T, F]`, for torch.export and ONNX.

    The transform is a product with cosines and sines, where `kernels.fbank` has a complex FFT that few runtimes know; B may be
    dynamic, W is fixed (default: settings.clip_samples) and all W samples are sound, or the first `samples` of each clip,
    which may be dynamic too. It costs more than the FFT does: for training and prediction here take `FrontEnd`.

    float32, by the same rule as `FrontEnd`: at most twice torchaudio's own error in float32, plus 1e-4. Each
    frame's mean is taken off before the product, since the lowest bands are differences of large sums otherwise; that a
    clip's mean was to go before is then implied. Raises ValueError for a W shorter than one window, and for a waveform of
    another shape.
    """

    def __init__(self, settings: FrontEndSettings, W: int | None = None):
        super().__init__()
        fbank = settings.fbank
        self.settings, self.W = settings, settings.clip_samples if W is None else W
        if fbank.frame > self.W:
            raise ValueError(f"W is at least one window of {fbank.frame} samples, got {self.W}")
        bins = fbank.n_fft // 2  # without the Nyquist bin, which has no weight in any filter
        turns = torch.arange(fbank.frame, dtype=torch.float64)[:, None] * torch.arange(bins) / fbank.n_fft
        angles = 2 * math.pi * turns  # (frame, bins)
        constants = {
            "taper": window(fbank, torch.float32),
            "transform": torch.cat([angles.cos(), angles.sin()], 1).float(),  # (frame, 2 bins)
            "filters": mel_matrix(fbank)[:, :bins].T.contiguous(),  # (bins, F)
        }
        for name, tensor in constants.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, waveform: torch.Tensor, samples: int | None = None) -> torch.Tensor:
        s, fbank = self.settings, self.settings.fbank
        if waveform.ndim != 2 or waveform.shape[1] != self.W:
            raise ValueError(f"waveform is (B, {self.W}), got {tuple(waveform.shape)}")
        frames = waveform.unfold(1, fbank.frame, fbank.hop)  # (B, frames, frame)
        frames = frames - frames.mean(2, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], 2)  # Kaldi repeats the first sample
        spectrum = ((frames - fbank.preemphasis * before) * self.taper) @ self.transform  # (B, frames, 2 bins)
        real, imaginary = spectrum.square().chunk(2, 2)
        log_mel = ((real + imaginary) @ self.filters).clamp_min(LOG_FLOOR).log()  # (B, frames, F)
        if samples is not None:
            sound = (
                torch.arange(log_mel.shape[1], device=log_mel.device) * fbank.hop + fbank.frame <= samples
            )  # (frames,)
            log_mel = torch.where(sound[:, None], log_mel, 0.0)
        if s.fit == "resize" and samples is not None:
            log_mel = _stretched(log_mel, sound.sum(), s.T)
        elif s.fit == "resize":
            log_mel = nnf.interpolate(log_mel.mT, size=s.T, mode="linear").mT
        else:
            log_mel = nnf.pad(log_mel[:, : s.T], (0, 0, 0, max(0, s.T - log_mel.shape[1])))
        return (log_mel - s.mean) / (2 * s.std)


def _stretched(log_mel, frames, T):
    """The first frames of each clip, a number on the device, stretched to T: linear interpolation as nnf.interpolate has it."""
    at = ((torch.arange(T, device=log_mel.device) + 0.5) * (frames / T) - 0.5).clamp_min(0)  # (T,)
    low = at.floor()
    share = (at - low)[:, None]
    high = torch.minimum(low + 1, (frames - 1).clamp_min(0).float())
    return log_mel[:, low.long()] * (1 - share) + log_mel[:, high.long()] * share


def _rolled(log_mel, roll):
    T = log_mel.shape[1]
    source = (torch.arange(T, device=log_mel.device) - roll[:, None]) % T  # (B, T)
    return log_mel.gather(1, source[:, :, None].expand_as(log_mel))


class Statistics:
    """Running mean and standard deviation of log-mel cells."""

    def __init__(self):
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, log_mel: torch.Tensor, valid_frames: torch.Tensor | None = None) -> None:
        """Take in un-normalised `[B, T, F]`: every cell, padding included, as AST counts (src/get_norm_stats.py), or only
        the frames before valid_frames[b]."""
        cells = log_mel.double()
        if valid_frames is not None:
            cells = cells[torch.arange(log_mel.shape[1], device=log_mel.device) < valid_frames[:, None]]
        self.count += cells.numel()
        self.total += float(cells.sum())
        self.squares += float(cells.square().sum())

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def std(self) -> float:
        return max(0.0, self.squares / self.count - self.mean**2) ** 0.5
