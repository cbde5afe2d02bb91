"""Bias and GELU: each backend against float64, forward and gradients by name, at every number and at the strange ones."""

import math

import pytest
import torch

import kernels
from kernels import native as shared
from kernels.gelu import native, reference

needs_native = pytest.mark.skipif(native.refuses() is not None, reason=f"the native GELU: {native.refuses()}.")
# The instruction sets of this processor.
LEVELS = range(native.LIBRARY.widest() + 1) if native.refuses() is None else ()


def arguments(shape, dtype, device="cpu", seed=0, scale=1.5):
    """x, bias and the gradient of the result. Rounded once, so that float64 sees the same numbers."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    x.view(-1)[3::7] *= 8  # both tails
    bias = 0.5 * torch.randn(shape[-1:], generator=generator)
    return [t.to(device) for t in ((scale * x).to(dtype), scale * bias, grad.to(dtype))]


def run(form, given, biased, hold=torch.clone):
    """Output and gradients by name."""
    x, bias = (hold(t).detach().requires_grad_() for t in given[:2])
    out = form(x, bias if biased else None)
    names, leaves = ("x", "bias")[: 1 + biased], (x, bias)[: 1 + biased]
    found = torch.autograd.grad(out, leaves, hold(given[2].to(out.dtype)))
    return {"out": out.detach()} | dict(zip(names, found, strict=True))


def plain(x, bias):
    return reference.gelu(x, bias, torch.promote_types(x.dtype, torch.float32))


def compare(shape, dtype, biased, device="cpu", hold=torch.clone, repeats=0, draws=4, scale=1.5):
    """The 2x rule for kernels.gelu, the worst of some draws: its error against float64 is at most twice the plain form's
    in the same types, plus one unit in the last place of the scale; `repeats` more runs give the same bits."""
    worst, scales = {}, {}
    for seed in range(draws):
        given = arguments(shape, dtype, device, seed, scale)
        got = run(kernels.gelu, given, biased, hold)
        theirs, exact = run(plain, given, biased), run(plain, [t.double() for t in given], biased)
        for name, wanted in exact.items():
            assert (got[name].dtype, got[name].shape) == (theirs[name].dtype, wanted.shape), name
            assert got[name].isfinite().all(), name
            errors = [float((r[name] - wanted).abs().max()) if wanted.numel() else 0.0 for r in (got, theirs)]
            worst[name] = [max(e, b) for e, b in zip(errors, worst.get(name, (0.0, 0.0)), strict=True)]
            # Of all draws where that is one number, whose slope may be next to its zero in one of them; else the smallest.
            here = max(1e-30, float(wanted.abs().amax())) if wanted.numel() else 1e-30
            choose = max if wanted.numel() == 1 else min
            scales[name] = choose(scales.get(name, here), here)
    for _ in range(repeats):
        again = run(kernels.gelu, given, biased, hold)
        assert all(torch.equal(got[name], again[name]) for name in got)
    for name, errors in worst.items():
        mine, theirs = (error / (torch.finfo(got[name].dtype).eps * scales[name]) for error in errors)
        assert mine <= 2 * theirs + 1, f"{name}: {mine:.2f} units, the plain form {theirs:.2f}"


def value_and_slope(z):
    """kernels.gelu of numbers `[n]` and its derivative there."""
    z = z[None].clone().requires_grad_()
    out = kernels.gelu(z, None)
    return out.detach()[0], torch.autograd.grad(out, z, torch.ones_like(out))[0][0]


def exact(z):
    """The GELU and its derivative in float64, by erfc, which does not cancel in the tail."""
    z = z.double()
    below = torch.special.erfc(-z / math.sqrt(2)) / 2
    return z * below, below + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def at_every_number(device="cpu"):
    """A dense sweep, and numbers that float32 can hardly hold: (errors of value and slope, and of the value beside itself).

    The last for negative z above -7: what a whole tail loses where 1 + erf cancels.
    """
    small = torch.logspace(-45, -1, 4000, dtype=torch.float64).float()
    z = torch.cat([torch.linspace(-16, 16, 400_001), small, -small]).to(device)
    errors = [(got - wanted).abs() for got, wanted in zip(value_and_slope(z), exact(z), strict=True)]
    tail = (z < 0) & (z > -7) & (exact(z)[0].abs() > 1e-30)
    share = errors[0] / torch.where(z.abs() > 1, z.abs().double(), 1.0)
    return float(share.max()), float(errors[1].max()), float((errors[0] / exact(z)[0].abs())[tail].max())


def test_the_reference_is_the_equation():
    x, bias, _ = (t.double() for t in arguments((3, 5, 7), torch.float32))
    out = kernels.gelu(x, bias)
    for b, t, d in ((0, 0, 0), (2, 4, 6), (1, 2, 3)):
        z = float(x[b, t, d]) + float(bias[d])
        wanted = z * (1 + math.erf(z / math.sqrt(2))) / 2
        assert abs(float(out[b, t, d]) - wanted) <= 1e-15 * max(1, abs(z))


def test_the_references_gradients_are_its_derivatives():
    leaves = [t.double().requires_grad_() for t in arguments((2, 3, 5), torch.float32)[:2]]
    assert torch.autograd.gradcheck(kernels.gelu, leaves)


def test_the_reference_adds_in_float32():
    x, bias = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([2.0**-9])
    z = x.float() + bias
    assert z.bfloat16() == 1  # the sum in bfloat16
    assert torch.equal(kernels.gelu(256 * x, 256 * bias), torch.nn.functional.gelu(256 * z).bfloat16())


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_types(backend, monkeypatch):
    """The result and the gradient of x have x's type, that of the bias the bias's, autocast or not."""
    monkeypatch.setenv("FFTP_BACKEND", f"gelu={backend}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, *((torch.float64,) if backend == "reference" else ())):
        for bias_dtype in (torch.float32, torch.bfloat16):
            x, bias = (torch.ones(2, 5, dtype=dtype).requires_grad_(), torch.ones(5, dtype=bias_dtype).requires_grad_())
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                out = kernels.gelu(x, bias)
            d_x, d_bias = torch.autograd.grad(out.sum(), (x, bias))
            assert (out.dtype, d_x.dtype, d_bias.dtype) == (dtype, dtype, bias_dtype)
            torch.testing.assert_close(d_bias, torch.full_like(d_bias, 2 * 1.0852318))


def test_refused_shapes():
    for x, bias in (((2, 3), (2,)), ((2, 3), (3, 1)), ((2, 3), (1,)), ((), ()), ((), None)):
        with pytest.raises(ValueError, match=r"x \(\.\.\., D\) takes a bias \(D,\) or None, got"):
            kernels.gelu(torch.zeros(x), None if bias is None else torch.zeros(bias))


@pytest.fixture
def in_c(monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "gelu=native")


@pytest.fixture(params=LEVELS, ids=shared.SETS.__getitem__)
def level(request, in_c, monkeypatch):
    """Each instruction set of this processor, with outputs that start as NaN."""
    monkeypatch.setattr(shared, "use_set", request.param)
    monkeypatch.setattr(torch, "empty", lambda size, **how: torch.full(size, float("nan"), **how))


@needs_native
@pytest.mark.parametrize("shape", [(1, 1), (2, 31, 192), (130, 200), (65, 3), (0, 7), (5, 768), (9, 33)], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_native_by_the_2x_rule(level, shape, biased):
    """Rows of two tasks, of whole vectors and not; also where everything is small."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compare(shape, dtype, biased, repeats=1, draws=2)
        compare(shape, dtype, biased, draws=1, scale=1e-3)


@needs_native
def test_native_at_every_number(level):
    """Seen: 6.3e-8, 7.5e-8 and 3.1e-4; PyTorch in float32: 3.5e-7, 2.6e-7 and 1."""
    value, slope, tail = at_every_number()
    assert value <= 9e-8
    assert slope <= 1.1e-7
    assert tail <= 4e-4


@needs_native
def test_native_at_infinities_and_nan(level):
    """The limits; NaN stays NaN, from x, the bias and the gradient, whatever its bits; nothing overflows on the way."""
    inf, nan = math.inf, math.nan
    out, slope = value_and_slope(torch.tensor([inf, -inf, nan, 3e38, -3e38, 1e-40, -1e-40]))
    assert torch.equal(out[[0, 1, 3, 4]], torch.tensor([inf, 0, 3e38, 0]))
    assert torch.equal(slope[[0, 1, 3, 4]], torch.tensor([1.0, 0, 1, 0]))
    assert out[2].isnan()
    assert slope[2].isnan()
    assert torch.equal(out[5:], torch.tensor([5e-41, -5e-41]))
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = torch.zeros(2, 40, dtype=dtype), torch.zeros(40)
        x[1, 3], bias[7] = nan, torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
        grad = torch.ones_like(x)
        grad[0, 39] = nan
        x.requires_grad_()
        bias.requires_grad_()
        out = kernels.gelu(x, bias)
        d_x, d_bias = torch.autograd.grad(out, (x, bias), grad)
        assert out.isnan().nonzero().tolist() == [[0, 7], [1, 3], [1, 7]]
        assert d_x.isnan().nonzero().tolist() == [[0, 7], [0, 39], [1, 3], [1, 7]]
        assert d_bias.isnan().nonzero().flatten().tolist() == [3, 7, 39]


@needs_native
def test_native_rounds_to_bfloat16_as_pytorch_does(level):
    """Every number that bfloat16 has; the result in float32 of the same number, rounded."""
    bits = torch.arange(2**16, dtype=torch.int32)
    x = torch.where(bits >= 2**15, bits - 2**16, bits).short().view(torch.bfloat16)[None]
    narrow, wide = kernels.gelu(x, None), kernels.gelu(x.float(), None).bfloat16()
    assert torch.equal(narrow.nan_to_num(7), wide.nan_to_num(7))
    assert torch.equal(narrow.isnan(), x.isnan())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_native_has_the_same_bits_in_any_batch_and_on_any_threads(threads, dtype, in_c):
    """Elements wherever they lie in a vector; the bias's gradient on any threads."""
    x, bias, grad = arguments((300, 77), dtype)
    one = run(kernels.gelu, (x, bias, grad), True)
    given = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = run(kernels.gelu, (x, bias, grad), True)
    finally:
        torch.set_num_threads(given)
    assert all(torch.equal(one[name], whole[name]) for name in one)
    for rows in (slice(299, 300), slice(60, 131)):
        part = run(kernels.gelu, (x[rows], bias, grad[rows]), True)
        assert all(torch.equal(part[name], whole[name][rows]) for name in ("out", "x"))
    shifted = run(kernels.gelu, (x[:, 5:], bias[5:], grad[:, 5:]), True)
    assert torch.equal(shifted["out"], whole["out"][:, 5:])
    assert torch.equal(shifted["bias"], whole["bias"][5:])


@needs_native
def test_native_strides_and_a_bias_that_is_not_trained(in_c):
    given = arguments((30, 20), torch.float32)
    clean = run(kernels.gelu, given, True)
    x, bias, grad = given[0].T.contiguous().T, torch.stack([given[1]] * 2, 1)[:, 1], given[2].T.contiguous().T
    turned = run(kernels.gelu, (x, bias, grad), True, hold=lambda t: t)
    assert all(torch.equal(turned[name], clean[name]) for name in clean)
    x = given[0].clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(kernels.gelu(x, given[1]), x, grad)[0], clean["x"])
