"""The CUDA scan of mamba-ssm and the CUDA convolution of causal-conv1d, through their public functions.

They take channels before time, `[B, E, L]`, and know one direction: the other one is a scan of the mirrored sequence. Their
scan adds gradients of A, B, C, D and delta_bias with atomics, so its backward is not the same bits twice.
"""

import functools

import torch
import torch.nn.functional as nnf

from kernels import packages
from kernels.selective_scan import reference

MOST_STATES = 256  # mamba-ssm, csrc/selective_scan/selective_scan.cpp
TAPS = (2, 3, 4)  # causal-conv1d, csrc/causal_conv1d.cpp
ALIGNED = 8  # elements, of channels and strides in causal-conv1d's channels-last form; the same file

# Both directions in one launch, as two groups of channels with B and C of their own, or in two launches. One launch keeps a
# GPU busy with half the clips. Two copy less: the doubled u and delta are a read and a write of each more than a mirrored one.
ONE_LAUNCH = False


def selective_scan(u, delta, A, B, C, D, z, delta_bias, A_backward, reverse):
    """As `reference.selective_scan`; u, delta, z, B and C go in their common type, states and decays are float32 inside.

    Raises ValueError for more than 256 states.
    """
    if A.shape[1] > MOST_STATES:
        raise ValueError(f"mamba-ssm's scan takes at most {MOST_STATES} states, got {A.shape[1]}")
    if u.numel() == 0:  # a launch of no blocks is an error
        return reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, A_backward, reverse)
    dtype = u.dtype
    common = functools.reduce(torch.promote_types, (t.dtype for t in (u, delta, z, B, C)))
    u, delta, z, B, C = (t.to(common) for t in (u, delta, z, B, C))
    _, A, D, delta_bias, A_backward = reference.precise(u, A, D, delta_bias, A_backward)
    u, delta = u.mT.contiguous(), delta.mT.contiguous()  # (B, E, L)
    B, C = B.mT[:, None].contiguous(), C.mT[:, None].contiguous()  # (B, 1, S, L)
    D, delta_bias = D.contiguous(), delta_bias.contiguous()
    if A_backward is None:
        given = (u, delta, B, C, z.mT.contiguous())
        u, delta, B, C, gate = (t.flip(-1) for t in given) if reverse else given
        y = _scan(u, delta, A, B, C, D, gate, delta_bias)
        return (y.flip(-1) if reverse else y).mT.to(dtype)
    if reverse:
        A, A_backward = A_backward, A
    if ONE_LAUNCH:
        u, delta, B, C = (torch.cat([t, t.flip(-1)], 1) for t in (u, delta, B, C))  # (B, 2 E, L), (B, 2, S, L)
        A, D, delta_bias = torch.cat([A, A_backward]), D.repeat(2), delta_bias.repeat(2)
        there, back = _scan(u, delta, A, B, C, D, None, delta_bias).chunk(2, 1)
    else:
        there = _scan(u, delta, A, B, C, D, None, delta_bias)
        back = _scan(u.flip(-1), delta.flip(-1), A_backward, B.flip(-1), C.flip(-1), D, None, delta_bias)
    there, back, z = reference.precise(there, back.flip(-1), z)
    return (nnf.silu(z) * (there + back).mT).to(dtype)  # z comes first: the result takes its layout


def _scan(u, delta, A, B, C, D, z, delta_bias):
    function = packages.SELECTIVE_SCAN.load()
    return function(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, delta_softplus=True)


def causal_conv(u, weight, bias, reverse):
    """As `reference.causal_conv`, in the common type of the three; accumulated in float32.

    Raises ValueError for other than 2 to 4 taps.
    """
    if weight.shape[1] not in TAPS:
        raise ValueError(f"causal-conv1d takes {TAPS[0]} to {TAPS[-1]} taps, got {weight.shape[1]}")
    if u.numel() == 0:
        return reference.causal_conv(u, weight, bias, reverse)
    # Under autocast u may be bfloat16 and the weights float32: the reference answers in float32 then.
    common = functools.reduce(torch.promote_types, (u.dtype, weight.dtype, bias.dtype))
    x, weight, bias = (t.to(common) for t in (u, weight, bias))
    x = (x.flip(1) if reverse else x).mT  # (B, E, L)
    if x.stride(1) != 1 or any(size % ALIGNED for size in (x.shape[1], x.stride(0), x.stride(2))):
        # Not contiguous(): where L is 1 that keeps strides which still look like channels last.
        x = x.clone(memory_format=torch.contiguous_format)
    y = packages.CAUSAL_CONV.load()(x=x, weight=weight, bias=bias.contiguous(), activation="silu").mT
    return y.flip(1) if reverse else y
