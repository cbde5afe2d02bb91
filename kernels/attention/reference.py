"""Attention as PyTorch has it: SDPA, which on a GPU is FlashAttention or cuDNN's kernel."""

from kernels.sdpa import sdpa


def attention(x, heads, bias):
    """softmax(q k^T / sqrt(d)) v of each head; see `op.attention`."""
    qkv = biased(x, bias)
    # Cut along the row, so that the gradients of the three are written side by side in one pass.
    q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))  # (B, H, L, D / H)
    return sdpa(q, k, v).transpose(1, 2).flatten(2)


def biased(x, bias):
    """x + bias, added in the wider of their types and rounded to x's."""
    return x if bias is None else (x + bias).to(x.dtype)
