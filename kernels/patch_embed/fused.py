"""The Triton embedding as operators of PyTorch: launches, shapes for tracing, gradients.

Tested in the interpreter and compiled ahead of time (bench/compile.py); not yet run on a GPU.
"""

import torch
import triton
from triton import knobs

from kernels.patch_embed import kernel
from kernels.patch_embed.kernel import Tile

MOST_ROWS = 2**31 - 2**10  # rows are counted in int32, and the last tile reaches past the end


def patch_embed(log_mel, weight, bias, stride, position, tokens, place):
    """As `reference.patch_embed`; the product takes autocast's type where it is on, and everything is added in float32."""
    device = log_mel.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else log_mel.dtype
    return embed(log_mel.to(dtype), weight.to(dtype), bias, *stride, position, tokens, place)


@torch.library.custom_op("fftp::patch_embed", mutates_args=())
def embed(
    log_mel: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stride_t: int,
    stride_f: int,
    position: torch.Tensor | None,
    tokens: torch.Tensor,
    place: int,
) -> torch.Tensor:
    """Log-mel `[B, T, F]` and weight `[D, 1, pt, pf]` of one type to `[B, N + c, D]`, as `reference.patch_embed`."""
    log_mel, flat, bias, tokens = log_mel.contiguous(), weight.contiguous(), bias.contiguous(), tokens.contiguous()
    out = torch.empty(
        _shape(log_mel, weight, stride_t, stride_f, tokens), dtype=_type(log_mel, position), device=log_mel.device
    )
    if not out.numel():
        return out
    B, L, D = out.shape
    at = _tile("forward", log_mel)
    sizes, constants = _launch(log_mel, weight, stride_t, stride_f, len(tokens), place)
    kernel._forward_kernel[(triton.cdiv(B * L, at.m) * triton.cdiv(D, at.n),)](
        log_mel, flat, bias, bias if position is None else position.contiguous(), tokens, out,
        B * L, *sizes, **constants,
        POSITION=position is not None, TOKENS=len(tokens) > 0,
        TILE_M=at.m, TILE_D=at.n, TILE_K=at.k, num_warps=at.warps, num_stages=at.stages,
    )  # fmt: skip
    return out


@embed.register_fake
def _(log_mel, weight, bias, stride_t, stride_f, position, tokens, place):
    return log_mel.new_empty(_shape(log_mel, weight, stride_t, stride_f, tokens), dtype=_type(log_mel, position))


@torch.library.custom_op("fftp::patch_embed_weight_gradient", mutates_args=())
def weight_gradient(
    grad: torch.Tensor, log_mel: torch.Tensor, weight: torch.Tensor, stride_t: int, stride_f: int, c: int, place: int
) -> torch.Tensor:
    """The gradient of weight, in its type, from the output's `[B, N + c, D]`; partial sums are added in a fixed order."""
    grad, log_mel = grad.contiguous(), log_mel.contiguous()
    B, L, D = grad.shape
    K, rows = weight[0].numel(), B * (L - c)
    if not rows:
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    at = _tile("weight", log_mel)
    parts = kernel.splits(at, D, K) if at is not kernel.INTERPRETED else 3
    per_split = triton.cdiv(triton.cdiv(rows, parts), at.k) * at.k
    partial = torch.empty(parts, D, K, dtype=torch.float32, device=grad.device)
    sizes, constants = _launch(log_mel, weight, stride_t, stride_f, c, place)
    kernel._weight_kernel[(triton.cdiv(D, at.m) * triton.cdiv(K, at.n), parts)](
        grad, log_mel, partial,
        rows, per_split, *sizes, **constants,
        TILE_D=at.m, TILE_K=at.n, TILE_R=at.k, num_warps=at.warps, num_stages=at.stages,
    )  # fmt: skip
    return partial.sum(0).to(weight.dtype).view(weight.shape)


@weight_gradient.register_fake
def _(grad, log_mel, weight, stride_t, stride_f, c, place):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.custom_op("fftp::patch_embed_log_mel_gradient", mutates_args=())
def log_mel_gradient(
    grad: torch.Tensor, log_mel: torch.Tensor, weight: torch.Tensor, stride_t: int, stride_f: int, c: int, place: int
) -> torch.Tensor:
    """The gradient of log_mel, in its type, from the output's `[B, N + c, D]`: each cell gathers the windows over it."""
    grad, flat = grad.contiguous(), weight.contiguous()
    B, T, F = log_mel.shape
    out = torch.empty(B, T, F, dtype=log_mel.dtype, device=grad.device)
    if not out.numel():
        return out
    at = _tile("log_mel", log_mel)
    bins = kernel.bins_of_tile(at, F, weight.shape[3])
    sizes, constants = _launch(log_mel, weight, stride_t, stride_f, c, place)
    grid = (triton.cdiv(B * triton.cdiv(T, stride_t), at.m), stride_t, triton.cdiv(F, bins))
    kernel._log_mel_kernel[grid](
        grad, flat, out,
        *sizes, B, **constants,
        TILE_M=at.m, TILE_F=bins, TILE_D=at.k, num_warps=at.warps, num_stages=at.stages,
    )  # fmt: skip
    return out


@log_mel_gradient.register_fake
def _(grad, log_mel, weight, stride_t, stride_f, c, place):
    return torch.empty_like(log_mel, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    log_mel, weight, bias, stride_t, stride_f, position, tokens, place = inputs
    ctx.save_for_backward(log_mel, weight)
    ctx.stride, ctx.place, ctx.c = (stride_t, stride_f), place, len(tokens)
    ctx.types = bias.dtype, None if position is None else position.dtype, tokens.dtype


def _backward(ctx, grad):
    log_mel, weight = ctx.saved_tensors
    needs, (of_bias, of_position, of_tokens) = ctx.needs_input_grad, ctx.types
    c, place = ctx.c, ctx.place
    d_log_mel = d_weight = d_bias = d_position = d_tokens = None
    if needs[0]:
        d_log_mel = log_mel_gradient(grad, log_mel, weight, *ctx.stride, c, place)
    if needs[1]:
        d_weight = weight_gradient(grad, log_mel, weight, *ctx.stride, c, place)
    if needs[2] or needs[5] or needs[6]:
        rows = grad.sum(0, dtype=torch.float32)  # (N + c, D): the batch is added up once for all three
        d_position = torch.cat([rows[:place], rows[place + c :]])
        d_bias, d_tokens = d_position.sum(0).to(of_bias), rows[place : place + c].to(of_tokens)
        d_position = None if of_position is None else d_position.to(of_position)
    return d_log_mel, d_weight, d_bias, None, None, d_position, d_tokens, None


embed.register_autograd(_backward, setup_context=_save)


def _shape(log_mel, weight, stride_t, stride_f, tokens):
    B, T, F = log_mel.shape
    D, _, pt, pf = weight.shape
    return B, ((T - pt) // stride_t + 1) * ((F - pf) // stride_f + 1) + tokens.shape[0], D


def _type(log_mel, position):
    """The reference's: adding positions widens the product's type."""
    return log_mel.dtype if position is None else torch.promote_types(log_mel.dtype, position.dtype)


def _tile(operation, log_mel) -> Tile:
    if knobs.runtime.interpret:
        return kernel.INTERPRETED
    # Between the three it is the older one's; sm_120, say, has less shared memory than sm_100: the smallest tiles.
    major = torch.cuda.get_device_capability(log_mel.device)[0]
    return kernel.tile(operation, {9: "sm_90", 10: "sm_100"}.get(major, "sm_80"), log_mel.dtype)


def _launch(log_mel, weight, stride_t, stride_f, c, place):
    """What the three kernels take: sizes in order, and constants by name."""
    B, T, F = log_mel.shape
    D, _, pt, pf = weight.shape
    n_t = (T - pt) // stride_t + 1
    N = n_t * ((F - pf) // stride_f + 1)
    if B * max(N + c, T) > MOST_ROWS:
        raise ValueError(
            f"a launch takes {MOST_ROWS} rows of output and of log-mel at most, "
            f"got B={B} clips of {N + c} tokens and {T} frames: split the batch"
        )
    constants = {"K": pt * pf, "F": F, "PF": pf, "ST": stride_t, "SF": stride_f}
    interpreted = {"UPCAST": knobs.runtime.interpret, "PRECISION": kernel.precision(log_mel.dtype)}
    return (T, N, n_t, D, c, place), constants | interpreted
