"""Speed, shift and background noise of waveforms: against literal numpy, sines and spectra, and draws word by word."""

import numpy as np
import pytest
import torch

from fftp import perturb
from fftp.augment import Augment, AugmentSettings
from kernels import draws
from kernels.draws import SPEED_UNIT
from tests.literal import below, words

SHIFT, SPEED, BACKGROUND = 11, 12, 13  # purposes: a number is part of what a seed means
W = 700
LENGTH = [700, 0, 1, 2, 257, 699, 700]
SHIFTS = [0, 3, 0, 1, -40, 500, -900]
SPEEDS = [0.85, 1.1, 1.0, 1.15, 0.9, 1.0, 1.05]


def clips(device="cpu"):
    """(waveforms of noise, zero behind their lengths; lengths)."""
    length = torch.tensor(LENGTH)
    waveform = torch.from_numpy(np.random.default_rng(0).normal(0, 0.2, (len(LENGTH), W)).astype(np.float32))
    return torch.where(torch.arange(W) < length[:, None], waveform, 0.0).to(device), length.to(device)


def fixed(speeds):
    return torch.tensor([round(speed * SPEED_UNIT) for speed in speeds])


def literal(clip, n, shift, speed):
    """One clip sample by sample in float64, from the sentence in `perturb.moved`."""

    def sample(k):
        return float(clip[k]) if 0 <= k < n else 0.0

    out, middle = np.zeros(len(clip)), (n - 1) / 2
    for i in range(n):
        place = middle + speed * (i - shift - middle)
        k = int(np.floor(place))
        t = place - k
        a, b, c, d = (sample(k + j) for j in (-1, 0, 1, 2))
        # Catmull and Rom's spline as the polynomial of its four points.
        out[i] = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return out


@pytest.mark.parametrize("what", ["shift", "speed", "both"])
def test_moved_clips_are_the_literal_ones(what, device):
    waveform, length = clips(device)
    shift = None if what == "speed" else torch.tensor(SHIFTS, device=device)
    speed = None if what == "shift" else fixed(SPEEDS).to(device)
    got = perturb.moved(waveform, length, shift, speed).cpu()
    for b, n in enumerate(LENGTH):
        by, at = (0 if shift is None else SHIFTS[b]), (1.0 if speed is None else int(fixed(SPEEDS)[b]) / SPEED_UNIT)
        expected = torch.from_numpy(literal(waveform[b].cpu(), n, by, at))
        if at == 1.0:
            assert torch.equal(got[b].double(), expected)  # copied
        # Float32 against float64, numbers up to 0.8: seen 8.6e-8, times four.
        torch.testing.assert_close(got[b].double(), expected, rtol=0, atol=3.3e-7)
        assert not got[b, n:].any()
    assert not got[6].any() or what == "speed"  # moved out of sight


def test_a_tone_played_faster_is_a_higher_tone():
    """500 Hz at speed 1.2 is 600 Hz, and what was in the middle still is."""
    t = (torch.arange(16_001, dtype=torch.float64) - 8_000) / 16_000
    length = torch.tensor([16_001])
    tone = torch.cos(2 * torch.pi * 500 * t).float()[None]
    got = perturb.moved(tone, length, None, fixed([1.2]))[0].double()
    inside = t.abs() < 0.4
    # The cubic's own error for 32 samples a turn: seen 1.3e-4, twice.
    torch.testing.assert_close(got[inside], torch.cos(2 * torch.pi * 600 * t[inside]), rtol=0, atol=2.6e-4)
    assert not got[t.abs() > 0.42].any()  # the clip is over: 0.5 / 1.2


def test_background_has_the_level_asked_for(device):
    waveform, length = clips(device)
    noise = torch.from_numpy(draws.coloured_noise(3)).to(device)
    B = len(LENGTH)
    level = torch.tensor([0.1, 0.5, 0.5, 0.5, 2.0, 0.0, 1.0], device=device)
    colour = torch.arange(B, device=device) % 3
    start = torch.tensor([0, 1, 5, 7, 400, 9, draws.COLOURED - 3], device=device)
    got = perturb.with_background(waveform, length, noise, level, colour, start).cpu()
    flat = noise.cpu().double().numpy()
    for b, n in enumerate(LENGTH):
        clip = waveform[b, :n].cpu().double().numpy()
        taken = np.take(flat[b % 3], int(start[b]) + np.arange(n), mode="wrap")
        loud = np.sqrt(np.square(clip).mean()) if n else 0.0
        # Float32 sums of numbers up to 3: seen 6.9e-8, times four.
        np.testing.assert_allclose(got[b, :n].numpy(), clip + float(level[b]) * loud * taken, rtol=0, atol=2.8e-7)
        assert not got[b, n:].any()
    assert torch.equal(got[5], waveform[5].cpu())  # level 0
    silent = perturb.with_background(0 * waveform, length, noise, level, colour, start)
    assert not silent.any()


def test_colours_fall_as_their_names_say():
    noise = draws.coloured_noise(7).astype(np.float64)
    np.testing.assert_allclose(np.square(noise).mean(1), 1, rtol=1e-6)
    assert not (draws.coloured_noise(8) == draws.coloured_noise(7)).any(1).all()
    spectrum = np.square(np.abs(np.fft.rfft(noise)))
    hertz = np.fft.rfftfreq(draws.COLOURED, 1 / 16_000)
    octaves = [spectrum[:, (hertz >= f) & (hertz < 2 * f)].mean(1) for f in (125, 250, 500, 1000, 2000, 4000)]
    slopes = np.diff(10 * np.log10(octaves), axis=0)  # dB an octave, of the power at a frequency
    # The band at 125 Hz holds 4096 numbers: its mean has a standard deviation of 0.07 dB; five of them.
    np.testing.assert_allclose(slopes, np.broadcast_to([0, -3.01, -6.02], slopes.shape), atol=0.35)
    assert spectrum[:, hertz < 19].max() < 1e-6 * spectrum[:, hertz >= 20].max()
    joint = np.abs(noise[:, 0] - noise[:, -1])
    steps = np.abs(np.diff(noise))
    assert (joint < steps.max(1)).all()  # no seam


def test_draws_are_the_written_ones(device):
    seed, epoch, tickets = 2**40 + 5, 3, torch.arange(50, device=device)
    shift = draws.draw_shift(seed, epoch, tickets, 1600).tolist()
    speed = draws.draw_speed(seed, epoch, tickets, 0.1).tolist()
    level, colour, start = draws.draw_background(seed, epoch, tickets, 0.6, -5.0, 15.0)
    reach = round(0.1 * SPEED_UNIT)
    for ticket in range(50):
        assert shift[ticket] == below(words(seed, SHIFT << 16, 0, epoch, ticket)[0], 3201) - 1600
        word = words(seed, SPEED << 16, 0, epoch, ticket)[0]
        assert speed[ticket] == SPEED_UNIT - reach + below(word, 2 * reach + 1)
        a, b, c, d = words(seed, BACKGROUND << 16, 0, epoch, ticket)
        decibels = -5 + 20 * (b >> 8) / 2**24
        expected = 10 ** (-decibels / 20) if a < round(0.6 * 2**32) else 0.0
        assert float(level[ticket]) == pytest.approx(expected, rel=1e-6)
        assert (int(colour[ticket]), int(start[ticket])) == (below(c, 3), below(d, draws.COLOURED))
    white = [word for block in range(100) for word in words(seed, (BACKGROUND << 16) + 1, block, 0, 0)]
    # All but what lies below 20 Hz, a 400th of the power.
    assert np.corrcoef(draws.coloured_noise(seed)[0, :400], white)[0, 1] > 0.99


def test_speeds_and_shifts_fill_their_range():
    tickets = torch.arange(4000)
    speed = draws.draw_speed(1, 0, tickets, 0.15).double() / SPEED_UNIT
    shift = draws.draw_shift(1, 0, tickets, 100).double()
    for values, reach in ((speed - 1, 0.15), (shift, 100)):
        assert values.abs().max() <= reach
        assert values.max() > 0.99 * reach
        assert values.min() < -0.99 * reach
        # A mean of 4000 uniform numbers: its standard deviation is reach / sqrt(3 * 4000); four of them.
        assert abs(float(values.mean())) < 4 * reach / 12_000**0.5


def test_a_setting_alone_does_its_own_work_and_none_leaves_the_waveform():
    waveform, length = clips()
    tickets = torch.arange(len(LENGTH))

    def through(**changed):
        made = Augment(AugmentSettings(**changed), 4, 128, 128)
        return made.perturbed(waveform, length, 16_000, 1, tickets)

    assert through() is waveform
    shift = draws.draw_shift(4, 1, tickets, 160)  # 10 ms at 16 kHz
    assert torch.equal(through(shift_ms=10.0), perturb.moved(waveform, length, shift, None))
    speed = draws.draw_speed(4, 1, tickets, 0.1)
    assert torch.equal(through(speed=0.1), perturb.moved(waveform, length, None, speed))
    noise = torch.from_numpy(draws.coloured_noise(4))
    drawn = draws.draw_background(4, 1, tickets, 1.0, 0.0, 6.0)
    moved = perturb.moved(waveform, length, shift, speed)
    expected = perturb.with_background(moved, length, noise, *drawn)
    given = {"background": 1.0, "background_snr_min": 0.0, "background_snr_max": 6.0}
    assert torch.equal(through(shift_ms=10.0, speed=0.1, **given), expected)
