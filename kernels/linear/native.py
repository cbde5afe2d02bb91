"""A linear layer's product in bfloat16, its gradients in C (native.c), for processors that multiply bfloat16 in vectors."""

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch.autograd.function import once_differentiable

from kernels.linear import reference
from kernels.native import Library

BLOCK = 32  # native.c's: what it takes are multiples of so many numbers

LIBRARY = Library(Path(__file__).parent, ("native.c", "../matrix.h", "../native.h"), ("product", "gradient"))


def _structure(sizes, pointers):
    fields = [(name, ctypes.c_int64) for name in sizes.split()]
    fields += [(name, ctypes.c_void_p) for name in pointers.split()]
    return type("Given", (ctypes.Structure,), {"_fields_": tuple(fields)})


_Product = _structure("rows N K threads", "grad weight panels d_x")
_Gradient = _structure("rows N K parts", "grad x d_weight")


def refuses() -> str | None:
    """Why this backend cannot run, or None."""
    if reason := LIBRARY.refuses():
        return reason
    if not LIBRARY.asks("bfloat16"):
        return "the processor has no AVX512-BF16"
    return "the processor has AMX, which PyTorch's own products use" if LIBRARY.asks("tiles") else None


def linear(x, weight):
    """As `reference.linear`, in bfloat16. Where no gradient is wanted, or a width is not a multiple of BLOCK, by that."""
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not wanted or weight.shape[0] % BLOCK or weight.shape[1] % BLOCK:
        return reference.linear(x, weight)
    return _Linear.apply(x.to(torch.bfloat16), weight)


class _Linear(torch.autograd.Function):
    """out = x W^T is PyTorch's. d_x = grad W, d_W = grad^T x: sums in float32, rounded once, d_W to the weight's own type.

    A row of d_x is the same bits in any batch and on any threads; so is d_W on any threads.
    """

    @staticmethod
    def forward(ctx, x, weight):
        narrow = weight.to(torch.bfloat16)
        ctx.save_for_backward(x, narrow)
        ctx.dtype = weight.dtype
        return nnf.linear(x, narrow)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad, (wants_x, wants_weight) = grad.contiguous(), ctx.needs_input_grad
        return _input(grad, weight) if wants_x else None, _weight(grad, x).to(ctx.dtype) if wants_weight else None


def _input(grad, weight):
    """grad weight, bfloat16."""
    (N, K), weight = weight.shape, weight.contiguous()
    d_x = torch.empty((*grad.shape[:-1], K), dtype=torch.bfloat16)
    if d_x.numel():
        panels = torch.empty((N, K), dtype=torch.bfloat16)
        numbers = (grad.numel() // N, N, K, torch.get_num_threads())
        LIBRARY.call("product", _Product(*numbers, *_pointers(grad, weight, panels, d_x)))
    return d_x


def _weight(grad, x):
    """grad^T x, float32."""
    N, K, x = grad.shape[-1], x.shape[-1], x.contiguous()
    if not x.numel():
        return torch.zeros((N, K), dtype=torch.float32, device="cpu")
    d_weight = torch.empty((N, K), dtype=torch.float32)
    parts = min(torch.get_num_threads(), max(N, K) // BLOCK)
    LIBRARY.call("gradient", _Gradient(x.numel() // K, N, K, parts, *_pointers(grad, x, d_weight)))
    return d_weight


def _pointers(*tensors):
    return (tensor.data_ptr() for tensor in tensors)
