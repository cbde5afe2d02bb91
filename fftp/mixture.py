"""A mixture of recordings in which it is known what sounds when: what a model that looks for sounds can be judged by."""

from dataclasses import dataclass

import numpy as np

from fftp.errors import UserError

SOUNDING = 0.6  # of a sound's share of a mixture
LOUDNESS = 0.05  # root mean square of a sound there, of full scale
PAUSE_DB = -40.0  # the noise beneath, over that
SHORTEST = 0.2  # seconds of a sound
HOP_SECONDS = 0.01  # from frame to frame


@dataclass(frozen=True, kw_only=True)
class Sound:
    """What can be heard from sample `start` of a mixture up to `stop`."""

    name: str
    start: int
    stop: int


def mixture(clips: list[np.ndarray], names: list[str], length: int, rate: int) -> tuple[np.ndarray, list[Sound]]:
    """The loudest stretch of each clip `[samples]`, equally loud, one after the other with pauses, and where each is.

    Every sound has `SOUNDING` of its share of `length` samples, in the middle of it; the rest is faint white noise, always
    the same. A clip that is shorter is taken whole. Raises UserError where so many do not fit.
    """
    slot = length // len(clips)
    longest = int(SOUNDING * slot)
    if longest < SHORTEST * rate:
        most = int(SOUNDING * length / (SHORTEST * rate))
        raise UserError(f"{len(clips)} recordings do not fit into {length / rate:.1f} s: give {most} or fewer.")
    out = LOUDNESS * 10 ** (PAUSE_DB / 20) * np.random.default_rng(0).standard_normal(length)
    sounds = []
    for i, (clip, name) in enumerate(zip(clips, names, strict=True)):
        n = min(longest, len(clip))
        energy = np.concatenate([[0.0], np.cumsum(np.square(clip, dtype=np.float64))])
        first = int(np.argmax(energy[n:] - energy[:-n]))
        taken = clip[first : first + n].astype(np.float64)
        start = i * slot + (slot - n) // 2
        out[start : start + n] += LOUDNESS * taken / max(np.sqrt(np.mean(taken**2)), 1e-9)
        sounds.append(Sound(name=name, start=start, stop=start + n))
    return out.astype(np.float32), sounds


def mean_over(sounds: list[Sound], heat: np.ndarray, rate: int) -> float:
    """Mean of heat `[T, F]`, which has mean 1 over all cells, over the frames of the sounds: 1 would be no preference."""
    middle = (np.arange(len(heat)) + 0.5) * HOP_SECONDS * rate
    inside = np.any([(middle >= sound.start) & (middle < sound.stop) for sound in sounds], axis=0)
    return float(heat[inside].mean() / heat.mean())
