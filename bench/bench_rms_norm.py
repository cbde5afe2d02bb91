"""The residual addition and its norm beside PyTorch's own two operations, as they are and compiled."""

from collections.abc import Iterator

import torch

import kernels
from bench.measure import Case, compiled, holds
from kernels import dispatch
from kernels.norm import reference

EPS = 1e-5


def cases(device: str) -> Iterator[Case]:
    if device == "cpu":
        sizes, types = ((128, 31, 192), (32, 249, 192)), (torch.float32, torch.bfloat16)
    else:
        sizes, types = ((32, 992, 768), (32, 97, 768), (1, 992, 768), (1, 97, 768)), (torch.bfloat16,)
    for size in sizes:
        for dtype in types:
            for direction in ("forward", "forward + backward"):
                yield _case(*size, dtype, direction, device)


def _case(B, L, D, dtype, direction, device):
    dispatch.use_fused(True)
    train = direction != "forward"
    moved = 2 * dtype.itemsize + 8  # x, normed; residual, total
    return Case(
        part="rms_norm",
        case={"B": B, "L": L, "D": D, "dtype": str(dtype)[6:], "direction": direction},
        backend=dispatch.select("rms_norm", device, "float32").name,
        ours=lambda sets: _candidate(_ours, (B, L, D), dtype, device, train, sets),
        peers={
            "add and rms_norm": lambda sets: _candidate(_plain, (B, L, D), dtype, device, train, sets),
            "compiled add and rms_norm": lambda sets: _candidate(
                compiled(_plain), (B, L, D), dtype, device, train, sets
            ),
        },
        correct=lambda: _correct((2, L, D), dtype, device, train),
        set_bytes=B * L * D * moved,
        # Backward: the gradients of normed and total, and total, in; those of residual and of x out.
        bytes=B * L * D * (moved + (2 * dtype.itemsize + 12 if train else 0)),
    )


def _ours(x, residual, weight):
    return kernels.rms_norm(x, residual, weight, EPS, x.dtype)


def _plain(x, residual, weight):
    wide = torch.promote_types(residual.dtype, torch.float32)
    return reference.rms_norm(x, residual, weight, EPS, x.dtype, wide)


def _inputs(shape, dtype, device):
    """x, residual and weight; the gradients of normed and total."""
    x, residual, grad, d_total = (torch.randn(shape, device=device) for _ in range(4))
    return x.to(dtype), residual, 1 + 0.1 * torch.randn(shape[-1], device=device), grad.to(dtype), d_total


def _candidate(function, shape, dtype, device, train, sets):
    given = [_inputs(shape, dtype, device) for _ in range(sets)]
    if not train:

        def forward(i):
            with torch.no_grad():
                return function(*given[i][:3])

        return forward
    leaves = [[t.requires_grad_() for t in one[:3]] for one in given]
    return lambda i: torch.autograd.grad(function(*leaves[i]), leaves[i], given[i][3:])


def _correct(shape, dtype, device, train):
    *given, grad, d_total = _inputs(shape, dtype, device)

    def run(function, dtype=None):
        own = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in given]
        out = function(*own)
        grads = (grad.to(out[0].dtype), d_total.to(out[1].dtype))
        return [*(o.detach() for o in out), *(torch.autograd.grad(out, own, grads) if train else ())]

    return holds(run(_ours), run(_plain), run(_plain, torch.float64))
