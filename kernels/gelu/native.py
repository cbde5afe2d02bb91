"""The GELU in C (native.c): float32 inside, elements that are the same bits at any batch size and number of threads."""

import math
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from kernels.native import Library, float32, new, pointers, readable, recorded, structure

LIBRARY = Library(
    Path(__file__).parent, ("native.c", "native_lanes.h", "../lanes.h", "../native.h"), ("gelu", "gradients")
)
TASK_ROWS, SEGMENTS, TERMS = 64, 16, 7  # native.c's

_Gelu = structure("rows D narrow", "table bias x out")
_Gradients = structure("rows D narrow", "table bias grad x d_x d_bias")


def refuses() -> str | None:
    """Why this backend cannot run, or None."""
    return LIBRARY.refuses()


def gelu(x, bias, wide):
    """As `reference.gelu`, for every type but float64."""
    given, bias = readable(x), float32(bias)
    out = _Function.apply(given, bias) if recorded(given, bias) else _run(given.contiguous(), bias)
    return out if out.dtype == x.dtype else out.to(x.dtype)


def _below(a):
    """Phi(-a)"""
    return math.erfc(a / math.sqrt(2)) / 2


def _slope(a):
    """The GELU's derivative at -a."""
    return _below(a) - a * math.exp(-a * a / 2) / math.sqrt(2 * math.pi)


def _table(function):
    """`[TERMS, SEGMENTS]`: coefficients of the polynomials in f = 2 a - n that meet the function of a at the TERMS zeros of
    Chebyshev's polynomial on -0.5 <= f <= 0.5, for each n but the last, which is 0."""
    at = [math.cos(math.pi * (k + 0.5) / TERMS) / 2 for k in range(TERMS)]
    table = torch.zeros((TERMS, SEGMENTS), dtype=torch.float32, device="cpu")
    for n in range(SEGMENTS - 1):
        differences, found = [function((n + f) / 2) for f in at], [0.0] * TERMS
        for order in range(1, TERMS):  # Newton's divided differences
            for k in reversed(range(order, TERMS)):
                differences[k] = (differences[k] - differences[k - 1]) / (at[k] - at[k - order])
        for f, value in zip(reversed(at), reversed(differences), strict=True):  # found (x - f) + value
            found = [value - f * found[0], *(found[k - 1] - f * found[k] for k in range(1, TERMS))]
        table[:, n] = torch.tensor(found, dtype=torch.float32, device="cpu")
    return table


_VALUES, _SLOPES = _table(_below), _table(_slope)


def _run(x, bias):
    """Of a contiguous x."""
    bias = bias if bias is None else bias.contiguous()
    out = new(x.shape, x.dtype)
    if x.numel():
        LIBRARY.call("gelu", _Gelu(*_numbers(x), *pointers(_VALUES, bias, x, out)))
    return out


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        x = x.contiguous()
        ctx.save_for_backward(x, bias if bias is None else bias.contiguous())
        return _run(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        grad, d_x, parts = grad.contiguous(), new(x.shape, x.dtype), None
        if bias is not None and ctx.needs_input_grad[1]:
            rows = x.numel() // len(bias) if x.numel() else 0
            parts = new((-(-rows // TASK_ROWS), len(bias)))
        if x.numel():
            LIBRARY.call("gradients", _Gradients(*_numbers(x), *pointers(_SLOPES, bias, grad, x, d_x, parts)))
        return d_x, parts if parts is None else parts.sum(0, dtype=torch.float64).float()


def _numbers(x):
    """Rows, width, and whether x is bfloat16."""
    return x.numel() // x.shape[-1], x.shape[-1], x.dtype != torch.float32
