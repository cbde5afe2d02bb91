"""The selective scan for a CPU without a compiler: torch operations on a few clips at a time, and its own backward.

The states `[L, clips, S, E]` of a block are what is large (16 times the input). Time stands first, so that one step of
the recurrence is one multiply-add over a contiguous slab, and states are written over the inputs they come from. A block
is as many clips as keep its two big buffers within the caches; the backward makes the states anew from the inputs
instead of keeping them. Nothing is divided and no product runs over more than one step, so nothing can underflow into 0/0.
"""

import math
import threading

import torch
import torch.nn.functional as nnf
from torch.autograd.function import once_differentiable

from kernels.selective_scan.reference import precise

# Bytes of one [L, clips, S, E] buffer, measured on two AVX-512 cores at L 31 to 249, E 384 (see the note in LOG.md).
BLOCK_BYTES = 4 << 20

_scratch = threading.local()


def selective_scan(u, delta, A, B, C, D, z, delta_bias, A_backward, reverse):
    """As `reference.selective_scan`, for every type but float64."""
    dtype = u.dtype
    u, delta, A, B, C, D, z, delta_bias, A_backward = precise(u, delta, A, B, C, D, z, delta_bias, A_backward)
    both = A if A_backward is None else torch.cat([A, A_backward], 1)  # (E, S or 2 S)
    y = _Scan.apply(u, delta, delta_bias, both, B, C, A_backward is not None, reverse)
    return ((y + (D if A_backward is None else 2 * D) * u) * nnf.silu(z)).to(dtype)


class _Scan(torch.autograd.Function):
    """y[b, t, e] = sum over directions of <s_t, C_t>; gradients of u, delta, its bias, A, B and C."""

    @staticmethod
    def forward(ctx, u, delta, delta_bias, A, B, C, two, reverse):
        raw = delta + delta_bias
        ctx.save_for_backward(u, raw, A, B, C)
        delta = nnf.softplus(raw)
        ctx.two, ctx.reverse = two, reverse
        y = torch.empty_like(u)
        for clips, directions in _work(u, A, two, reverse):
            for number, (decays, backwards) in enumerate(directions):
                states, _ = _states(u[clips], delta[clips], decays, B[clips], backwards)
                C_t = _time_first(C[clips], backwards)
                part = _time_first_back(torch.matmul(C_t[:, :, None], states).squeeze(2), backwards)  # (L, b, E)
                if number == 0:
                    y[clips] = part
                else:
                    y[clips] += part
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        u, raw, A, B, C = ctx.saved_tensors
        delta = nnf.softplus(raw)
        d_u, d_delta = torch.zeros_like(u), torch.zeros_like(delta)
        d_A, d_B, d_C = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
        S = B.shape[2]
        for clips, directions in _work(u, A, ctx.two, ctx.reverse):
            for number, (decays, backwards) in enumerate(directions):
                given = (t[clips] for t in (u, delta, B, C, grad))
                parts = _block_backward(*given, decays, backwards)
                for total, part in zip((d_u, d_delta, d_B, d_C), parts[:4], strict=True):
                    total[clips] += part
                d_A[:, number * S : (number + 1) * S] += parts[4].T
        d_raw = d_delta.mul_(raw.sigmoid())
        # Over clips and tokens in float64: thousands of terms one after the other lose more than the scan does.
        d_bias = d_raw.sum((0, 1), dtype=torch.float64).float()
        return d_u, d_raw, d_bias, d_A, d_B, d_C, None, None


def _work(u, A, two, reverse):
    """Pairs (slice of clips, [(decay rates `[S, E]`, runs from the end?)])."""
    S = A.shape[1] // (2 if two else 1)
    directions = [(A[:, :S].T.contiguous(), reverse)]
    if two:
        directions.append((A[:, S:].T.contiguous(), not reverse))
    clips = max(1, BLOCK_BYTES // (4 * u.shape[1] * S * u.shape[2]))
    for i in range(0, u.shape[0], clips):
        yield slice(i, i + clips), directions


def _time_first(x, backwards):
    """`[b, L, n]` -> `[L, b, n]`, in the order of the scan."""
    x = x.transpose(0, 1)
    return x.flip(0) if backwards else x.contiguous()


def _time_first_back(x, backwards):
    """`[L, b, n]` in the order of the scan -> `[b, L, n]`."""
    return (x.flip(0) if backwards else x).transpose(0, 1)


def _states(u, delta, decays, B, backwards):
    """States and decays of a block, both `[L, b, S, E]`, in buffers that the next call writes over."""
    step, gain, B_t = _time_first(delta, backwards), _time_first(delta * u, backwards), _time_first(B, backwards)
    states, decay = _buffers(0, 2, (*step.shape[:2], *decays.shape))
    torch.mul(step[:, :, None], decays, out=decay).exp_()
    torch.mul(gain[:, :, None], B_t[..., None], out=states)
    steps = states.unbind()
    for before, now, factor in zip(steps, steps[1:], decay.unbind()[1:], strict=False):
        now.addcmul_(factor, before)
    return states, decay


def _block_backward(u, delta, B, C, grad, decays, backwards):
    """Gradients (u, delta, B, C in `[b, L, n]`, decays in `[S, E]`) of one direction over a block of clips."""
    states, decay = _states(u, delta, decays, B, backwards)
    C_t, B_t, grad_t = (_time_first(x, backwards) for x in (C, B, grad))
    u_t, step = _time_first(u, backwards), _time_first(delta, backwards)
    adjoint, spare = _buffers(2, 2, states.shape)
    torch.mul(grad_t[:, :, None], C_t[..., None], out=adjoint)  # d loss / d s_t, (L, b, S, E)
    steps = adjoint.unbind()
    for now, after, factor in zip(steps[-2::-1], steps[:0:-1], decay.unbind()[:0:-1], strict=True):
        now.addcmul_(factor, after)
    d_C = torch.matmul(states, grad_t[..., None]).squeeze(-1)  # (L, b, S, E) @ (L, b, E, 1) -> (L, b, S)
    d_gain = torch.matmul(B_t[:, :, None], adjoint).squeeze(2)  # (L, b, 1, S) @ (L, b, S, E) -> (L, b, E)
    # Summed in pairs, as the reference's gradient is: over E products a matrix-vector product has twice its error.
    d_B = torch.mul(adjoint, (step * u_t)[:, :, None], out=spare).sum(-1)
    # d loss / d (delta_t A) = adjoint_t * decay_t * s_(t-1); the first step has no state before it.
    adjoint[0] = 0
    adjoint[1:].mul_(decay[1:]).mul_(states[:-1])
    d_delta = torch.mul(adjoint, decays, out=decay).sum(2) + d_gain * u_t
    d_decays = torch.mul(adjoint, step[:, :, None], out=decay).sum((0, 1))
    parts = (_time_first_back(x, backwards) for x in (d_gain * step, d_delta, d_B, d_C))
    return (*parts, d_decays)


def _buffers(first, count, shape):
    """Scratch kept between calls, a set for each thread: fresh memory costs more than what is done with it."""
    kept = _scratch.__dict__
    size = math.prod(shape)
    for number in range(first, first + count):
        if number not in kept or kept[number].numel() < size:
            with torch.inference_mode(False):  # a buffer made while evaluating has to serve training too
                kept[number] = torch.empty(size)
    return [kept[number][:size].view(shape) for number in range(first, first + count)]
