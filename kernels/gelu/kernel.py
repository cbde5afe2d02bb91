"""Bias and exact GELU in Triton, forward and backward: one exponential an element for the distribution and its density.

With a = |z|: Phi(-a) = exp(-a^2 / 2) m(a), gelu(z) = max(z, 0) - a Phi(-a), and the slope Phi(z) + z phi(z) at -a, which is
1 less the slope at a, is exp(-a^2 / 2) (m(a) - a / sqrt(2 pi)).
"""

import triton
import triton.language as tl

from kernels.norm.kernel import _load, _store

# Rows and columns of a program's block, and its warps: 16 numbers a thread (32 spill on sm_100).
BLOCK, WARPS = (8, 256), 4
# The bias's gradient is cut into so many parts of rows, whatever the batch: with three blocks of columns (width 768) four
# programs for each of an H200's multiprocessors.
PARTS = 176
INTERPRETED_BLOCK, INTERPRETED_PARTS = (8, 128), 3  # small, so that small shapes have edges
# Whether it is 1 or a multiple of 16 would be compiled in, and an epoch's last batch would wait for a compiler.
_SIZES = ["rows", "per_part"]


@triton.jit
def _bell_and_mills(z):
    """(a, exp(-a^2 / 2), m(a)), a at most 15, where the exponential is 0; a NaN stays one.

    m(a) = t (1 / 2 - 0.34 a t C(t)) with t = 1 / (1 + 0.34 a), the form of Hastings (Abramowitz and Stegun, 7.1.26), C
    fitted anew by least squares with Lawson's weights: Phi within 1.5e-8, and within 9e-6 of itself in its whole tail.
    """
    a = tl.abs(z)
    a = tl.where(a > 15.0, 15.0, a)
    t = 1.0 / (1.0 + 0.34 * a)
    c = 0.0440383453 * t - 0.153082604
    c = c * t + 0.10504628
    c = c * t + 0.0796558504
    c = c * t + 0.233671372
    c = c * t + 0.364031883
    return a, tl.exp2(a * a * -0.7213475204), t * (0.5 - 0.34 * a * t * c)


@triton.jit
def _bias_of(bias_ptr, d, D, BIAS: tl.constexpr, BLOCK_D: tl.constexpr):
    if BIAS:
        return tl.load(bias_ptr + d, mask=d < D, other=0.0)
    return tl.zeros((BLOCK_D,), tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    x_ptr, bias_ptr, out_ptr,
    rows, D,
    BIAS: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = z Phi(z), z = x + bias (BIAS) or x.

    Traffic in elements: 2*rows*D. Source: reference.py.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    z = _load(x_ptr, row, d, rows, D) + _bias_of(bias_ptr, d, D, BIAS, BLOCK_D)[None, :]
    a, bell, mills = _bell_and_mills(z)
    _store(out_ptr, row, d, rows, D, tl.where(z < 0.0, 0.0, z) - a * mills * bell, INTERPRETED)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    grad_ptr, x_ptr, bias_ptr, d_x_ptr, partial_ptr,
    rows, per_part, D,
    BIAS: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d_x = grad * (Phi(z) + z phi(z)); partial[part] `[D]` (BIAS): its sum over this program's per_part rows, not rounded.

    Traffic in elements: 3*rows*D. Source: the derivative of reference.py.
    """
    part = tl.program_id(0).to(tl.int64)
    first, d = part * per_part, tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.minimum(first + per_part, rows)
    bias = _bias_of(bias_ptr, d, D, BIAS, BLOCK_D)
    # Added up over rows at the end: within the loop a sum would wait for all warps.
    d_bias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    while first < end:
        row = first + tl.arange(0, BLOCK_R)
        z = _load(x_ptr, row, d, end, D) + bias[None, :]
        a, bell, mills = _bell_and_mills(z)
        below = (mills - a * 0.3989422804) * bell
        d_z = _load(grad_ptr, row, d, end, D) * tl.where(z < 0.0, below, 1.0 - below)
        _store(d_x_ptr, row, d, end, D, d_z, INTERPRETED)
        d_bias += d_z
        first += BLOCK_R
    if BIAS:
        tl.store(partial_ptr + part * D + d, tl.sum(d_bias, 0), mask=d < D)
