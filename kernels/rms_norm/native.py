"""The norm in C (native.c): float32 inside, rows that are the same bits at any batch size and number of threads."""

import ctypes
from pathlib import Path

import torch

from kernels.native import Library

LIBRARY = Library(
    Path(__file__).parent, ("native.c", "native_lanes.h", "../lanes.h", "../native.h"), ("norm", "gradients")
)
TASK_ROWS = 64  # native.c's
TYPES = (torch.float32, torch.bfloat16)  # of x and of what comes out; others go through float32


def _structure(numbers, pointers):
    fields = [(name, ctypes.c_int64) for name in numbers.split()] + [("eps", ctypes.c_double)]
    fields += [(name, ctypes.c_void_p) for name in pointers.split()]
    return type("Given", (ctypes.Structure,), {"_fields_": tuple(fields)})


_Norm = _structure("rows D narrow_x narrow_normed", "x residual weight normed total")
_Gradients = _structure("rows D narrow_grad", "grad d_total total weight d d_x d_weight")


def refuses() -> str | None:
    """Why this backend cannot run, or None."""
    return LIBRARY.refuses()


def rms_norm(x, residual, weight, eps, dtype, wide):
    """As `reference.rms_norm`, for every type but float64."""
    x, weight = (x if x.dtype in TYPES else x.float()), weight.float()
    out = dtype if dtype in TYPES else torch.float32
    normed, total = _Function.apply(x, None if residual is None else residual.float(), weight, eps, out)
    return normed.to(dtype), total


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, dtype):
        x, weight = x.contiguous(), weight.contiguous()
        residual = residual if residual is None else residual.contiguous()
        normed, total = torch.empty(x.shape, dtype=dtype), torch.empty(x.shape)
        if x.numel():
            D = len(weight)
            pointers = _pointers(x, residual, weight, normed, total)
            numbers = (x.numel() // D, D, x.dtype != torch.float32, dtype != torch.float32)
            LIBRARY.call("norm", _Norm(*numbers, eps, *pointers))
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.dtype, ctx.adds = eps, x.dtype, residual is not None
        return normed, total

    @staticmethod
    def backward(ctx, grad, d_total):
        total, weight = ctx.saved_tensors
        grad, d_total = grad.contiguous(), d_total.contiguous()
        D, narrow = len(weight), ctx.dtype != torch.float32
        d, d_x = torch.empty(total.shape), torch.empty(total.shape, dtype=ctx.dtype) if narrow else None
        if not total.numel():
            return d_x if narrow else d, d if ctx.adds else None, torch.zeros_like(weight), None, None
        rows = total.numel() // D
        parts = torch.empty((-(-rows // TASK_ROWS), D))
        pointers = _pointers(grad, d_total, total, weight, d, d_x, parts)
        LIBRARY.call("gradients", _Gradients(rows, D, grad.dtype != torch.float32, ctx.eps, *pointers))
        return d_x if narrow else d, d if ctx.adds else None, parts.sum(0, dtype=torch.float64).float(), None, None


def _pointers(*tensors):
    return (None if tensor is None else tensor.data_ptr() for tensor in tensors)
