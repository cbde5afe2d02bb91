"""Residual addition and RMSNorm or LayerNorm in Triton, both ways: a program owns whole rows, so that each is read once."""

import triton
import triton.language as tl

from kernels.patch_embed.kernel import _round

# Elements of a program's block, rows times the power of two that D fits in, and its warps: 32 numbers a thread.
BLOCK, WARPS = 4096, 4
# Backward a warp has rows to itself, whose four sums then wait for no other warp; two share a row of more than 512 places,
# or it spills (by three registers in Triton 3.9).
BACKWARD_BLOCK, PLACES_OF_A_WARP = 1024, 512
# The vectors' gradients are cut into so many parts, whatever the batch: eight for each of an H200's multiprocessors.
PARTS = 1056
INTERPRETED_BLOCK, INTERPRETED_PARTS = 1024, 3  # small, so that small shapes have edges
# Whether it is 1 or a multiple of 16 would be compiled in, and an epoch's last batch would wait for a compiler.
_SIZES = ["rows", "per_part"]


def backward_warps(width: int) -> int:
    """For rows of so many places, a power of two."""
    return max(1, width // PLACES_OF_A_WARP)


@triton.jit
def _load(ptr, row, d, rows, D):
    """`[BLOCK_R, BLOCK_D]` in float32, 0 outside."""
    inside = (row < rows)[:, None] & (d < D)[None, :]
    return tl.load(ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, row, d, rows, D, tile, INTERPRETED: tl.constexpr):
    inside = (row < rows)[:, None] & (d < D)[None, :]
    tl.store(ptr + row[:, None] * D + d[None, :], _round(tile, ptr.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def _vector(ptr, d, D):
    return tl.load(ptr + d, mask=d < D, other=0.0)


@triton.jit
def _centre(total, d, D):
    """total - mean over D of each row, 0 outside of D."""
    mean = tl.sum(total, 1) / D
    return tl.where((d < D)[None, :], total - mean[:, None], 0.0)


@triton.jit
def _scale(total, is_row, D, eps):
    """1 / sqrt(mean(total^2) + eps) of each row, both operations rounded once; 1 where there is no row."""
    square = tl.where(is_row, tl.sum(total * total, 1) / D + eps, 1.0)
    return tl.div_rn(tl.full((total.shape[0],), 1.0, tl.float32), tl.sqrt_rn(square))


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    x_ptr, residual_ptr, bias_ptr, weight_ptr, shift_ptr, normed_ptr, total_ptr,
    rows, D, eps,
    ADD: tl.constexpr, BIAS: tl.constexpr, CENTRED: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """total = residual (ADD) + x + bias (BIAS); normed[r] = total[r] / sqrt(mean(total[r]^2) + eps) * weight, or CENTRED
    (total[r] - mean(total[r])) / sqrt(var(total[r]) + eps) * weight + shift.

    Traffic in elements: 4*rows*D. Source: reference.py.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    total = _load(x_ptr, row, d, rows, D)
    if ADD:
        total += _load(residual_ptr, row, d, rows, D)
    if BIAS:
        total += _vector(bias_ptr, d, D)[None, :]
    _store(total_ptr, row, d, rows, D, total, INTERPRETED)
    if CENTRED:
        total = _centre(total, d, D)
    weight = _vector(weight_ptr, d, D)
    normed = total * _scale(total, row < rows, D, eps)[:, None] * weight[None, :]
    if CENTRED:
        normed += _vector(shift_ptr, d, D)[None, :]
    _store(normed_ptr, row, d, rows, D, normed, INTERPRETED)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    grad_ptr, d_total_ptr, total_ptr, weight_ptr, d_ptr, d_x_ptr, partial_ptr,
    rows, per_part, D, eps,
    CENTRED: tl.constexpr, NARROW: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The derivative of `_forward_kernel`, with unit = total * scale, total less its mean where CENTRED, grad that of
    normed and g = grad * weight, less its mean where CENTRED:

    d = d_total + scale * (g - unit * mean(g * unit)), the gradient of residual and of x; in x's type it goes to d_x too
    where NARROW. partial[part] `[1, D]`, or `[3, D]` where CENTRED: the sums of grad * unit, grad and d over this program's
    per_part rows, for weight, shift and bias. Traffic in elements: 4*rows*D, 5*rows*D where NARROW. Source: the derivative
    of reference.py.
    """
    part = tl.program_id(0).to(tl.int64)
    first, d = part * per_part, tl.arange(0, BLOCK_D)
    end = tl.minimum(first + per_part, rows)
    weight = _vector(weight_ptr, d, D)
    d_weight = tl.zeros((BLOCK_D,), tl.float32)
    d_shift = tl.zeros((BLOCK_D,), tl.float32)
    d_bias = tl.zeros((BLOCK_D,), tl.float32)
    while first < end:
        row = first + tl.arange(0, BLOCK_R)
        total = _load(total_ptr, row, d, end, D)
        grad = _load(grad_ptr, row, d, end, D)
        if CENTRED:
            total = _centre(total, d, D)
            d_shift += tl.sum(grad, 0)
        scale = _scale(total, row < end, D, eps)
        unit = total * scale[:, None]
        d_weight += tl.sum(grad * unit, 0)
        grad *= weight[None, :]
        along = tl.sum(grad * unit, 1) / D
        if CENTRED:
            grad = _centre(grad, d, D)
        found = (grad - unit * along[:, None]) * scale[:, None] + _load(d_total_ptr, row, d, end, D)
        if CENTRED:
            d_bias += tl.sum(found, 0)
        _store(d_ptr, row, d, end, D, found, INTERPRETED)
        if NARROW:
            _store(d_x_ptr, row, d, end, D, found, INTERPRETED)
        first += BLOCK_R
    if CENTRED:
        at = partial_ptr + part * 3 * D + d
        tl.store(at, d_weight, mask=d < D)
        tl.store(at + D, d_shift, mask=d < D)
        tl.store(at + 2 * D, d_bias, mask=d < D)
    else:
        tl.store(partial_ptr + part * D + d, d_weight, mask=d < D)
