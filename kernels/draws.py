"""What is drawn for a sample besides its masks: order, roll, gain, mixup, shift, speed, noises, lead. All keyed, see
`kernels.philox`.

Arguments have the same meaning everywhere: seed, a 64-bit integer (or one-element int64 tensor); epoch, an integer (or
one-element tensor); tickets `[B]` int64, each sample's place in the epoch's order. A sample's draws depend on these
three alone: not on the batch, the device or the process.
"""

import numpy as np
import torch

from kernels import philox as keyed

ROLL_SPAN = 20  # frames: rolls are uniform on -10..9 (AST's dataloader.py)
NOISE_SCALE = 10.0  # a clip's noise is at most 1 / 10 in normalised units (AST's dataloader.py)
SPEED_UNIT = 2**30  # playing speeds are whole multiples of 1 / SPEED_UNIT
COLOURS = (0, 1, 2)  # of background noise, white, pink and brown: its power falls as so many powers of the frequency
COLOURED = 2**19  # samples of each colour, 33 s at 16 kHz
LOWEST = 1 / 800  # cycles a sample, 20 Hz at 16 kHz: where the filter bank begins, and the noise


def shuffle(seed: int, epoch: int, n: int) -> np.ndarray:
    """The epoch's order: a permutation of 0..n-1 as int64 `[n]`."""
    a, b, _, _ = keyed.philox_numpy(seed, keyed.SHUFFLE << 16, 0, epoch, np.arange(n))
    return np.argsort((a.astype(np.uint64) << np.uint64(32)) | b, kind="stable")


def balanced(seed: int, epoch: int, weights: np.ndarray, n: int) -> np.ndarray:
    """n draws with replacement, each sample as likely as its integer weight `[samples]` says; int64 `[n]`.

    The sum of the weights stays below 2^32, so that 64-bit products cannot overflow.
    """
    total = np.cumsum(np.asarray(weights, dtype=np.uint64))
    if not 0 < int(total[-1]) < 2**32:
        raise ValueError(f"the weights must add up to 1..2^32-1, got {int(total[-1])}")
    a = keyed.philox_numpy(seed, keyed.BALANCED << 16, 0, epoch, np.arange(n))[0].astype(np.uint64)
    return np.searchsorted(total, (a * total[-1]) >> np.uint64(32), side="right")


def draw_roll(seed, epoch, tickets: torch.Tensor) -> torch.Tensor:
    """Frames to roll each clip by along time, int64 `[B]` in -10..9."""
    a, _, _, _ = keyed.philox(seed, keyed.ROLL << 16, 0, epoch, tickets)
    return keyed.below(a, ROLL_SPAN) - ROLL_SPAN // 2


def draw_gain(seed, epoch, tickets: torch.Tensor, decibels: float) -> torch.Tensor:
    """A factor for each waveform, float32 `[B]`, uniform in dB between -decibels and +decibels."""
    a, _, _, _ = keyed.philox(seed, keyed.GAIN << 16, 0, epoch, tickets)
    # In float64, then rounded: the library's float32 power differs in its last bit with the place in the batch.
    return (10.0 ** ((2.0 * keyed.uniform(a).double() - 1.0) * (decibels / 20.0))).float()


def draw_mixup(seed, epoch, tickets: torch.Tensor, probability: float, n: int, fixed: bool = False):
    """Mixup's decision, partner and weight (Zhang et al., 2018; PAPER_NOTES D-12).

    Returns (mixed bool `[B]`, partner int64 `[B]` in 0..n-1, lambda float32 `[B]`). lambda ~ Beta(10, 10), drawn as the
    10th smallest of 19 uniform words: exact, and the same on every device. fixed: lambda = 0.5, the paper's other reading.
    """
    a, b, _, _ = keyed.philox(seed, keyed.MIXUP << 16, 0, epoch, tickets)
    mixed, partner = keyed.passes(a, probability), keyed.below(b, n)
    if fixed:
        return mixed, partner, torch.full(tickets.shape, 0.5, device=tickets.device)
    attempts = torch.arange(5, device=tickets.device)
    words = torch.stack(
        keyed.philox(seed, (keyed.LAMBDA << 16) + attempts, 0, epoch, tickets[:, None]), -1
    )  # (B, 5, 4)
    tenth = words.flatten(1)[:, :19].sort(dim=1).values[:, 9]
    return mixed, partner, (tenth.double() * 2.0**-32).float()


def mixup_partners(seed: int, epoch: int, tickets: np.ndarray, probability: float, n: int):
    """`draw_mixup`'s decision and partner on the host, for what is gathered there: bool and int64 arrays `[B]`."""
    a, b, _, _ = keyed.philox_numpy(seed, keyed.MIXUP << 16, 0, epoch, tickets)
    partner = (b.astype(np.uint64) * np.uint64(n)) >> np.uint64(32)
    return a < round(probability * 2**32), partner.astype(np.int64)


def draw_shift(seed, epoch, tickets: torch.Tensor, most: int) -> torch.Tensor:
    """Samples to move each waveform by, int64 `[B]`, uniform on -most..most."""
    a, _, _, _ = keyed.philox(seed, keyed.SHIFT << 16, 0, epoch, tickets)
    return keyed.below(a, 2 * most + 1) - most


def draw_speed(seed, epoch, tickets: torch.Tensor, most: float) -> torch.Tensor:
    """A playing speed for each waveform in 1 / SPEED_UNIT, int64 `[B]`, uniform on 1 - most .. 1 + most; most below 1."""
    reach = round(most * SPEED_UNIT)
    a, _, _, _ = keyed.philox(seed, keyed.SPEED << 16, 0, epoch, tickets)
    return keyed.below(a, 2 * reach + 1) + (SPEED_UNIT - reach)


def draw_background(seed, epoch, tickets: torch.Tensor, probability: float, low: float, high: float):
    """Background noise for each clip: (level float32, colour int64, start int64), each `[B]`.

    level: amplitude over the clip's, from a ratio of the clip to the noise that is uniform on low..high dB, or 0 where there
    is none; colour: a row of `coloured_noise`; start: where in it the clip begins.
    """
    a, b, c, d = keyed.philox(seed, keyed.BACKGROUND << 16, 0, epoch, tickets)
    decibels = low + (high - low) * keyed.uniform(b).double()
    level = torch.where(keyed.passes(a, probability), 10.0 ** (-decibels / 20.0), 0.0)  # float64, as in `draw_gain`
    return level.float(), keyed.below(c, len(COLOURS)), keyed.below(d, COLOURED)


def coloured_noise(seed: int) -> np.ndarray:
    """A run's background noise, float32 `[colours, COLOURED]`: power proportional to f^-0, f^-1 and f^-2 from LOWEST on, mean
    square 1, without a seam from its end to its beginning. Made on the host, so that every device has the same."""
    rows, blocks = np.arange(len(COLOURS))[:, None], np.arange(COLOURED // 4)
    words = keyed.philox_numpy(seed, (keyed.BACKGROUND << 16) + 1, blocks, 0, rows)  # 4 x (colours, blocks)
    white = np.stack(words, -1).reshape(len(COLOURS), COLOURED) * 2.0**-32 - 0.5
    frequency = np.maximum(np.fft.rfftfreq(COLOURED), 1 / COLOURED)
    fall = np.where(frequency >= LOWEST, frequency ** (-0.5 * np.array(COLOURS)[:, None]), 0.0)
    shaped = np.fft.irfft(np.fft.rfft(white) * fall, COLOURED)
    return (shaped / np.sqrt(np.square(shaped).mean(1, keepdims=True))).astype(np.float32)


def draw_lead(seed, epoch, tickets: torch.Tensor, probability: float, most: int) -> torch.Tensor:
    """Patches of other sound in front of each clip, int64 `[B]`: 0, or with the probability uniform on 1..most."""
    a, b, _, _ = keyed.philox(seed, keyed.LEAD << 16, 0, epoch, tickets)
    return torch.where(keyed.passes(a, probability), 1 + keyed.below(b, most), 0)


def lead_clips(seed, epoch, tickets: torch.Tensor, own: torch.Tensor, clips: int, n: int) -> torch.Tensor:
    """The clips that stand in front of clips `own` `[B]` of 0..n-1, int64 `[clips, B]`, the nearest first; none of them is
    the clip itself unless it is the only one."""
    shapes = 1 + torch.arange(clips, device=tickets.device)[:, None]
    a, _, _, _ = keyed.philox(seed, keyed.LEAD << 16, shapes, epoch, tickets)
    return (own + 1 + keyed.below(a, n - 1)) % n


def lead_clips_numpy(seed: int, epoch: int, tickets: np.ndarray, own: np.ndarray, clips: int, n: int) -> np.ndarray:
    """`lead_clips` on the host, for what is gathered there."""
    a, _, _, _ = keyed.philox_numpy(seed, keyed.LEAD << 16, 1 + np.arange(clips)[:, None], epoch, tickets)
    return (own + 1 + ((a.astype(np.int64) * (n - 1)) >> 32)) % n


def draw_noise(seed, epoch, tickets: torch.Tensor, T: int, F: int) -> torch.Tensor:
    """Noise to add to the normalised log-mel, float32 `[B, T, F]`: U[0, 1) a cell times U[0, 0.1) a clip."""
    tickets = tickets[:, None]
    blocks = -(-T * F // 4)
    scale = keyed.uniform(keyed.philox(seed, keyed.NOISE << 16, 0, epoch, tickets)[0])  # (B, 1)
    scale = scale / torch.full_like(scale, NOISE_SCALE)  # by a number, CUDA would multiply with its rounded inverse
    shapes = 1 + torch.arange(blocks, device=tickets.device)
    words = keyed.philox(seed, keyed.NOISE << 16, shapes, epoch, tickets)  # 4 x (B, blocks)
    cells = torch.stack([keyed.uniform(w) for w in words], -1).flatten(1)[:, : T * F]
    return (cells * scale).view(-1, T, F)
