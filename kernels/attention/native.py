"""Attention in bfloat16 in C (native.c), forward and backward, for processors that multiply bfloat16."""

from pathlib import Path

import torch

from kernels.attention import products
from kernels.native import Library, float32, new, pointers, recorded, structure

WIDTH = 64  # of a head, as all of AST's sizes have it
PARTS = 4  # a thread's share of the tasks, at least, so that threads end at much the same time

SOURCES = ("native.c", "native_matrix.h", "../matrix.h", "../tiles.h", "../native.h")
LIBRARY = Library(Path(__file__).parent, SOURCES, ("attention", "gradients"))


_Attention = structure("B L H parts threads", "x bias out")
_Gradients = structure("B L H threads", "grad x bias d_x d_bias")


def refuses() -> str | None:
    """Why this backend cannot run, or None."""
    if reason := LIBRARY.refuses():
        return reason
    return None if LIBRARY.asks("bfloat16") else "the processor has no AVX512-BF16"


def attention(x, heads, bias):
    """As `reference.attention`, in bfloat16. Where a head is not WIDTH wide, by `products`."""
    if x.shape[2] != 3 * heads * WIDTH:
        return products.attention(x, heads, bias)
    x, bias = x.to(torch.bfloat16), float32(bias)
    if recorded(x, bias):
        return attended(x, bias, heads)
    return _attended(x, bias, heads)  # an operation of PyTorch's costs more than a short clip's attention


@torch.library.custom_op("fftp::native_attention", mutates_args=(), device_types="cpu")
def attended(x: torch.Tensor, bias: torch.Tensor | None, heads: int) -> torch.Tensor:
    """Of x, `[B, L, 3 H 64]` bfloat16, and bias, `[3 H 64]` float32: `[B, L, H 64]`.

    A row is the same bits in any batch and on any threads.
    """
    return _attended(x, bias, heads)


def _attended(x, bias, heads):
    B, L, _ = x.shape
    x, bias = x.contiguous(), bias if bias is None else bias.contiguous()
    out = new((B, L, heads * WIDTH), torch.bfloat16)
    if out.numel():
        threads = torch.get_num_threads()
        parts = -(-PARTS * threads // (B * heads))
        LIBRARY.call("attention", _Attention(B, L, heads, parts, threads, *pointers(x, bias, out)))
    return out


@attended.register_fake
def _(x, bias, heads):
    return x.new_empty(*x.shape[:2], x.shape[2] // 3)


@torch.library.custom_op("fftp::native_attention_backward", mutates_args=(), device_types="cpu")
def gradients(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, heads: int, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x, `[B, L, 3 H 64]` bfloat16, and of the bias, `[3 H 64]` float32, or `[0]` where it is not wanted.

    Each clip's share of the bias's gradient is a sum of float32, they are added in float64.
    """
    B, L, width = x.shape
    grad, x, bias = grad.contiguous(), x.contiguous(), bias if bias is None else bias.contiguous()
    d_x = new((B, L, width), torch.bfloat16)
    shares = new((B if L else 0, width)) if wanted else None
    if d_x.numel():
        LIBRARY.call(
            "gradients", _Gradients(B, L, heads, torch.get_num_threads(), *pointers(grad, x, bias, d_x, shares))
        )
    return d_x, new((0,)) if shares is None else shares.sum(0, dtype=torch.float64).float()


@gradients.register_fake
def _(grad, x, bias, heads, wanted):
    return x.new_empty(x.shape), x.new_empty(x.shape[2] if wanted else 0, dtype=torch.float32)


def _keep(ctx, inputs, output):
    x, bias, ctx.heads = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, grad):
    x, bias = ctx.saved_tensors
    wanted = bias is not None and ctx.needs_input_grad[1]
    d_x, d_bias = gradients(grad.to(torch.bfloat16), x, bias, ctx.heads, wanted)
    return d_x, d_bias if wanted else None, None


attended.register_autograd(_backward, setup_context=_keep)
