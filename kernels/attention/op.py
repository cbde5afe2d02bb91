"""The public door of attention: checks, and the choice of backend."""

import torch

from kernels import dispatch


def attention(x: torch.Tensor, heads: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Every token looks at every token of its clip: softmax(q k^T / sqrt(d)) v, head by head, d = D / heads.

    x `[B, L, 3 D]`: a token's q, k and v, each head by head, as one linear layer makes them; bias `[3 D]`: that layer's, where
    it has not added it yet. x + bias is rounded to x's type, as the layer's result is (which rounds once where this, from a
    rounded x, does so twice). Returns `[B, L, D]` in x's type; the softmax is in float32 (float64 where x is).
    Raises ValueError for other shapes.
    """
    if x.ndim != 3 or x.shape[2] % (3 * heads):
        raise ValueError(f"x is (B, L, 3 D) with D a multiple of heads={heads}, got {tuple(x.shape)}")
    if bias is not None and bias.shape != x.shape[2:]:
        raise ValueError(f"bias is (3 D,) = {tuple(x.shape[2:])} as x has it, got {tuple(bias.shape)}")
    return dispatch.choose("attention", x)(x, heads, bias)
