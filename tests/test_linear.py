"""A linear layer's product: gradients in C against float64, rows, threads, types, widths, refusals."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as nnf
from in_c import multiplied
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
import kernels.native as shared
from kernels import dispatch
from kernels.linear import native, reference

SHAPES = [((1,), 32, 32), ((7,), 64, 96), ((3, 3), 32, 192), ((64,), 192, 64), ((2, 65), 96, 32), ((1, 391), 64, 160)]


in_c = multiplied(native)


def made(rows, K, N, seed=0):
    """x and a weight for the result, both what bfloat16 holds, and the layer's weight in float32."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(*rows, width, generator=generator).bfloat16() for width in (K, N))
    return x, grad, torch.randn(N, K, generator=generator)


def run(call, x, grad, weight):
    """(result, gradient of x, gradient of the weight)."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = call(x, weight)
    return out.detach(), *torch.autograd.grad(out, (x, weight), grad.to(out.dtype))


def autocast(x, weight):
    """The reference as a step has it."""
    with torch.autocast("cpu", torch.bfloat16):
        return reference.linear(x, weight)


@pytest.mark.parametrize(("rows", "K", "N"), SHAPES)
def test_in_c_by_the_2x_rule(rows, K, N, in_c, poison):
    """The weight in float32, rounded on the way, as autocast has it; its gradient in float32."""
    x, grad, weight = made(rows, K, N)
    exact = run(reference.linear, x.double(), grad.double(), weight.bfloat16().double())
    ours, plain = run(native.linear, x, grad, weight), run(autocast, x, grad, weight)
    for name, wanted, found, theirs in zip(("out", "x", "weight"), exact, ours, plain, strict=True):
        assert found.dtype == theirs.dtype, name
        assert found.shape == wanted.shape, name
        unit = 2.0 ** (torch.frexp(wanted.abs().max()).exponent - 8)  # of the last place in bfloat16
        error, allowed = ((t.double() - wanted).abs().max() for t in (found, theirs))
        assert error <= 2 * allowed + unit, name
    if in_c < shared.AMX:
        assert torch.equal(ours[0], plain[0])  # PyTorch's own
    # Sums of float32 that are not rounded to bfloat16. Seen: 6e-7 of the largest.
    assert (ours[2] - exact[2]).abs().max() <= 5e-6 * exact[2].abs().max()


@pytest.mark.usefixtures("in_c")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_in_c_rows_have_the_same_bits_in_any_batch_and_on_any_threads(threads):
    x, grad, weight = made((5, 131), 96, 160)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = run(native.linear, x, grad, weight)
    finally:
        torch.set_num_threads(before)
    alone = run(native.linear, x, grad, weight)
    assert all(map(torch.equal, whole, alone))
    for row in (0, 63, 64, 127, 128, 130):
        own = (slice(2, 3), slice(row, row + 1))
        assert torch.equal(run(native.linear, x[own], grad[own], weight)[1], whole[1][own])
    turned = run(native.linear, x[..., :64], grad[..., 32:128], weight[32:128, :64])  # the wider is K, or N
    wide = run(native.linear, grad[..., 32:128], x[..., :64], weight[32:128, :64].T)
    assert torch.equal(turned[2], wide[2].T)


@pytest.fixture
def tiles():
    if reason := native.refuses():
        pytest.skip(f"linear=native: {reason}.")
    if native.LIBRARY.widest() < shared.AMX:
        pytest.skip("this processor has no AMX")


# Rows in one and in several cuts, in squares and in less; depths in one step and in several, of one block and of several;
# columns in one part and in several, panels in whole groups and in others.
WITHOUT_GRADIENTS = [
    *SHAPES,
    ((16,), 32, 32),
    ((17,), 800, 96),
    ((98,), 768, 2304),
    ((1, 300), 3072, 768),
    ((129,), 288, 32),
    ((3, 290), 832, 1568),
    ((850,), 512, 224),
]


@pytest.mark.parametrize(("rows", "K", "N"), WITHOUT_GRADIENTS)
def test_by_tiles_without_gradients(rows, K, N, tiles, poison, monkeypatch):
    """A small result: by the 2x rule; the same bits with the weight laid out before, on any threads, and for a row alone."""
    monkeypatch.setattr(reference, "linear", None)
    x, _, weight = made(rows, K, N)
    exact, plain = x.double() @ weight.bfloat16().double().T, nnf.linear(x, weight.bfloat16())
    panels = native.panels(weight)
    with torch.no_grad():
        found = native.linear(x, weight)
        assert (found.dtype, found.shape) == (torch.bfloat16, exact.shape)
        error, allowed = ((t.double() - exact).abs().max() for t in (found, plain))
        assert error <= 2 * allowed + 2.0 ** (torch.frexp(exact.abs().max()).exponent - 8)
        assert torch.equal(native.linear(x.mT.contiguous().mT, weight.bfloat16(), panels), found)
        last = (*(slice(n - 1, n) for n in rows),)
        assert torch.equal(native.linear(x[last], weight, panels), found[last])
        before = torch.get_num_threads()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                assert torch.equal(native.linear(x, weight, panels), found)
            finally:
                torch.set_num_threads(before)
        assert native.linear(x[:0], weight, panels).shape == (0, *found.shape[1:])


@pytest.mark.usefixtures("tiles")
def test_by_tiles_rows_may_lie_anywhere(poison, monkeypatch):
    """Slices of clips, windows that overlap, one row for all: the bits of a copy."""
    monkeypatch.setattr(reference, "linear", None)
    x, _, weight = made((4, 70), 64, 96)
    given = (x[1:, 3:, :], x[::2, ::3], x[:, :, None].expand(4, 70, 2, 64)[:, 0], x[:1, :1].expand(5, 9, 64))
    windows = x.flatten(1)[:, : 69 * 64].unfold(1, 64, 32)
    with torch.no_grad():
        for rows in (*given, windows, x[:, :1], x[:0], x[..., 1:33].unflatten(0, (2, 2))):
            found = native.linear(rows, weight[:, : rows.shape[-1]])
            assert torch.equal(
                found, native.linear(rows.clone(memory_format=torch.contiguous_format), weight[:, : rows.shape[-1]])
            )


def test_by_tiles_large_results_and_other_widths_go_by_the_reference(tiles, monkeypatch):
    monkeypatch.setattr(native, "SMALL", 64 * 96)
    x, _, weight = made((65,), 64, 96)
    dispatch.use_fused(True)
    with torch.no_grad():
        panels = kernels.linear_panels(weight)
        monkeypatch.setattr(native, "_product", None)
        assert torch.equal(kernels.linear(x, weight.bfloat16(), panels), nnf.linear(x, weight.bfloat16()))
        with pytest.raises(TypeError):
            kernels.linear(x[1:], weight.bfloat16(), panels)
    assert kernels.linear_panels(weight[:, :48]) is None
    dispatch.use_fused(False)
    assert kernels.linear_panels(weight) is None


def test_without_amx_nothing_is_laid_out(monkeypatch):
    monkeypatch.setattr(type(native.LIBRARY), "widest", lambda library: shared.SETS.index("AVX-512"))
    assert native.panels(torch.zeros(32, 32)) is None


@pytest.mark.usefixtures("in_c")
def test_in_c_many_rows_add_up():
    """4,100 rows, the last of them beside zeros: the weight's gradient stays within float32's rounding."""
    x, grad, weight = made((4101,), 64, 32)
    exact = grad.double().T @ x.double()
    found = run(native.linear, x, grad, weight)[2]
    assert (found - exact).abs().max() <= 1e-6 * (grad.double().abs().T @ x.double().abs()).max()


@pytest.mark.usefixtures("in_c")
def test_in_c_types_strides_and_what_is_not_wanted(poison):
    x, grad, weight = made((9, 12), 64, 32)
    whole = run(native.linear, x, grad, weight)
    narrow = run(native.linear, x, grad, weight.bfloat16())
    assert torch.equal(narrow[0], whole[0])
    assert torch.equal(narrow[1], whole[1])
    assert torch.equal(narrow[2], whole[2].bfloat16())
    finer = (x.float() * 1.0001).requires_grad_()
    rounded = native.linear(finer, weight)
    assert torch.equal(rounded, reference.linear(finer.bfloat16(), weight.bfloat16()))
    assert torch.equal(torch.autograd.grad(rounded, finer, grad)[0], whole[1].float())
    views = run(native.linear, x.mT.contiguous().mT, grad[:1, :1].expand(9, 12, -1), weight.T.contiguous().T)
    assert all(map(torch.equal, views, run(native.linear, x, grad[:1, :1].expand(9, 12, -1).contiguous(), weight)))
    frozen = native.linear(x, weight.requires_grad_())
    assert torch.equal(torch.autograd.grad(frozen, weight, grad)[0], whole[2])
    given = x.detach().requires_grad_()
    assert torch.equal(torch.autograd.grad(native.linear(given, weight.detach()), given, grad)[0], whole[1])
    out, d_x, d_weight = run(native.linear, x[:0], grad[:0], weight)
    assert out.shape == (0, 12, 32)
    assert d_x.shape == (0, 12, 64)
    assert not d_weight.any()


@pytest.mark.usefixtures("in_c")
def test_in_c_nan_stays_in_its_row():
    x, grad, weight = made((20,), 32, 64)
    clean = run(native.linear, x, grad, weight)
    x[17, 5], grad[3, 6] = float("nan"), float("inf")
    out, d_x, d_weight = run(native.linear, x, grad, weight)
    other = torch.arange(20) != 17
    assert out[17].isnan().all()
    assert torch.equal(out[other], clean[0][other])
    other = torch.arange(20) != 3
    assert torch.equal(d_x[other], clean[1][other])
    assert not d_x[3].isfinite().any()
    assert d_weight[:, 5].isnan().all()


@pytest.mark.usefixtures("in_c")
@pytest.mark.parametrize(("K", "N"), [(48, 32), (32, 12), (7, 5)])
def test_other_widths_go_by_the_reference(K, N):
    x, grad, weight = made((4, 5), K, N)
    dispatch.use_fused(True)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(kernels.linear, x, grad, weight)
    assert all(map(torch.equal, found, run(autocast, x, grad, weight)))
    assert dispatch.in_use() == {"linear": "native"}


def test_shapes_are_checked():
    for x, weight in (
        (torch.zeros(3, 4), torch.zeros(4, 3)),
        (torch.zeros(()), torch.zeros(2, 1)),
        (torch.zeros(4),) * 2,
    ):
        with pytest.raises(ValueError, match=r"x \(\.\.\., K\) takes a weight \(N, K\)"):
            kernels.linear(x, weight)


def test_refusals_say_why(monkeypatch):
    refuses = next(b for b in dispatch.TABLE["linear"] if b.name == "native").refuses
    assert refuses("cuda", "bfloat16") == "it is C for the CPU; the tensors are on cuda"
    assert refuses("cpu", "float32") == "it computes in bfloat16; the tensors are float32"
    monkeypatch.setattr(type(native.LIBRARY), "refuses", lambda library: None)
    for answer, reason in (
        (False, "the processor has no AVX512-BF16"),
        (True, None),
    ):
        monkeypatch.setattr(type(native.LIBRARY), "asks", lambda library, name, answer=answer: answer)
        assert refuses("cpu", "bfloat16") == reason
    monkeypatch.setattr(type(native.LIBRARY), "refuses", lambda library: "it is not built: ...")
    assert refuses("cpu", "bfloat16") == "it is not built: ..."
    dispatch.use_fused(True)
    assert dispatch.select("linear", "cpu", "bfloat16").name == "reference"


class TestWatched:
    """Whatever follows operations instead of their results is not left with a call of C that it cannot see."""

    def call(self, x, weight):
        dispatch.use_fused(True)
        x = kernels.attention(kernels.linear(x.bfloat16(), weight.bfloat16()), 1, torch.ones(192))
        x = kernels.layer_norm(x, None, None, torch.ones(64), torch.zeros(64), 1e-6)[0]
        return kernels.gelu(x, None)

    @pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
    def test_traced_by_jit_without_gradients(self):
        (x, _, weight), (other, _, _) = made((2, 5), 32, 192), made((2, 5), 32, 192, seed=1)
        with torch.no_grad():
            traced = torch.jit.trace(self.call, (x, weight), check_trace=False)
            assert torch.equal(traced(other, weight), self.call(other, weight))

    def test_compiled_whole(self):
        x, _, weight = made((2, 5), 32, 192)
        dispatch.use_fused(True)
        compiled = torch.compile(kernels.linear, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert torch.equal(compiled(x, weight.bfloat16()), nnf.linear(x, weight.bfloat16()))

    def test_with_fake_tensors(self):
        with FakeTensorMode(), torch.no_grad():
            x, weight = torch.empty(2, 5, 32, dtype=torch.bfloat16), torch.empty(192, 32, dtype=torch.bfloat16)
            dispatch.use_fused(True)
            assert kernels.attention(kernels.linear(x, weight), 1).shape == (2, 5, 64)

    def test_memory_is_asked_for(self):
        with pytest.raises(TypeError, match="an operation in C needs tensors with memory"):
            shared.pointers(torch.empty(2, 3), torch.empty(2, 3, device="meta"))
        assert shared.pointers(None, torch.empty(0, device="meta")) == [None, 0]

    @pytest.mark.filterwarnings("ignore")  # forward_ad scripts something, which is deprecated
    def test_with_tangents(self):
        x, tangent, weight = made((7,), 32, 32)
        dispatch.use_fused(True)
        with torch.no_grad(), fwAD.dual_level():
            out = kernels.linear(fwAD.make_dual(x, tangent), weight.bfloat16())
            assert torch.equal(fwAD.unpack_dual(out).tangent, nnf.linear(tangent, weight.bfloat16()))


def test_no_width_and_wrong_panels():
    dispatch.use_fused(True)
    with torch.no_grad():
        none = kernels.linear(torch.zeros(3, 0, dtype=torch.bfloat16), torch.zeros(32, 0, dtype=torch.bfloat16))
        assert torch.equal(none, torch.zeros(3, 32, dtype=torch.bfloat16))
        right = torch.zeros(64 * 64, 2, dtype=torch.bfloat16)
        for panels in (right[:512].flatten(), right.T[0].float().contiguous(), right[:, 0]):
            with pytest.raises(ValueError, match="panels are `linear_panels` of this weight, 4096 numbers in bfloat16"):
                kernels.linear(torch.zeros(1, 64), torch.zeros(64, 64), panels)
