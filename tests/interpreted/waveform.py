"""Waveforms by the Triton kernels, by the 2x rule. Run by tests/test_triton_waveform.py."""

import pytest
import torch
from test_waveform import FORMS, LENGTH, WEIGHT, W, arguments, far_pack, literal, pack

import kernels
from kernels.waveform import kernel, reference


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "waveforms=triton")


def held(given, guard):
    """The same tensors between guard zones: reading past their ends gives other numbers."""
    if isinstance(given, torch.Tensor):
        return guard.hold(given)
    return given and tuple(held(t, guard) for t in given)


@pytest.mark.parametrize("chunk", [512, kernel.CHUNK])
@pytest.mark.parametrize("form", FORMS)
def test_2x_rule(form, chunk, guard, device, monkeypatch):
    """Chunks that the clips' ends lie inside, on and behind."""
    monkeypatch.setattr(kernel, "CHUNK", chunk)
    given = {name: held(t, guard) for name, t in arguments(form, device).items()}
    got = kernels.waveforms(**given, W=W).cpu()
    exact = literal(**given, W=W)
    plain = reference.waveforms(given["samples"], given["start"], given["length"], W, given["gain"], given["partner"])
    ours, theirs = (float((t.double() - exact).abs().max()) for t in (got, plain.cpu()))
    assert ours <= 2 * theirs
    for b, n in enumerate(LENGTH):
        assert not got[b, n:].any()


def test_means_are_exact_to_the_last_rounding(guard, device, monkeypatch):
    """Samples near full scale, 2^19 of them: a float32 sum would be off by far more than the mean's last place."""
    monkeypatch.setattr(kernel, "CHUNK", 2**15)
    n = 2**19
    samples = torch.full((n,), 32000, dtype=torch.int16)
    samples[::3] = -7
    start, length = torch.zeros(1, dtype=torch.int64), torch.tensor([n])
    got = kernels.waveforms(samples.to(device), start.to(device), length.to(device), n).cpu()
    mean = samples.double().mean() / 32768
    wanted = (samples.float() / 32768 - mean.float())[None]
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_the_same_bits_in_any_batch_and_chunk(form, guard, device, monkeypatch):
    whole = kernels.waveforms(**arguments(form, device), W=W)
    monkeypatch.setattr(kernel, "CHUNK", 512)
    assert torch.equal(kernels.waveforms(**arguments(form, device), W=W), whole)
    for rows in (slice(2, 3), slice(1, 6)):
        assert torch.equal(kernels.waveforms(**arguments(form, device, rows), W=W), whole[rows])


def test_weight_one_keeps_the_clip(guard, device):
    b, mixed = WEIGHT.index(1.0), arguments("gain and mixup", device)
    got, plain = (kernels.waveforms(**given, W=W) for given in (mixed, mixed | {"partner": None}))
    assert torch.equal(got[b], plain[b])


def test_more_chunks_than_are_added_at_a_time(guard, device, monkeypatch):
    given = arguments("gain and mixup", device)
    whole = kernels.waveforms(**given, W=W)
    monkeypatch.setattr(kernel, "CHUNK", 256)
    monkeypatch.setattr(kernel, "BLOCK_CHUNKS", 4)
    assert W > 256 * 4
    assert torch.equal(kernels.waveforms(**given, W=W), whole)


def test_tensors_that_are_not_contiguous(guard, device):
    given = arguments("gain and mixup", device)
    spread = {n: t.repeat_interleave(2)[::2] for n, t in given.items() if n != "partner"}
    spread["partner"] = tuple(t.repeat_interleave(2)[::2] for t in given["partner"])
    assert torch.equal(kernels.waveforms(**spread, W=W), kernels.waveforms(**given, W=W))


def test_a_pack_of_more_than_32_bits(tmp_path, device, monkeypatch):
    if device == "cpu":
        # The interpreter copies every argument's storage back onto itself when a kernel ends: 4 GiB of disk here.
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)
    near, length = torch.tensor([0, 400], device=device), torch.tensor([1000, 600], device=device)
    weight = torch.tensor([0.5, 0.3], device=device)
    results = []
    for samples, start in ((pack()[:1000], near), (far_pack(tmp_path), near + 2**31)):
        partner = start.flip(0), length.flip(0), weight
        results.append(kernels.waveforms(samples.to(device), start, length, 1000, None, partner))
    assert torch.equal(*results)
    assert results[0].any()


def test_an_empty_batch(guard, device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert kernels.waveforms(pack().to(device), none, none, 7).shape == (0, 7)


def test_too_many_chunks_are_refused():
    """On the meta device, where they take no memory."""
    start = torch.empty(2**20, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"2147483647 chunks of 4096 samples at most, got 4294967296"):
        kernel.gathered._init_fn(pack().to("meta"), start, start, 2**24, None, None, None, None)


def test_opcheck(device):
    given = arguments("gain and mixup", device)
    for gain, partner in ((None, (None, None, None)), (given["gain"], given["partner"])):
        arguments_ = (given["samples"], given["start"], given["length"], W, gain, *partner)
        torch.library.opcheck(kernel.gathered, arguments_)
