"""What happens to training waveforms before the front end: playing speed, shift in time, background noise.

Plain PyTorch on the device; each row depends on its own clip alone, and the host reads nothing. Waveforms float32 `[B, W]`
are zero behind their length int64 `[B]` samples, which stays as it is.
"""

import torch
import torch.nn.functional as nnf

from kernels.draws import SPEED_UNIT

CHUNK = 256  # samples whose squares are added at a time
_BITS = (2 * SPEED_UNIT).bit_length() - 1  # behind the point of a place between samples


def moved(waveform: torch.Tensor, length: torch.Tensor, shift: torch.Tensor | None, speed: torch.Tensor | None):
    """Each clip played faster or slower about its middle, then moved along time; zeros come in where it leaves off.

    out[i] = clip(m + speed (i - shift - m)) for i < n, with n = length, m = (n - 1) / 2, and a clip that is 0 outside of
    0..n-1; between samples it is Catmull and Rom's cubic (Keys, 1981, a = -1/2). shift: int64 `[B]` samples, later for
    positive ones. speed: int64 `[B]` in 1 / SPEED_UNIT, so that places are whole numbers: the same samples on every device.
    Without speed, and at speed 1, samples are copied as they are. Nothing is filtered: played faster, what lay above
    8 kHz / speed folds back below 8 kHz.
    """
    if shift is None and speed is None:
        return waveform
    W = waveform.shape[1]
    i, n = torch.arange(W, device=waveform.device), length[:, None]
    since = i if shift is None else i - shift[:, None]
    padded = nnf.pad(waveform, (4, 4))  # four zeros on either side stand for all that is outside

    def at(place, ahead):
        """Samples so many places after `place`, -1 to 2."""
        return padded[:, ahead + 1 : ahead + W + 6].gather(1, place)  # (B, W)

    if speed is None:
        out = at((since + 3).clamp(0, W + 4).expand_as(waveform), 0)
    else:
        place = (2 * since - (n - 1)) * speed[:, None] + (n - 1) * SPEED_UNIT  # (B, W), in 2^-BITS of a sample
        whole, t = place >> _BITS, (place & (2**_BITS - 1)).float() * 2.0**-_BITS
        place = whole.add_(3).clamp_(0, W + 4)
        out = at(place, -1) * (0.5 * t * (t * (2 - t) - 1))
        out += at(place, 0) * (1 + 0.5 * t * t * (3 * t - 5))
        out += at(place, 1) * (0.5 * t * (1 + t * (4 - 3 * t)))
        out += at(place, 2) * (0.5 * t * t * (t - 1))
    return torch.where(i < n, out, 0.0)


def with_background(
    waveform: torch.Tensor,
    length: torch.Tensor,
    noise: torch.Tensor,
    level: torch.Tensor,
    colour: torch.Tensor,
    start: torch.Tensor,
) -> torch.Tensor:
    """waveform + level rms(clip) noise[colour, start + i], as far as the clip goes.

    noise: float32 `[colours, n]` with mean square 1, read round its end; level: float32 `[B]`, amplitude of the noise over the
    clip's, 0 for none; colour, start: int64 `[B]`.
    """
    W, size = waveform.shape[1], noise.shape[1]
    i = torch.arange(W, device=waveform.device)
    taken = noise.view(-1)[colour[:, None] * size + (start[:, None] + i) % size]  # (B, W)
    factor = (level * power(waveform, length).sqrt().float())[:, None]
    return torch.where(i < length[:, None], waveform + factor * taken, 0.0)


def power(waveform: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Mean square of each clip, float64 `[B]`; 0 for an empty one. Chunks first: the same bits at any batch size."""
    chunks = nnf.pad(waveform, (0, -waveform.shape[1] % CHUNK)).square().unflatten(1, (-1, CHUNK))
    return chunks.sum(2, dtype=torch.float64).sum(1) / length.clamp_min(1)
