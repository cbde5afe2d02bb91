"""A linear layer's product in bfloat16, its gradients in C (native.c), for processors that multiply bfloat16.

PyTorch's own products use AMX where the processor has it: there the weight's gradient is C, and where no gradient is wanted
so are sums of at least LONG numbers, and small results.
"""

from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch.autograd.function import once_differentiable

from kernels.linear import reference
from kernels.native import AMX, Library, new, pointers, structure, watched

BLOCK = 32  # native.c's: what it takes are multiples of so many numbers
# Tiles are ahead of PyTorch's product where each number of the result sums up at least LONG, and else up to SMALL numbers of a
# result (LOG.md).
SMALL, LONG = 1 << 19, 512

SOURCES = ("native.c", "../matrix.h", "../tiles.h", "../native.h")
LIBRARY = Library(Path(__file__).parent, SOURCES, ("pack", "product", "gradient"))


_Pack = structure("N K crosswise", "weight panels")
_Product = structure("rows depth columns threads together pitch apart", "left panels out")
_Gradient = structure("rows N K parts", "grad x d_weight")


def refuses() -> str | None:
    """Why this backend cannot run, or None."""
    if reason := LIBRARY.refuses():
        return reason
    return None if LIBRARY.asks("bfloat16") else "the processor has no AVX512-BF16"


def panels(weight):
    """As `op.linear_panels`, of a weight that stays as it is: `[N K]` bfloat16 with AMX, else None."""
    return _packed(weight.to(torch.bfloat16)) if _by_tiles(weight) else None


def linear(x, weight, panels=None):
    """As `reference.linear`, in bfloat16; by that where a width is not a multiple of BLOCK."""
    if not _divides(weight):
        return reference.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x.to(torch.bfloat16), weight)
    x, (N, K) = x.to(torch.bfloat16), weight.shape
    if watched() or not _by_tiles(weight) or (K < LONG and x.numel() // K * N > SMALL):
        return reference.linear(x, weight.to(torch.bfloat16))
    return _product(x, _packed(weight.to(torch.bfloat16)) if panels is None else panels, N)


def _divides(weight):
    N, K = weight.shape
    return N > 0 and K > 0 and not (N % BLOCK or K % BLOCK)


def _by_tiles(weight):
    return _divides(weight) and LIBRARY.widest() == AMX


class _Linear(torch.autograd.Function):
    """out = x W^T is PyTorch's. d_x = grad W, with AMX PyTorch's too, d_W = grad^T x: sums in float32, rounded once, d_W to
    the weight's own type.

    In C a row of d_x is the same bits in any batch and on any threads; so is d_W on any threads.
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
        wants_x, wants_weight = ctx.needs_input_grad
        d_x = _input(grad, weight) if wants_x else None
        return d_x, _weight(grad.contiguous(), x.contiguous()).to(ctx.dtype) if wants_weight else None


def _input(grad, weight):
    """grad weight, bfloat16."""
    if _by_tiles(weight):
        return grad @ weight
    return _product(grad, _packed(weight, crosswise=True), weight.shape[1])


def _packed(weight, crosswise=False):
    """A weight `[N, K]` as the right side of a product by rows of K numbers, or crosswise of N: `[N K]` bfloat16."""
    (N, K), weight = weight.shape, weight.contiguous()
    made = new((N * K,), torch.bfloat16)
    LIBRARY.call("pack", _Pack(N, K, crosswise, *pointers(weight, made)))
    return made


def _product(left, panels, columns):
    """`[..., columns]` bfloat16."""
    depth = left.shape[-1]
    if left.ndim != 3 or left.stride(2) != 1 or LIBRARY.widest() < AMX:
        left = left.contiguous()
    rows = left.numel() // depth
    together, pitch, apart = (left.shape[1], left.stride(1), left.stride(0)) if left.ndim == 3 else (rows, depth, 0)
    out = new((*left.shape[:-1], columns), torch.bfloat16)
    if out.numel():
        numbers = (rows, depth, columns, torch.get_num_threads(), together, pitch, apart)
        LIBRARY.call("product", _Product(*numbers, *pointers(left, panels, out)))
    return out


def _weight(grad, x):
    """grad^T x, float32."""
    N, K = grad.shape[-1], x.shape[-1]
    if not x.numel():
        return torch.zeros((N, K), dtype=torch.float32, device="cpu")
    d_weight = new((N, K))
    parts = min(torch.get_num_threads(), max(N, K) // BLOCK)
    LIBRARY.call("gradient", _Gradient(x.numel() // K, N, K, parts, *pointers(grad, x, d_weight)))
    return d_weight
