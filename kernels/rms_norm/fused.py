"""The Triton norm as operators of PyTorch: launches, shapes for tracing, gradients.

Tested in the interpreter and compiled ahead of time (bench/compile.py); not yet run on a GPU.
"""

import torch
import triton
from triton import knobs

from kernels.rms_norm import kernel


def rms_norm(x, residual, weight, eps, dtype, wide):
    """As `reference.rms_norm`, for every type but float64."""
    x = x if x.itemsize <= 4 else x.float()
    return norm(x, None if residual is None else residual.float(), weight.float(), eps, dtype)


@torch.library.custom_op("fftp::rms_norm", mutates_args=())
def norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed in dtype, total in float32), both `[..., D]`; x in 16 or 32 bits, residual and weight `[D]` in float32."""
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        x = x.contiguous()
        rows, constants = _cut(x)
        kernel._forward_kernel[(triton.cdiv(rows, constants["BLOCK_R"]),)](
            x, x if residual is None else residual.contiguous(), weight.contiguous(), normed, total,
            rows, x.shape[-1], eps,
            ADD=residual is not None, **constants, num_warps=kernel.WARPS,
        )  # fmt: skip
    return normed, total


@norm.register_fake
def _(x, residual, weight, eps, dtype):
    return tuple(torch.empty_like(x, dtype=t, memory_format=torch.contiguous_format) for t in (dtype, torch.float32))


@torch.library.custom_op("fftp::rms_norm_gradients", mutates_args=())
def gradients(
    grad: torch.Tensor,
    d_total: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of residual in float32, of x in dtype (empty where that is float32: it is the same) and of weight.

    The weight's is made from parts, whose number is a constant, in a fixed order: the same bits every time.
    """
    d = torch.empty(total.shape, dtype=torch.float32, device=total.device)
    d_x = torch.empty(_narrow_shape(total, dtype), dtype=dtype, device=total.device)
    if not total.numel():
        return d, d_x, torch.zeros_like(weight)
    rows, constants = _cut(total)
    parts = kernel.INTERPRETED_PARTS if knobs.runtime.interpret else kernel.PARTS
    partial = torch.empty((parts, len(weight)), dtype=torch.float32, device=total.device)
    kernel._backward_kernel[(parts,)](
        grad.contiguous(), d_total.contiguous(), total, weight.contiguous(), d, d_x, partial,
        rows, triton.cdiv(rows, parts), total.shape[-1], eps,
        NARROW=dtype != torch.float32, **constants, num_warps=kernel.WARPS,
    )  # fmt: skip
    return d, d_x, partial.sum(0)


@gradients.register_fake
def _(grad, d_total, total, weight, eps, dtype):
    d_x = total.new_empty(_narrow_shape(total, dtype), dtype=dtype)
    return torch.empty_like(total), d_x, torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    x, residual, weight, ctx.eps, _ = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.dtype, ctx.adds = x.dtype, residual is not None


def _backward(ctx, grad, d_total):
    d, d_x, d_weight = gradients(grad, d_total, *ctx.saved_tensors, ctx.eps, ctx.dtype)
    return d if ctx.dtype == torch.float32 else d_x, d if ctx.adds else None, d_weight, None, None


norm.register_autograd(_backward, setup_context=_save)


def _narrow_shape(total, dtype):
    return (0,) if dtype == torch.float32 else total.shape


def _cut(x):
    """The number of rows, and the constants of a launch."""
    D = x.shape[-1]
    block, width = kernel.INTERPRETED_BLOCK if knobs.runtime.interpret else kernel.BLOCK, triton.next_power_of_2(D)
    constants = {"INTERPRETED": knobs.runtime.interpret, "BLOCK_R": max(1, block // width), "BLOCK_D": width}
    return x.numel() // D, constants
