"""Packed samples to waveforms: against numpy, partners cut and padded, bad input, rows on their own, large packs."""

import re

import numpy as np
import pytest
import torch

import kernels
from kernels import dispatch

W = 2000
# Clips of the pack below: one sample, one chunk of the means, a little more, nothing, cut at W, the pack's last sample.
START = [0, 100, 1000, 5, 3000, 9000]
LENGTH = [1, 256, 1255, 0, 5000, 1000]
OTHER_START = [4000, 0, 0, 700, 17, 9999]
OTHER_LENGTH = [900, 9000, 300, 40, 1999, 1]
GAIN = [1.0, 0.25, 1.7, 3.0, 0.9, 0.5]
WEIGHT = [0.5, 0.3, 1.0, 0.6, 0.75, 0.125]
FORMS = ["plain", "gain", "mixup", "gain and mixup"]


def pack(offset: float = 2000.0) -> torch.Tensor:
    """Noise about an offset, as int16 `[10000]`, with both ends of the range in it."""
    samples = np.random.default_rng(0).normal(offset, 5000, 10_000).clip(-32768, 32767).astype(np.int16)
    samples[1003], samples[1004] = -32768, 32767
    return torch.from_numpy(samples)


def arguments(form: str, device: str = "cpu", rows=slice(None)) -> dict:
    """Everything but W, for the rows asked for."""

    def on(values, dtype=torch.int64):
        return torch.tensor(values, dtype=dtype)[rows].to(device)

    given = {"samples": pack().to(device), "start": on(START), "length": on(LENGTH), "gain": None, "partner": None}
    if "gain" in form:
        given["gain"] = on(GAIN, torch.float32)
    if "mixup" in form:
        given["partner"] = on(OTHER_START), on(OTHER_LENGTH), on(WEIGHT, torch.float32)
    return given


def literal(samples, start, length, W, gain=None, partner=None) -> torch.Tensor:
    """The same clip by clip in numpy's float64, without a look at the reference."""
    samples, out = samples.cpu().numpy(), np.zeros((len(start), W))

    def clip(first, n):
        wave = samples[first : first + min(n, W)] / 32768
        return wave - wave.mean() if len(wave) else wave

    for b in range(len(start)):
        own = clip(int(start[b]), int(length[b]))
        if gain is not None:
            own = float(gain[b]) * own
        n = len(own)
        if n and partner is not None and float(partner[2][b]) != 1:
            weight, other = float(partner[2][b]), np.zeros(n)
            found = clip(int(partner[0][b]), int(partner[1][b]))[:n]
            other[: len(found)] = found
            own = weight * own + (1 - weight) * other
            own = own - own.mean()
        out[b, :n] = own
    return torch.from_numpy(out)


@pytest.mark.parametrize("form", FORMS)
def test_against_numpy(form, device):
    given = arguments(form, device)
    got = kernels.waveforms(**given, W=W)
    assert got.dtype == torch.float32
    # Roundings of numbers up to 1.7. Seen: 5.4e-8, times three.
    torch.testing.assert_close(got.cpu().double(), literal(**given, W=W), rtol=0, atol=1.6e-7)
    for b, n in enumerate(LENGTH):
        assert not got[b, n:].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_the_same_bits_in_any_batch_and_for_any_w(form, device):
    whole = kernels.waveforms(**arguments(form, device), W=W)
    for b in range(len(START)):
        alone = kernels.waveforms(**arguments(form, device, slice(b, b + 1)), W=W)
        assert torch.equal(alone[0], whole[b])
        if max(LENGTH[b], OTHER_LENGTH[b]) < 1500:
            shorter = kernels.waveforms(**arguments(form, device, slice(b, b + 1)), W=1500)
            assert torch.equal(shorter[0], whole[b, :1500])


def test_weight_one_keeps_the_clip(device):
    mixed = arguments("gain and mixup", device)
    b = WEIGHT.index(1.0)
    got, plain = (kernels.waveforms(**given, W=W) for given in (mixed, mixed | {"partner": None}))
    assert torch.equal(got[b], plain[b])
    assert not torch.equal(got[1], plain[1])


def test_a_partner_is_cut_to_the_clip_and_followed_by_zeros(device):
    """A clip of zeros beside a partner of 3 and of 30 samples: what is left is the partner, without the mean."""
    samples = torch.zeros(100, dtype=torch.int16, device=device)
    samples[50:80] = torch.arange(1, 31, device=device).to(torch.int16) * 1024
    start, length = torch.tensor([0, 0], device=device), torch.tensor([10, 10], device=device)
    partner = torch.tensor([50, 50], device=device), torch.tensor([3, 30], device=device)
    half = torch.full((2,), 0.5, device=device)
    got = kernels.waveforms(samples, start, length, 12, None, (*partner, half)).cpu() * 32 * 2
    short = torch.tensor([-1.0, 0.0, 1.0, *[0.0] * 7])  # 1, 2, 3 without their mean; it stays zero behind them
    long = torch.arange(1, 11) - 5.5  # 1..10: its mean of 15.5 off, then the mixture's
    # In units of 1 / 32: float32 of numbers up to 0.5. Seen: 1.9e-6 in these units, times two.
    torch.testing.assert_close(got[:, :10], torch.stack([short, long]), rtol=0, atol=4e-6)
    assert not got[:, 10:].any()


@pytest.mark.parametrize("fused", [False, True])
def test_a_weight_or_gain_that_is_not_finite_stays_in_its_row(fused, device):
    dispatch.use_fused(fused)
    given = arguments("gain and mixup", device)
    clean = kernels.waveforms(**given, W=W)
    given["gain"][1] = float("nan")
    given["partner"][2][4] = float("inf")
    got = kernels.waveforms(**given, W=W)
    others = [0, 2, 3, 5]
    assert torch.equal(got[others], clean[others])
    for b in (1, 4):
        assert not got[b, : min(W, LENGTH[b])].isfinite().any()
        assert not got[b, LENGTH[b] :].any()


def far_pack(tmp_path) -> torch.Tensor:
    """A pack of 2^31 + 1000 samples in a file that is a hole up to the last 1000, so that it takes no memory."""
    path, n = tmp_path / "pack", 2**31 + 1000
    with open(path, "wb") as file:
        file.seek(2 * 2**31)
        file.write(pack()[:1000].numpy().tobytes())
    return torch.from_file(str(path), shared=False, size=n, dtype=torch.int16)


def test_a_pack_of_more_than_32_bits(tmp_path):
    near, far = torch.tensor([0, 400]), torch.tensor([2**31, 2**31 + 400])
    length, weight = torch.tensor([1000, 600]), torch.tensor([0.5, 0.3])
    got = kernels.waveforms(far_pack(tmp_path), far, length, 1000, None, (far.flip(0), length.flip(0), weight))
    wanted = kernels.waveforms(pack()[:1000], near, length, 1000, None, (near.flip(0), length.flip(0), weight))
    assert torch.equal(got, wanted)
    assert got.any()


def test_an_empty_batch(device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert kernels.waveforms(pack().to(device), none, none, 7).shape == (0, 7)


INTEGERS, FLOATS = torch.tensor([0, 5]), torch.tensor([0.5, 0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": torch.zeros(9)}, "samples is int16 (n,), got torch.float32 (9,)"),
        ({"samples": torch.zeros(1, 9, dtype=torch.int16)}, "samples is int16 (n,), got torch.int16 (1, 9)"),
        ({"start": INTEGERS.int()}, "start is int64 (2,), got torch.int32 (2,)"),
        ({"length": INTEGERS[:1]}, "length is int64 (2,), got torch.int64 (1,)"),
        ({"gain": FLOATS.double()}, "gain is float32 (2,), got torch.float64 (2,)"),
        ({"gain": FLOATS[:1]}, "gain is float32 (2,), got torch.float32 (1,)"),
        ({"partner": (INTEGERS.int(), INTEGERS, FLOATS)}, "partner's start is int64 (2,), got torch.int32 (2,)"),
        ({"partner": (INTEGERS, INTEGERS[:1], FLOATS)}, "partner's length is int64 (2,), got torch.int64 (1,)"),
        ({"partner": (INTEGERS, INTEGERS, INTEGERS)}, "partner's weight is float32 (2,), got torch.int64 (2,)"),
        ({"W": 0}, "W is at least 1 sample, got 0"),
    ],
)
def test_refused_by_name(change, message):
    given = {"samples": pack(), "start": INTEGERS, "length": INTEGERS, "W": 10}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        kernels.waveforms(**(given | change))
