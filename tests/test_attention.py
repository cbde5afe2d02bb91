"""Attention: its formula and gradients in float64, the products in bfloat16 against them, lengths, batches, memory."""

import pytest
import torch

import kernels
from kernels import dispatch
from kernels.attention import native, products, reference

SHAPES = [(1, 1, 1, 8), (3, 2, 2, 16), (33, 32, 3, 64), (2, 63, 4, 64), (1, 97, 12, 64), (2, 249, 3, 24)]
IDS = ["one token", "two", "speechcommands", "63", "base", "249"]


@pytest.fixture
def in_c():
    if reason := native.refuses():
        pytest.skip(reason)


def written_out(qkv, heads):
    """The formula, with everything written down."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def made(B, L, heads, d, seed=0):
    """qkv and a weight for the result, both what bfloat16 holds."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.randn(B, L, n * heads * d, generator=generator).bfloat16() for n in (3, 1))
    return tuple(numbers)


def run(call, qkv, weight, heads):
    """(result, gradient of qkv)."""
    qkv = qkv.detach().requires_grad_()
    out = call(qkv, heads)
    return out.detach(), torch.autograd.grad(out, qkv, weight.to(out.dtype))[0]


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_the_reference_is_the_formula(shape):
    qkv, weight = made(*shape)
    both = (run(f, qkv.double(), weight, shape[2]) for f in (kernels.attention, written_out))
    for ours, exact in zip(*both, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("kept", [products.KEPT_CELLS, 0], ids=["kept", "computed anew"])
def test_products_in_bfloat16(shape, kept, monkeypatch):
    """In units of the last place of the largest entry (2^-7 of its power of two): seen 2.5 forward and 2.8 backward, where
    SDPA has 0.7 and 1.3; the bound is half as much again."""
    monkeypatch.setattr(products, "KEPT_CELLS", kept)
    monkeypatch.setattr(products, "CHUNK_CELLS", 20000)  # several chunks, the last one partial
    qkv, weight = made(*shape)
    exact = run(written_out, qkv.double(), weight, shape[2])
    for found, wanted, bound in zip(run(products.attention, qkv, weight, shape[2]), exact, (3.7, 4.2), strict=True):
        assert found.dtype == torch.bfloat16
        unit = 2.0 ** (torch.frexp(wanted.abs().max()).exponent - 8)
        assert float((found.double() - wanted).abs().max() / unit) < bound


@pytest.mark.parametrize("shape", [s for s in (*SHAPES, (2, 129, 2, 64)) if s[3] == 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_in_c(shape, threads, in_c):
    """One unit in the last place, as SDPA: seen 0.62. A clip's rows are the same bits alone and on any threads."""
    qkv, _ = made(*shape)
    exact = written_out(qkv.double(), shape[2])
    given = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = native.attention(qkv, shape[2])
    finally:
        torch.set_num_threads(given)
    unit = 2.0 ** (torch.frexp(exact.abs().max()).exponent - 8)
    assert float((found.double() - exact).abs().max() / unit) < 1
    assert torch.equal(native.attention(qkv[-1:], shape[2]), found[-1:])


def test_in_c_nan_and_infinity_stay_in_their_clip(in_c):
    qkv, _ = made(3, 67, 2, 64)
    clean = native.attention(qkv, 2)
    qkv[1, 66, 130], qkv[2, 3, 5] = float("inf"), float("nan")  # a key of the first head, a query of the first
    found = native.attention(qkv, 2)
    assert torch.equal(found[0], clean[0])
    assert found[1, :, :64].isnan().any()
    assert torch.equal(found[1, :, 64:], clean[1, :, 64:])
    assert found[2, 3, :64].isnan().all()
    assert torch.equal(found[2, 4:], clean[2, 4:])


def test_in_c_large_scores(in_c):
    qkv, _ = made(2, 34, 3, 64)
    exact = written_out((20 * qkv).double(), 3)
    # The inputs are exact, the scores float32: what is left is the rounding of the weights and of the result.
    assert float((native.attention(20 * qkv, 3).double() - exact).abs().max()) < 2**-7 * float(exact.abs().max())
    assert native.attention(qkv[:0], 3).shape == (0, 34, 192)


def test_in_c_with_gradients_or_other_heads_it_is_the_products(in_c):
    qkv, weight = made(2, 31, 3, 64)
    assert all(map(torch.equal, run(native.attention, qkv, weight, 3), run(products.attention, qkv, weight, 3)))
    narrow, _ = made(2, 31, 3, 16)
    assert torch.equal(native.attention(narrow, 3), products.attention(narrow, 3))


def test_what_is_computed_anew_has_the_same_bits(monkeypatch):
    qkv, weight = made(2, 63, 4, 64)
    kept = run(products.attention, qkv, weight, 4)
    monkeypatch.setattr(products, "KEPT_CELLS", 0)
    assert all(map(torch.equal, kept, run(products.attention, qkv, weight, 4)))


def test_large_scores_and_a_strided_input():
    """Scores of some hundreds, where a sum of exponentials would overflow; qkv as every second token of a larger tensor."""
    qkv, _ = made(2, 34, 3, 64)
    qkv = (20 * qkv)[:, ::2]
    exact = written_out(qkv.double(), 3)
    # A rounded score of 512 is off by up to 1, and moves the result by as much as the values differ.
    assert float((products.attention(qkv, 3).double() - exact).abs().max()) < 0.25 * float(exact.abs().max())
    assert products.attention(qkv[:0], 3).shape == (0, 17, 192)


def test_which_backend_runs():
    chosen = "products" if native.refuses() else "native"
    assert dispatch._first(dispatch.TABLE["attention"], "cpu", "bfloat16").name == chosen
    assert dispatch._first(dispatch.TABLE["attention"], "cpu", "float32").name == "reference"
    assert dispatch._first(dispatch.TABLE["attention"], "cuda", "bfloat16").name == "reference"
    qkv, _ = made(2, 5, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dispatch.use_fused(True)
        kernels.attention(qkv, 2)
    assert dispatch.in_use() == {"attention": chosen}


def test_refused():
    with pytest.raises(ValueError, match=r"D a multiple of heads=4, got \(2, 5, 30\)"):
        kernels.attention(torch.zeros(2, 5, 30), 4)


def test_the_reference_takes_sdpa_as_it_is():
    qkv, _ = made(2, 31, 2, 8)
    assert torch.equal(kernels.attention(qkv.float(), 2), reference.attention(qkv.float(), 2))
