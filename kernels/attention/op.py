"""The public door of attention: checks, and the choice of backend."""

import torch

from kernels import dispatch


def attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Every token looks at every token of its clip: softmax(q k^T / sqrt(d)) v, head by head, d = D / heads.

    qkv `[B, L, 3 D]`: a token's q, k and v, each head by head, as one linear layer makes them. Returns `[B, L, D]` in its
    type; the softmax is in float32 (float64 where qkv is). Raises ValueError for another shape.
    """
    if qkv.ndim != 3 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"qkv is (B, L, 3 D) with D a multiple of heads={heads}, got {tuple(qkv.shape)}")
    return dispatch.choose("attention", qkv)(qkv, heads)
