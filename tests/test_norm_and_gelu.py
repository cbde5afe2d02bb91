"""What the norms and the GELU share: any subset of gradients, and no trust in what new tensors are by default."""

import itertools

import pytest
import torch

import kernels
from kernels import dispatch

# Operation -> its tensors, those that may be None, and what else it takes.
OPERATIONS = {
    "rms_norm": (("x", "residual", "weight"), ("residual",), (1e-5,)),
    "layer_norm": (("x", "residual", "bias", "weight", "shift"), ("residual", "bias"), (1e-5,)),
    "gelu": (("x", "bias"), ("bias",), ()),
}
each = pytest.mark.parametrize("operation", OPERATIONS)


@pytest.fixture
def fused():
    dispatch.use_fused(True)
    yield
    dispatch.use_fused(False)


def tensors(operation):
    generator = torch.Generator().manual_seed(3)
    names = OPERATIONS[operation][0]
    return {n: torch.randn((70, 13) if n in ("x", "residual") else (13,), generator=generator) for n in names}


def outputs(operation, given):
    out = getattr(kernels, operation)(*given.values(), *OPERATIONS[operation][2])
    return out if isinstance(out, tuple) else (out,)


def subsets(names, least):
    return [some for k in range(least, len(names) + 1) for some in itertools.combinations(names, k)]


@each
def test_whatever_gradients_are_wanted(operation, fused):
    """Of every subset of what is given, and of each output alone: what the references give, within float32's rounding."""
    names, optional, _ = OPERATIONS[operation]
    for absent in subsets(optional, 0):
        for wanted in subsets([name for name in names if name not in absent], 1):
            for which in range(len(outputs(operation, tensors(operation)))):
                found = []
                for use in (False, True):
                    dispatch.use_fused(use)
                    given = {n: None if n in absent else t for n, t in tensors(operation).items()}
                    leaves = [given[name].requires_grad_() for name in wanted]
                    out = outputs(operation, given)[which].square().sum()
                    some = out.requires_grad  # the total does not depend on weight and shift
                    found.append(torch.autograd.grad(out, leaves, allow_unused=True) if some else ())
                for name, plain, ours in zip(wanted, *found, strict=False):
                    ours = torch.zeros_like(given[name]) if ours is None else ours
                    plain = torch.zeros_like(given[name]) if plain is None else plain
                    torch.testing.assert_close(ours, plain, rtol=2e-5, atol=2e-4, msg=f"{name} of {which}, {absent}")


@each
def test_a_second_derivative_is_refused(operation, fused):
    """Rather than taken for zero where other ways to the input have one."""
    if dispatch.select(operation, "cpu", "float32").name == "reference":
        pytest.skip(f"{operation} has no other backend here: its library in C is not built.")
    given = tensors(operation)
    x = given["x"].requires_grad_()
    (first,) = torch.autograd.grad(outputs(operation, given)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (first.square().sum() + x.square().sum()).backward()


@each
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_whatever_type_new_tensors_have(operation, default, fused):
    def run():
        given = {name: t.requires_grad_() for name, t in tensors(operation).items()}
        out = outputs(operation, given)
        return [*out, *torch.autograd.grad(sum(o.square().sum() for o in out), list(given.values()))]

    wanted = run()
    with_default = torch.get_default_dtype()
    try:
        given = {name: t.requires_grad_() for name, t in tensors(operation).items()}
        torch.set_default_dtype(default)
        out = outputs(operation, given)
        found = [*out, *torch.autograd.grad(sum(o.square().sum() for o in out), list(given.values()))]
    finally:
        torch.set_default_dtype(with_default)
    for ours, tensor in zip(found, wanted, strict=True):
        assert torch.equal(ours, tensor)


@each
def test_tensors_of_two_devices_are_refused(operation, fused):
    given = tensors(operation)
    last = list(given)[-1]
    with pytest.raises(ValueError, match="one device"):
        outputs(operation, given | {last: given[last].to("meta")})
