"""The selective scan of few clips in Triton: chunks of tokens side by side, forward only; docs/INTERNALS.md has the arithmetic.

Three launches: each chunk's last state from a first one of zero; the states carried from chunk to chunk; each chunk once
more, from the state that it really starts with. Every exponential of the scan is made twice, the second time for y.
"""

import triton
import triton.language as tl

from kernels.selective_scan.forward_kernel import _forward_pass
from kernels.selective_scan.kernel import (
    _SIZES,
    LOG2E,
    _exp2,
    _load,
    _softplus_sigmoid,
    _split,
    _stack,
    _step,
    _steps,
)

# Tokens of a chunk: in short clips the steps in sequence decide (3 a token of a chunk), in long ones the states in memory.
SHORT_CLIP, SHORT_CHUNK, LONG_CHUNK = 256, 16, 32
CARRIED, CARRY_WARPS = 256, 2  # states that a program carries over all chunks, and its warps; not measured


def chunk(L: int) -> int:
    """Tokens of a chunk, by the length alone."""
    return SHORT_CHUNK if L <= SHORT_CLIP else LONG_CHUNK


@triton.jit
def _chunk_pass(
    u_ptr, delta_ptr, A_ptr, B_ptr, bias_ptr, end_ptr, total_ptr,
    stride_u, stride_delta, stride_B,
    first, e, s, L, E, S,
    BACKWARDS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One direction over L rows: the state behind the last, from zero, and the sum of all steps."""
    is_e, is_s = e < E, s < S
    of_state, is_state = e[:, None] * S + s[None, :], is_e[:, None] & is_s[None, :]
    rate = tl.load(A_ptr + of_state, mask=is_state, other=0.0) * LOG2E
    bias = tl.load(bias_ptr + e, mask=is_e, other=0.0)
    state, total = tl.zeros_like(rate), tl.zeros_like(bias)
    rows, is_row = _steps(0, 4, first, L, BACKWARDS)
    u = _load(u_ptr, rows, stride_u, e, is_row, is_e, INTERPRETED)
    raw = _load(delta_ptr, rows, stride_delta, e, is_row, is_e, INTERPRETED)
    B = _load(B_ptr, rows, stride_B, s, is_row, is_s, INTERPRETED)
    i = 0
    while i < L:
        rows, is_row = _steps(i, 4, first, L, BACKWARDS)
        # The next group is on its way while this one is computed.
        next_rows, is_next = _steps(i + 4, 4, first, L, BACKWARDS)
        next_u = _load(u_ptr, next_rows, stride_u, e, is_next, is_e, INTERPRETED)
        next_raw = _load(delta_ptr, next_rows, stride_delta, e, is_next, is_e, INTERPRETED)
        next_B = _load(B_ptr, next_rows, stride_B, s, is_next, is_s, INTERPRETED)
        delta, _ = _softplus_sigmoid(raw + bias[None, :])
        delta = tl.where(is_row[:, None], delta, 0.0)  # past the end the state stays as it is
        delta0, delta1, delta2, delta3 = _split(delta)
        gain0, gain1, gain2, gain3 = _split(delta * u)
        B0, B1, B2, B3 = _split(B)
        state = _step(state, rate, delta0, gain0, B0, INTERPRETED)
        state = _step(state, rate, delta1, gain1, B1, INTERPRETED)
        state = _step(state, rate, delta2, gain2, B2, INTERPRETED)
        state = _step(state, rate, delta3, gain3, B3, INTERPRETED)
        total += delta0 + delta1 + delta2 + delta3
        u, raw, B = next_u, next_raw, next_B
        i += 4
    tl.store(end_ptr + of_state, state, mask=is_state)
    tl.store(total_ptr + e, total, mask=is_e)


@triton.jit(do_not_specialize=_SIZES)
def _ends_kernel(
    u_ptr, delta_ptr, A_ptr, A_backward_ptr, B_ptr, bias_ptr, ends_ptr, totals_ptr,
    stride_u, stride_delta, stride_B,
    B, L, E, S, chunks,
    TWO: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """ends[direction, b, c] `[E, S]`: the state behind chunk c from zero; totals[direction, b, c] `[E]`: its sum of delta.

    Traffic in elements, one direction: 2*B*L*E + B*L*S + B*chunks*E*(S + 1). Source: reference.py.
    """
    blocks = tl.cdiv(E, BLOCK_E)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    s = tl.arange(0, BLOCK_S)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)  # among all clips'
    token = chunk % chunks * CHUNK
    first, length = chunk // chunks * L + token, tl.minimum(L - token, CHUNK)
    if TWO and tl.program_id(1) == 1:
        chunk += B.to(tl.int64) * chunks
        _chunk_pass(
            u_ptr, delta_ptr, A_backward_ptr, B_ptr, bias_ptr, ends_ptr + chunk * E * S, totals_ptr + chunk * E,
            stride_u, stride_delta, stride_B, first, e, s, length, E, S, not REVERSE, INTERPRETED,
        )  # fmt: skip
    else:
        _chunk_pass(
            u_ptr, delta_ptr, A_ptr, B_ptr, bias_ptr, ends_ptr + chunk * E * S, totals_ptr + chunk * E,
            stride_u, stride_delta, stride_B, first, e, s, length, E, S, REVERSE, INTERPRETED,
        )  # fmt: skip


@triton.jit
def _load_ends(ends_ptr, totals_ptr, i, e, n, E, states, chunks, BACKWARDS: tl.constexpr):
    """The next four chunks in the direction's order: their numbers, whether they are there, ends and totals `[4, n]`."""
    step = i + tl.arange(0, 4)
    chunk, is_chunk = chunks - 1 - step if BACKWARDS else step, step < chunks
    inside = is_chunk[:, None] & (n < states)[None, :]
    end = tl.load(ends_ptr + chunk[:, None] * states + n[None, :], mask=inside, other=0.0)
    return chunk, inside, end, tl.load(totals_ptr + chunk[:, None] * E + e[None, :], mask=inside, other=0.0)


@triton.jit
def _carry(
    A_ptr, ends_ptr, totals_ptr, starts_ptr, n, E, S, chunks, BACKWARDS: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """One direction of `_carry_kernel`, for one clip's states n of `[E * S]`."""
    states, e = E * S, n // S
    rate = tl.load(A_ptr + n, mask=n < states, other=0.0) * LOG2E
    state = tl.zeros_like(rate)
    chunk, inside, end, total = _load_ends(ends_ptr, totals_ptr, 0, e, n, E, states, chunks, BACKWARDS)
    i = 0
    while i < chunks:
        # The next group is on its way while this one is computed.
        next_chunk, next_inside, next_end, next_total = _load_ends(
            ends_ptr, totals_ptr, i + 4, e, n, E, states, chunks, BACKWARDS
        )
        decay0, decay1, decay2, decay3 = _split(_exp2(total * rate[None, :], INTERPRETED))
        end0, end1, end2, end3 = _split(end)
        state1 = decay0 * state + end0
        state2 = decay1 * state1 + end1
        state3 = decay2 * state2 + end2
        at = starts_ptr + chunk[:, None] * states + n[None, :]
        tl.store(at, _stack(state, state1, state2, state3), mask=inside)
        state = decay3 * state3 + end3
        chunk, inside, end, total = next_chunk, next_inside, next_end, next_total
        i += 4


@triton.jit(do_not_specialize=_SIZES)
def _carry_kernel(
    A_ptr, A_backward_ptr, ends_ptr, totals_ptr, starts_ptr,
    B, E, S, chunks,
    TWO: tl.constexpr, REVERSE: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """starts[direction, b, c]: the state before chunk c, start' = exp(A total) start + end from chunk to chunk.

    Traffic in elements, one direction: 3*B*chunks*E*S. Source: reference.py.
    """
    blocks = tl.cdiv(E * S, BLOCK)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    clip = (tl.program_id(0) // blocks).to(tl.int64)
    if TWO and tl.program_id(1) == 1:
        clip = (clip + B) * chunks
        _carry(
            A_backward_ptr, ends_ptr + clip * E * S, totals_ptr + clip * E, starts_ptr + clip * E * S,
            n, E, S, chunks, not REVERSE, INTERPRETED,
        )  # fmt: skip
    else:
        clip = clip * chunks
        _carry(
            A_ptr, ends_ptr + clip * E * S, totals_ptr + clip * E, starts_ptr + clip * E * S,
            n, E, S, chunks, REVERSE, INTERPRETED,
        )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _outputs_kernel(
    u_ptr, delta_ptr, A_ptr, A_backward_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, out_ptr, sum_ptr, starts_ptr,
    B, L, chunks,
    stride_u: tl.constexpr, stride_delta: tl.constexpr, stride_B: tl.constexpr, stride_C: tl.constexpr,
    stride_z: tl.constexpr, E: tl.constexpr, S: tl.constexpr,
    TWO: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """`_forward_kernel` for one chunk of tokens, from the states before it; both directions of it in one program.

    Traffic in elements, one direction: 4*B*L*E + 2*B*L*S + B*chunks*E*S; the second adds as much.
    Source: reference.py.
    """
    blocks = tl.cdiv(E, BLOCK_E)
    first_e = tl.program_id(0) % blocks * BLOCK_E
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    token = chunk % chunks * CHUNK
    first, length = chunk // chunks * L + token, tl.minimum(L - token, CHUNK)
    starts_ptr += chunk * E * S
    _forward_pass(
        u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, out_ptr, sum_ptr, starts_ptr,
        stride_u, stride_delta, stride_B, stride_C, stride_z,
        first, first_e, length, E, S,
        REVERSE, True, not TWO, False, True, CHUNK, INTERPRETED, BLOCK_E, BLOCK_S,
    )  # fmt: skip
    if TWO:
        tl.debug_barrier()  # the other direction's threads read what these wrote
        _forward_pass(
            u_ptr, delta_ptr, A_backward_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, out_ptr, sum_ptr,
            starts_ptr + B.to(tl.int64) * chunks * E * S,
            stride_u, stride_delta, stride_B, stride_C, stride_z,
        first, first_e, length, E, S,
            not REVERSE, False, True, False, True, CHUNK, INTERPRETED, BLOCK_E, BLOCK_S,
        )  # fmt: skip
