"""The Triton norms as operators of PyTorch: launches, shapes for tracing, gradients.

Tested in the interpreter and compiled ahead of time (bench/compile.py); earlier forms ran on an H200 (LOG.md).
"""

import torch
import triton
from triton import knobs

from kernels.norm import kernel


def rms_norm(x, residual, weight, eps, dtype, wide):
    """As `reference.rms_norm`, for every type but float64."""
    x, residual, weight = _wide(x, residual, weight)
    return rms(x, residual, weight, eps, dtype)


def layer_norm(x, residual, bias, weight, shift, eps, dtype, wide):
    """As `reference.layer_norm`, for every type but float64."""
    return centred(*_wide(x, residual, bias, weight, shift), eps, dtype)


@torch.library.custom_op("fftp::rms_norm", mutates_args=())
def rms(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed in dtype, total in float32), both `[..., D]`; x in 16 or 32 bits, residual and weight `[D]` in float32."""
    return _launch(x, residual, None, weight, None, eps, dtype)


@torch.library.custom_op("fftp::layer_norm", mutates_args=())
def centred(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rms`, about the mean; bias and shift `[D]` in float32."""
    return _launch(x, residual, bias, weight, shift, eps, dtype)


def _launch(x, residual, bias, weight, shift, eps, dtype):
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        x = x.contiguous()
        rows, constants = _cut(x, kernel.BLOCK)
        residual, bias, weight, shift = (t if t is None else t.contiguous() for t in (residual, bias, weight, shift))
        kernel._forward_kernel[(triton.cdiv(rows, constants["BLOCK_R"]),)](
            x, x if residual is None else residual, weight if bias is None else bias, weight,
            weight if shift is None else shift, normed, total,
            rows, x.shape[-1], eps,
            ADD=residual is not None, BIAS=bias is not None, CENTRED=shift is not None,
            **constants, num_warps=kernel.WARPS,
        )  # fmt: skip
    return normed, total


def _traced(x, *others):
    return tuple(
        torch.empty_like(x, dtype=t, memory_format=torch.contiguous_format) for t in (others[-1], torch.float32)
    )


rms.register_fake(_traced)
centred.register_fake(_traced)


@torch.library.custom_op("fftp::norm_gradients", mutates_args=())
def gradients(
    grad: torch.Tensor,
    d_total: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    centred: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of residual in float32, of x in dtype (empty where that is float32: it is the same) and of weight,
    `[1, D]`, or where centred of weight, shift and bias, `[3, D]`.

    The last are made from parts, whose number is a constant, in a fixed order: the same bits every time.
    """
    D, kinds = len(weight), 3 if centred else 1
    d = torch.empty(total.shape, dtype=torch.float32, device=total.device)
    d_x = torch.empty(_narrow_shape(total, dtype), dtype=dtype, device=total.device)
    if not total.numel():
        return d, d_x, weight.new_zeros(kinds, D)
    rows, constants = _cut(total, kernel.BACKWARD_BLOCK)
    parts = kernel.INTERPRETED_PARTS if knobs.runtime.interpret else kernel.PARTS
    partial = torch.empty((parts, kinds, D), dtype=torch.float32, device=total.device)
    kernel._backward_kernel[(parts,)](
        grad.contiguous(), d_total.contiguous(), total, weight.contiguous(), d, d_x, partial,
        rows, triton.cdiv(rows, parts), D, eps,
        CENTRED=centred, NARROW=dtype != torch.float32, **constants, num_warps=kernel.backward_warps(constants["BLOCK_D"]),
    )  # fmt: skip
    return d, d_x, partial.sum(0)


@gradients.register_fake
def _(grad, d_total, total, weight, eps, dtype, centred):
    d_x = total.new_empty(_narrow_shape(total, dtype), dtype=dtype)
    return torch.empty_like(total), d_x, weight.new_empty(3 if centred else 1, len(weight))


def _save_rms(ctx, inputs, output):
    x, residual, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.dtype, ctx.adds = x.dtype, residual is not None


def _save_centred(ctx, inputs, output):
    x, residual, bias, weight, _, eps, dtype = inputs
    _save_rms(ctx, (x, residual, weight, eps, dtype), output)
    ctx.biased = bias is not None


def _backward_rms(ctx, grad, d_total):
    d_x, d, (d_weight,) = _found(ctx, grad, d_total, False)
    return d_x, d, d_weight, None, None


def _backward_centred(ctx, grad, d_total):
    d_x, d, (d_weight, d_shift, d_bias) = _found(ctx, grad, d_total, True)
    return d_x, d, d_bias if ctx.biased else None, d_weight, d_shift, None, None


rms.register_autograd(_backward_rms, setup_context=_save_rms)
centred.register_autograd(_backward_centred, setup_context=_save_centred)


def _found(ctx, grad, d_total, about_mean):
    """The gradients of x, of residual (None without one), and those of the vectors."""
    d, d_x, sums = gradients(grad, d_total, *ctx.saved_tensors, ctx.eps, ctx.dtype, about_mean)
    return d if ctx.dtype == torch.float32 else d_x, d if ctx.adds else None, sums.unbind(0)


def _wide(x, *others):
    """The types that the kernels take."""
    return x if x.itemsize <= 4 else x.float(), *(t if t is None else t.float() for t in others)


def _narrow_shape(total, dtype):
    return (0,) if dtype == torch.float32 else total.shape


def _cut(x, block):
    """The number of rows, and the constants of a launch whose programs have blocks of so many elements."""
    D = x.shape[-1]
    block, width = kernel.INTERPRETED_BLOCK if knobs.runtime.interpret else block, triton.next_power_of_2(D)
    constants = {"INTERPRETED": knobs.runtime.interpret, "BLOCK_R": max(1, block // width), "BLOCK_D": width}
    return x.numel() // D, constants
