"""The residual addition and its norms: each backend against float64, forward and gradients by name."""

import pytest
import torch

import kernels
from kernels import native as shared
from kernels.norm import native, reference

needs_native = pytest.mark.skipif(native.refuses() is not None, reason=f"the native norms: {native.refuses()}.")
# The instruction sets of this processor.
LEVELS = range(native.LIBRARY.widest() + 1) if native.refuses() is None else ()
VECTORS = {
    "rms_norm": ("weight",),
    "layer_norm": ("bias", "weight", "shift"),
}  # what an operation takes behind residual
FORMS = {  # an operation, and which of its tensors are None
    "rms_norm": ("rms_norm", ()),
    "rms_norm, first": ("rms_norm", ("residual",)),
    "layer_norm": ("layer_norm", ()),
    "layer_norm, no bias": ("layer_norm", ("bias",)),
    "layer_norm, first": ("layer_norm", ("residual", "bias")),
}
each_form = pytest.mark.parametrize(("operation", "absent"), FORMS.values(), ids=FORMS)
each_operation = pytest.mark.parametrize("operation", VECTORS)


def arguments(operation, shape, x_dtype=torch.float32, dtype=torch.float32, device="cpu", seed=0, absent=()):
    """The operation's tensors by name, and the gradients of normed and total. Rounded once, so that float64 sees the same
    numbers."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x, residual, grad, d_total = (torch.randn(shape, generator=generator) for _ in range(4))
    vectors = {name: 0.5 * torch.randn(shape[-1:], generator=generator) for name in ("weight", "bias", "shift")}
    vectors["weight"] += 1
    given = {"x": (0.7 * x).to(x_dtype), "residual": 2 * residual} | {n: vectors[n] for n in VECTORS[operation]}
    given = {name: None if name in absent else t.to(device) for name, t in given.items()}
    return given, [grad.to(device, dtype), d_total.to(device)]


def run(form, given, grads, dtype, hold=torch.clone):
    """Outputs and gradients by name; form takes the tensors of `given` in their order, and dtype."""
    leaves = {name: hold(t).detach().requires_grad_() for name, t in given.items() if t is not None}
    out = form(*(leaves.get(name) for name in given), dtype)
    grads = [hold(t.to(o.dtype)) for t, o in zip(grads, out, strict=True)]
    found = torch.autograd.grad(out, list(leaves.values()), grads)
    return {"normed": out[0].detach(), "total": out[1].detach()} | dict(zip(leaves, found, strict=True))


def in_float64(given):
    return {name: t if t is None else t.double() for name, t in given.items()}


def compare(operation, shape, x_dtype, dtype, absent=(), device="cpu", hold=torch.clone, repeats=0, eps=1e-5, draws=4):
    """The 2x rule for an operation, the worst of some draws: its error against float64 is at most twice the plain form's in
    the same types, plus one unit in the last place of the scale; `repeats` more runs give the same bits."""

    def plain(x, *rest):
        *others, dtype = rest
        wide = torch.promote_types(x.dtype, torch.float32)
        return getattr(reference, operation)(x, *others, eps, dtype, wide)

    def ours(*rest):
        *others, dtype = rest
        return getattr(kernels, operation)(*others, eps, dtype)

    worst = {}
    for seed in range(draws):
        given, grads = arguments(operation, shape, x_dtype, dtype, device, seed, absent)
        got, theirs = run(ours, given, grads, dtype, hold), run(plain, given, grads, dtype)
        exact = run(plain, in_float64(given), grads, torch.float64)
        assert got.keys() == exact.keys()
        for name, wanted in exact.items():
            assert (got[name].dtype, got[name].shape) == (theirs[name].dtype, wanted.shape), name
            unit = torch.finfo(got[name].dtype).eps * max(1e-30, float(wanted.abs().amax())) if wanted.numel() else 1.0
            errors = [float((r[name] - wanted).abs().max()) if wanted.numel() else 0.0 for r in (got, theirs)]
            before = worst.get(name, (0.0, 0.0))
            worst[name] = [max(e / unit, b) for e, b in zip(errors, before, strict=True)]
            assert got[name].isfinite().all(), name
    for _ in range(repeats):
        again = run(ours, given, grads, dtype, hold)
        assert all(torch.equal(got[name], again[name]) for name in got)
    for name, (mine, theirs) in worst.items():
        assert mine <= 2 * theirs + 1, f"{name}: {mine:.2f} units, the plain form {theirs:.2f}"


def test_the_references_are_the_equations():
    for operation in VECTORS:
        given = in_float64(arguments(operation, (3, 5, 7))[0])
        normed, total = getattr(kernels, operation)(*given.values(), 0.1)
        centred = operation == "layer_norm"
        assert torch.equal(total, given["residual"] + given["x"] + (given["bias"] if centred else 0))
        for b, t in ((0, 0), (2, 4)):
            row = [float(v) for v in total[b, t]]
            row = [v - sum(row) / 7 for v in row] if centred else row
            size = (sum(v * v for v in row) / 7 + 0.1) ** 0.5
            wanted = torch.tensor(row, dtype=torch.float64) / size * given["weight"] + given.get("shift", 0)
            torch.testing.assert_close(normed[b, t], wanted, rtol=0, atol=1e-14)  # sums of seven terms in float64


@each_operation
def test_the_references_gradients_are_its_derivatives(operation):
    leaves = [t.requires_grad_() for t in in_float64(arguments(operation, (2, 3, 5))[0]).values()]
    assert torch.autograd.gradcheck(lambda *given: getattr(kernels, operation)(*given, 1e-5), leaves)


@each_operation
@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=needs_native)])
def test_types(operation, backend, monkeypatch):
    """The stream is never narrower than float32; normed has autocast's type, or the one that is asked for."""
    monkeypatch.setenv("FFTP_BACKEND", f"{operation}={backend}")
    x, residual, *vectors = arguments(operation, (2, 5), torch.bfloat16)[0].values()

    def types(*given):
        return [t.dtype for t in getattr(kernels, operation)(*given[:2], *vectors, 1e-5, *given[2:])]

    assert types(x, residual) == types(x, None) == types(x, x) == [torch.float32, torch.float32]
    assert types(x, residual, torch.float16) == [torch.float16, torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        assert types(x, residual) == types(residual, None) == [torch.bfloat16, torch.float32]
        assert types(x, residual, torch.float32) == [torch.float32, torch.float32]
    if backend == "reference":
        assert types(x.double(), None) == types(x, residual.double()) == [torch.float64, torch.float64]


def test_refused_shapes():
    for shapes in (
        ((2, 3), (3,), (3,)),
        ((2, 3), (2, 3), (2,)),
        ((2, 3), (2, 3), (3, 1)),
        ((2, 3), None, (4,)),
        ((),) * 3,
    ):
        x, residual, weight = (None if s is None else torch.zeros(s) for s in shapes)
        with pytest.raises(ValueError, match=r"x \(\.\.\., D\) takes a residual of its own shape and weight \(D,\)"):
            kernels.rms_norm(x, residual, weight, 1e-5)
    for wrong in range(3):
        vectors = [torch.zeros(4 if i == wrong else 3) for i in range(3)]
        with pytest.raises(ValueError, match=rf"and bias, weight, shift \(D,\).*{VECTORS['layer_norm'][wrong]} \(4,\)"):
            kernels.layer_norm(torch.zeros(2, 3), None, *vectors, 1e-5)


@pytest.fixture
def in_c(monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "rms_norm=native,layer_norm=native")


@needs_native
@pytest.mark.parametrize("level", LEVELS, ids=shared.SETS.__getitem__)
@pytest.mark.parametrize("shape", [(1, 1), (2, 31, 192), (130, 200), (65, 3), (0, 7), (5, 768)], ids=str)
@each_form
def test_native_by_the_2x_rule(level, shape, operation, absent, in_c, monkeypatch):
    """Rows of two tasks, of whole vectors and not; outputs start as NaN."""
    monkeypatch.setattr(shared, "use_set", level)
    monkeypatch.setattr(torch, "empty", lambda size, **how: torch.full(size, float("nan"), **how))
    wide, narrow, half = torch.float32, torch.bfloat16, torch.float16
    for x_dtype, dtype in ((wide, wide), (wide, narrow), (narrow, wide), (narrow, narrow), (half, half)):
        compare(operation, shape, x_dtype, dtype, absent, repeats=1)


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
@each_operation
@pytest.mark.parametrize("threads", [1, 3])
def test_native_rows_have_the_same_bits_in_any_batch_and_on_any_threads(operation, threads, in_c):
    x, residual, *vectors = arguments(operation, (300, 33), torch.bfloat16)[0].values()
    norm, given = getattr(kernels, operation), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = norm(x, residual, *vectors, 1e-5)
    finally:
        torch.set_num_threads(given)
    for rows in (slice(299, 300), slice(60, 131)):
        part = norm(x[rows], residual[rows], *vectors, 1e-5)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


@needs_native
@each_operation
def test_native_nan_and_strides(operation, in_c):
    x, residual, *vectors = arguments(operation, (3, 20))[0].values()
    norm = getattr(kernels, operation)
    clean = norm(x, residual, *vectors, 1e-5)
    strided = [torch.stack([vector] * 2, 1)[:, 1] for vector in vectors]
    turned = norm(x.T.contiguous().T, residual.T.contiguous().T, *strided, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(turned, clean, strict=True))
    x[1, 5] = float("nan")
    sick = norm(x, residual, *vectors, 1e-5, torch.bfloat16)
    for bad, whole in zip(sick, clean, strict=True):
        assert torch.equal(bad[[0, 2]], whole[[0, 2]].to(bad.dtype))
    assert sick[0][1].isnan().all()


@needs_native
def test_native_mean_far_from_zero(in_c):
    """Rows with a mean of a thousand deviations: the variance is taken about the mean, not as a difference of squares."""
    x = 1000 + torch.randn(7, 192, generator=torch.Generator().manual_seed(0))
    vectors = (None, torch.ones(192), torch.zeros(192))
    wanted = reference.layer_norm(x.double(), None, *vectors, 1e-6, torch.float64, torch.float64)[0]
    theirs = reference.layer_norm(x, None, *vectors, 1e-6, torch.float32, torch.float32)[0]
    errors = [float((t - wanted).abs().max()) for t in (kernels.layer_norm(x, None, *vectors, 1e-6)[0], theirs)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps * float(wanted.abs().max())
