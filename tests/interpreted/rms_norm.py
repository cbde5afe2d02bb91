"""The norm by the Triton kernels, by the 2x rule. Run by tests/test_triton_rms_norm.py."""

import pytest
import torch
from test_rms_norm import arguments, compare

import kernels
from kernels.rms_norm import fused, kernel

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "rms_norm=triton")


# Rows, D: one of each, fewer than a block, several blocks and parts; widths that are no power of two, and one that is.
SHAPES = [(1, 1), (3, 192), (13, 200), (40, 24), (1, 768), (2, 3000)]


@pytest.mark.parametrize("adds", [True, False], ids=["residual", "first"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, dtype, adds, guard, device):
    again = {"repeats": 9, "draws": 4} if device == "cuda" else {"repeats": int(dtype == "float32"), "draws": 2}
    compare(shape, TYPES[dtype], TYPES[dtype], adds, device, guard.hold, **again)


@pytest.mark.parametrize(("x", "out"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_each_tensor_may_have_a_type_of_its_own(x, out, guard, device):
    compare((5, 3, 48), TYPES[x], TYPES[out], True, device, guard.hold, draws=2)


def test_the_shipped_cut(guard, device, monkeypatch):
    """Blocks and parts as on a GPU, where the interpreter takes its own: most parts have no rows."""
    if device == "cpu":
        monkeypatch.setattr(kernel, "INTERPRETED_BLOCK", kernel.BLOCK)
        monkeypatch.setattr(kernel, "INTERPRETED_PARTS", 40)
    compare((3, 31, 192), torch.bfloat16, torch.bfloat16, True, device, guard.hold, draws=1)


def test_rows_do_not_depend_on_the_batch(guard, device):
    """Bit for bit: a row is added up by itself."""
    x, residual, weight, *_ = arguments((33, 7, 20), torch.float32, torch.float32, device)
    whole = kernels.rms_norm(x, residual, weight, 1e-5)
    for rows in (slice(32, 33), slice(3, 17)):
        part = kernels.rms_norm(x[rows], residual[rows], weight, 1e-5)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


def test_nan_stays_in_its_row(guard, device):
    x, residual, weight, *_ = arguments((3, 20), torch.float32, torch.float32, device)
    clean = kernels.rms_norm(x, residual, weight, 1e-5)
    x[1, 5] = float("nan")
    for sick, whole in zip(kernels.rms_norm(x, residual, weight, 1e-5), clean, strict=True):
        assert torch.equal(sick[[0, 2]], whole[[0, 2]])
    assert kernels.rms_norm(x, residual, weight, 1e-5)[0][1].isnan().all()


def test_no_epsilon_and_empty_parts(guard, device):
    """Rows past a part's end have no scale then: they leave the weight's gradient alone."""
    compare((31, 20), torch.float32, torch.float32, True, device, guard.hold, eps=0.0, draws=2)


def test_inputs_that_are_not_contiguous_and_no_rows(guard, device):
    x, residual, weight, *_ = arguments((4, 6, 20), torch.float32, torch.float32, device)
    wanted = kernels.rms_norm(x, residual, weight, 1e-5)
    turned = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, residual))
    got = kernels.rms_norm(*turned, torch.stack([weight, weight], 1)[:, 1], 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    compare((0, 20), torch.float32, torch.float32, True, device, guard.hold)


@pytest.mark.parametrize("adds", [True, False], ids=["residual", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(adds, dtype, device):
    x, residual, weight, grad, d_total = arguments((2, 3, 5), dtype, torch.float32, device)
    leaves = [t if t is None else t.requires_grad_() for t in (x, residual if adds else None, weight)]
    torch.library.opcheck(fused.norm, (*leaves, 1e-5, torch.float32))
    utilities = ("test_schema", "test_faketensor")
    given = (grad, d_total, residual.detach(), weight.detach(), 1e-5, dtype)
    torch.library.opcheck(fused.gradients, given, test_utils=utilities)


@pytest.mark.slow
def test_under_compile(device):
    x, residual, weight, *_ = arguments((2, 5, 20), torch.float32, torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]

    def plain(x, residual, weight):
        return torch.cat(kernels.rms_norm(x, residual, weight, 1e-5))

    results = [
        [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
        for out in (torch.compile(plain)(*leaves), plain(*leaves))
    ]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_float64_is_refused():
    with pytest.raises(
        ValueError, match="rms_norm=triton, which cannot run: it adds in float32; the tensors are float64"
    ):
        kernels.rms_norm(torch.zeros(2, 3).double(), None, torch.ones(3), 1e-5)
