"""`synth`: ten classes of one-second sounds, made from (seed, split, number) alone.

The classes differ in how the sound moves through time and frequency, not in where its energy lies: pitch, band, level,
onset, length, brightness and noise are drawn alike for all, so the mean spectrum says little about the class.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from fftp.errors import UserError
from train.data.clips import ARRAY_RATE, SPLITS, Clip, DataSet

LENGTH = ARRAY_RATE  # samples in a clip: one second
_EDGE = 240  # samples (15 ms) of fade at either end of the sound, so that ends do not click


def load(settings: Any) -> DataSet:
    """`synth_train`, `synth_validation` and `synth_test` clips, equally many of each class, for `settings.seed`."""
    counts = (settings.synth_train, settings.synth_validation, settings.synth_test)
    for split, count in zip(SPLITS, counts, strict=True):
        if count < len(CLASSES):
            raise UserError(f"--synth-{split} is {count}: give at least {len(CLASSES)}, one clip of each class.")
    clips = [
        Clip(make(settings.seed, split, number), (number % len(CLASSES),), split, f"{split}/{number}")
        for split, count in zip(SPLITS, counts, strict=True)
        for number in range(count)
    ]
    return DataSet("synth", CLASSES, tuple(clips), multi_label=False, clip_seconds=LENGTH / ARRAY_RATE)


def make(seed: int, split: str, number: int) -> np.ndarray:
    """Clip `number` of a split as int16 (16000,) at 16 kHz; its class is `number % 10`. The same whatever else is made.

    The sound lasts 0.55 to 0.95 s, peaks 3 to 26 dB below full scale, and lies 16 to 34 dB above a background of noise.
    """
    rng = np.random.default_rng((seed % 2**64, SPLITS.index(split), number))
    n = int(rng.integers(int(0.55 * LENGTH), int(0.95 * LENGTH)))
    onset = int(rng.integers(0, LENGTH - n))
    sound = _SOUNDS[CLASSES[number % len(CLASSES)]](rng, n)
    fade = np.sin(np.linspace(0, np.pi / 2, _EDGE, dtype=np.float32)) ** 2
    sound[:_EDGE] *= fade
    sound[-_EDGE:] *= fade[::-1]

    # One tap of feedforward makes the background darker or brighter, by up to 20 dB from end to end.
    background = rng.standard_normal(LENGTH + 1, dtype=np.float32)
    background = background[1:] + np.float32(rng.uniform(-0.8, 0.8)) * background[:-1]
    wanted = _rms(sound) / 10 ** (rng.uniform(16, 34) / 20)
    clip = background * np.float32(wanted / _rms(background))
    clip[onset : onset + n] += sound
    clip *= np.float32(10 ** (rng.uniform(-26, -3) / 20) / np.abs(clip).max())
    return np.rint(clip * 32767).astype(np.int16)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.dot(x, x) / len(x)))


def _tone(rng: np.random.Generator, octaves: np.ndarray) -> np.ndarray:
    """A tone of one to four harmonics whose pitch is `octaves` (n,) above or below a random centre: float32 (n,)."""
    centre = 2 ** rng.uniform(np.log2(500), np.log2(1000))  # Hz; 4 harmonics, 0.75 octaves up, stay below 8 kHz
    cycles = np.cumsum(centre / ARRAY_RATE * np.exp2(octaves)) + rng.uniform()
    angle = ((cycles % 1) * (2 * np.pi)).astype(np.float32)
    current, before, twice_cos = np.sin(angle), np.float32(0), 2 * np.cos(angle)
    tone, strength = current.copy(), 1.0
    for _ in range(rng.integers(0, 4)):
        # sin((k + 1) a) = 2 cos(a) sin(k a) - sin((k - 1) a): a product in place of a sine for each harmonic.
        current, before = twice_cos * current - before, current
        strength *= rng.uniform(0.4, 0.9)
        tone += np.float32(strength) * current
    return tone


def _band(rng: np.random.Generator, n: int) -> np.ndarray:
    """Gaussian noise in a band 0.4 to 1.5 octaves wide around a random centre: float32 (n,)."""
    centre, half = 2 ** rng.uniform(np.log2(450), np.log2(3500)), rng.uniform(0.2, 0.75)
    low, high = (int(centre * 2**side * LENGTH / ARRAY_RATE) for side in (-half, half))
    spectrum = np.zeros(LENGTH // 2 + 1, dtype=np.complex64)
    spectrum[low:high] = rng.standard_normal(2 * (high - low), dtype=np.float32).view(np.complex64)
    return np.fft.irfft(spectrum)[:n].astype(np.float32) * LENGTH**0.5


def _span(rng: np.random.Generator) -> float:
    """How far a pitch travels, in octaves."""
    return rng.uniform(0.7, 1.5)


def _rising_chirp(rng: np.random.Generator, n: int) -> np.ndarray:
    return _tone(rng, _span(rng) * np.linspace(-0.5, 0.5, n))


def _falling_chirp(rng: np.random.Generator, n: int) -> np.ndarray:
    return _tone(rng, _span(rng) * np.linspace(0.5, -0.5, n))


def _arch(rng: np.random.Generator, n: int) -> np.ndarray:
    """Up, then down."""
    return _tone(rng, _span(rng) * (0.5 - np.abs(np.linspace(-1, 1, n))))


def _rising_steps(rng: np.random.Generator, n: int) -> np.ndarray:
    """Three or four notes, each above the last."""
    notes = int(rng.integers(3, 5))
    return _tone(rng, _span(rng) * (np.arange(n) * notes // n / (notes - 1) - 0.5))


def _steady_tone(rng: np.random.Generator, n: int) -> np.ndarray:
    return _tone(rng, np.full(n, rng.uniform(-0.4, 0.4)))


def _vibrato(rng: np.random.Generator, n: int) -> np.ndarray:
    """Frequency modulation, 4 to 9 times a second."""
    swing = np.sin(2 * np.pi * (rng.uniform(4, 9) / ARRAY_RATE * np.arange(n) + rng.uniform()))
    return _tone(rng, 0.5 * _span(rng) * swing)


def _tremolo(rng: np.random.Generator, n: int) -> np.ndarray:
    """Amplitude modulation, 4 to 9 times a second."""
    return _steady_tone(rng, n) * _pulse(rng, n)


def _clicks(rng: np.random.Generator, n: int) -> np.ndarray:
    """A click every 50 to 150 ms: a few milliseconds of broadband noise that die away."""
    period = int(rng.uniform(0.05, 0.15) * ARRAY_RATE)
    decay = np.float32(rng.uniform(0.001, 0.005) * ARRAY_RATE)
    envelope = np.exp(-(np.arange(n, dtype=np.float32) % period) / decay)
    noise = rng.standard_normal(n + 1, dtype=np.float32)
    return envelope * (noise[1:] + np.float32(rng.uniform(-0.8, 0.8)) * noise[:-1])


def _noise_band(rng: np.random.Generator, n: int) -> np.ndarray:
    return _band(rng, n)


def _noise_pulses(rng: np.random.Generator, n: int) -> np.ndarray:
    """A noise band that comes and goes 4 to 9 times a second."""
    return _band(rng, n) * _pulse(rng, n)


def _pulse(rng: np.random.Generator, n: int) -> np.ndarray:
    """A squared sine, 0 to 1, 4 to 9 times a second: float32 (n,)."""
    cycles = rng.uniform(4, 9) / ARRAY_RATE * np.arange(n) + rng.uniform()
    return np.sin(((cycles % 1) * np.pi).astype(np.float32)) ** 2


_SOUNDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "rising_chirp": _rising_chirp,
    "falling_chirp": _falling_chirp,
    "arch": _arch,
    "rising_steps": _rising_steps,
    "steady_tone": _steady_tone,
    "vibrato": _vibrato,
    "tremolo": _tremolo,
    "clicks": _clicks,
    "noise_band": _noise_band,
    "noise_pulses": _noise_pulses,
}
CLASSES = tuple(_SOUNDS)
