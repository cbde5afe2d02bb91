"""The selective scan and its causal convolution in Triton, forward and backward; docs/INTERNALS.md has the drawing.

A program of the scan owns one clip and a block of channels, keeps their states `[BLOCK_E, BLOCK_S]` in registers, and walks
along time in groups of four tokens; where there are two directions it walks twice, so that nothing is added by two programs.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from kernels.patch_embed.kernel import _round


@dataclass(frozen=True, kw_only=True)
class Block:
    """What a program owns: channels, and tokens in the convolution (the scan takes all); its warps. None was timed."""

    channels: int
    warps: int
    tokens: int = 0


# (operation, architecture) -> block, the same for every type: the arithmetic is in float32. Up to 168 registers, twelve
# warps fit a multiprocessor, and the 1536 programs of 32 clips and 1536 channels an H200 at once. The backward, which keeps
# three times as much as the forward, spills with 32 channels, and the forward on sm_100 does now and then (bench/compile.py).
BLOCKS = {
    ("scan", "sm_80"): Block(channels=32, warps=1),
    ("scan", "sm_90"): Block(channels=32, warps=1),
    ("scan", "sm_100"): Block(channels=16, warps=1),
    ("scan_backward", "sm_80"): Block(channels=16, warps=1),
    ("scan_backward", "sm_90"): Block(channels=16, warps=1),
    ("scan_backward", "sm_100"): Block(channels=16, warps=1),
    ("conv", "sm_80"): Block(channels=64, tokens=32, warps=4),
    ("conv", "sm_90"): Block(channels=64, tokens=32, warps=4),
    ("conv", "sm_100"): Block(channels=64, tokens=16, warps=4),
}
INTERPRETED = Block(channels=256, tokens=16, warps=1)  # wide, as the interpreter's time goes by operations
# Tokens between two checkpoints of the state: 16 states in float32 every 32 tokens are as much memory as u in bfloat16.
CHUNK = 32
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
WIDEN_BFLOAT16 = tl.constexpr("{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }")
_SIZES = ["B", "L", "chunks"]


@triton.jit
def _exp2(x, INTERPRETED: tl.constexpr):
    """2^x. The plain instruction flushes results below 2^-126 to 0; scaling them would cost three more."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _softplus_sigmoid(x):
    """log(1 + exp(x)) and 1 / (1 + exp(-x)), neither of which overflows."""
    e = tl.exp(-tl.abs(x))
    one_more = 1.0 + e
    # log1p without the library: what 1 + e lost is put back by e / ((1 + e) - 1).
    lost = one_more == 1.0
    log1p = tl.where(lost, e, tl.log(one_more) * (e / tl.where(lost, 1.0, one_more - 1.0)))
    return tl.maximum(x, 0.0) + log1p, tl.where(x >= 0.0, 1.0, e) / one_more


@triton.jit
def _load(ptr, rows, stride, columns, is_row, is_column, INTERPRETED: tl.constexpr):
    """Rows of a matrix, 0 outside, in float32.

    Widened by an instruction of ours: Triton 3.6 would move its own behind the exchange between threads that a split
    takes, and with it all the arithmetic in between, which each thread would then do four times over.
    """
    at = ptr + rows[:, None] * stride + columns[None, :]
    x = tl.load(at, mask=is_row[:, None] & is_column[None, :], other=0.0)
    if INTERPRETED or x.dtype == tl.float32:
        return x.to(tl.float32)
    elif x.dtype == tl.float16:
        return tl.inline_asm_elementwise("cvt.f32.f16 $0, $1;", "=f,h", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(WIDEN_BFLOAT16, "=f,h", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _store(ptr, rows, stride, columns, is_row, is_column, tile, INTERPRETED: tl.constexpr):
    at = ptr + rows[:, None] * stride + columns[None, :]
    tl.store(at, _round(tile, ptr.dtype.element_ty, INTERPRETED), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _split(tile):
    """The four rows of `[4, n]`."""
    even, odd = tile.reshape(2, 2, tile.shape[1]).permute(2, 0, 1).split()
    row0, row2 = even.split()
    row1, row3 = odd.split()
    return row0, row1, row2, row3


@triton.jit
def _split_pair(tile):
    """The two rows of `[2, n]`."""
    return tile.permute(1, 0).split()


@triton.jit
def _stack_pair(row0, row1):
    """Two rows `[n]` as `[2, n]`."""
    return tl.join(row0, row1).permute(1, 0)


@triton.jit
def _stack(row0, row1, row2, row3):
    """Four rows `[n]` as `[4, n]`."""
    tile = tl.join(tl.join(row0, row2), tl.join(row1, row3))
    return tile.permute(1, 2, 0).reshape(4, row0.shape[0])


@triton.jit
def _steps(i, count: tl.constexpr, first, L, BACKWARDS: tl.constexpr):
    """Steps i..i+count-1 of a scan over rows first..first+L-1 of `[B * L, n]`: which they read, and whether they are there."""
    step = i + tl.arange(0, count)
    token = L - 1 - step if BACKWARDS else step
    return first + token, step < L


@triton.jit
def _step(state, rate, delta, gain, B, INTERPRETED: tl.constexpr):
    """exp(delta A) s + delta u B, with rate = A log2(e)."""
    return _exp2(delta[:, None] * rate, INTERPRETED) * state + gain[:, None] * B[None, :]


@triton.jit
def _over_channels(x, INTERPRETED: tl.constexpr):
    """The sum of `[BLOCK_E, BLOCK_S]` over channels. By sixteens where numpy would add them one after the other."""
    if INTERPRETED and x.shape[0] > 16:
        x = tl.sum(x.reshape(x.shape[0] // 16, 16, x.shape[1]), 1)
    return tl.sum(x, 0)


@triton.jit
def _adjoint_step(adjoint, d_A, state, before, rate, delta, gain, B, C, d_y, INTERPRETED: tl.constexpr):
    """Step t of the adjoint, a_t = d loss / d s_t: returns a_t exp(delta A), the sums for d_A, and the step's gradients.

    d_gain and d_power log2(e) `[BLOCK_E]` are sums over states, d_B and d_C `[BLOCK_S]` sums over the block's channels.
    """
    adjoint += d_y[:, None] * C[None, :]
    d_C = _over_channels(state * d_y[:, None], INTERPRETED)
    d_gain = tl.sum(adjoint * B[None, :], 1)
    d_B = _over_channels(adjoint * gain[:, None], INTERPRETED)
    adjoint *= _exp2(delta[:, None] * rate, INTERPRETED)
    d_power = adjoint * before  # d loss / d (delta_t A)
    d_A += d_power * delta[:, None]
    return adjoint, d_A, d_gain, tl.sum(d_power * rate, 1), d_B, d_C


@triton.jit
def _backward_pass(
    grad_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, checkpoints_ptr, states_ptr, sums_ptr,
    d_u_ptr, d_delta_ptr, d_A_ptr, d_B_ptr, d_C_ptr, d_D_ptr, d_z_ptr, d_bias_ptr,
    stride_u, stride_delta, stride_B, stride_C, stride_z,
    b, e, s, elements, L, E, S, chunks,
    BACKWARDS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One direction of `_backward_kernel`: all but the LAST leave d_u, d_delta, d_z in sums_ptr, all but the FIRST add them."""
    is_e, is_s = e < E, s < S
    of_state, is_state = e[:, None] * S + s[None, :], is_e[:, None] & is_s[None, :]
    rate = tl.load(A_ptr + of_state, mask=is_state, other=0.0) * LOG2E
    skip = tl.load(D_ptr + e, mask=is_e, other=0.0)
    bias = tl.load(bias_ptr + e, mask=is_e, other=0.0)
    d_A = tl.zeros_like(rate)
    adjoint = tl.zeros_like(rate)
    of_scratch = tl.arange(0, e.shape[0])[:, None] * s.shape[0] + s[None, :]
    chunk = chunks - 1
    while chunk >= 0:
        # Along the chunk from its checkpoint: y for the gate's gradient, and the state at the start of each pair is kept.
        i = chunk * CHUNK
        end = tl.minimum(i + CHUNK, L)
        state = tl.load(checkpoints_ptr + (b * chunks + chunk) * (E * S) + of_state, mask=is_state, other=0.0)
        tl.debug_barrier()  # the chunk before has been read
        d_D = tl.zeros(skip.shape, tl.float32)
        while i < end:
            tl.store(states_ptr + (i % CHUNK // 2) * (e.shape[0] * s.shape[0]) + of_scratch, state)
            rows, is_row = _steps(i, 2, b * L, L, BACKWARDS)
            u = _load(u_ptr, rows, stride_u, e, is_row, is_e, INTERPRETED)
            raw = _load(delta_ptr, rows, stride_delta, e, is_row, is_e, INTERPRETED)
            z = _load(z_ptr, rows, stride_z, e, is_row, is_e, INTERPRETED)
            grad = _load(grad_ptr, rows, E, e, is_row, is_e, INTERPRETED)
            B0, B1 = _split_pair(_load(B_ptr, rows, stride_B, s, is_row, is_s, INTERPRETED))
            C0, C1 = _split_pair(_load(C_ptr, rows, stride_C, s, is_row, is_s, INTERPRETED))
            delta, _ = _softplus_sigmoid(raw + bias[None, :])
            delta0, delta1 = _split_pair(delta)
            gain0, gain1 = _split_pair(delta * u)
            state = _step(state, rate, delta0, gain0, B0, INTERPRETED)
            y0 = tl.sum(state * C0[None, :], 1)
            state = _step(state, rate, delta1, gain1, B1, INTERPRETED)
            y1 = tl.sum(state * C1[None, :], 1)
            _, gate = _softplus_sigmoid(z)
            d_D += tl.sum(grad * (z * gate) * u, 0)
            d_z = grad * (_stack_pair(y0, y1) + skip[None, :] * u) * (gate * (1.0 + z * (1.0 - gate)))
            if not FIRST:
                d_z += _load(sums_ptr + 2 * elements, rows, E, e, is_row, is_e, INTERPRETED)
            if LAST:
                _store(d_z_ptr, rows, E, e, is_row, is_e, d_z, INTERPRETED)
            else:
                _store(sums_ptr + 2 * elements, rows, E, e, is_row, is_e, d_z, INTERPRETED)
            i += 2
        tl.store(d_D_ptr + (b * chunks + chunk) * E + e, d_D, mask=is_e)
        tl.debug_barrier()  # the adjoint's threads read the states that these wrote
        # Back through the pairs: their two states anew, then two steps of the adjoint.
        i -= 2
        d_bias = tl.zeros(bias.shape, tl.float32)
        while i >= chunk * CHUNK:
            rows, is_row = _steps(i, 2, b * L, L, BACKWARDS)
            u = _load(u_ptr, rows, stride_u, e, is_row, is_e, INTERPRETED)
            raw = _load(delta_ptr, rows, stride_delta, e, is_row, is_e, INTERPRETED)
            z = _load(z_ptr, rows, stride_z, e, is_row, is_e, INTERPRETED)
            grad = _load(grad_ptr, rows, E, e, is_row, is_e, INTERPRETED)
            B0, B1 = _split_pair(_load(B_ptr, rows, stride_B, s, is_row, is_s, INTERPRETED))
            C0, C1 = _split_pair(_load(C_ptr, rows, stride_C, s, is_row, is_s, INTERPRETED))
            state0 = tl.load(states_ptr + (i % CHUNK // 2) * (e.shape[0] * s.shape[0]) + of_scratch)
            delta, of_raw = _softplus_sigmoid(raw + bias[None, :])
            delta = tl.where(is_row[:, None], delta, 0.0)
            _, gate = _softplus_sigmoid(z)
            d_y = grad * (z * gate)
            delta0, delta1 = _split_pair(delta)
            gain0, gain1 = _split_pair(delta * u)
            d_y0, d_y1 = _split_pair(d_y)
            state1 = _step(state0, rate, delta0, gain0, B0, INTERPRETED)
            state2 = _step(state1, rate, delta1, gain1, B1, INTERPRETED)
            adjoint, d_A, d_gain1, d_power1, d_B1, d_C1 = _adjoint_step(
                adjoint, d_A, state2, state1, rate, delta1, gain1, B1, C1, d_y1, INTERPRETED
            )
            adjoint, d_A, d_gain0, d_power0, d_B0, d_C0 = _adjoint_step(
                adjoint, d_A, state1, state0, rate, delta0, gain0, B0, C0, d_y0, INTERPRETED
            )
            _store(d_B_ptr, rows, S, s, is_row, is_s, _stack_pair(d_B0, d_B1), INTERPRETED)
            _store(d_C_ptr, rows, S, s, is_row, is_s, _stack_pair(d_C0, d_C1), INTERPRETED)
            d_gain = _stack_pair(d_gain0, d_gain1)
            d_u = d_gain * delta + skip[None, :] * d_y
            d_raw = (d_gain * u + _stack_pair(d_power0, d_power1) * LN2) * of_raw
            d_bias += tl.sum(d_raw, 0)
            if not FIRST:
                d_u += _load(sums_ptr, rows, E, e, is_row, is_e, INTERPRETED)
                d_raw += _load(sums_ptr + elements, rows, E, e, is_row, is_e, INTERPRETED)
            if LAST:
                _store(d_u_ptr, rows, E, e, is_row, is_e, d_u, INTERPRETED)
                _store(d_delta_ptr, rows, E, e, is_row, is_e, d_raw, INTERPRETED)
            else:
                _store(sums_ptr, rows, E, e, is_row, is_e, d_u, INTERPRETED)
                _store(sums_ptr + elements, rows, E, e, is_row, is_e, d_raw, INTERPRETED)
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
    TWO: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The derivative of `_forward_kernel`, by the adjoint a_t = exp(delta_(t+1) A) a_(t+1) + d_y_t C_t of each direction.

    d_y = grad silu(z);  d_C_t = sum_e d_y_t s_t;  d_B_t = sum_e a_t delta_t u_t;  d_gain_t = <a_t, B_t>
    d_u_t = delta_t d_gain_t + D d_y_t;  d_delta_t = u_t d_gain_t + <a_t exp(delta_t A) s_(t-1), A>
    d_A = sum_t delta_t a_t exp(delta_t A) s_(t-1)
    Sums over channels and clips are left in parts: d_B and d_C `[direction, block of channels, B, L, S]`, d_A
    `[direction, B, E, S]`, d_D and d_bias `[direction, B, chunks, E]`. states_ptr: `[CHUNK / 2, BLOCK_E, BLOCK_S]` for each
    program; sums_ptr: `[3, B, L, E]` between the directions.
    Traffic in elements, one direction: 9*B*L*E (u and delta are read twice) + (3 + 2*blocks)*B*L*S, and the states of
    a chunk, which the cache holds; the second adds 12*B*L*E. Source: the derivative of reference.py.
    """
    blocks = tl.cdiv(E, BLOCK_E)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks).to(tl.int64)
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    s = tl.arange(0, BLOCK_S)
    B = B.to(tl.int64)
    of_block = block * B * L * S
    states_ptr += tl.program_id(0).to(tl.int64) * (CHUNK // 2 * BLOCK_E * BLOCK_S)
    _backward_pass(
        grad_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, checkpoints_ptr, states_ptr, sums_ptr,
        d_u_ptr, d_delta_ptr, d_A_ptr, d_B_ptr + of_block, d_C_ptr + of_block, d_D_ptr, d_z_ptr, d_bias_ptr,
        stride_u, stride_delta, stride_B, stride_C, stride_z, b, e, s, B * L * E, L, E, S, chunks,
        REVERSE, True, not TWO, CHUNK, INTERPRETED,
    )  # fmt: skip
    if TWO:
        tl.debug_barrier()  # the other direction's threads read what these wrote
        of_block += blocks * B * L * S
        _backward_pass(
            grad_ptr, u_ptr, delta_ptr, A_backward_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr,
            checkpoints_ptr + B * chunks * E * S, states_ptr, sums_ptr,
            d_u_ptr, d_delta_ptr, d_A_ptr + B * E * S, d_B_ptr + of_block, d_C_ptr + of_block,
            d_D_ptr + B * chunks * E, d_z_ptr, d_bias_ptr + B * chunks * E,
            stride_u, stride_delta, stride_B, stride_C, stride_z, b, e, s, B * L * E, L, E, S, chunks,
            not REVERSE, False, True, CHUNK, INTERPRETED,
        )  # fmt: skip


@triton.jit
def _convolve(
    u_ptr, weight_ptr, bias_ptr, stride_u, b, token, e, is_token, is_e, L,
    K: tl.constexpr, REVERSE: tl.constexpr, BIAS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """bias + sum_j weight[:, j] u_(t - K + 1 + j), or u_(t + K - 1 - j) where REVERSE; u is 0 outside the clip."""
    total = tl.zeros((token.shape[0], e.shape[0]), tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + e, mask=is_e, other=0.0)[None, :]
    for j in tl.static_range(K):
        u = _load_tap(u_ptr, stride_u, b, token, e, is_token, is_e, L, j, K, REVERSE, INTERPRETED)
        total += u * tl.load(weight_ptr + e * K + j, mask=is_e, other=0.0)[None, :]
    return total


@triton.jit
def _load_tap(
    u_ptr, stride_u, b, token, e, is_token, is_e, L,
    j: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """u where tap j meets it, for each token."""
    at = token + (K - 1 - j) if REVERSE else token - (K - 1 - j)
    return _load(u_ptr, b * L + at, stride_u, e, is_token & (at >= 0) & (at < L), is_e, INTERPRETED)


@triton.jit
def _conv_block(L, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """This program's clip, number of its block of tokens among all clips', tokens, channels, and which of them exist."""
    blocks_e, blocks_t = tl.cdiv(E, BLOCK_E), tl.cdiv(L, BLOCK_T)
    block = tl.program_id(0) // blocks_e
    b = (block // blocks_t).to(tl.int64)
    token = block % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(0) % blocks_e * BLOCK_E + tl.arange(0, BLOCK_E)
    return b, block.to(tl.int64), token, e, token < L, e < E


@triton.jit(do_not_specialize=_SIZES)
def _conv_kernel(
    u_ptr, weight_ptr, bias_ptr, out_ptr,
    stride_u, L, E,
    K: tl.constexpr, REVERSE: tl.constexpr, ADJOINT: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[b,t,e] = silu(bias[e] + sum_j weight[e,j] u[b, t - K + 1 + j, e]); ADJOINT: the sum alone.

    Traffic in elements: 2*B*L*E; the taps' overlap is served by the cache. Source: reference.py.
    """
    b, _, token, e, is_token, is_e = _conv_block(L, E, BLOCK_T, BLOCK_E)
    total = _convolve(
        u_ptr, weight_ptr, bias_ptr, stride_u, b, token, e, is_token, is_e, L, K, REVERSE, not ADJOINT, INTERPRETED
    )
    if not ADJOINT:
        _, gate = _softplus_sigmoid(total)
        total *= gate
    _store(out_ptr, b * L + token, E, e, is_token, is_e, total, INTERPRETED)


@triton.jit(do_not_specialize=_SIZES)
def _conv_backward_kernel(
    grad_ptr, u_ptr, weight_ptr, bias_ptr, d_total_ptr, partial_ptr,
    stride_u, L, E,
    K: tl.constexpr, REVERSE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """d_total = grad silu'(total); partial[block of tokens, j] `[E]`: its sum with tap j's u, and alone at j = K.

    d_u is `_conv_kernel` of d_total the other way, ADJOINT.
    Traffic in elements: 3*B*L*E + B*ceil(L / BLOCK_T)*(K + 1)*E. Source: the derivative of reference.py.
    """
    b, block, token, e, is_token, is_e = _conv_block(L, E, BLOCK_T, BLOCK_E)
    total = _convolve(
        u_ptr, weight_ptr, bias_ptr, stride_u, b, token, e, is_token, is_e, L, K, REVERSE, True, INTERPRETED
    )
    _, gate = _softplus_sigmoid(total)
    grad = _load(grad_ptr, b * L + token, E, e, is_token, is_e, INTERPRETED)
    d_total = grad * (gate * (1.0 + total * (1.0 - gate)))
    _store(d_total_ptr, b * L + token, E, e, is_token, is_e, d_total, INTERPRETED)
    partial_ptr += block * (K + 1) * E + e
    for j in tl.static_range(K):
        u = _load_tap(u_ptr, stride_u, b, token, e, is_token, is_e, L, j, K, REVERSE, INTERPRETED)
        tl.store(partial_ptr + j * E, tl.sum(d_total * u, 0), mask=is_e)
    tl.store(partial_ptr + K * E, tl.sum(d_total, 0), mask=is_e)
