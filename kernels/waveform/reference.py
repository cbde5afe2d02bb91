"""The wave stage as it is defined: gather, remove the mean, gain, mix. Plain PyTorch, on any device."""

import torch

SCALE = 1 / 32768.0


def waveforms(samples, start, length, W, gain, partner):
    """weight * own + (1 - weight) * partner's, without means; see `op.waveforms`."""
    length = length.clamp_max(W)
    own = gather(samples, start, length, W)
    if gain is not None:
        own = own * gain[:, None]
    own = remove_mean(own, length)
    if partner is None:
        return own
    start, other_length, weight = partner
    other_length = other_length.clamp_max(W)
    other = remove_mean(gather(samples, start, other_length, W), other_length)
    weight = weight[:, None]
    other = torch.where(inside(length, W), other, 0.0)
    mixture = remove_mean(weight * own + (1 - weight) * other, length)
    return torch.where(weight == 1, own, mixture)


def gather(samples, start, length, W):
    """samples[start : start + length] of each clip in -1..1, followed by zeros; float32 `[B, W]`."""
    if samples.device.type == "cpu":  # slices cost less than an index for every sample
        out = torch.zeros(start.numel(), W)
        for row, first, n in zip(out, start.tolist(), length.tolist(), strict=True):
            torch.mul(samples[first : first + n], SCALE, out=row[:n])
        return out
    place = start[:, None] + torch.arange(W, device=samples.device)
    here = inside(length, W)
    return torch.where(here, samples[torch.where(here, place, 0)].float() * SCALE, 0.0)


def inside(length, W):
    """True before the end of each clip: bool `[B, W]`."""
    return torch.arange(W, device=length.device) < length[:, None]


def clip_mean(waveform: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Mean of each clip's first length[b] samples, `[B]`; waveform `[B, W]` is zero behind them.

    Summed in float64, 256 samples at a time and then one after the other, so that a clip's mean does not depend on how
    long the others are.
    """
    B, W = waveform.shape
    chunks = torch.nn.functional.pad(waveform, (0, -W % 256)).view(B, -(-W // 256), 256)
    running = chunks.sum(-1, dtype=torch.float64).cumsum(1)
    last = ((length - 1).clamp_min(0) // 256)[:, None]
    return (running.gather(1, last).squeeze(1) / length.clamp_min(1)).to(waveform.dtype)


def remove_mean(waveform: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Each clip minus its own mean, zero again behind length[b]; `[B, W]` in and out."""
    return torch.where(inside(length, waveform.shape[1]), waveform - clip_mean(waveform, length)[:, None], 0.0)
