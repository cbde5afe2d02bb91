"""Operations in C: every instruction set against the reference, batches, threads, lengths, what is refused, the build."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels.native
from kernels import FbankSettings
from kernels.fbank import native, reference
from kernels.fbank.reference import LOG_FLOOR
from kernels.waveform import native as waveform_native
from kernels.waveform import reference as waveform_reference

ROOT = Path(__file__).parents[1]
AST = FbankSettings()
SETTINGS = [
    AST,
    FbankSettings(sample_rate=8000, n_mels=40),  # an odd power of two as the transform's size
    FbankSettings(sample_rate=44100, n_mels=80, hop_ms=5.0),
    FbankSettings(
        n_mels=23, frame_ms=32.0, hop_ms=12.5, low_hz=100.0, high_hz=-500.0, preemphasis=0.0
    ),  # frame = n_fft
    FbankSettings(n_mels=5, hop_ms=30.0),  # samples between the frames that belong to none
    FbankSettings(sample_rate=1000, n_mels=3, frame_ms=2.0, hop_ms=1.0, high_hz=400.0),  # two points
]


@pytest.fixture(params=range(kernels.native.AMX), ids=kernels.native.SETS[: kernels.native.AMX])
def instructions(request, monkeypatch):
    """One instruction set after the other, as far as this processor has them."""
    if reason := native.refuses() or waveform_native.refuses():
        pytest.skip(reason)
    if request.param > native.LIBRARY.widest():
        pytest.skip(f"this processor has no {kernels.native.SETS[request.param]}")
    monkeypatch.setattr(kernels.native, "use_set", request.param)
    assert native.LIBRARY.instruction_set() == kernels.native.SETS[request.param]


@pytest.fixture
def poison(monkeypatch):
    """What is not written shows: torch.empty is full of NaN."""
    monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.full(size, math.nan, **how))


def noise(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_of(waveform):
    return torch.full(waveform.shape[:1], waveform.shape[1])


def log_mel(waveform, settings=AST, T=None, length=None, roll=None, backend=native):
    length = all_of(waveform) if length is None else length
    return backend.fbank(waveform, length, settings, settings.frames(waveform.shape[1]) if T is None else T, roll)


# fbank -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.sample_rate}-{s.frame_ms:g}-{s.hop_ms:g}")
@pytest.mark.parametrize("level", [1.0, 1e-4, 0.0])
def test_as_the_reference_in_float64(instructions, poison, settings, level):
    """Of three clips: one to be cut, one to be padded, one that begins in the middle of a group of frames after the roll."""
    W = settings.samples(70) + 3
    waveform = level * noise(3, W)
    waveform[2] += level * torch.sin(torch.arange(W) * 0.3)
    given = {"T": 67, "length": torch.tensor([W, settings.samples(20), W + 5]), "roll": torch.tensor([0, -9, 66])}
    exact = log_mel(waveform.double(), settings, **given, backend=reference)
    plain = log_mel(waveform, settings, **given, backend=reference)
    got = log_mel(waveform, settings, **given)
    assert got.dtype == torch.float32
    assert torch.equal(got == 0, exact == 0)
    error = float((got - exact).abs().max())
    assert error <= 2 * float((plain - exact).abs().max()) + 1e-4
    # In double but for the logarithm and its rounding: two units in the last place of 16, 1.9e-6. Seen: 5.4e-7.
    assert error <= 1.9e-6


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_row_i_has_the_same_bits_in_any_batch_and_on_any_threads(instructions, threads):
    rng = np.random.default_rng(0)
    length = torch.tensor(rng.integers(1, 24000, 37))
    length[0], length[5], length[36] = 24000, 399, 400
    waveform = noise(37, 24000) * (torch.arange(24000) < length[:, None])
    roll = torch.tensor(rng.integers(-10, 10, 37))
    given = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = log_mel(waveform, T=151, length=length, roll=roll)
        noisy = native.normalise(whole.clone(), -4.0, 4.5, (7, 3, length))
    finally:
        torch.set_num_threads(given)
    for b in range(37):
        own = slice(b, b + 1)
        tight = torch.nn.functional.pad(waveform[own, : length[b]], (0, max(0, 400 - int(length[b]))))
        alone = log_mel(tight, T=151, length=length[own], roll=roll[own])
        assert torch.equal(alone[0], whole[b])
        assert torch.equal(native.normalise(alone, -4.0, 4.5, (7, 3, length[own]))[0], noisy[b])


def test_a_frame_has_the_same_bits_wherever_it_lies(instructions):
    """In any lane: the same 400 samples at the start of a clip and k hops later."""
    waveform = noise(1, AST.samples(40))
    whole = log_mel(waveform)[0]
    for k in range(1, 18):
        assert torch.equal(log_mel(waveform[:, k * AST.hop :])[0], whole[k:])


def test_nan_and_infinity_stay_in_their_clip(instructions):
    waveform = noise(4, 4000)
    clean = log_mel(waveform)
    waveform[1, 2000], waveform[2, 2000], waveform[3] = math.nan, math.inf, 3e38
    got = log_mel(waveform)
    assert torch.equal(got[0], clean[0])
    hit = (torch.arange(23) * 160 <= 2000) & (torch.arange(23) * 160 + 400 > 2000)
    for b in (1, 2):
        assert got[b, hit].isnan().all()  # empty filters too, as in a matrix product
        assert torch.equal(got[b, ~hit], clean[b, ~hit])
    assert not (got[3].isfinite() & (got[3] > 89)).any()  # log of float32's largest is 88.7


def test_the_logarithm_is_exact_to_a_unit_and_at_the_floor(instructions):
    assert (log_mel(torch.zeros(1, 4000)) == math.log(LOG_FLOOR)).all()
    # Twice the amplitude is four times the energy, exactly: 2 log(2) between them, wherever the energy lies.
    waveform = noise(1, 4000)
    octaves = torch.cat([log_mel(waveform * 2.0**k) for k in range(-3, 30)]).double()
    filled = (octaves[0] > math.log(LOG_FLOOR) + 1).nonzero(as_tuple=True)
    steps = octaves[:, *filled].diff(dim=0)
    # A unit in the last place of numbers up to 64, 3.8e-6, in either: 7.6e-6. Seen: 2.9e-6.
    torch.testing.assert_close(steps, torch.full_like(steps, 2 * math.log(2)), rtol=0, atol=7.6e-6)


def test_shapes_strides_and_types_of_arguments(instructions, poison):
    waveform = noise(2, 8000)
    assert torch.equal(log_mel(waveform[:, ::2]), log_mel(waveform[:, ::2].contiguous()))
    assert torch.equal(log_mel(waveform[:1].expand(3, -1)), log_mel(waveform[[0, 0, 0]]))
    assert torch.equal(log_mel(waveform[:, 80:]), log_mel(waveform[:, 80:].clone()))
    roll = torch.tensor([3, -4], dtype=torch.int32)
    assert torch.equal(log_mel(waveform, roll=roll), log_mel(waveform, roll=roll.long()))
    assert log_mel(waveform[:0]).shape == (0, 48, 128)
    assert log_mel(waveform, T=0).shape == (2, 0, 128)
    assert not log_mel(waveform, length=torch.tensor([399, -1])).any()


def test_a_gradient_is_refused_rather_than_left_out():
    if reason := native.refuses():
        pytest.skip(reason)
    out = log_mel(noise(1, 400).requires_grad_())
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        out.sum().backward()


def test_operators(instructions):
    roll, starts, tickets = torch.tensor([3, -4]), torch.tensor([0, 5]), torch.tensor([7, 8])
    torch.library.opcheck(native.log_mel, (noise(2, 900), all_of(noise(2, 900)), roll, 9, 16000, 20, *SCALES))
    torch.library.opcheck(native.normalise_, (noise(2, 5, 3), 0.5, 2.0, tickets[:1], tickets[:1], tickets))
    samples = torch.arange(900, dtype=torch.int16)
    given = (samples, starts, starts + 300, 400, noise(2), starts, starts + 50, noise(2))
    torch.library.opcheck(waveform_native.mixed, given)


SCALES = (25.0, 10.0, 20.0, 0.0, 0.97)


# normalise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 101, 37), (2, 1, 1), (1, 300, 128), (0, 5, 3)])
@pytest.mark.parametrize("seed", [None, 5, 2**64 - 1])
def test_normalise_has_the_references_bits(instructions, shape, seed):
    tickets = torch.tensor([2**33 + 1, -1, 0])[: shape[0]]
    keys = None if seed is None else (seed, 3, tickets)
    x = 30 * noise(*shape)
    wanted = reference.normalise(x.clone(), -4.2677393, 4.5689974, keys)
    given = x.clone()
    assert native.normalise(given, -4.2677393, 4.5689974, keys) is given
    assert torch.equal(given, wanted)
    turned = (
        x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    )  # in place, whatever its strides
    assert torch.equal(native.normalise(turned, -4.2677393, 4.5689974, keys), wanted)
    if seed is not None:
        tensors = (torch.tensor([seed - 2**64 if seed >= 2**63 else seed]), torch.tensor([3]), tickets)
        assert torch.equal(native.normalise(x.clone(), -4.2677393, 4.5689974, tensors), wanted)


# waveforms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("louder", [False, True])
def test_waveforms_have_the_references_bits(instructions, poison, mixed, louder):
    """Sums in double of numbers of 24 bits: their rounding is far below float32's, and the means come out the same."""
    generator = torch.Generator().manual_seed(1)
    samples = torch.randint(-(2**15), 2**15, (50_000,), dtype=torch.int16, generator=generator)
    start, other = torch.randint(0, 45_000, (2, 40), generator=generator)
    length, other_length = torch.randint(1, 5_000, (2, 40), generator=generator)
    length[:4], other_length[3:7] = torch.tensor([0, 1, 4999, 256]), torch.tensor([0, 1, 3, 4999])
    weight = torch.rand(40, generator=generator)
    weight[::3] = 1.0
    gain = torch.rand(40, generator=generator) * 2 if louder else None
    partner = (other, other_length, weight) if mixed else None
    for W in (1, 257, 4000):
        wanted = waveform_reference.waveforms(samples, start, length, W, gain, partner)
        assert torch.equal(waveform_native.waveforms(samples, start, length, W, gain, partner), wanted)


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, -3), (96, 5), (2**40, 1)])
def test_clips_outside_of_the_samples_are_refused(start, length):
    if reason := waveform_native.refuses():
        pytest.skip(reason)
    samples, good = torch.zeros(100, dtype=torch.int16), torch.tensor([95, 5])
    bad = (torch.tensor([0, start]), torch.tensor([5, length]))
    with pytest.raises(ValueError, match=f"clip 1, {length} samples from {start} on, lies outside of the 100 samples"):
        waveform_native.waveforms(samples, *bad, 10, None, None)
    with pytest.raises(ValueError, match=f"clip 1, {length} samples from {start} on"):
        waveform_native.waveforms(samples, good, torch.tensor([5, 5]), 10, None, (*bad, torch.ones(2)))
    waveform_native.waveforms(samples, good, torch.tensor([5, 500]).clamp_max(95), 10, None, None)


LIBRARIES = ("attention", "fbank", "gelu", "linear", "norm", "selective_scan", "spec_mask", "waveform")

# The library -----------------------------------------------------------------------------------------------------------


def test_the_libraries_build_from_these_sources(tmp_path):
    """setup.py in a folder of its own; a library of other sources is refused, and one that is none."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) is on the path")
    # Where the sources lie, so that the checksum can be compared.
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for path in (
        p for folder in ("kernels", *(f"kernels/{name}" for name in LIBRARIES)) for p in (ROOT / folder).glob("*.[ch]")
    ):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "warning:" not in done.stderr
    fresh = kernels.native.Library(tmp_path / "kernels" / "fbank", native.LIBRARY.sources, native.LIBRARY.functions)
    assert fresh.refuses() is None
    assert fresh.instruction_set() in kernels.native.SETS

    kernels.native._load.cache_clear()
    with (tmp_path / "kernels" / "native.h").open("a") as header:
        header.write("/* changed */\n")
    assert fresh.refuses().startswith("the library was built from other sources than these: python setup.py build_ext")

    kernels.native._load.cache_clear()
    built = fresh.path()
    built.rename(tmp_path / "kept")
    assert fresh.refuses() == "it is not built: python setup.py build_ext --inplace needs a C compiler"

    # Elsewhere: the loader knows a library that it has opened by its path.
    other = kernels.native.Library(tmp_path, native.LIBRARY.sources, native.LIBRARY.functions)
    (tmp_path / built.name).touch()
    assert other.refuses().startswith("the library did not load (")
    kernels.native._load.cache_clear()
