"""A residual addition and its norm beside PyTorch's own operations, as they are and compiled: rows of two parts."""

from collections.abc import Iterator

import torch

import kernels
from bench.measure import Case, compiled, holds
from kernels import dispatch
from kernels.norm import reference

EPS = 1e-5
VECTORS = {"rms_norm": 1, "layer_norm": 3}  # weight; bias, weight and shift


def cases(operation: str, sizes: tuple, dtypes: tuple, device: str) -> Iterator[Case]:
    """Rows of the part that has the operation's name; sizes are (B, L, D)."""
    for size in sizes:
        for dtype in dtypes:
            for direction in ("forward", "forward + backward"):
                yield _case(operation, *size, dtype, direction, device)


def _case(operation, B, L, D, dtype, direction, device):
    dispatch.use_fused(True)
    train = direction != "forward"
    moved = 2 * dtype.itemsize + 8  # x, normed; residual, total
    ours, plain = _ours(operation), _plain(operation)

    def candidate(function):
        return lambda sets: _candidate(function(), operation, (B, L, D), dtype, device, train, sets)

    return Case(
        part=operation,
        case={"B": B, "L": L, "D": D, "dtype": str(dtype)[6:], "direction": direction},
        backend=dispatch.select(operation, device, "float32").name,
        ours=candidate(lambda: ours),
        peers={
            f"add and {operation}": candidate(lambda: plain),
            f"compiled add and {operation}": candidate(lambda: compiled(plain)),
        },
        correct=lambda: _correct(ours, plain, _inputs(operation, (2, L, D), dtype, device), train),
        set_bytes=B * L * D * moved,
        # Backward: the gradients of normed and total, and total, in; those of residual and of x out, in float32 one buffer.
        bytes=B * L * D * (moved + ((16 if dtype.itemsize == 4 else 2 * dtype.itemsize + 12) if train else 0)),
    )


def _ours(operation):
    return lambda x, *others: getattr(kernels, operation)(x, *others, EPS, x.dtype)


def _plain(operation):
    def plain(x, residual, *vectors):
        wide = torch.promote_types(residual.dtype, torch.float32)
        return getattr(reference, operation)(x, residual, *vectors, EPS, x.dtype, wide)

    return plain


def _inputs(operation, shape, dtype, device):
    """x, residual and what else the operation takes, then the gradients of normed and total."""
    x, residual, grad, d_total = (torch.randn(shape, device=device) for _ in range(4))
    vectors = [1 + 0.1 * torch.randn(shape[-1], device=device) for _ in range(VECTORS[operation])]
    return [x.to(dtype), residual, *vectors], [grad.to(dtype), d_total]


def _candidate(function, operation, shape, dtype, device, train, sets):
    given = [_inputs(operation, shape, dtype, device) for _ in range(sets)]
    if not train:

        def forward(i):
            with torch.no_grad():
                return function(*given[i][0])

        return forward
    leaves = [[t.requires_grad_() for t in tensors] for tensors, _ in given]
    return lambda i: torch.autograd.grad(function(*leaves[i]), leaves[i], given[i][1])


def _correct(ours, plain, inputs, train):
    given, (grad, d_total) = inputs

    def run(function, dtype=None):
        own = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in given]
        out = function(*own)
        grads = (grad.to(out[0].dtype), d_total.to(out[1].dtype))
        return [*(o.detach() for o in out), *(torch.autograd.grad(out, own, grads) if train else ())]

    return holds(run(ours), run(plain), run(plain, torch.float64))
