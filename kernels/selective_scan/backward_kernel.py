"""The gradients of the selective scan in Triton; docs/INTERNALS.md has the drawing.

A program owns one clip and a block of channels, a channel to a thread: its states, and the adjoint's, stand in that thread's
registers, so that sums over states meet no other thread. Sums over channels do: `_exchange` makes sixteen of them at once.
"""

import triton
import triton.language as tl

from kernels.patch_embed.kernel import _round
from kernels.selective_scan.kernel import _SIZES, LN2, LOG2E, _exp2, _reciprocal, _widen

STATES = tl.constexpr(16)  # of the models: those that the exchange is for
LANES = 32  # threads of a warp


def over_lanes(states: int, block, interpreted: bool) -> bool:
    """Whether sums over channels are made by the exchange: a part for each warp; else for each block."""
    return not interpreted and states == STATES.value and block.channels == LANES * block.warps


def _exchange() -> str:
    """PTX: STATES numbers of each thread, summed over the warp: thread i is left with the sum of number i % STATES.

    In each round a thread keeps half of its numbers, gives the other half to the thread that keeps those, and adds what it
    gets: 16 exchanges for 16 sums, where summing each by itself takes 80.
    """
    lines = [
        ".reg .pred p;",
        ".reg .b32 lane, bit;",
        f".reg .f32 kept, sent, x<{STATES.value}>;",
        "mov.u32 lane, %laneid;",
    ]
    lines += [f"mov.f32 x{i}, ${i + STATES.value};" for i in range(STATES.value)]
    count = STATES.value
    while count > 1:
        count //= 2
        lines += [f"and.b32 bit, lane, {count};", "setp.ne.b32 p, bit, 0;"]
        for i in range(count):
            lines += [f"selp.f32 kept, x{i + count}, x{i}, p;", f"selp.f32 sent, x{i}, x{i + count}, p;"]
            lines += [f"shfl.sync.bfly.b32 sent, sent, {count}, 0x1f, 0xffffffff;", f"add.f32 x{i}, kept, sent;"]
    lines += [
        f"shfl.sync.bfly.b32 sent, x0, {STATES.value}, 0x1f, 0xffffffff;",
        "add.f32 x0, x0, sent;",
        "mov.b32 $0, x0;",
    ]
    return "{ " + " ".join(lines + [f"mov.b32 ${i}, 0;" for i in range(1, STATES.value)]) + " }"


EXCHANGE = tl.constexpr(_exchange())
EXCHANGE_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * STATES.value + ["f"] * STATES.value))


@triton.jit
def _by_channels(index, INTERPRETED: tl.constexpr):
    """index `[BLOCK_S, BLOCK_E]`, for a load or store that gives a thread one channel and all of its states.

    Triton cuts a block by how its addresses run. Here it cannot see that; it is told that channels lie side by side, which
    is not always so, but as it does not know them to be aligned either, it reads each number by itself.
    """
    if INTERPRETED:
        return index
    hidden = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [index], dtype=tl.int32, is_pure=True, pack=1)
    return tl.max_contiguous(hidden, (1, index.shape[1]))


@triton.jit
def _divide(x, y, INTERPRETED: tl.constexpr):
    """x / y by the approximate reciprocal, 0 where y is infinite; two units in the last place."""
    if INTERPRETED:
        return x / y
    return x * _reciprocal(y, INTERPRETED)


@triton.jit
def _exp(x, INTERPRETED: tl.constexpr):
    """e^x, below 2^-126 flushed to 0."""
    if INTERPRETED:
        return tl.exp(x)
    return _exp2(x * LOG2E, INTERPRETED)


@triton.jit
def _sigmoid(x, INTERPRETED: tl.constexpr):
    """1 / (1 + exp(-x)); neither it nor x times it overflows."""
    return _divide(1.0, 1.0 + _exp(-x, INTERPRETED), INTERPRETED)


@triton.jit
def _softplus(x, INTERPRETED: tl.constexpr):
    """log(1 + exp(x)): log1p(e) = 2 atanh(e / (2 + e)) by its series, as e = exp(-|x|) is at most 1."""
    e = _exp(-tl.abs(x), INTERPRETED)
    t = _divide(e, 2.0 + e, INTERPRETED)
    square = t * t
    series = 0.2857142857 + square * (0.2222222222 + square * (0.1818181818 + square * 0.17))
    series = square * (0.6666666667 + square * (0.4 + square * series))
    # t (2 + series), but as 2 t = e - e t, a division's error counts for less than half.
    return tl.maximum(x, 0.0) + (e - t * (e - series))


@triton.jit
def _token(i, L, BACKWARDS: tl.constexpr):
    """The token of step i."""
    return L - 1 - i if BACKWARDS else i


@triton.jit
def _fetch(
    u_ptr, delta_ptr, z_ptr, grad_ptr, BC_at, stride_u, stride_delta, stride_z, stride_BC, i, e, of_e, of_BC, L, E,
    BACKWARDS: tl.constexpr,
):  # fmt: skip
    """u, delta, z and the output's gradient `[BLOCK_E]`, B and C `[2 BLOCK_S]` at step i, as they are stored; 0 outside."""
    row = _token(i, L, BACKWARDS)
    there = i < of_e
    u = tl.load(u_ptr + row * stride_u + e, mask=there, other=0.0)
    raw = tl.load(delta_ptr + row * stride_delta + e, mask=there, other=0.0)
    z = tl.load(z_ptr + row * stride_z + e, mask=there, other=0.0)
    grad = tl.load(grad_ptr + row * E + e, mask=there, other=0.0)
    return u, raw, z, grad, tl.load(BC_at + row * stride_BC, mask=i < of_BC, other=0.0)


@triton.jit
def _split_states(BC, INTERPRETED: tl.constexpr):
    """A row's B and C `[BLOCK_S]` of `[2 BLOCK_S]`, in float32."""
    return _widen(BC, INTERPRETED).reshape(2, BC.shape[0] // 2).permute(1, 0).split()


@triton.jit
def _put(ptr, i, e, of_e, L, E, x, BACKWARDS: tl.constexpr, INTERPRETED: tl.constexpr):
    at = ptr + _token(i, L, BACKWARDS) * E + e
    tl.store(at, _round(x, ptr.dtype.element_ty, INTERPRETED), mask=i < of_e)


@triton.jit
def _step(state, rate, delta, gain, B, INTERPRETED: tl.constexpr):
    """exp(delta A) s + delta u B, with rate = A log2(e); states `[BLOCK_S, BLOCK_E]`."""
    return _exp2(delta[None, :] * rate, INTERPRETED) * state + gain[None, :] * B[:, None]


@triton.jit
def _output_gradient(
    d_z_ptr, sum_ptr, y, skip, u, z, grad, i, e, of_e, L, E,
    BACKWARDS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Writes a step's d_z and returns its d_y."""
    gate = _sigmoid(z, INTERPRETED)
    d_z = grad * (y + skip * u) * (gate * (1.0 + z * (1.0 - gate)))
    if not FIRST:
        d_z += tl.load(sum_ptr + _token(i, L, BACKWARDS) * E + e, mask=i < of_e, other=0.0)
    if LAST:
        _put(d_z_ptr, i, e, of_e, L, E, d_z, BACKWARDS, INTERPRETED)
    else:
        _put(sum_ptr, i, e, of_e, L, E, d_z, BACKWARDS, INTERPRETED)
    return grad * (z * gate)


@triton.jit
def _over_channels(x, INTERPRETED: tl.constexpr):
    """The sum of `[BLOCK_S, BLOCK_E]` over channels. By sixteens where numpy would add them one after the other."""
    if INTERPRETED and x.shape[1] > 16:
        x = tl.sum(x.reshape(x.shape[0], 16, x.shape[1] // 16), 2)
    return tl.sum(x, 1)


@triton.jit
def _put_over_channels(
    ptr, x, i, s, of_s, lane, part, L, S,
    BACKWARDS: tl.constexpr, OVER_LANES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Step i's row of d_B or d_C: `[BLOCK_S, BLOCK_E]` summed over channels, where OVER_LANES over each warp's 32."""
    at = ptr + _token(i, L, BACKWARDS) * S
    if OVER_LANES:
        sums = tl.inline_asm_elementwise(EXCHANGE, EXCHANGE_CONSTRAINTS, [x], dtype=tl.int32, is_pure=True, pack=STATES)
        sums = tl.sum(tl.where(s[:, None] == 0, sums, 0), 0).to(tl.float32, bitcast=True)
        at += lane % 32 if lane.shape[0] == 32 else lane // 32 * part + lane % 32
        tl.store(at, sums, mask=i < tl.where(lane % 32 < STATES, L, 0))
    else:
        tl.store(at + s, _over_channels(x, INTERPRETED), mask=i < of_s)


@triton.jit
def _adjoint_step(
    adjoint, d_A, before, rate, skip, u, delta, of_raw, d_y, B, C,
    d_B_ptr, d_u_ptr, d_delta_ptr, sum_u_ptr, sum_delta_ptr, part, i, e, of_e, s, of_s, lane, L, E, S,
    BACKWARDS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, OVER_LANES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Step i of the adjoint, a_t = d loss / d s_t: writes the step's gradients; returns a_t exp(delta A), d_A and d_raw."""
    gain = delta * u
    adjoint += d_y[None, :] * C[:, None]
    d_gain = tl.sum(adjoint * B[:, None], 0)
    row = _token(i, L, BACKWARDS)
    _put_over_channels(
        d_B_ptr, adjoint * gain[None, :], i, s, of_s, lane, part, L, S, BACKWARDS, OVER_LANES, INTERPRETED
    )
    adjoint *= _exp2(delta[None, :] * rate, INTERPRETED)
    d_power = adjoint * before  # d loss / d (delta_t A)
    d_A += d_power * delta[None, :]
    d_u = d_gain * delta + skip * d_y
    d_raw = (d_gain * u + tl.sum(d_power * rate, 0) * LN2) * of_raw
    total = d_raw
    if not FIRST:
        there = i < of_e
        d_u += tl.load(sum_u_ptr + row * E + e, mask=there, other=0.0)
        total += tl.load(sum_delta_ptr + row * E + e, mask=there, other=0.0)
    if LAST:
        _put(d_u_ptr, i, e, of_e, L, E, d_u, BACKWARDS, INTERPRETED)
        _put(d_delta_ptr, i, e, of_e, L, E, total, BACKWARDS, INTERPRETED)
    else:
        _put(sum_u_ptr, i, e, of_e, L, E, d_u, BACKWARDS, INTERPRETED)
        _put(sum_delta_ptr, i, e, of_e, L, E, total, BACKWARDS, INTERPRETED)
    return adjoint, d_A, d_raw


@triton.jit
def _backward_pass(
    grad_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, checkpoints_ptr, states_ptr, sums_ptr,
    d_u_ptr, d_delta_ptr, d_A_ptr, d_B_ptr, d_C_ptr, d_D_ptr, d_z_ptr, d_bias_ptr,
    stride_u, stride_delta, stride_B, stride_C, stride_z,
    b, e, s, elements, part, L, E, S, chunks,
    BACKWARDS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    CHUNK: tl.constexpr, OVER_LANES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One direction of `_backward_kernel`: all but the LAST leave d_u, d_delta, d_z in sums_ptr, all but the FIRST add them."""
    is_e, is_s = e < E, s < S
    of_state, is_state = _by_channels(e[None, :] * S + s[:, None], INTERPRETED), is_e[None, :] & is_s[:, None]
    rate = tl.load(A_ptr + of_state, mask=is_state, other=0.0) * LOG2E
    skip = tl.load(D_ptr + e, mask=is_e, other=0.0)
    bias = tl.load(bias_ptr + e, mask=is_e, other=0.0)
    d_A = tl.zeros_like(rate)
    adjoint = tl.zeros_like(rate)
    lane = tl.arange(0, e.shape[0])
    scratch_ptr = states_ptr + _by_channels(s[:, None] * e.shape[0] + lane[None, :], INTERPRETED)
    PAIR: tl.constexpr = e.shape[0] * s.shape[0]
    u_ptr += b * L * stride_u
    delta_ptr += b * L * stride_delta
    B_ptr += b * L * stride_B
    C_ptr += b * L * stride_C
    z_ptr += b * L * stride_z
    grad_ptr += b * L * E
    d_u_ptr += b * L * E
    d_delta_ptr += b * L * E
    d_z_ptr += b * L * E
    d_B_ptr += b * L * S
    d_C_ptr += b * L * S
    sum_u_ptr = sums_ptr + b * L * E
    sum_delta_ptr = sum_u_ptr + elements
    sum_z_ptr = sum_delta_ptr + elements
    n = tl.arange(0, 2 * s.shape[0])
    # A step reads and writes below these: scalars are not to meet masks, which the interpreter widens then.
    of_e, of_s, of_BC = tl.where(is_e, L, 0), tl.where(is_s, L, 0), tl.where(n % s.shape[0] < S, L, 0)
    BC_at = tl.where(n < s.shape[0], B_ptr + n, C_ptr + n - s.shape[0])
    stride_BC = tl.where(n < s.shape[0], stride_B, stride_C)
    chunk = chunks - 1
    while chunk >= 0:
        # Along the chunk from its checkpoint: y for the gate's gradient, and the state at the start of each pair is kept.
        i = chunk * CHUNK
        end = tl.minimum(i + CHUNK, L)
        tl.debug_barrier()  # the chunk before has been read
        state = tl.load(checkpoints_ptr + (b * chunks + chunk) * (E * S) + of_state, mask=is_state, other=0.0)
        d_D = tl.zeros(skip.shape, tl.float32)
        u0, raw0, z0, grad0, BC0 = _fetch(
            u_ptr, delta_ptr, z_ptr, grad_ptr, BC_at, stride_u, stride_delta, stride_z, stride_BC,
            i, e, of_e, of_BC, L, E, BACKWARDS,
        )  # fmt: skip
        u1, raw1, z1, grad1, BC1 = _fetch(
            u_ptr, delta_ptr, z_ptr, grad_ptr, BC_at, stride_u, stride_delta, stride_z, stride_BC,
            i + 1, e, of_e, of_BC, L, E, BACKWARDS,
        )  # fmt: skip
        while i < end:
            tl.store(scratch_ptr + (i % CHUNK // 2) * PAIR, state)
            # The next pair is on its way while this one is computed.
            next_u0, next_raw0, next_z0, next_grad0, next_BC0 = _fetch(
                u_ptr, delta_ptr, z_ptr, grad_ptr, BC_at, stride_u, stride_delta, stride_z, stride_BC,
                i + 2, e, of_e, of_BC, L, E, BACKWARDS,
            )  # fmt: skip
            next_u1, next_raw1, next_z1, next_grad1, next_BC1 = _fetch(
                u_ptr, delta_ptr, z_ptr, grad_ptr, BC_at, stride_u, stride_delta, stride_z, stride_BC,
                i + 3, e, of_e, of_BC, L, E, BACKWARDS,
            )  # fmt: skip
            B0, C0 = _split_states(BC0, INTERPRETED)
            B1, C1 = _split_states(BC1, INTERPRETED)
            u0, u1 = _widen(u0, INTERPRETED), _widen(u1, INTERPRETED)
            delta0 = _softplus(_widen(raw0, INTERPRETED) + bias, INTERPRETED)
            delta1 = _softplus(_widen(raw1, INTERPRETED) + bias, INTERPRETED)
            state = _step(state, rate, delta0, delta0 * u0, B0, INTERPRETED)
            y0 = tl.sum(state * C0[:, None], 0)
            d_y0 = _output_gradient(
                d_z_ptr, sum_z_ptr, y0, skip, u0, _widen(z0, INTERPRETED), _widen(grad0, INTERPRETED),
                i, e, of_e, L, E, BACKWARDS, FIRST, LAST, INTERPRETED,
            )  # fmt: skip
            _put_over_channels(
                d_C_ptr, state * d_y0[None, :], i, s, of_s, lane, part, L, S, BACKWARDS, OVER_LANES, INTERPRETED
            )
            d_D += d_y0 * u0
            state = _step(state, rate, delta1, delta1 * u1, B1, INTERPRETED)
            y1 = tl.sum(state * C1[:, None], 0)
            d_y1 = _output_gradient(
                d_z_ptr, sum_z_ptr, y1, skip, u1, _widen(z1, INTERPRETED), _widen(grad1, INTERPRETED),
                i + 1, e, of_e, L, E, BACKWARDS, FIRST, LAST, INTERPRETED,
            )  # fmt: skip
            _put_over_channels(
                d_C_ptr, state * d_y1[None, :], i + 1, s, of_s, lane, part, L, S, BACKWARDS, OVER_LANES, INTERPRETED
            )
            d_D += d_y1 * u1
            u0, raw0, z0, grad0, BC0 = next_u0, next_raw0, next_z0, next_grad0, next_BC0
            u1, raw1, z1, grad1, BC1 = next_u1, next_raw1, next_z1, next_grad1, next_BC1
            i += 2
        tl.store(d_D_ptr + (b * chunks + chunk) * E + e, d_D, mask=is_e)
        tl.debug_barrier()  # the adjoint's threads read the states that these wrote
        # Back through the pairs: the state between their two tokens anew, then two steps of the adjoint.
        i -= 2
        d_bias = tl.zeros(bias.shape, tl.float32)
        u0, raw0, z0, grad0, BC0 = _fetch(
            u_ptr, delta_ptr, z_ptr, grad_ptr, BC_at, stride_u, stride_delta, stride_z, stride_BC,
            i, e, of_e, of_BC, L, E, BACKWARDS,
        )  # fmt: skip
        u1, raw1, z1, grad1, BC1 = _fetch(
            u_ptr, delta_ptr, z_ptr, grad_ptr, BC_at, stride_u, stride_delta, stride_z, stride_BC,
            i + 1, e, of_e, of_BC, L, E, BACKWARDS,
        )  # fmt: skip
        while i >= chunk * CHUNK:
            state0 = tl.load(scratch_ptr + (i % CHUNK // 2) * PAIR)
            next_u0, next_raw0, next_z0, next_grad0, next_BC0 = _fetch(
                u_ptr, delta_ptr, z_ptr, grad_ptr, BC_at, stride_u, stride_delta, stride_z, stride_BC,
                tl.maximum(i - 2, 0), e, of_e, of_BC, L, E, BACKWARDS,
            )  # fmt: skip
            next_u1, next_raw1, next_z1, next_grad1, next_BC1 = _fetch(
                u_ptr, delta_ptr, z_ptr, grad_ptr, BC_at, stride_u, stride_delta, stride_z, stride_BC,
                tl.maximum(i - 1, 0), e, of_e, of_BC, L, E, BACKWARDS,
            )  # fmt: skip
            B0, C0 = _split_states(BC0, INTERPRETED)
            B1, C1 = _split_states(BC1, INTERPRETED)
            u0, u1 = _widen(u0, INTERPRETED), _widen(u1, INTERPRETED)
            raw0, raw1 = _widen(raw0, INTERPRETED) + bias, _widen(raw1, INTERPRETED) + bias
            z0, z1 = _widen(z0, INTERPRETED), _widen(z1, INTERPRETED)
            delta0 = _softplus(raw0, INTERPRETED)
            delta1 = tl.where(i + 1 < L, _softplus(raw1, INTERPRETED), 0.0)
            state1 = _step(state0, rate, delta0, delta0 * u0, B0, INTERPRETED)
            adjoint, d_A, d_raw = _adjoint_step(
                adjoint, d_A, state1, rate, skip, u1, delta1, _sigmoid(raw1, INTERPRETED),
                _widen(grad1, INTERPRETED) * (z1 * _sigmoid(z1, INTERPRETED)), B1, C1,
                d_B_ptr, d_u_ptr, d_delta_ptr, sum_u_ptr, sum_delta_ptr, part, i + 1, e, of_e, s, of_s, lane,
                L, E, S, BACKWARDS, FIRST, LAST, OVER_LANES, INTERPRETED,
            )  # fmt: skip
            d_bias += d_raw
            adjoint, d_A, d_raw = _adjoint_step(
                adjoint, d_A, state0, rate, skip, u0, delta0, _sigmoid(raw0, INTERPRETED),
                _widen(grad0, INTERPRETED) * (z0 * _sigmoid(z0, INTERPRETED)), B0, C0,
                d_B_ptr, d_u_ptr, d_delta_ptr, sum_u_ptr, sum_delta_ptr, part, i, e, of_e, s, of_s, lane,
                L, E, S, BACKWARDS, FIRST, LAST, OVER_LANES, INTERPRETED,
            )  # fmt: skip
            d_bias += d_raw
            u0, raw0, z0, grad0, BC0 = next_u0, next_raw0, next_z0, next_grad0, next_BC0
            u1, raw1, z1, grad1, BC1 = next_u1, next_raw1, next_z1, next_grad1, next_BC1
            i -= 2
        tl.store(d_bias_ptr + (b * chunks + chunk) * E + e, d_bias, mask=is_e)
        chunk -= 1
    tl.store(d_A_ptr + b * (E * S) + of_state, d_A, mask=is_state)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    grad_ptr, u_ptr, delta_ptr, A_ptr, A_backward_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, checkpoints_ptr,
    states_ptr, sums_ptr, d_u_ptr, d_delta_ptr, d_A_ptr, d_B_ptr, d_C_ptr, d_D_ptr, d_z_ptr, d_bias_ptr,
    stride_u, stride_delta, stride_B, stride_C, stride_z,
    B, L, E, S, chunks,
    TWO: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr, OVER_LANES: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The derivative of `_forward_kernel`, by the adjoint a_t = exp(delta_(t+1) A) a_(t+1) + d_y_t C_t of each direction.

    d_y = grad silu(z);  d_C_t = sum_e d_y_t s_t;  d_B_t = sum_e a_t delta_t u_t;  d_gain_t = <a_t, B_t>
    d_u_t = delta_t d_gain_t + D d_y_t;  d_delta_t = u_t d_gain_t + <a_t exp(delta_t A) s_(t-1), A>
    d_A = sum_t delta_t a_t exp(delta_t A) s_(t-1)
    Sums over channels and clips are left in parts: d_B and d_C `[direction, part, B, L, S]`, a part for 32 channels where
    OVER_LANES, else for the block; d_A `[direction, B, E, S]`, d_D and d_bias `[direction, B, chunks, E]`. states_ptr:
    `[CHUNK / 2, BLOCK_S, BLOCK_E]` for each program; sums_ptr: `[3, B, L, E]` between the directions.
    Traffic in elements, one direction: 11*B*L*E (u, delta, z and grad are read twice) + (6 + 2*parts)*B*L*S, and the states
    of a chunk, which the cache holds; the second adds 12*B*L*E. Source: the derivative of reference.py.
    """
    blocks = tl.cdiv(E, BLOCK_E)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks).to(tl.int64)
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    s = tl.arange(0, BLOCK_S)
    B = B.to(tl.int64)
    PARTS: tl.constexpr = BLOCK_E // 32 if OVER_LANES else 1
    part = B * L * S
    d_B_ptr += block * PARTS * part
    d_C_ptr += block * PARTS * part
    states_ptr += tl.program_id(0).to(tl.int64) * (CHUNK // 2 * BLOCK_E * BLOCK_S)
    _backward_pass(
        grad_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, checkpoints_ptr, states_ptr, sums_ptr,
        d_u_ptr, d_delta_ptr, d_A_ptr, d_B_ptr, d_C_ptr, d_D_ptr, d_z_ptr, d_bias_ptr,
        stride_u, stride_delta, stride_B, stride_C, stride_z, b, e, s, B * L * E, part, L, E, S, chunks,
        REVERSE, True, not TWO, CHUNK, OVER_LANES, INTERPRETED,
    )  # fmt: skip
    if TWO:
        tl.debug_barrier()  # the other direction's threads read what these wrote
        _backward_pass(
            grad_ptr, u_ptr, delta_ptr, A_backward_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr,
            checkpoints_ptr + B * chunks * E * S, states_ptr, sums_ptr,
            d_u_ptr, d_delta_ptr, d_A_ptr + B * E * S, d_B_ptr + blocks * PARTS * part,
            d_C_ptr + blocks * PARTS * part, d_D_ptr + B * chunks * E, d_z_ptr, d_bias_ptr + B * chunks * E,
            stride_u, stride_delta, stride_B, stride_C, stride_z, b, e, s, B * L * E, part, L, E, S, chunks,
            not REVERSE, False, True, CHUNK, OVER_LANES, INTERPRETED,
        )  # fmt: skip
