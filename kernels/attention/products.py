"""Attention in bfloat16 on a CPU as batched matrix products, forward and backward.

PyTorch's fused CPU kernel multiplies small blocks, in which native bfloat16 products gain nothing (its backward is slower
than in float32); whole products of a head do gain. The scores are rounded to bfloat16 once, before the softmax, whose
sums are float32: the result's error is two to three times that of the fused kernel (tests/test_attention.py). It is for
processors that native.c is not for, and for other heads.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels.attention.reference import biased

CHUNK_CELLS = 1 << 20  # scores at a time, as many heads as these hold: 2 MB, which a core's caches keep
KEPT_CELLS = 1 << 25  # probabilities that a call keeps for its backward; more are computed anew


def attention(x, heads, bias):
    """As `reference.attention`, in bfloat16."""
    return _Attention.apply(biased(x.to(torch.bfloat16), bias), heads)


def split(qkv, heads):
    """`[B, L, 3 D]` -> `[3, B H, L, d]`, one copy."""
    B, L, width = qkv.shape
    d = width // (3 * heads)
    return qkv.view(B, L, 3, heads, d).permute(2, 0, 3, 1, 4).reshape(3, B * heads, L, d)


def joined(heads_first, heads):
    """`[B H, L, d]` -> `[B, L, H d]`."""
    n, L, d = heads_first.shape
    B = n // heads
    return heads_first.view(B, heads, L, d).transpose(1, 2).reshape(B, L, heads * d)


def _chunks(n, L):
    """Slices of n heads whose scores fit CHUNK_CELLS."""
    size = max(1, CHUNK_CELLS // max(1, L * L))
    return [slice(i, i + size) for i in range(0, n, size)]


def _probabilities(q, k, out=None):
    """softmax(q k^T / sqrt(d)), `[heads of a chunk, L, L]`."""
    scores = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    torch.baddbmm(scores, q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5, out=scores)
    return torch.softmax(scores, -1, out=scores if out is None else out)


class _Attention(torch.autograd.Function):
    """P = softmax(q k^T / sqrt(d)), out = P v; dv = P^T g, dS = P * (g v^T - rowsum(P * g v^T)), dq = dS k / sqrt(d), dk
    = dS^T q / sqrt(d)."""

    @staticmethod
    def forward(ctx, qkv, heads):
        L = qkv.shape[1]
        q, k, v = packed = split(qkv, heads)
        kept = None
        if ctx.needs_input_grad[0] and len(q) * L * L <= KEPT_CELLS:
            kept = q.new_empty(len(q), L, L)
        out = torch.empty_like(q)
        for part in _chunks(len(q), L):
            p = _probabilities(q[part], k[part], None if kept is None else kept[part])
            torch.bmm(p, v[part], out=out[part])
        ctx.save_for_backward(packed, kept)
        return joined(out, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        packed, kept = ctx.saved_tensors
        q, k, v = packed
        (B, _, D), (n, L, d) = grad.shape, q.shape
        g = grad.to(q.dtype).view(B, L, D // d, d).transpose(1, 2).reshape(n, L, d)
        out = torch.empty_like(packed)
        for part in _chunks(n, L):
            dq, dk, dv = out[:, part]
            p = _probabilities(q[part], k[part]) if kept is None else kept[part]
            torch.bmm(p.mT, g[part], out=dv)
            ds = torch._softmax_backward_data(torch.bmm(g[part], v[part].mT), p, -1, p.dtype)
            torch.baddbmm(dq, ds, k[part], beta=0, alpha=d**-0.5, out=dq)
            torch.baddbmm(dk, ds.mT, q[part], beta=0, alpha=d**-0.5, out=dk)
        return out.view(3, B, D // d, L, d).permute(1, 3, 0, 2, 4).reshape(B, L, 3 * D), None
