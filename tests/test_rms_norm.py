"""The residual addition and its norm: each backend against float64, forward and gradients by name."""

import pytest
import torch

import kernels
from kernels import native as shared
from kernels.rms_norm import native, reference

needs_native = pytest.mark.skipif(native.refuses() is not None, reason=f"the native norm: {native.refuses()}.")
LEVELS = range(native.LIBRARY._set() + 1) if native.refuses() is None else ()  # the instruction sets of this processor
NAMES = ("normed", "total", "x", "residual", "weight")


def arguments(shape, x_dtype, dtype, device="cpu", seed=0):
    """x, residual and weight; the gradients of normed and total. Rounded once, so that float64 sees the same numbers."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x, residual, grad, d_total = (torch.randn(shape, generator=generator) for _ in range(4))
    weight = 1 + 0.5 * torch.randn(shape[-1:], generator=generator)
    x, grad = (0.7 * x).to(x_dtype), grad.to(dtype)
    return [t.to(device) for t in (x, 2 * residual, weight, grad, d_total)]


def run(form, given, dtype, adds, hold=torch.clone):
    """Outputs and gradients by name."""
    x, residual, weight = (hold(t).detach().requires_grad_() for t in given[:3])
    out = form(x, residual if adds else None, weight, dtype)
    leaves = [x, residual, weight] if adds else [x, weight]
    found = torch.autograd.grad(out, leaves, [hold(t.to(o.dtype)) for t, o in zip(given[3:], out, strict=True)])
    names = [name for name in NAMES if adds or name != "residual"]
    return dict(zip(names, (*(o.detach() for o in out), *found), strict=True))


def compare(shape, x_dtype, dtype, adds, device="cpu", hold=torch.clone, repeats=0, eps=1e-5, draws=4):
    """The 2x rule for kernels.rms_norm, the worst of some draws: its error against float64 is at most twice the plain
    form's in the same types, plus one unit in the last place of the scale; `repeats` more runs give the same bits."""

    def plain(x, residual, weight, dtype):
        return reference.rms_norm(x, residual, weight, eps, dtype, torch.promote_types(x.dtype, torch.float32))

    def ours(x, residual, weight, dtype):
        return kernels.rms_norm(x, residual, weight, eps, dtype)

    worst = {}
    for seed in range(draws):
        given = arguments(shape, x_dtype, dtype, device, seed)
        got = run(ours, given, dtype, adds, hold)
        theirs, exact = run(plain, given, dtype, adds), run(plain, [t.double() for t in given], torch.float64, adds)
        for name, wanted in exact.items():
            assert (got[name].dtype, got[name].shape) == (theirs[name].dtype, wanted.shape), name
            unit = torch.finfo(got[name].dtype).eps * max(1e-30, float(wanted.abs().amax())) if wanted.numel() else 1.0
            errors = [float((r[name] - wanted).abs().max()) if wanted.numel() else 0.0 for r in (got, theirs)]
            before = worst.get(name, (0.0, 0.0))
            worst[name] = [max(e / unit, b) for e, b in zip(errors, before, strict=True)]
            assert got[name].isfinite().all(), name
    for _ in range(repeats):
        again = run(ours, given, dtype, adds, hold)
        assert all(torch.equal(got[name], again[name]) for name in got)
    for name, (mine, theirs) in worst.items():
        assert mine <= 2 * theirs + 1, f"{name}: {mine:.2f} units, the plain form {theirs:.2f}"


def test_the_reference_is_the_equation():
    x, residual, weight, *_ = (t.double() for t in arguments((3, 5, 7), torch.float32, torch.float32))
    normed, total = kernels.rms_norm(x, residual, weight, 0.1)
    assert torch.equal(total, residual + x)
    for b, t in ((0, 0), (2, 4)):
        row = [float(v) for v in residual[b, t] + x[b, t]]
        size = (sum(v * v for v in row) / 7 + 0.1) ** 0.5
        wanted = torch.tensor([v / size * float(w) for v, w in zip(row, weight, strict=True)], dtype=torch.float64)
        torch.testing.assert_close(normed[b, t], wanted, rtol=0, atol=1e-14)  # sums of seven terms in float64


def test_the_references_gradients_are_its_derivatives():
    leaves = [t.double().requires_grad_() for t in arguments((2, 3, 5), torch.float32, torch.float32)[:3]]
    assert torch.autograd.gradcheck(lambda *given: kernels.rms_norm(*given, 1e-5), leaves)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_types(backend, monkeypatch):
    """The stream is never narrower than float32; normed has autocast's type, or the one that is asked for."""
    monkeypatch.setenv("FFTP_BACKEND", f"rms_norm={backend}")
    x, residual, weight, *_ = arguments((2, 5), torch.bfloat16, torch.float32)

    def types(*given):
        return [t.dtype for t in kernels.rms_norm(*given[:2], weight, 1e-5, *given[2:])]

    assert types(x, residual) == types(x, None) == types(x, x) == [torch.float32, torch.float32]
    assert types(x, residual, torch.float16) == [torch.float16, torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        assert types(x, residual) == types(residual, None) == [torch.bfloat16, torch.float32]
        assert types(x, residual, torch.float32) == [torch.float32, torch.float32]
    if backend == "reference":
        assert types(x.double(), None) == types(x, residual.double()) == [torch.float64, torch.float64]


def test_refused_shapes():
    for shapes in (((2, 3), (3,), (3,)), ((2, 3), (2, 3), (2,)), ((2, 3), (2, 3), (3, 1)), ((2, 3), None, (4,))):
        x, residual, weight = (None if s is None else torch.zeros(s) for s in shapes)
        with pytest.raises(ValueError, match=r"x \(\.\.\., D\) takes a residual of its own shape and weight \(D,\)"):
            kernels.rms_norm(x, residual, weight, 1e-5)


@pytest.fixture
def in_c(monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "rms_norm=native")


@needs_native
@pytest.mark.parametrize("level", LEVELS, ids=shared.SETS.__getitem__)
@pytest.mark.parametrize("shape", [(1, 1), (2, 31, 192), (130, 200), (65, 3), (0, 7), (5, 768)], ids=str)
@pytest.mark.parametrize("adds", [True, False], ids=["residual", "first"])
def test_native_by_the_2x_rule(level, shape, adds, in_c, monkeypatch):
    """Rows of two tasks, of whole vectors and not; outputs start as NaN."""
    monkeypatch.setattr(shared, "use_set", level)
    monkeypatch.setattr(torch, "empty", lambda size, **how: torch.full(size, float("nan"), **how))
    for x_dtype in (torch.float32, torch.bfloat16, torch.float16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            compare(shape, x_dtype, dtype, adds, repeats=1)


@needs_native
@pytest.mark.parametrize("level", LEVELS, ids=shared.SETS.__getitem__)
def test_native_rounds_to_bfloat16_as_pytorch_does(level, in_c, monkeypatch):
    """Every number that bfloat16 has and the halves between, subnormal ones, infinities and NaN among them."""
    monkeypatch.setattr(shared, "use_set", level)
    bits = torch.arange(2**17, dtype=torch.int64) << 15
    weight = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
    wide = kernels.rms_norm(torch.ones(1, 2**17), None, weight, 0.0)[0]
    narrow = kernels.rms_norm(torch.ones(1, 2**17), None, weight, 0.0, torch.bfloat16)[0]
    assert torch.equal(wide[0].nan_to_num(7), weight.nan_to_num(7))
    assert torch.equal(narrow.nan_to_num(7), wide.bfloat16().nan_to_num(7))
    assert torch.equal(narrow.isnan(), wide.isnan())


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_native_rows_have_the_same_bits_in_any_batch_and_on_any_threads(threads, in_c):
    x, residual, weight, *_ = arguments((300, 33), torch.bfloat16, torch.float32)
    given = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = kernels.rms_norm(x, residual, weight, 1e-5)
    finally:
        torch.set_num_threads(given)
    for rows in (slice(299, 300), slice(60, 131)):
        part = kernels.rms_norm(x[rows], residual[rows], weight, 1e-5)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


@needs_native
def test_native_nan_and_strides(in_c):
    x, residual, weight, *_ = arguments((3, 20), torch.float32, torch.float32)
    clean = kernels.rms_norm(x, residual, weight, 1e-5)
    turned = kernels.rms_norm(x.T.contiguous().T, residual.T.contiguous().T, torch.stack([weight] * 2, 1)[:, 1], 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(turned, clean, strict=True))
    x[1, 5] = float("nan")
    for sick, whole in zip(kernels.rms_norm(x, residual, weight, 1e-5, torch.bfloat16), clean, strict=True):
        assert torch.equal(sick[[0, 2]], whole[[0, 2]].to(sick.dtype))
    assert kernels.rms_norm(x, residual, weight, 1e-5, torch.bfloat16)[0][1].isnan().all()
