"""The GELU by the Triton kernels, by the 2x rule. Run by tests/test_triton_gelu.py."""

import math

import pytest
import torch
from test_gelu import arguments, at_every_number, compare, run, value_and_slope

import kernels
from kernels.gelu import fused, kernel

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "gelu=triton")


# Rows, D: one of each, fewer than a block, several blocks and parts of both; widths that are no power of two, and one that is.
SHAPES = [(1, 1), (3, 192), (13, 200), (40, 24), (1, 768), (2, 600)]


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, dtype, biased, guard, device):
    again = {"repeats": 9, "draws": 4} if device == "cuda" else {"repeats": int(dtype == "float32"), "draws": 2}
    compare(shape, TYPES[dtype], biased, device, guard.hold, **again)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_the_shipped_cut(scale, guard, device, monkeypatch):
    """Blocks and parts as on a GPU, where the interpreter takes its own: most parts have no rows. Small numbers too."""
    if device == "cpu":
        monkeypatch.setattr(kernel, "INTERPRETED_BLOCK", kernel.BLOCK)
        monkeypatch.setattr(kernel, "INTERPRETED_PARTS", 13)
    for dtype in (torch.float32, torch.bfloat16):
        compare((3, 31, 300), dtype, True, device, guard.hold, draws=1, scale=scale)


def test_every_number(guard, device, monkeypatch):
    """PyTorch in float32: 3.5e-7, 2.6e-7 and 1. One row, in few blocks for the interpreter."""
    monkeypatch.setattr(kernel, "INTERPRETED_BLOCK", (1, 1 << 16))
    value, slope, tail = at_every_number(device)
    assert value <= 2e-7
    assert slope <= 3e-7
    assert tail <= 3e-5


def test_infinities_and_nan(guard, device):
    """The limits; NaN stays NaN, and where it was."""
    inf, nan = math.inf, math.nan
    out, slope = (t.cpu() for t in value_and_slope(torch.tensor([inf, -inf, 3e38, -3e38, nan], device=device)))
    assert torch.equal(out[:4], torch.tensor([inf, 0, 3e38, 0]))
    assert torch.equal(slope[:4], torch.tensor([1.0, 0, 1, 0]))
    assert out[4].isnan()
    assert slope[4].isnan()
    x, bias, grad = arguments((5, 40), torch.float32, device)
    x[1, 3], bias[7], grad[0, 39] = nan, nan, nan
    found = run(kernels.gelu, (x, bias, grad), True)
    assert set(map(tuple, found["out"].isnan().nonzero().tolist())) == {(1, 3), *((row, 7) for row in range(5))}
    assert found["bias"].isnan().nonzero().flatten().tolist() == [3, 7, 39]


def test_rows_do_not_depend_on_the_batch(guard, device):
    """Bit for bit."""
    x, bias, _ = arguments((33, 7, 20), torch.float32, device)
    whole = kernels.gelu(x, bias)
    for rows in (slice(32, 33), slice(3, 17)):
        assert torch.equal(kernels.gelu(x[rows], bias), whole[rows])


def test_inputs_that_are_not_contiguous_and_no_rows(guard, device):
    x, bias, grad = arguments((4, 6, 20), torch.float32, device)
    wanted = run(kernels.gelu, (x, bias, grad), True)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, grad)]
    got = run(kernels.gelu, (turned[0], torch.stack([bias, bias], 1)[:, 1], turned[1]), True, hold=lambda t: t)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    compare((0, 20), torch.float32, True, device, guard.hold)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(biased, dtype, device):
    x, bias, grad = arguments((2, 3, 5), dtype, device)
    leaves = (x.requires_grad_(), bias.requires_grad_() if biased else None)
    torch.library.opcheck(fused.activate, leaves)
    given = (grad, x.detach(), bias.detach() if biased else None)
    torch.library.opcheck(fused.gradients, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_under_compile(device):
    x, bias, _ = arguments((2, 5, 20), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, bias)]
    results = [
        [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
        for out in (torch.compile(kernels.gelu)(*leaves), kernels.gelu(*leaves))
    ]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_float64_is_refused(device):
    with pytest.raises(ValueError, match="gelu=triton, which cannot run: it adds in float32; the tensors are float64"):
        kernels.gelu(torch.zeros(2, 3, device=device).double(), None)
