"""A linear layer's product in bfloat16 in C (native.c), forward and backward, for processors that multiply it in vectors."""

import ctypes
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from kernels.linear import reference
from kernels.native import Library

BLOCK = 32  # native.c's: what it takes are multiples of so many numbers

LIBRARY = Library(Path(__file__).parent, ("native.c", "../matrix.h", "../native.h"), ("product", "gradient"))


def _structure(sizes, pointers):
    fields = [(name, ctypes.c_int64) for name in sizes.split()]
    fields += [(name, ctypes.c_void_p) for name in pointers.split()]
    return type("Given", (ctypes.Structure,), {"_fields_": tuple(fields)})


_Product = _structure("rows inner columns turned narrow threads", "x weight panels out")
_Gradient = _structure("rows N K parts", "grad x d_weight")


def refuses() -> str | None:
    """Why this backend cannot run, or None."""
    if reason := LIBRARY.refuses():
        return reason
    if not LIBRARY.asks("bfloat16"):
        return "the processor has no AVX512-BF16"
    return "the processor has AMX, which PyTorch's own products use" if LIBRARY.asks("tiles") else None


def linear(x, weight):
    """As `reference.linear`, in bfloat16. Where a width is not a multiple of BLOCK, by that."""
    if weight.shape[0] % BLOCK or weight.shape[1] % BLOCK:
        return reference.linear(x, weight)
    return _Linear.apply(x.to(torch.bfloat16), weight)


class _Linear(torch.autograd.Function):
    """out = x W^T, d_x = grad W, d_W = grad^T x: sums in float32, rounded once, the weight's gradient to the weight's type.

    A row is the same bits in any batch and on any threads; so is the weight's gradient on any threads.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, weight.shape[0], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        d_x = _product(grad, weight, weight.shape[1], 0) if wants_x else None
        return d_x, _gradient(grad, x, weight) if wants_weight else None


def _product(x, weight, columns, turned):
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty((*x.shape[:-1], columns), dtype=torch.bfloat16)
    if out.numel():
        panels = torch.empty(weight.shape, dtype=torch.bfloat16)
        narrow = weight.dtype == torch.bfloat16
        numbers = (out.numel() // columns, x.shape[-1], columns, turned, narrow, torch.get_num_threads())
        LIBRARY.call("product", _Product(*numbers, *_pointers(x, weight if narrow else weight.float(), panels, out)))
    return out


def _gradient(grad, x, weight):
    (N, K), (grad, x) = weight.shape, (grad.contiguous(), x.contiguous())
    if not x.numel():
        return torch.zeros_like(weight)
    out = torch.empty((N, K), dtype=torch.float32)
    parts = min(torch.get_num_threads(), max(N, K) // BLOCK)
    LIBRARY.call("gradient", _Gradient(x.numel() // K, N, K, parts, *_pointers(grad, x, out)))
    return out.to(weight.dtype)


def _pointers(*tensors):
    return (tensor.data_ptr() for tensor in tensors)
