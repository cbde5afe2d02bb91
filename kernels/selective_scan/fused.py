"""The Triton scan and convolution as operators of PyTorch: launches, shapes for tracing, gradients.

Tested in the interpreter and compiled ahead of time (bench/compile.py); earlier forms ran on an H200 (LOG.md).
"""

import torch
import triton
from triton import knobs

from kernels.selective_scan import backward_kernel, forward_kernel, kernel
from kernels.selective_scan.kernel import Block


def selective_scan(u, delta, A, B, C, D, z, delta_bias, A_backward, reverse):
    """As `reference.selective_scan`, for every type but float64."""
    given = precise(u, delta, A, B, C, D, z, delta_bias, A_backward)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    return scan(*given, reverse, keep)[0].to(u.dtype)


def precise(u, delta, A, B, C, D, z, delta_bias, A_backward):
    """The inputs as the kernels take them: rows in 16 or 32 bits, decays, skip and bias in float32."""
    u, delta, B, C, z = (t if t.itemsize <= 4 else t.float() for t in (u, delta, B, C, z))
    A_backward = None if A_backward is None else A_backward.float()
    return u, delta, A.float(), B, C, D.float(), z, delta_bias.float(), A_backward


def causal_conv(u, weight, bias, reverse):
    """As `reference.causal_conv`, in its type, but everything is added in float32."""
    dtype = torch.promote_types(torch.promote_types(u.dtype, weight.dtype), bias.dtype)
    return conv(u if u.itemsize <= 4 else u.float(), weight.float(), bias.float(), reverse, dtype)


@torch.library.custom_op("fftp::selective_scan", mutates_args=())
def scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    A_backward: torch.Tensor | None,
    reverse: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, L, E]` in u's type, and the states that a backward starts from, where `keep`.

    u, delta, z `[B, L, E]` and B, C `[B, L, S]` in 16 or 32 bits, each its own; the others in float32, as in the reference.
    States: `[1 or 2 directions, B, ceil(L / CHUNK), E, S]`, float32; without `keep` an empty tensor.
    """
    batch, L, E = u.shape
    two = A_backward is not None
    out = torch.empty((batch, L, E), dtype=u.dtype, device=u.device)
    states = torch.empty(_states_shape(u, A, two, keep), dtype=torch.float32, device=u.device)
    if not out.numel():
        return out, states
    at = _block("scan", u)
    # Where there are two directions, the first leaves its sums here for the second.
    sums = torch.empty((batch, L, E), dtype=torch.float32, device=u.device) if two else out
    inputs, strides = _inputs(u, delta, A, B, C, D, z, delta_bias, A_backward)
    forward_kernel._forward_kernel[(batch * triton.cdiv(E, at.channels),)](
        *inputs, out, sums, states,
        batch, L, _chunks(L), *strides, E, A.shape[1],
        TWO=two, REVERSE=reverse, KEEP=keep, **_constants(at, A), num_warps=at.warps,
    )  # fmt: skip
    return out, states


@scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, A_backward, reverse, keep):
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    return out, A.new_empty(_states_shape(u, A, A_backward is not None, keep))


@torch.library.custom_op("fftp::selective_scan_gradients", mutates_args=())
def scan_gradients(
    grad: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    A_backward: torch.Tensor | None,
    states: torch.Tensor,
    reverse: bool,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """The gradients of u, delta, A, B, C, D, z, delta_bias and A_backward (empty without it), each in its input's type.

    Sums over channels, clips and chunks are made from parts in a fixed order: the same bits every time.
    """
    batch, L, E = u.shape
    S, two, device, types = A.shape[1], A_backward is not None, u.device, (B.dtype, C.dtype)
    if not u.numel():
        return tuple(torch.zeros_like(t) for t in (u, delta, A, B, C, D, z, delta_bias, A if two else A[:0]))
    at = _block("scan_backward", u)
    blocks, chunks, directions = triton.cdiv(E, at.channels), _chunks(L), 1 + two

    def scratch(*shape):
        return torch.empty(shape, dtype=torch.float32, device=device)

    d_u, d_delta, d_z = (torch.empty((batch, L, E), dtype=t.dtype, device=device) for t in (u, delta, z))
    d_A = scratch(directions, batch, E, S)
    block = _constants(at, A)
    lanes = backward_kernel.over_lanes(block["BLOCK_S"], at, block["INTERPRETED"])
    parts = directions * blocks * (at.channels // backward_kernel.LANES if lanes else 1)
    d_B, d_C = (scratch(parts, batch, L, S) for _ in range(2))
    d_D, d_bias = (scratch(directions * batch * chunks, E) for _ in range(2))
    of_pairs = scratch(batch * blocks, kernel.CHUNK // 2, block["BLOCK_S"], at.channels)
    sums = scratch(3, batch, L, E) if two else d_u
    inputs, strides = _inputs(u, delta, A, B, C, D, z, delta_bias, A_backward)
    backward_kernel._backward_kernel[(batch * blocks,)](
        grad.contiguous(), *inputs, states, of_pairs, sums, d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias,
        *strides, batch, L, E, S, chunks,
        TWO=two, REVERSE=reverse, OVER_LANES=lanes, **block, num_warps=at.warps,
    )  # fmt: skip
    d_A = d_A.sum(1)
    return (
        d_u, d_delta, d_A[0].clone(), d_B.sum(0).to(types[0]), d_C.sum(0).to(types[1]),
        # Thousands of terms: in float32 this sum would lose more than the scan does.
        d_D.sum(0, dtype=torch.float64).float(), d_z, d_bias.sum(0, dtype=torch.float64).float(),
        d_A[1].clone() if two else scratch(0, S),
    )  # fmt: skip


@scan_gradients.register_fake
def _(grad, u, delta, A, B, C, D, z, delta_bias, A_backward, states, reverse):
    given = (u, delta, A, B, C, D, z, delta_bias, A[:0] if A_backward is None else A_backward)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in given)


def _save_scan(ctx, inputs, output):
    *given, reverse, keep = inputs
    ctx.save_for_backward(*given, output[1])
    ctx.reverse = reverse
    ctx.keep = keep


def _scan_backward(ctx, grad, _):
    *given, states = ctx.saved_tensors
    if not ctx.keep:
        raise RuntimeError("this scan was run without `keep`: it has no gradients")
    gradients = scan_gradients(grad, *given, states, ctx.reverse)
    return *gradients[:8], None if given[8] is None else gradients[8], None, None


scan.register_autograd(_scan_backward, setup_context=_save_scan)


@torch.library.custom_op("fftp::causal_conv", mutates_args=())
def conv(u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, reverse: bool, dtype: torch.dtype) -> torch.Tensor:
    """u `[B, L, E]` in 16 or 32 bits, weight `[E, K]` and bias `[E]` in float32, to `[B, L, E]` in dtype."""
    out = torch.empty(u.shape, dtype=dtype, device=u.device)
    if out.numel():
        _convolve(u, weight, bias, out, reverse, adjoint=False)
    return out


@conv.register_fake
def _(u, weight, bias, reverse, dtype):
    return torch.empty_like(u, dtype=dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("fftp::causal_conv_gradients", mutates_args=())
def conv_gradients(
    grad: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of u (in its type), weight and bias; sums over tokens are made from parts in a fixed order."""
    batch, L, E = u.shape
    K = weight.shape[1]
    if not u.numel():
        return torch.zeros_like(u), torch.zeros_like(weight), torch.zeros_like(bias)
    at = _block("conv", u)
    parts = batch * triton.cdiv(L, at.tokens)
    d_total = torch.empty((batch, L, E), dtype=torch.float32, device=u.device)
    partial = torch.empty((parts, K + 1, E), dtype=torch.float32, device=u.device)
    u, stride = _rows(u)
    kernel._conv_backward_kernel[(parts * triton.cdiv(E, at.channels),)](
        grad.contiguous(), u, weight.contiguous(), bias.contiguous(), d_total, partial,
        stride, L, E,
        K=K, REVERSE=reverse, INTERPRETED=knobs.runtime.interpret,
        BLOCK_T=at.tokens, BLOCK_E=at.channels, num_warps=at.warps,
    )  # fmt: skip
    d_u = torch.empty((batch, L, E), dtype=u.dtype, device=u.device)
    _convolve(d_total, weight, bias, d_u, not reverse, adjoint=True)
    sums = partial.sum(0, dtype=torch.float64).float()  # (K + 1, E)
    return d_u, sums[:K].T.contiguous(), sums[K].clone()


@conv_gradients.register_fake
def _(grad, u, weight, bias, reverse):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, weight, bias))


def _save_conv(ctx, inputs, output):
    u, weight, bias, ctx.reverse, _ = inputs
    ctx.save_for_backward(u, weight, bias)


def _conv_backward(ctx, grad):
    return *conv_gradients(grad, *ctx.saved_tensors, ctx.reverse), None, None


conv.register_autograd(_conv_backward, setup_context=_save_conv)


def _convolve(u, weight, bias, out, reverse, adjoint):
    """Writes the convolution of u into out; adjoint: without bias and SiLU."""
    batch, L, E = u.shape
    at = _block("conv", u)
    u, stride = _rows(u)
    kernel._conv_kernel[(batch * triton.cdiv(L, at.tokens) * triton.cdiv(E, at.channels),)](
        u, weight.contiguous(), bias.contiguous(), out,
        stride, L, E,
        K=weight.shape[1], REVERSE=reverse, ADJOINT=adjoint, INTERPRETED=knobs.runtime.interpret,
        BLOCK_T=at.tokens, BLOCK_E=at.channels, num_warps=at.warps,
    )  # fmt: skip


def _states_shape(u, A, two, keep):
    return (1 + two, u.shape[0], _chunks(u.shape[1]), *A.shape) if keep else (0,)


def _chunks(L):
    return (L + kernel.CHUNK - 1) // kernel.CHUNK


def _block(operation, u) -> Block:
    if knobs.runtime.interpret:
        return kernel.INTERPRETED
    # Between the three it is the older one's.
    major = torch.cuda.get_device_capability(u.device)[0]
    return kernel.BLOCKS[operation, {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")]


def _constants(at, A):
    S = triton.next_power_of_2(A.shape[1])
    return {"CHUNK": kernel.CHUNK, "INTERPRETED": knobs.runtime.interpret, "BLOCK_E": at.channels, "BLOCK_S": S}


def _inputs(u, delta, A, B, C, D, z, delta_bias, A_backward):
    """The inputs as both kernels take them, and the strides between the rows of u, delta, B, C and z."""
    if B.dtype != C.dtype:  # a row of both is loaded at once
        B, C = B.float(), C.float()
    (u, delta, B, C, z), strides = zip(*(_rows(t) for t in (u, delta, B, C, z)), strict=True)
    A, D, delta_bias = A.contiguous(), D.contiguous(), delta_bias.contiguous()
    A_backward = A if A_backward is None else A_backward.contiguous()
    return (u, delta, A, A_backward, B, C, D, z, delta_bias), strides


def _rows(x):
    """`[B, L, n]` as a matrix of B * L rows and the stride between them; copied only where it is not one already.

    The halves of a projection (u and z, B and C) are: their rows lie apart, but evenly.
    """
    if not x.is_contiguous() and x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)):
        return x, x.stride(1)
    return x.contiguous(), x.shape[2]
