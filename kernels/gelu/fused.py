"""The Triton GELU as operators of PyTorch: launches, shapes for tracing, gradients.

Tested in the interpreter, compiled ahead of time (bench/compile.py), and run on an H200 (LOG.md).
"""

import torch
import triton
from triton import knobs

from kernels.gelu import kernel


def gelu(x, bias, wide):
    """As `reference.gelu`, for every type but float64."""
    return activate(x, None if bias is None else bias.float())


@torch.library.custom_op("fftp::gelu", mutates_args=())
def activate(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """gelu(x + bias) in x's type: x `[..., D]` in 16 or 32 bits, bias `[D]` in float32 or None."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        x, D = x.contiguous(), x.shape[-1]
        rows, constants = _cut(x)
        grid = (triton.cdiv(rows, constants["BLOCK_R"]), triton.cdiv(D, constants["BLOCK_D"]))
        kernel._forward_kernel[grid](
            x, x if bias is None else bias.contiguous(), out, rows, D,
            BIAS=bias is not None, **constants, num_warps=kernel.WARPS,
        )  # fmt: skip
    return out


@activate.register_fake
def _(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fftp::gelu_gradients", mutates_args=())
def gradients(grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x in its type and of bias (empty without one).

    The bias's is made from parts, whose number is a constant, in a fixed order: the same bits every time.
    """
    d_x, D = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
    if not x.numel():
        return d_x, x.new_zeros(_bias_shape(x, bias), dtype=torch.float32)
    x = x.contiguous()
    rows, constants = _cut(x)
    parts = kernel.INTERPRETED_PARTS if knobs.runtime.interpret else kernel.PARTS
    partial = torch.empty((parts, *_bias_shape(x, bias)), dtype=torch.float32, device=x.device)
    kernel._backward_kernel[(parts, triton.cdiv(D, constants["BLOCK_D"]))](
        grad.contiguous(), x, x if bias is None else bias.contiguous(), d_x, partial,
        rows, triton.cdiv(rows, parts), D,
        BIAS=bias is not None, **constants, num_warps=kernel.WARPS,
    )  # fmt: skip
    return d_x, partial.sum(0, dtype=torch.float64).float()


@gradients.register_fake
def _(grad, x, bias):
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return d_x, x.new_empty(_bias_shape(x, bias), dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, bias = ctx.saved_tensors
    d_x, d_bias = gradients(grad, x, bias)
    return d_x, None if bias is None else d_bias


activate.register_autograd(_backward, setup_context=_save)


def _bias_shape(x, bias):
    return (0,) if bias is None else x.shape[-1:]


def _cut(x):
    """The number of rows, and the constants of a launch."""
    interpreted = knobs.runtime.interpret
    block_r, block_d = kernel.INTERPRETED_BLOCK if interpreted else kernel.BLOCK
    return x.numel() // x.shape[-1], {"INTERPRETED": interpreted, "BLOCK_R": block_r, "BLOCK_D": block_d}
