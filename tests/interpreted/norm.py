"""The norms by the Triton kernels, by the 2x rule. Run by tests/test_triton_norm.py."""

import pytest
import torch
from test_norm import arguments, compare, each_form, each_operation

import kernels
from kernels.norm import fused, kernel

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OPERATORS = {"rms_norm": fused.rms, "layer_norm": fused.centred}


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", "rms_norm=triton,layer_norm=triton")


# Rows, D: one of each, fewer than a block, several blocks and parts; widths that are no power of two, and one that is.
SHAPES = [(1, 1), (3, 192), (13, 200), (40, 24), (1, 768), (2, 3000)]


@each_form
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, dtype, operation, absent, guard, device):
    again = {"repeats": 9, "draws": 4} if device == "cuda" else {"repeats": int(dtype == "float32"), "draws": 2}
    compare(operation, shape, TYPES[dtype], TYPES[dtype], absent, device, guard.hold, **again)


@each_operation
@pytest.mark.parametrize(("x", "out"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_each_tensor_may_have_a_type_of_its_own(operation, x, out, guard, device):
    compare(operation, (5, 3, 48), TYPES[x], TYPES[out], (), device, guard.hold, draws=2)


@each_operation
def test_the_shipped_cut(operation, guard, device, monkeypatch):
    """Blocks and parts as on a GPU, where the interpreter takes its own: most parts have no rows."""
    if device == "cpu":
        monkeypatch.setattr(kernel, "INTERPRETED_BLOCK", kernel.BLOCK)
        monkeypatch.setattr(kernel, "INTERPRETED_PARTS", 40)
    compare(operation, (3, 31, 192), torch.bfloat16, torch.bfloat16, (), device, guard.hold, draws=1)


@each_operation
def test_rows_do_not_depend_on_the_batch(operation, guard, device):
    """Bit for bit: a row is added up by itself."""
    x, residual, *vectors = arguments(operation, (33, 7, 20), device=device)[0].values()
    norm = getattr(kernels, operation)
    whole = norm(x, residual, *vectors, 1e-5)
    for rows in (slice(32, 33), slice(3, 17)):
        part = norm(x[rows], residual[rows], *vectors, 1e-5)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


@each_operation
def test_nan_stays_in_its_row(operation, guard, device):
    x, residual, *vectors = arguments(operation, (3, 20), device=device)[0].values()
    norm = getattr(kernels, operation)
    clean = norm(x, residual, *vectors, 1e-5)
    x[1, 5] = float("nan")
    sick = norm(x, residual, *vectors, 1e-5)
    for bad, whole in zip(sick, clean, strict=True):
        assert torch.equal(bad[[0, 2]], whole[[0, 2]])
    assert sick[0][1].isnan().all()


@each_operation
def test_no_epsilon_and_empty_parts(operation, guard, device):
    """Rows past a part's end have no scale then: they leave the gradients of weight, shift and bias alone."""
    compare(operation, (31, 20), torch.float32, torch.float32, (), device, guard.hold, eps=0.0, draws=2)


@each_operation
def test_inputs_that_are_not_contiguous_and_no_rows(operation, guard, device):
    x, residual, *vectors = arguments(operation, (4, 6, 20), device=device)[0].values()
    norm = getattr(kernels, operation)
    wanted = norm(x, residual, *vectors, 1e-5)
    turned = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, residual))
    got = norm(*turned, *(torch.stack([vector, vector], 1)[:, 1] for vector in vectors), 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    compare(operation, (0, 20), torch.float32, torch.float32, (), device, guard.hold)


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(operation, absent, dtype, device):
    given, (grad, d_total) = arguments(operation, (2, 3, 5), dtype, device=device, absent=absent)
    leaves = [t if t is None else t.requires_grad_() for t in given.values()]
    torch.library.opcheck(OPERATORS[operation], (*leaves, 1e-5, torch.float32))
    utilities = ("test_schema", "test_faketensor")
    given = (grad, d_total, d_total + 1, given["weight"].detach(), 1e-5, dtype, operation == "layer_norm")
    torch.library.opcheck(fused.gradients, given, test_utils=utilities)


@pytest.mark.slow
@each_operation
def test_under_compile(operation, device):
    leaves = [t.requires_grad_() for t in arguments(operation, (2, 5, 20), device=device)[0].values()]

    def plain(*leaves):
        return torch.cat(getattr(kernels, operation)(*leaves, 1e-5))

    results = [
        [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
        for out in (torch.compile(plain)(*leaves), plain(*leaves))
    ]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("operation", "others"), [("rms_norm", 1), ("layer_norm", 3)])
def test_float64_is_refused(operation, others, device):
    x, vectors = torch.zeros(2, 3, device=device).double(), [torch.ones(3, device=device)] * others
    with pytest.raises(
        ValueError, match=f"{operation}=triton, which cannot run: it adds in float32; the tensors are float64"
    ):
        getattr(kernels, operation)(x, None, *vectors, 1e-5)
