"""Attention in bfloat16 in C (native.c), for processors that multiply bfloat16; without gradients."""

import ctypes
from pathlib import Path

import torch

from kernels.attention import products
from kernels.native import Library

WIDTH = 64  # of a head, as all of AST's sizes have it
PARTS = 4  # a thread's share of the tasks, at least, so that threads end at much the same time

LIBRARY = Library(Path(__file__).parent, ("native.c", "../native.h"), ("attention",))


class _Attention(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("B", "L", "H", "parts")),
        ("qkv", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    ]


def refuses() -> str | None:
    """Why this backend cannot run, or None."""
    if reason := LIBRARY.refuses():
        return reason
    return None if LIBRARY.asks("bfloat16") else "the processor has no AVX512-BF16"


def attention(qkv, heads):
    """As `reference.attention`, in bfloat16. Where gradients are wanted, or a head is not WIDTH wide, by `products`."""
    if (torch.is_grad_enabled() and qkv.requires_grad) or qkv.shape[2] != 3 * heads * WIDTH:
        return products.attention(qkv, heads)
    return attended(qkv.to(torch.bfloat16), heads)


@torch.library.custom_op("fftp::native_attention", mutates_args=(), device_types="cpu")
def attended(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, L, 3 H 64]` -> `[B, L, H 64]`. A row is the same bits at any batch and number of threads."""
    B, L, _ = qkv.shape
    qkv = qkv.contiguous()
    out = torch.empty(B, L, heads * WIDTH, dtype=torch.bfloat16)
    if out.numel():
        parts = -(-PARTS * torch.get_num_threads() // (B * heads))
        LIBRARY.call("attention", _Attention(B, L, heads, parts, qkv.data_ptr(), out.data_ptr()))
    return out


@attended.register_fake
def _(qkv, heads):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
