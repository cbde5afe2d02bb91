"""The norms in C (native.c): float32 inside, rows that are the same bits at any batch size and number of threads."""

from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from kernels.native import TYPES, Library, float32, new, pointers, readable, recorded, structure

LIBRARY = Library(
    Path(__file__).parent, ("native.c", "native_lanes.h", "../lanes.h", "../native.h"), ("norm", "gradients")
)
TASK_ROWS = 64  # native.c's

_Norm = structure("rows D centred narrow_x narrow_normed", "x residual bias weight shift normed total", "eps")
_Gradients = structure("rows D centred narrow_grad", "grad d_total total weight d d_x sums", "eps")


def refuses() -> str | None:
    """Why this backend cannot run, or None."""
    return LIBRARY.refuses()


def rms_norm(x, residual, weight, eps, dtype, wide):
    """As `reference.rms_norm`, for every type but float64."""
    return _norm(x, (residual, None, weight, None), eps, dtype)


def layer_norm(x, residual, bias, weight, shift, eps, dtype, wide):
    """As `reference.layer_norm`, for every type but float64."""
    return _norm(x, (residual, bias, weight, shift), eps, dtype)


def _norm(x, others, eps, dtype):
    x, out = readable(x), dtype if dtype in TYPES else torch.float32
    given = (x, *map(float32, others), eps, out)
    normed, total = _Function.apply(*given) if recorded(x, *others) else _run(*given)
    return normed if out == dtype else normed.to(dtype), total


def _run(x, residual, bias, weight, shift, eps, dtype):
    given = [t if t is None else t.contiguous() for t in (x, residual, bias, weight, shift)]
    normed, total = new(x.shape, dtype), new(x.shape)
    if x.numel():
        D = len(weight)
        numbers = (x.numel() // D, D, shift is not None, x.dtype != torch.float32, dtype != torch.float32)
        LIBRARY.call("norm", _Norm(*numbers, eps, *pointers(*given, normed, total)))
    return normed, total


class _Function(torch.autograd.Function):
    """Without a shift the norm is not about the mean: RMSNorm."""

    @staticmethod
    def forward(ctx, x, residual, bias, weight, shift, eps, dtype):
        normed, total = _run(x, residual, bias, weight, shift, eps, dtype)
        ctx.save_for_backward(total, weight.contiguous())
        ctx.eps, ctx.dtype, ctx.centred = eps, x.dtype, shift is not None
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, d_total):
        total, weight = ctx.saved_tensors
        grad, d_total = grad.contiguous(), d_total.contiguous()
        D, narrow = len(weight), ctx.dtype != torch.float32
        rows = total.numel() // D if D else 0
        d, d_x = new(total.shape), new(total.shape, ctx.dtype) if narrow else None
        parts = new((-(-rows // TASK_ROWS), 3 if ctx.centred else 1, D))
        if rows:
            numbers = (rows, D, ctx.centred, grad.dtype != torch.float32)
            given = pointers(grad, d_total, total, weight, d, d_x, parts)
            LIBRARY.call("gradients", _Gradients(*numbers, ctx.eps, *given))
        d_weight, *others = parts.sum(0, dtype=torch.float64).float()
        d_shift, d_bias = others or (None, None)
        _, adds, biased, *_ = ctx.needs_input_grad
        return d_x if narrow else d, d if adds else None, d_bias if biased else None, d_weight, d_shift, None, None
