"""Waveform to log-mel, equal to Kaldi's compute-fbank-feats as torchaudio.compliance.kaldi.fbank renders it."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from kernels import draws

# Frames that go through the FFT and the mel product at a time. The number is fixed and the last block is padded, so
# that a frame meets the same matrix product whatever else is in the batch; 512 rows stay in a core's second-level cache.
BLOCK = 512
LOG_FLOOR = 2.0**-23  # energies below it count as this much: float32's epsilon, as Kaldi has it
MEL_BREAK_HZ, MEL_SCALE = 700.0, 1127.0  # mel(f) = 1127 ln(1 + f / 700)


@dataclass(frozen=True, kw_only=True)
class FbankSettings:
    """Parameters of the filter bank; the defaults are AST's and AuM's (`htk_compat`, Hann, no dither)."""

    sample_rate: int = 16000  # Hz
    n_mels: int = 128
    frame_ms: float = 25.0
    hop_ms: float = 10.0
    low_hz: float = 20.0
    high_hz: float = 0.0  # 0 or below: so far under the Nyquist frequency
    preemphasis: float = 0.97

    @property
    def frame(self) -> int:
        """Samples in an analysis window."""
        return int(self.sample_rate * self.frame_ms / 1000)

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return int(self.sample_rate * self.hop_ms / 1000)

    @property
    def n_fft(self) -> int:
        """The power of two that holds a frame."""
        return 1 << (self.frame - 1).bit_length()

    def frames(self, samples):
        """Frames of a clip of so many samples (integers or int64 tensor): whole windows only, Kaldi's snip_edges."""
        if isinstance(samples, torch.Tensor):
            return ((samples - self.frame).div(self.hop, rounding_mode="floor") + 1).clamp_min(0)
        return max(0, (samples - self.frame) // self.hop + 1)

    def samples(self, frames: int) -> int:
        """The shortest clip with so many frames."""
        return self.frame + (frames - 1) * self.hop


@lru_cache(maxsize=16)
def mel_matrix(settings: FbankSettings) -> torch.Tensor:
    """Triangular mel filters, float32 `[n_mels, n_fft // 2 + 1]`; the Nyquist bin has weight 0.

    Computed in float32 as Kaldi and torchaudio do: the narrow filters at the bottom feel the rounding (up to 1e-4 in
    the logarithm), and equal features need equal filters. Only the logarithm is rounded once from float64, because
    torch's float32 one has other last bits on other processors, and a model should hear the same everywhere.
    """
    nyquist = settings.sample_rate / 2
    high = settings.high_hz if settings.high_hz > 0 else nyquist + settings.high_hz
    low_mel, high_mel = (MEL_SCALE * math.log(1.0 + f / MEL_BREAK_HZ) for f in (settings.low_hz, high))
    spacing = (high_mel - low_mel) / (settings.n_mels + 1)
    number = torch.arange(settings.n_mels, dtype=torch.float32)[:, None]
    left, centre, right = (low_mel + (number + k) * spacing for k in (0.0, 1.0, 2.0))
    bins = settings.n_fft // 2
    frequency = (settings.sample_rate / settings.n_fft) * torch.arange(bins, dtype=torch.float32)
    mel = (MEL_SCALE * (1.0 + frequency / MEL_BREAK_HZ).double().log().float())[None]
    weights = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp_min(0.0)
    return torch.nn.functional.pad(weights, (0, 1))


@lru_cache(maxsize=16)
def window(settings: FbankSettings, dtype: torch.dtype) -> torch.Tensor:
    """The symmetric Hann window, `[frame]`."""
    return torch.hann_window(settings.frame, periodic=False, dtype=dtype)


def fbank(waveform, length, settings, T, roll):
    """log(max(mel_matrix |FFT(window * preemphasis(frame - mean))|^2, floor)) of every whole frame, placed in `[B, T, F]`.

    Rows without a frame stay zero; row t of the clip lands at (t + roll[b]) mod T.
    """
    B, W = waveform.shape
    log_mel = waveform.new_zeros(B, T, settings.n_mels)
    n_frames = min(settings.frames(W), T)
    if B == 0 or n_frames == 0:
        return log_mel
    frames = waveform.unfold(1, settings.frame, settings.hop)  # (B, frames, frame), a view
    valid = torch.arange(n_frames, device=waveform.device) < settings.frames(length)[:, None]  # (B, n_frames)
    clip, t = valid.nonzero(as_tuple=True)
    target = t if roll is None else (t + roll[clip]) % T
    filters = mel_matrix(settings).to(waveform.device, waveform.dtype).T.contiguous()
    taper = window(settings, waveform.dtype).to(waveform.device)
    padded = waveform.new_zeros(BLOCK, settings.n_fft)
    for i in range(0, len(clip), BLOCK):
        part = slice(i, i + BLOCK)
        rows = frames[clip[part], t[part]]
        if len(rows) < BLOCK:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, BLOCK - len(rows)))
        log_mel[clip[part], target[part]] = _block(rows, taper, filters, padded, settings)[: len(clip[part])]
    return log_mel


def _block(rows, taper, filters, padded, settings):
    """Log-mel of BLOCK frames, `[BLOCK, frame]` -> `[BLOCK, n_mels]`; padded is scratch whose tail stays zero."""
    rows = rows - rows.mean(1, keepdim=True)
    frame = padded[:, : settings.frame]
    torch.sub(rows[:, 1:], rows[:, :-1], alpha=settings.preemphasis, out=frame[:, 1:])
    frame[:, 0] = rows[:, 0] * (1.0 - settings.preemphasis)  # Kaldi repeats the first sample before the window
    frame *= taper
    power = torch.view_as_real(torch.fft.rfft(padded)).square().sum(-1)  # (BLOCK, n_fft // 2 + 1)
    return (power @ filters).clamp_min_(LOG_FLOOR).log_()


def normalise(log_mel, mean, std, noise):
    """(x - mean) / (2 std), plus the keyed noise where it is asked for; in place."""
    log_mel.sub_(mean).div_(2 * std)
    if noise is not None:
        log_mel.add_(draws.draw_noise(*noise, *log_mel.shape[1:]))
    return log_mel
