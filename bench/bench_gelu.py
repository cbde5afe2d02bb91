"""A bias and the GELU behind it beside PyTorch's own two operations, as they are and compiled."""

from collections.abc import Iterator

import torch
import torch.nn.functional as nnf

import kernels
from bench.measure import Case, compiled, holds
from kernels import dispatch
from kernels.gelu import reference


def cases(device: str) -> Iterator[Case]:
    if device == "cpu":
        sizes, types = ((128, 32, 768),), (torch.bfloat16, torch.float32)
    else:
        sizes, types = ((32, 993, 3072), (32, 98, 3072), (1, 993, 3072)), (torch.bfloat16,)
    for size in sizes:
        for dtype in types:
            for direction in ("forward", "forward + backward"):
                yield _case(*size, dtype, direction, device)


def _case(B, L, D, dtype, direction, device):
    dispatch.use_fused(True)
    train = direction != "forward"
    moved = 2 * dtype.itemsize  # x, out
    return Case(
        part="gelu",
        case={"B": B, "L": L, "D": D, "dtype": str(dtype)[6:], "direction": direction},
        backend=dispatch.select("gelu", device, str(dtype)[6:]).name,
        ours=lambda sets: _candidate(kernels.gelu, (B, L, D), dtype, device, train, sets),
        peers={
            "add and gelu": lambda sets: _candidate(_plain, (B, L, D), dtype, device, train, sets),
            "compiled add and gelu": lambda sets: _candidate(compiled(_plain), (B, L, D), dtype, device, train, sets),
        },
        correct=lambda: _correct((2, L, D), dtype, device, train),
        set_bytes=B * L * D * moved,
        # Backward: grad and x in, the gradient of x out.
        bytes=B * L * D * (moved + (3 * dtype.itemsize if train else 0)),
    )


def _reference(x, bias):
    return reference.gelu(x, bias, torch.promote_types(x.dtype, torch.float32))


def _plain(x, bias):
    """As a linear layer under autocast has it: the bias in x's type."""
    return nnf.gelu(x + bias.to(x.dtype))


def _inputs(shape, dtype, device):
    """x, bias and the gradient of the result."""
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return x, 0.1 * torch.randn(shape[-1], device=device), grad


def _candidate(function, shape, dtype, device, train, sets):
    given = [_inputs(shape, dtype, device) for _ in range(sets)]
    if not train:

        def forward(i):
            with torch.no_grad():
                return function(*given[i][:2])

        return forward
    leaves = [[t.requires_grad_() for t in one[:2]] for one in given]
    return lambda i: torch.autograd.grad(function(*leaves[i]), leaves[i], given[i][2])


def _correct(shape, dtype, device, train):
    *given, grad = _inputs(shape, dtype, device)

    def run(function, dtype=None):
        own = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in given]
        out = function(*own)
        return [out.detach(), *(torch.autograd.grad(out, own, grad.to(out.dtype)) if train else ())]

    return holds(run(kernels.gelu), run(_reference), run(_reference, torch.float64))
