"""Log-mel and normalisation by the Triton kernels. Run by tests/test_triton_fbank.py.

The rule of the front end: error against float64 at most twice the plain form's own in float32, plus 1e-4. The plain form is
torchaudio where it is installed, else our reference, which tests/test_fbank.py holds against torchaudio.
"""

import importlib.util
import math
import warnings

import numpy as np
import pytest
import torch
from test_fbank import RATE, noise, signals, theirs

import kernels
from kernels import FbankSettings
from kernels.fbank import fused, kernel, reference
from kernels.fbank.reference import LOG_FLOOR

SETTINGS = {
    "8k-40": FbankSettings(sample_rate=8000, n_mels=40),
    "22k-64": FbankSettings(sample_rate=22050, n_mels=64),
    "32k-128": FbankSettings(sample_rate=32000),
    "44k-80": FbankSettings(sample_rate=44100, n_mels=80, hop_ms=5.0),
    "64 points": FbankSettings(sample_rate=2000, n_mels=10),
    "128 points": FbankSettings(sample_rate=4000, n_mels=20),
    "band": FbankSettings(n_mels=23, low_hz=100.0, high_hz=-500.0, preemphasis=0.5),
    "a window of 512": FbankSettings(n_mels=64, frame_ms=32.0, hop_ms=12.5, high_hz=7600.0, preemphasis=0.0),
    "from 0 Hz": FbankSettings(n_mels=30, low_hz=0.0),
}


def clips() -> dict[str, torch.Tensor]:
    """Those of the reference's tests, and some that ask more of the products: all energy far from most bins."""
    t = torch.arange(RATE, dtype=torch.float64) / RATE
    more = {
        "amplitude 1e-5": 1e-4 * noise(RATE, seed=6),
        # Not 3000: with whole periods in a hop every frame is the same, and torchaudio's error a single draw of roundings
        # (3.0e-3 on one processor, 3.7e-3 on another, 2.6e-3 to 1.0e-2 with the phase).
        "sine of 3001 Hz": torch.sin(2 * math.pi * 3001 * t),
        "rumble": torch.sin(2 * math.pi * 31 * t) + 1e-4 * noise(RATE, seed=7),
    }
    return signals() | more


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "fbank=triton,normalise=triton")


def plain(waveform, length=None, settings=None, T=None, roll=None):
    """The reference, whatever backend is asked for."""
    settings = settings or FbankSettings()
    if length is None:
        length = torch.full((len(waveform),), waveform.shape[1], dtype=torch.int64, device=waveform.device)
    return reference.fbank(waveform, length, settings, settings.frames(waveform.shape[1]) if T is None else T, roll)


def check(got, alone, exact):
    """The front end's rule, and the 2x rule for the mean error, which 1e-4 would hide.

    2e-6 beside the mean: one unit in the last place of a logarithm near the floor, -15.9, and the exponent's share of one.
    """
    ours, others = ((t.double() - exact).abs() for t in (got, alone))
    assert float(ours.max()) <= 2 * float(others.max()) + 1e-4, f"{float(ours.max())} against {float(others.max())}"
    assert float(ours.mean()) <= 2 * float(others.mean()) + 2e-6, f"{float(ours.mean())} against {float(others.mean())}"


def nearest_tf32(x):
    """float32 with 10 bits of fraction, rounded to nearest, ties away from zero."""
    return ((np.ascontiguousarray(x, np.float32).view(np.int32) + 0x1000) & ~0x1FFF).view(np.float32)


def tf32x3(builder, a, b, d, precision, imprecise):
    """tl.dot as a GPU makes it of three products of TensorFloat-32, the smaller ones first.

    Eight products are added to the accumulator at a time, and their sum is cut, not rounded, to float32: the matrix
    units are no better than that. The interpreter itself multiplies in plain float32.
    """
    from triton.runtime.interpreter import TensorHandle

    upper, lower = zip(
        *((nearest_tf32(x.data), nearest_tf32(x.data - nearest_tf32(x.data))) for x in (a, b)), strict=True
    )
    total = d.data.astype(np.float32)
    for left, right in ((lower[0], upper[1]), (upper[0], lower[1]), (upper[0], upper[1])):
        for k in range(0, left.shape[1], 8):
            exact = total + left[:, k : k + 8].astype(np.float64) @ right[k : k + 8].astype(np.float64)
            total = exact.astype(np.float32)
            above = np.abs(total) > np.abs(exact)
            total[above] = np.nextafter(total[above], np.float32(0))
    return TensorHandle(total, d.dtype.scalar)


@pytest.fixture(params=["as they are", "tf32x3"])
def products(request, device, monkeypatch):
    """The interpreter's products, and the matrix units' emulated; on a GPU they are what they are."""
    if request.param == "tf32x3" and device == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        assert kernel.PRECISION == "tf32x3"
        monkeypatch.setattr(InterpreterBuilder, "create_dot", tf32x3)


@pytest.mark.parametrize("name", clips())
def test_signals(name, products, guard, device):
    wave = clips()[name]
    length = torch.tensor([len(wave)])
    centred = kernels.remove_mean(wave.float()[None], length)
    got = kernels.fbank(guard.hold(centred.to(device)))[0].cpu()
    if importlib.util.find_spec("torchaudio"):
        exact, alone = theirs(wave), theirs(wave.float())
    else:
        exact, alone = plain(kernels.remove_mean(wave[None], length))[0], plain(centred)[0]
    check(got, alone, exact)


def check_batch(wave, length, settings, T, roll, guard, device):
    """A batch against the reference: errors where there are frames, exact zeros elsewhere."""
    held = [t if t is None else guard.hold(t.to(device)) for t in (wave.float(), length, roll)]
    got = kernels.fbank(held[0], held[1], settings, T, held[2]).cpu()
    exact, alone = (plain(w, length, settings, T, roll) for w in (wave, wave.float()))
    assert got.shape == exact.shape
    assert torch.equal(got == 0, exact == 0)
    check(got, alone, exact)
    return got


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings(name, guard, device):
    settings = SETTINGS[name]
    W = settings.samples(21) + 7
    wave = noise(2, W, seed=5)
    wave[0] -= wave[0].mean()
    length = torch.tensor([W, settings.samples(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_batch(wave, length, settings, 23, torch.tensor([-4, 9]), guard, device)


LENGTHS = [5000, 400, 399, 0, 559, 560, 900, 6000]


@pytest.mark.parametrize("T", [1, 17, 35, 50])
@pytest.mark.parametrize("rolled", [True, False], ids=["rolled", "not rolled"])
def test_lengths_and_rolls(rolled, T, guard, device):
    """T below, at and above what the longest clip of 35 frames has; no tile of 16 divides them."""
    length = torch.tensor(LENGTHS)
    wave = noise(8, 6000, seed=2)  # noise behind the clips' ends, too: it must not be heard
    roll = torch.tensor([0, 3, -3, 1, -10, 9, 10 * T + 1, -(2**40)]) if rolled else None
    check_batch(wave, length, None, T, roll, guard, device)


def test_one_window_and_the_shipped_tiles(guard, device, monkeypatch):
    monkeypatch.setattr(fused, "_tile", lambda settings: kernel.tile(settings.n_fft))
    monkeypatch.setattr(fused, "_tables", lambda s, d: tuple(guard.hold(t.to(d)) for t in kernel.tables(s)))
    check_batch(noise(1, 400), torch.tensor([400]), None, 1, None, guard, device)
    check_batch(noise(2, 7000), torch.tensor([7000, 1000]), None, 45, torch.tensor([5, -5]), guard, device)


def test_a_row_is_the_same_bits_in_any_batch(guard, device):
    wave, length = noise(5, 6000, seed=3).float().to(device), torch.tensor([6000, 900, 400, 399, 5123], device=device)
    roll = torch.tensor([0, 4, -9, 2, -1], device=device)
    whole = kernels.fbank(wave, length, T=37, roll=roll)
    for b in range(5):
        own = slice(b, b + 1)
        assert torch.equal(kernels.fbank(wave[own], length[own], T=37, roll=roll[own])[0], whole[b])
        n = max(400, int(length[b]))  # without the samples behind it
        assert torch.equal(kernels.fbank(wave[own, :n], length[own], T=37, roll=roll[own])[0], whole[b])


def test_the_roll_is_torchs(guard, device):
    wave = noise(4, 3000, seed=4).float().to(device)
    roll = torch.tensor([-10, -1, 0, 9], device=device)
    still = kernels.fbank(wave, T=21)
    wanted = torch.stack([clip.roll(int(by), 0) for clip, by in zip(still, roll, strict=True)])
    assert torch.equal(kernels.fbank(wave, T=21, roll=roll), wanted)


def test_silence_is_at_the_floor_and_nan_stays_in_its_frames(guard, device):
    wave = noise(3, 2000, seed=9).float().to(device)
    wave[0] = 0
    wave[1, 800] = float("nan")
    got = kernels.fbank(wave)
    # One unit in the last place of the logarithm of the floor.
    torch.testing.assert_close(got[0], torch.full_like(got[0], math.log(LOG_FLOOR)), rtol=0, atol=1e-6)
    frames = [t for t in range(11) if 160 * t <= 800 < 160 * t + 400]
    assert got[1].isnan().all(1).nonzero().flatten().tolist() == frames
    assert int(got.isnan().sum()) == len(frames) * 128


def test_waveforms_that_are_not_contiguous_and_empty_batches(guard, device):
    wave = noise(2, 4000, seed=1).float().to(device)
    assert torch.equal(kernels.fbank(wave[:, ::2]), kernels.fbank(wave[:, ::2].contiguous()))
    assert kernels.fbank(wave[:0]).shape == (0, 23, 128)
    assert kernels.fbank(wave, T=0).shape == (2, 0, 128)


def test_what_is_refused(device):
    with pytest.raises(ValueError, match="it adds in float32; the tensors are float64"):
        kernels.fbank(noise(1, 4000).to(device))
    for rate, points in ((96000, 4096), (1000, 32)):
        with pytest.raises(
            ValueError, match=rf"64 to 2048 points, a window of \d+ samples takes {points}: run without"
        ):
            kernels.fbank(torch.zeros(1, 4000, device=device), settings=FbankSettings(sample_rate=rate))


# Normalisation --------------------------------------------------------------------------------------------------------

SHAPES = {"one cell": (1, 1, 1), "odd": (3, 37, 5), "a block and more": (2, 130, 16), "blocks": (2, 64, 128)}


@pytest.mark.parametrize("seed", [None, 7, 2**64 - 5])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("name", SHAPES)
def test_normalise_gives_the_references_bits(name, layout, seed, guard, device):
    B, T, F = SHAPES[name]
    log_mel = 5 * torch.randn(B, T, F, generator=torch.Generator().manual_seed(T)) - 4
    tickets = torch.arange(B) * 7919 + 2**31
    wanted = reference.normalise(log_mel.clone(), -4.2677393, 4.5689974, None if seed is None else (seed, 3, tickets))
    whole = {
        "contiguous": log_mel,
        "transposed": log_mel.transpose(1, 2),
        "sliced": torch.stack([log_mel, torch.zeros_like(log_mel)], -1).flatten(2),
    }[layout]
    whole = guard.hold(whole.to(device))
    view = {"contiguous": whole, "transposed": whole.transpose(1, 2), "sliced": whole[:, :, ::2]}[layout]
    out = kernels.normalise(view, -4.2677393, 4.5689974, None if seed is None else (seed, 3, tickets.to(device)))
    assert out.data_ptr() == view.data_ptr()
    assert torch.equal(view.cpu(), wanted)
    if layout == "sliced":
        assert not whole[:, :, 1::2].any()


def test_normalise_takes_its_keys_from_the_device_and_keeps_nan(guard, device):
    log_mel = guard.hold(torch.zeros(3, 9, 7, device=device))
    log_mel[1, 2, 3] = float("nan")
    tickets = torch.tensor([5, 5, 9], device=device)
    keys = torch.tensor([-5], device=device), torch.tensor(2**32 - 1, device=device), tickets
    wanted = reference.normalise(log_mel.cpu(), 0.5, 2.0, (2**64 - 5, 2**32 - 1, tickets.cpu()))
    got = kernels.normalise(log_mel, 0.5, 2.0, keys).cpu()
    assert torch.equal(got.nan_to_num(99), wanted.nan_to_num(99))
    assert int(got.isnan().sum()) == 1
    assert torch.equal(got[0], got[1].nan_to_num(float(got[0, 2, 3])))  # the same ticket
    assert not torch.equal(got[0], got[2])
    assert kernels.normalise(log_mel[:0], 0.5, 2.0, (1, 2, tickets[:0])).shape == (0, 9, 7)


def test_opcheck(device):
    wave, length = noise(2, 1000).float().to(device), torch.tensor([1000, 400], device=device)
    for roll in (None, torch.tensor([1, -1], device=device)):
        torch.library.opcheck(fused.log_mel, (wave, length, 16000, 8, 25.0, 10.0, 20.0, 0.0, 0.97, 6, roll))
    log_mel, one = torch.randn(2, 5, 3, device=device), torch.tensor([7], device=device)
    torch.library.opcheck(fused.normalise_, (log_mel, -4.0, 9.0, None, None, None))
    torch.library.opcheck(fused.normalise_, (log_mel, -4.0, 9.0, one, one, torch.arange(2, device=device)))


def test_too_many_programs_are_refused(monkeypatch):
    """On the meta device, where they take no memory; a GPU's tile has twice as many frames."""
    monkeypatch.setattr(fused, "_tile", lambda settings: kernel.INTERPRETED)
    wave, length = torch.empty(2**28, 400, device="meta"), torch.empty(2**28, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"2147483647 tiles of 16 frames at most, got 2415919104"):
        fused.log_mel._init_fn(wave, length, 16000, 8, 25.0, 10.0, 20.0, 0.0, 0.97, 144, None)
    with pytest.raises(ValueError, match=r"2147483647 cells of a clip at most, got log_mel \(1, 16777216, 128\)"):
        fused.normalise_._init_fn(torch.empty(1, 2**24, 128, device="meta"), 0.0, 1.0, None, None, None)
