"""The selective scan's forward in Triton; docs/INTERNALS.md has the drawing.

A program owns one clip and a block of channels. A thread of it owns whole channels: the states of a channel stand in its
registers, so that nothing is exchanged between threads but B and C. It walks along time in groups of four tokens, and where
there are two directions it walks twice, so that nothing is added by two programs.

The strides and sizes are constants, so that the four rows of a group are one address.
"""

import triton
import triton.language as tl

from kernels.patch_embed.kernel import _round
from kernels.selective_scan.kernel import _SIZES, LOG2E, _exp2, _reciprocal, _widen

# log(1 + e) = s p(s^2) with s = e / (2 + e): 2 artanh(s), fitted to s up to 1/3 (3e-8 of it).
P0 = tl.constexpr(2.0)
P1 = tl.constexpr(0.6666631698608398)
P2 = tl.constexpr(0.40024852752685547)
P3 = tl.constexpr(0.2796141803264618)
P4 = tl.constexpr(0.2817465662956238)


@triton.jit
def _softplus(x, INTERPRETED: tl.constexpr):
    """log(1 + exp(x)), in two of the slow instructions."""
    e = _exp2(tl.abs(x) * -LOG2E, INTERPRETED)
    s = e * _reciprocal(2.0 + e, INTERPRETED)
    t = s * s
    p = P0 + t * (P1 + t * (P2 + t * (P3 + t * P4)))
    return tl.maximum(x, 0.0) + s * p


@triton.jit
def _silu(x, INTERPRETED: tl.constexpr):
    return x * _reciprocal(1.0 + _exp2(x * -LOG2E, INTERPRETED), INTERPRETED)


@triton.jit
def _four(at, stride, t, limit):
    """The rows `[n]` of steps t..t+3, from at. From the limit on they are undefined: no step follows that would use them."""
    row0 = tl.load(at, mask=t < limit)
    row1 = tl.load(at + stride, mask=t + 1 < limit)
    row2 = tl.load(at + 2 * stride, mask=t + 2 < limit)
    row3 = tl.load(at + 3 * stride, mask=t + 3 < limit)
    return row0, row1, row2, row3


@triton.jit
def _four_or_zero(at, stride, t, limit):
    """`_four`, 0 from the limit on: of states that are not there."""
    row0 = tl.load(at, mask=t < limit, other=0.0)
    row1 = tl.load(at + stride, mask=t + 1 < limit, other=0.0)
    row2 = tl.load(at + 2 * stride, mask=t + 2 < limit, other=0.0)
    row3 = tl.load(at + 3 * stride, mask=t + 3 < limit, other=0.0)
    return row0, row1, row2, row3


@triton.jit
def _token(
    state, rate, skip, bias, u, raw, BC, z, before, to_at, t, limit,
    FIRST: tl.constexpr, LAST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Step t: returns the state `[BLOCK_S, BLOCK_E]` and writes the row of y. BC `[2 * BLOCK_S]`: B, then C."""
    u = _widen(u, INTERPRETED)
    delta = _softplus(_widen(raw, INTERPRETED) + bias, INTERPRETED)
    gain = delta * u
    B, C = _widen(BC, INTERPRETED).reshape(2, rate.shape[0]).permute(1, 0).split()
    state = _exp2(delta[None, :] * rate, INTERPRETED) * state + gain[None, :] * B[:, None]
    y = tl.sum(state * C[:, None], 0) + skip * u
    if not FIRST:
        y += before
    if LAST:
        y *= _silu(_widen(z, INTERPRETED), INTERPRETED)
    tl.store(to_at, _round(y, to_at.dtype.element_ty, INTERPRETED), mask=t < limit)
    return state


@triton.jit
def _group(
    state, rate, skip, bias, u, raw, BC, z_at, sum_at, to_at, stride_z, stride_sum, t, limit,
    FIRST: tl.constexpr, LAST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Steps t..t+3."""
    z = u
    before = u
    if LAST:
        z = _four(z_at, stride_z, t, limit)
    if not FIRST:
        before = _four(sum_at, stride_sum, t, limit)
    for i in tl.static_range(4):
        state = _token(
            state, rate, skip, bias, u[i], raw[i], BC[i], z[i], before[i], to_at + i * stride_sum, t + i, limit,
            FIRST, LAST, INTERPRETED,
        )  # fmt: skip
    return state


@triton.jit
def _load_states(ptr, first_e, E: tl.constexpr, S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr):
    """`[E, S]` from channel first_e on as `[BLOCK_S, BLOCK_E]`, 0 outside.

    Loaded flat, in the order that gives each thread whole channels; loaded as they lie, four states would be one load, and
    a thread would keep those.
    """
    n = tl.arange(0, BLOCK_S * BLOCK_E)
    s, e = n // BLOCK_E, first_e + n % BLOCK_E
    return tl.load(ptr + e * S + s, mask=(e < E) & (s < S), other=0.0).reshape(BLOCK_S, BLOCK_E)


@triton.jit
def _forward_pass(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, out_ptr, sum_ptr, checkpoints_ptr,
    stride_u: tl.constexpr, stride_delta: tl.constexpr, stride_B: tl.constexpr, stride_C: tl.constexpr,
    stride_z: tl.constexpr, first, first_e, L, E: tl.constexpr, S: tl.constexpr,
    BACKWARDS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, KEEP: tl.constexpr, START: tl.constexpr,
    CHUNK: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One direction of `_forward_kernel` over L rows: all but the LAST leave their y in sum_ptr, all but the FIRST add it.

    checkpoints_ptr: where the states go that are to be KEPT, or the one to START from.
    """
    e, s = first_e + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_S)
    is_e, is_s = e < E, s < S
    rate = _load_states(A_ptr, first_e, E, S, BLOCK_E, BLOCK_S) * LOG2E
    skip = tl.load(D_ptr + e, mask=is_e, other=0.0)
    bias = tl.load(bias_ptr + e, mask=is_e, other=0.0)
    if START:
        state = _load_states(checkpoints_ptr, first_e, E, S, BLOCK_E, BLOCK_S)
    else:
        state = tl.zeros_like(rate)
    # Where each thread stands, and the step of its first row that is not there.
    row = first + L - 1 if BACKWARDS else first
    way: tl.constexpr = -1 if BACKWARDS else 1
    n = tl.arange(0, 2 * BLOCK_S)
    n_at = tl.where(n < BLOCK_S, B_ptr + row * stride_B + n, C_ptr + row * stride_C + n - BLOCK_S)
    limit, limit_n = tl.where(is_e, L, 0), tl.where(n % BLOCK_S < S, L, 0)
    u_at, raw_at, z_at = u_ptr + row * stride_u + e, delta_ptr + row * stride_delta + e, z_ptr + row * stride_z + e
    sum_at = sum_ptr + row * E + e
    to_at = out_ptr + row * E + e if LAST else sum_at
    next_u: tl.constexpr = way * stride_u
    next_raw: tl.constexpr = way * stride_delta
    next_z: tl.constexpr = way * stride_z
    next_sum: tl.constexpr = way * E
    if stride_B == stride_C:
        next_n: tl.constexpr = way * stride_B
    else:
        next_n = tl.where(n < BLOCK_S, way * stride_B, way * stride_C)
    u, raw, BC = (
        _four(u_at, next_u, 0, limit),
        _four(raw_at, next_raw, 0, limit),
        _four_or_zero(n_at, next_n, 0, limit_n),
    )
    i = 0
    while i < L:
        if KEEP and i % CHUNK == 0:
            of_state, is_state = e[:, None] * S + s[None, :], is_e[:, None] & is_s[None, :]
            tl.store(checkpoints_ptr + of_state, state.trans(1, 0), mask=is_state)
            checkpoints_ptr += E * S
        # Two groups: the second is on its way while the first is computed, the next first one during the second.
        other_u = _four(u_at + 4 * next_u, next_u, i + 4, limit)
        other_raw = _four(raw_at + 4 * next_raw, next_raw, i + 4, limit)
        other_BC = _four_or_zero(n_at + 4 * next_n, next_n, i + 4, limit_n)
        state = _group(
            state, rate, skip, bias, u, raw, BC, z_at, sum_at, to_at, next_z, next_sum, i, limit,
            FIRST, LAST, INTERPRETED,
        )  # fmt: skip
        u_at += 8 * next_u
        raw_at += 8 * next_raw
        n_at += 8 * next_n
        u = _four(u_at, next_u, i + 8, limit)
        raw = _four(raw_at, next_raw, i + 8, limit)
        BC = _four_or_zero(n_at, next_n, i + 8, limit_n)
        state = _group(
            state, rate, skip, bias, other_u, other_raw, other_BC,
            z_at + 4 * next_z, sum_at + 4 * next_sum, to_at + 4 * next_sum, next_z, next_sum, i + 4, limit,
            FIRST, LAST, INTERPRETED,
        )  # fmt: skip
        z_at += 8 * next_z
        sum_at += 8 * next_sum
        to_at += 8 * next_sum
        i += 8


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    u_ptr, delta_ptr, A_ptr, A_backward_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, out_ptr, sum_ptr, checkpoints_ptr,
    B, L, chunks,
    stride_u: tl.constexpr, stride_delta: tl.constexpr, stride_B: tl.constexpr, stride_C: tl.constexpr,
    stride_z: tl.constexpr, E: tl.constexpr, S: tl.constexpr,
    TWO: tl.constexpr, REVERSE: tl.constexpr, KEEP: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out[b,t,e] = silu(z) * sum over directions of (<s_t, C_t> + D u_t), s_t as in reference.py.

    checkpoints[direction, b, c] `[E, S]`: the state before step c * CHUNK of that direction, where KEEP.
    Traffic in elements, one direction: 4*B*L*E + 2*B*L*S; the second adds 5*B*L*E + 2*B*L*S. Source: reference.py.
    """
    blocks = tl.cdiv(E, BLOCK_E)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first_e = tl.program_id(0) % blocks * BLOCK_E
    checkpoints_ptr += b * chunks * E * S
    _forward_pass(
        u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, out_ptr, sum_ptr, checkpoints_ptr,
        stride_u, stride_delta, stride_B, stride_C, stride_z, b * L, first_e, L, E, S,
        REVERSE, True, not TWO, KEEP, False, CHUNK, INTERPRETED, BLOCK_E, BLOCK_S,
    )  # fmt: skip
    if TWO:
        tl.debug_barrier()  # the other direction's threads read what these wrote
        _forward_pass(
            u_ptr, delta_ptr, A_backward_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, out_ptr, sum_ptr,
            checkpoints_ptr + B.to(tl.int64) * chunks * E * S,
            stride_u, stride_delta, stride_B, stride_C, stride_z, b * L, first_e, L, E, S,
            not REVERSE, False, True, KEEP, False, CHUNK, INTERPRETED, BLOCK_E, BLOCK_S,
        )  # fmt: skip
