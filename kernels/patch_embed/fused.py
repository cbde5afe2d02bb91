"""The Triton embedding as operators of PyTorch: launches, shapes for tracing, gradients.

Tested in the interpreter and compiled ahead of time (bench/compile.py); earlier forms ran on an H200 (LOG.md).
"""

import torch
import triton
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import dispatch
from kernels.patch_embed import kernel
from kernels.patch_embed.kernel import Tile

MOST_ROWS = 2**30  # rows are counted in int32, and the last tile or part of a sum reaches past the end
MOST_CELLS = 2**31 - 1  # of a patch with the frames it lies in: they are counted in int32, too


def patch_embed(log_mel, weight, bias, stride, position, tokens, place, rectangles=None, fill=None, panels=None):
    """As `reference.patch_embed`; the product takes autocast's type where it is on, and everything is added in float32."""
    return _patch_embed(log_mel, weight, bias, stride, position, tokens, place, rectangles, fill, boxes=False)


def patch_embed_by_descriptor(
    log_mel, weight, bias, stride, position, tokens, place, rectangles=None, fill=None, panels=None
):
    """As `patch_embed`, but the forward pass without masks loads by tensor descriptors where `boxes_fit` the geometry."""
    return _patch_embed(log_mel, weight, bias, stride, position, tokens, place, rectangles, fill, boxes=True)


def _patch_embed(log_mel, weight, bias, stride, position, tokens, place, rectangles, fill, boxes):
    dtype = dispatch.computed_in(log_mel)
    bits = None
    if rectangles is not None:
        # The fill takes its rounding here: the interpreter's own cast to bfloat16 truncates.
        bits, fill = bit_plane(rectangles, *log_mel.shape[1:]), fill.detach().to(dtype)
    return embed(log_mel.to(dtype), weight.to(dtype), bias, *stride, position, tokens, place, bits, fill, boxes)


def boxes_fit(log_mel: torch.Tensor, weight: torch.Tensor, stride_t: int) -> bool:
    """Whether one descriptor reaches every window: full frequency, clips of whole strides, addresses of 16 bytes."""
    _, T, F = log_mel.shape
    whole = weight.shape[3] == F and T % stride_t == 0
    steps = (stride_t * F * log_mel.itemsize, weight[0].numel() * weight.itemsize)
    return whole and not any(number % 16 for number in (*steps, log_mel.data_ptr(), weight.data_ptr()))


@torch.library.custom_op("fftp::patch_embed_bit_plane", mutates_args=())
def bit_plane(rectangles: torch.Tensor, T: int, F: int) -> torch.Tensor:
    """Rectangles int32 `[B, M, 4]` as bits, int64 `[B, T, ceil(F / 64)]`: bit f mod 64 of word f / 64 is set where hidden."""
    B, M, _ = rectangles.shape
    bits = torch.empty(_plane(rectangles, T, F), dtype=torch.int64, device=rectangles.device)
    if B:
        kernel._bits_kernel[(B * triton.cdiv(T, kernel.FRAMES_OF_BITS),)](
            rectangles.contiguous(), bits,
            T, M,
            WORDS=bits.shape[2], TILE_T=kernel.FRAMES_OF_BITS, TILE_W=triton.next_power_of_2(bits.shape[2]),
            num_warps=kernel.BITS_WARPS,
        )  # fmt: skip
    return bits


@bit_plane.register_fake
def _(rectangles, T, F):
    return rectangles.new_empty(_plane(rectangles, T, F), dtype=torch.int64)


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
    bits: torch.Tensor | None,
    fill: torch.Tensor | None,
    boxes: bool,
) -> torch.Tensor:
    """Log-mel `[B, T, F]` and weight `[D, 1, pt, pf]` of one type to `[B, N + c, D]`, as `reference.patch_embed`.

    bits: `bit_plane`'s, with fill `[B]` in log-mel's type, or None; boxes: load by tensor descriptors where they fit.
    """
    log_mel, flat, bias, tokens = log_mel.contiguous(), weight.contiguous(), bias.contiguous(), tokens.contiguous()
    out = torch.empty(
        _shape(log_mel, weight, stride_t, stride_f, tokens), dtype=_type(log_mel, position), device=log_mel.device
    )
    if not out.numel():
        return out
    B, L, D = out.shape
    K, N = weight[0].numel(), L - len(tokens)
    at, parts = _tile("forward", log_mel, weight, bits), kernel.forward_parts(K, N)
    sizes, constants = _launch(log_mel, weight, stride_t, stride_f, len(tokens), place)
    left, right, rows = log_mel, flat, B * L
    # Masked tiles that came by descriptors were wrong on an H200 at some tile sizes (Triton 3.6): these take pointers.
    boxes = boxes and bits is None and boxes_fit(log_mel, flat, stride_t)
    if boxes:
        left, right, rows = _descriptors(log_mel, flat, stride_t, at)
    added = (bias, bias if position is None else position.contiguous(), tokens)
    flags = {"POSITION": position is not None, "TOKENS": len(tokens) > 0}
    target = out if parts == 1 else torch.empty(parts, B, L, D, dtype=torch.float32, device=out.device)
    kernel._forward_kernel[(triton.cdiv(rows, at.m) * triton.cdiv(D, at.n), parts)](
        left, right, *added, *_cover(bits, fill, log_mel), target,
        rows, *sizes, **constants, **flags,
        HIDDEN=bits is not None, PRECISION=kernel.precision(log_mel.dtype), BOXES=boxes, PARTS=parts,
        TILE_M=at.m, TILE_D=at.n, TILE_K=at.k, num_warps=at.warps, num_stages=at.stages,
    )  # fmt: skip
    if parts > 1:
        rows, columns = kernel.JOINED_ROWS, kernel.JOINED_COLUMNS
        kernel._join_kernel[(triton.cdiv(B * L, rows) * triton.cdiv(D, columns),)](
            target, *added, out,
            B * L, N, D, len(tokens), place,
            PARTS=parts, **flags, UPCAST=constants["UPCAST"],
            TILE_M=rows, TILE_D=columns, num_warps=kernel.JOIN_WARPS,
        )  # fmt: skip
    return out


@embed.register_fake
def _(log_mel, weight, bias, stride_t, stride_f, position, tokens, place, bits, fill, boxes):
    return log_mel.new_empty(_shape(log_mel, weight, stride_t, stride_f, tokens), dtype=_type(log_mel, position))


@torch.library.custom_op("fftp::patch_embed_weight_gradient", mutates_args=())
def weight_gradient(
    grad: torch.Tensor,
    log_mel: torch.Tensor,
    weight: torch.Tensor,
    stride_t: int,
    stride_f: int,
    c: int,
    place: int,
    bits: torch.Tensor | None,
    fill: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of weight, in its type, from the output's `[B, N + c, D]`; partial sums are added in a fixed order."""
    grad, log_mel = grad.contiguous(), log_mel.contiguous()
    B, L, D = grad.shape
    K, rows = weight[0].numel(), B * (L - c)
    if not rows:
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    at = _tile("weight", log_mel, weight, bits)
    parts = kernel.splits(at, D, K) if at is not kernel.INTERPRETED else 3
    per_split = triton.cdiv(triton.cdiv(rows, parts), at.k) * at.k
    partial = torch.empty(parts, D, K, dtype=torch.float32, device=grad.device)
    sizes, constants = _launch(log_mel, weight, stride_t, stride_f, c, place)
    kernel._weight_kernel[(triton.cdiv(D, at.m) * triton.cdiv(K, at.n), parts)](
        grad, log_mel, *_cover(bits, fill, log_mel), partial,
        rows, per_split, *sizes, **constants, HIDDEN=bits is not None, PRECISION=kernel.precision(log_mel.dtype),
        TILE_D=at.m, TILE_K=at.n, TILE_R=at.k, num_warps=at.warps, num_stages=at.stages,
    )  # fmt: skip
    return partial.sum(0).to(weight.dtype).view(weight.shape)


@weight_gradient.register_fake
def _(grad, log_mel, weight, stride_t, stride_f, c, place, bits, fill):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.custom_op("fftp::patch_embed_log_mel_gradient", mutates_args=())
def log_mel_gradient(
    grad: torch.Tensor,
    log_mel: torch.Tensor,
    weight: torch.Tensor,
    stride_t: int,
    stride_f: int,
    c: int,
    place: int,
    bits: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of log_mel, in its type, from the output's `[B, N + c, D]`: each cell gathers the windows over it."""
    grad, flat = grad.contiguous(), weight.contiguous()
    B, T, F = log_mel.shape
    out = torch.empty(B, T, F, dtype=log_mel.dtype, device=grad.device)
    if not out.numel():
        return out
    at = _tile("log_mel", log_mel, weight, bits)
    bins = kernel.bins_of_tile(at, F, weight.shape[3])
    sizes, constants = _launch(log_mel, weight, stride_t, stride_f, c, place)
    grid = (triton.cdiv(B * triton.cdiv(T, stride_t), at.m) * stride_t, triton.cdiv(F, bins))
    kernel._log_mel_kernel[grid](
        grad, flat, grad if bits is None else bits, out,
        *sizes, B, **constants, HIDDEN=bits is not None, PRECISION=kernel.precision(log_mel.dtype),
        TILE_M=at.m, TILE_F=bins, TILE_D=at.k, num_warps=at.warps, num_stages=at.stages,
    )  # fmt: skip
    return out


@log_mel_gradient.register_fake
def _(grad, log_mel, weight, stride_t, stride_f, c, place, bits):
    return torch.empty_like(log_mel, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    log_mel, weight, bias, stride_t, stride_f, position, tokens, place, bits, fill, _ = inputs
    ctx.save_for_backward(log_mel, weight, bits, fill)
    ctx.stride, ctx.place, ctx.c = (stride_t, stride_f), place, len(tokens)
    ctx.types = bias.dtype, None if position is None else position.dtype, tokens.dtype


def _backward(ctx, grad):
    log_mel, weight, bits, fill = ctx.saved_tensors
    needs, (of_bias, of_position, of_tokens) = ctx.needs_input_grad, ctx.types
    c, place = ctx.c, ctx.place
    d_log_mel = d_weight = d_bias = d_position = d_tokens = None
    if needs[0]:
        d_log_mel = log_mel_gradient(grad, log_mel, weight, *ctx.stride, c, place, bits)
    if needs[1]:
        d_weight = weight_gradient(grad, log_mel, weight, *ctx.stride, c, place, bits, fill)
    if needs[2] or needs[5] or needs[6]:
        rows = grad.sum(0, dtype=torch.float32)  # (N + c, D): the batch is added up once for all three
        d_position = torch.cat([rows[:place], rows[place + c :]])
        d_bias, d_tokens = d_position.sum(0).to(of_bias), rows[place : place + c].to(of_tokens)
        d_position = None if of_position is None else d_position.to(of_position)
    return d_log_mel, d_weight, d_bias, None, None, d_position, d_tokens, None, None, None, None


embed.register_autograd(_backward, setup_context=_save)


def _shape(log_mel, weight, stride_t, stride_f, tokens):
    B, T, F = log_mel.shape
    D, _, pt, pf = weight.shape
    return B, ((T - pt) // stride_t + 1) * ((F - pf) // stride_f + 1) + tokens.shape[0], D


def _type(log_mel, position):
    """The reference's: adding positions widens the product's type."""
    return log_mel.dtype if position is None else torch.promote_types(log_mel.dtype, position.dtype)


def _plane(rectangles, T, F):
    return rectangles.shape[0], T, -(-F // 64)


def _cover(bits, fill, unused):
    """Bits and fill for a launch; a tensor that is never touched where nothing is hidden."""
    return (unused, unused) if bits is None else (bits, fill.contiguous())


def _descriptors(log_mel, weight, stride_t, at):
    """Of all windows, clip after clip, rows that overlap; of the weights; and how many rows there are."""
    (B, T, F), (D, K) = log_mel.shape, weight.flatten(1).shape
    windows = [(B * T - K // F) // stride_t + 1, K]
    left = TensorDescriptor(log_mel, windows, [stride_t * F, 1], [at.m, at.k])
    return left, TensorDescriptor(weight, [D, K], [K, 1], [at.n, at.k]), B * (T // stride_t)


def _tile(name, log_mel, weight, bits) -> Tile:
    operation = kernel.operation(name, bits is not None, log_mel.shape[2], weight.shape[3])
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
    if pt * max(F, 8) > MOST_CELLS:  # a frame of the bit plane has 8 bytes at least
        raise ValueError(f"a patch reaches over {MOST_CELLS} cells at most, got {pt} frames of {F} bins")
    constants = {"K": pt * pf, "F": F, "PF": pf, "ST": stride_t, "SF": stride_f, "UPCAST": knobs.runtime.interpret}
    return (T, N, n_t, D, c, place), constants
