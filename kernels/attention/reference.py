"""Attention as PyTorch has it: SDPA, which on a GPU is FlashAttention or cuDNN's kernel."""

from kernels.sdpa import sdpa


def attention(x, heads, bias):
    """softmax(q k^T / sqrt(d)) v of each head; see `op.attention`."""
    qkv = biased(x, bias)
    B, L, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.view(B, L, 3, heads, D // heads).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, L, D / H)
    return sdpa(q, k, v).transpose(1, 2).flatten(2)


def biased(x, bias):
    """x + bias, added in the wider of their types and rounded to x's."""
    return x if bias is None else (x + bias).to(x.dtype)
