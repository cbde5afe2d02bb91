"""AuM's causal convolution in Triton with its gradients, and what the scan's kernels share; docs/INTERNALS.md has the drawing.

The scan itself: forward_kernel.py, backward_kernel.py, and chunked_kernel.py for single clips.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from kernels.patch_embed.kernel import _round


@dataclass(frozen=True, kw_only=True)
class Block:
    """What a program owns: channels, and tokens in the convolution (the scan takes all); its warps."""

    channels: int
    warps: int
    tokens: int = 0


# (operation, architecture) -> block, the same for every type: the arithmetic is in float32. Up to 168 registers, twelve
# warps fit a multiprocessor, and the 1536 programs of 32 clips and 1536 channels an H200 at once. The backward takes
# all 255 (eight warps), and spills on sm_100 with 32 channels (bench/compile.py).
BLOCKS = {
    ("scan", "sm_80"): Block(channels=32, warps=1),
    ("scan", "sm_90"): Block(channels=32, warps=1),
    ("scan", "sm_100"): Block(channels=32, warps=1),
    ("scan_backward", "sm_80"): Block(channels=32, warps=1),
    ("scan_backward", "sm_90"): Block(channels=32, warps=1),
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
def _reciprocal(x, INTERPRETED: tl.constexpr):
    """1 / x in one instruction, within one unit in the last place."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _widen(x, INTERPRETED: tl.constexpr):
    """In float32, by an instruction of ours, which stays where it is and in each thread once: Triton 3.6 would move its own
    behind the exchange between threads that a split takes, and with it all the arithmetic in between."""
    if INTERPRETED or x.dtype == tl.float32:
        return x.to(tl.float32)
    elif x.dtype == tl.float16:
        return tl.inline_asm_elementwise("cvt.f32.f16 $0, $1;", "=f,h", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(WIDEN_BFLOAT16, "=f,h", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _load(ptr, rows, stride, columns, is_row, is_column, INTERPRETED: tl.constexpr):
    """Rows of a matrix, 0 outside, in float32."""
    at = ptr + rows[:, None] * stride + columns[None, :]
    return _widen(tl.load(at, mask=is_row[:, None] & is_column[None, :], other=0.0), INTERPRETED)


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
