"""Patch embedding in Triton: one matrix product over overlapping windows, written straight into the encoder's input.

No window is ever copied: row n of the product's left side is read where it lies in the log-mel. A row of the product is
a row of the output, class tokens included, so that every store is contiguous. docs/INTERNALS.md has the drawing.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, kw_only=True)
class Tile:
    """How a product of [m, k] and [k, n] is cut: the tile, warps for it, and loads in flight. Timed on an H200 (LOG.md): those
    of sm_90 for 16 bits, but for log_mel and scattered masks."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# (operation, architecture, bytes of an element) -> tile. Chosen for no spills and the matrix units (bench/compile.py).
TILES = {
    ("forward", "sm_80", 2): Tile(m=128, n=128, k=64, warps=8, stages=3),
    ("forward", "sm_80", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("forward", "sm_90", 2): Tile(m=128, n=256, k=64, warps=8, stages=3),
    ("forward", "sm_90", 4): Tile(m=128, n=64, k=32, warps=8, stages=3),
    ("forward", "sm_100", 2): Tile(m=128, n=128, k=64, warps=8, stages=3),
    ("forward", "sm_100", 4): Tile(m=128, n=64, k=32, warps=8, stages=3),
    # Square patches: an address for each element, which on sm_80 takes the registers of half a tile.
    ("forward_square", "sm_80", 2): Tile(m=64, n=128, k=64, warps=8, stages=3),
    ("forward_square", "sm_80", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("forward_square", "sm_90", 2): Tile(m=128, n=256, k=32, warps=8, stages=4),
    ("forward_square", "sm_90", 4): Tile(m=128, n=64, k=32, warps=8, stages=3),
    ("forward_square", "sm_100", 2): Tile(m=128, n=128, k=64, warps=8, stages=3),
    ("forward_square", "sm_100", 4): Tile(m=128, n=64, k=32, warps=8, stages=3),
    # With words of the bit plane. Triton 3.6 gives eight warps of sm_100 128 registers each, too few here.
    ("forward_hidden", "sm_80", 2): Tile(m=128, n=128, k=64, warps=8, stages=3),
    ("forward_hidden", "sm_80", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("forward_hidden", "sm_90", 2): Tile(m=64, n=256, k=64, warps=8, stages=3),
    ("forward_hidden", "sm_90", 4): Tile(m=128, n=64, k=32, warps=8, stages=3),
    ("forward_hidden", "sm_100", 2): Tile(m=128, n=128, k=64, warps=4, stages=3),
    ("forward_hidden", "sm_100", 4): Tile(m=128, n=64, k=32, warps=8, stages=3),
    # Masks on windows that do not run along the bit plane's words: addresses of single bytes take registers.
    ("forward_scattered", "sm_80", 2): Tile(m=64, n=128, k=64, warps=8, stages=3),
    ("forward_scattered", "sm_80", 4): Tile(m=32, n=64, k=32, warps=4, stages=3),
    ("forward_scattered", "sm_90", 2): Tile(m=64, n=128, k=64, warps=8, stages=3),
    ("forward_scattered", "sm_90", 4): Tile(m=128, n=64, k=32, warps=8, stages=3),
    ("forward_scattered", "sm_100", 2): Tile(m=64, n=128, k=64, warps=8, stages=3),
    ("forward_scattered", "sm_100", 4): Tile(m=128, n=64, k=32, warps=8, stages=3),
    ("weight", "sm_80", 2): Tile(m=64, n=128, k=64, warps=8, stages=3),
    ("weight", "sm_80", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("weight", "sm_90", 2): Tile(m=128, n=128, k=64, warps=8, stages=3),
    ("weight", "sm_90", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("weight", "sm_100", 2): Tile(m=64, n=256, k=64, warps=8, stages=3),
    ("weight", "sm_100", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    # Square patches again: with 64 rows at a time 16-bit gradients that come in float32 spill on sm_90.
    ("weight_square", "sm_80", 2): Tile(m=64, n=128, k=64, warps=8, stages=3),
    ("weight_square", "sm_80", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("weight_square", "sm_90", 2): Tile(m=128, n=128, k=32, warps=8, stages=4),
    ("weight_square", "sm_90", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("weight_square", "sm_100", 2): Tile(m=64, n=256, k=64, warps=8, stages=3),
    ("weight_square", "sm_100", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    # One word of 64 bits a row: 64 columns.
    ("weight_hidden", "sm_80", 2): Tile(m=128, n=64, k=64, warps=8, stages=3),
    ("weight_hidden", "sm_80", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("weight_hidden", "sm_90", 2): Tile(m=128, n=64, k=64, warps=8, stages=3),
    ("weight_hidden", "sm_90", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("weight_hidden", "sm_100", 2): Tile(m=128, n=64, k=64, warps=8, stages=3),
    ("weight_hidden", "sm_100", 4): Tile(m=64, n=64, k=32, warps=8, stages=3),
    ("weight_scattered", "sm_80", 2): Tile(m=64, n=64, k=64, warps=8, stages=3),
    ("weight_scattered", "sm_80", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("weight_scattered", "sm_90", 2): Tile(m=64, n=64, k=64, warps=8, stages=3),
    ("weight_scattered", "sm_90", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("weight_scattered", "sm_100", 2): Tile(m=64, n=64, k=64, warps=8, stages=3),
    ("weight_scattered", "sm_100", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("log_mel", "sm_80", 2): Tile(m=64, n=128, k=64, warps=8, stages=3),
    ("log_mel", "sm_80", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("log_mel", "sm_90", 2): Tile(m=128, n=128, k=64, warps=8, stages=3),
    ("log_mel", "sm_90", 4): Tile(m=64, n=64, k=32, warps=4, stages=3),
    ("log_mel", "sm_100", 2): Tile(m=128, n=128, k=32, warps=8, stages=3),
    ("log_mel", "sm_100", 4): Tile(m=64, n=64, k=32, warps=8, stages=3),
}
INTERPRETED = Tile(m=32, n=32, k=64, warps=1, stages=1)  # small, so that small shapes have edges
JOINED_ROWS, JOINED_COLUMNS, JOIN_WARPS = 16, 128, 4  # what a program adds up where the sum over K is cut; not measured
FRAMES_OF_BITS, BITS_WARPS = 64, 4  # frames of the bit plane to a program; not measured
# Whether these are 1 or multiples of 16 would be compiled in, and an epoch's last batch would wait for a compiler.
_SIZES = ["rows", "per_split", "T", "N", "n_t", "c", "place", "B", "M"]
PROGRAMS = 132  # at least as many for a weight gradient: an H100's or H200's multiprocessors


def tile(operation: str, arch: str, dtype: torch.dtype) -> Tile:
    """The table's tile for an architecture and a type."""
    return TILES[operation, arch, dtype.itemsize]


def operation(name: str, masked: bool, F: int, pf: int) -> str:
    """What the table calls a forward pass, or a gradient, with or without masks."""
    if name == "log_mel":
        return name
    if not masked:
        return f"{name}_square" if pf != F else name
    return f"{name}_scattered" if pf != F or F % 64 else f"{name}_hidden"


def forward_parts(K: int, N: int) -> int:
    """Into how many parts the output's sums over K are cut. Never a matter of the batch: the bits depend on it.

    Where a clip's patches fill one tile at most, whole tiles leave multiprocessors idle. A part is 3,072 long or more, so
    that a float32 partial costs at most a quarter of the time of its products (docs/INTERNALS.md).
    """
    return max(1, K // 3072) if N <= 128 else 1


def splits(tile: Tile, D: int, K: int) -> int:
    """Into how many parts the rows of a weight gradient are cut. Never a matter of the batch: the bits depend on it."""
    tiles = triton.cdiv(D, tile.m) * triton.cdiv(K, tile.n)
    return triton.next_power_of_2(triton.cdiv(PROGRAMS, tiles))


def bins_of_tile(tile: Tile, F: int, pf: int) -> int:
    """Mel bins that a tile of the log-mel's gradient covers: few where patches are low, as others would be masked."""
    return tile.n if pf == F else min(tile.n, max(16, triton.next_power_of_2(pf)))


def precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: three products of TensorFloat-32 carry a float32; the 16-bit types need no choice."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


@triton.jit
def _window(b, n, T, n_t, F: tl.constexpr, PF: tl.constexpr, ST: tl.constexpr, SF: tl.constexpr):
    """Where window n of clip b starts, in elements (int64): frame (n mod n_t)*st, bin (n / n_t)*sf."""
    start = b.to(tl.int64) * T * F + (n % n_t).to(tl.int64) * (ST * F)
    if PF != F:  # a full-frequency patch has one band
        start += (n // n_t) * SF
    return start


@triton.jit
def _inside(k, F: tl.constexpr, PF: tl.constexpr):
    """Where element k = tp*pf + fp of a patch lies behind the start of its window: tp*F + fp."""
    if PF == F:
        return k
    return k // PF * F + k % PF


@triton.jit
def _hidden(
    bits_ptr, at, f0, k0, k, is_row,
    K: tl.constexpr, F: tl.constexpr, PF: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """True where element k of a window is hidden; at: the word of its first frame, f0: its first bin, k = k0..k0+TILE-1.

    Full-frequency steps that lie inside one word of 64 bits load one a row; the others load a byte of it an element.
    """
    if PF == F and F % 64 == 0 and 64 % TILE == 0:
        # A step past K, where weights are zero, looks at the last word.
        word = tl.load(bits_ptr + at + tl.minimum(k0, K - 1) // 64, mask=is_row, other=0)
        hidden = (word[:, None] >> (k % 64).to(tl.int64)[None, :]) & 1
    else:
        f = f0[:, None] + (k % PF)[None, :]
        bytes_ptr = bits_ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + at[:, None] * 8  # the lowest comes first
        bytes_ptr += (k // PF * ((F + 63) // 64 * 8))[None, :] + f // 8
        byte = tl.load(bytes_ptr, mask=is_row[:, None] & (k < K)[None, :], other=0)
        hidden = (byte.to(tl.int32) >> (f % 8)) & 1
    return hidden != 0


@triton.jit
def _round(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """x in dtype, to nearest even. UPCAST: by hand for bfloat16, which the interpreter truncates to."""
    if UPCAST and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _emit(
    acc, d, bias_ptr, position_ptr, tokens_ptr, out_ptr, out_row, n, i, is_patch, is_token, D,
    PARTS: tl.constexpr, POSITION: tl.constexpr, TOKENS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A strip of columns d of a tile: + bias + position in patch rows, the token itself in token rows; stored.

    Of several parts each is stored as it is: they are added up first.
    """
    inside = d < D
    if PARTS == 1:
        bias = tl.load(bias_ptr + d, mask=inside, other=0.0)
        acc += bias.to(tl.float32)[None, :]  # before position: that order spills less
        if POSITION:
            at = position_ptr + n.to(tl.int64)[:, None] * D + d[None, :]
            acc += tl.load(at, mask=is_patch[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if TOKENS:
            at = tokens_ptr + i.to(tl.int64)[:, None] * D + d[None, :]
            token = tl.load(at, mask=is_token[:, None] & inside[None, :], other=0.0).to(tl.float32)
            acc = tl.where(is_token[:, None], token, acc)
    at = out_ptr + out_row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, _round(acc, out_ptr.dtype.element_ty, UPCAST), mask=(is_patch | is_token)[:, None] & inside[None, :])


@triton.jit
def _row_of_output(m, rows, N, c, place):
    """What row m = b*(N + c) + l holds: (b, patch number, token number, is it a patch, is it a token)."""
    b, row = m // (N + c), m % (N + c)
    is_token = (row >= place) & (row < place + c) & (m < rows)
    is_patch = (m < rows) & ((row < place) | (row >= place + c))
    n = tl.where(is_patch, tl.where(row < place, row, row - c), 0)
    return b, n, tl.where(is_token, row - place, 0), is_patch, is_token


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    log_mel_ptr, weight_ptr, bias_ptr, position_ptr, tokens_ptr, bits_ptr, fill_ptr, out_ptr,
    rows, T, N, n_t, D, c, place,
    K: tl.constexpr, F: tl.constexpr, PF: tl.constexpr, ST: tl.constexpr, SF: tl.constexpr,
    HIDDEN: tl.constexpr, POSITION: tl.constexpr, TOKENS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BOXES: tl.constexpr, PARTS: tl.constexpr, TILE_M: tl.constexpr, TILE_D: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """out[b, l(n), d] = sum_k x[b, window n, k] weight[d, k] + bias[d] + position[n, d]; out[b, place + i] = tokens[i].

    x is fill[b] where bits say that it is hidden. Of several PARTS of the sum over k each goes to a plane of out of its
    own, bare; `_join_kernel` adds them. BOXES: log_mel_ptr and weight_ptr are tensor descriptors, of the
    windows [B*T/st, K] with strides (st*F, 1) and of the weights; rows are windows then, tokens are stored by the way.
    Traffic in elements: B*T*F + D*K + N*D + c*D reads from memory (the windows' overlap is served by the cache),
    B*(N + c)*D writes; with HIDDEN a word of 64 bits for every 64 cells. Source: reference.py; the paper's section III-A.
    """
    tiles_d = tl.cdiv(D, TILE_D)
    m0 = tl.program_id(0) // tiles_d * TILE_M
    d0 = tl.program_id(0) % tiles_d * TILE_D
    part = tl.program_id(1)
    m = m0 + tl.arange(0, TILE_M)
    if BOXES:
        per_clip = T // ST  # windows from here to the next clip's first; the last ones would reach into it
        b, n = m // per_clip, m % per_clip
        is_patch = (m < rows) & (n < N)
        is_token, i = is_patch & False, n
        out_row = b.to(tl.int64) * (N + c) + n + tl.where(n >= place, c, 0)
    else:
        b, n, i, is_patch, is_token = _row_of_output(m, rows, N, c, place)
        out_row = m.to(tl.int64)
    start = _window(b, n, T, n_t, F, PF, ST, SF)
    d = d0 + tl.arange(0, TILE_D)
    if HIDDEN:
        fill = tl.load(fill_ptr + b, mask=is_patch, other=0.0)[:, None]
        first_word = (b.to(tl.int64) * T + n % n_t * ST) * ((F + 63) // 64)
    # The steps of a part; those past K are masked, and there are none of them where the parts divide K.
    PER_PART: tl.constexpr = (K + PARTS * TILE_K - 1) // (PARTS * TILE_K) * TILE_K
    acc = tl.zeros((TILE_M, TILE_D), tl.float32)
    for step in range(0, PER_PART, TILE_K):
        k0 = part * PER_PART + step
        k = k0 + tl.arange(0, TILE_K)
        if BOXES:
            x = log_mel_ptr.load([m0, k0])
            w = weight_ptr.load([d0, k0]).T
        else:
            patch_mask, weight_mask = is_patch[:, None], (d < D)[None, :]
            if PER_PART * PARTS != K:
                patch_mask, weight_mask = patch_mask & (k < K)[None, :], weight_mask & (k < K)[:, None]
            x = tl.load(log_mel_ptr + start[:, None] + _inside(k, F, PF)[None, :], mask=patch_mask, other=0.0)
            w = tl.load(weight_ptr + d.to(tl.int64)[None, :] * K + k[:, None], mask=weight_mask, other=0.0)
        if HIDDEN:
            x = tl.where(_hidden(bits_ptr, first_word, n // n_t * SF, k0, k, is_patch, K, F, PF, TILE_K), fill, x)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)  # (TILE_M, TILE_K) @ (TILE_K, TILE_D)
    if PARTS > 1:
        out_ptr += part.to(tl.int64) * (rows if not BOXES else rows // per_clip * (N + c)) * D
    # Four strips: the whole tile beside its positions and pointers does not fit the registers.
    STRIP: tl.constexpr = TILE_D // 4
    left, right = acc.reshape(TILE_M, 2, 2 * STRIP).permute(0, 2, 1).split()
    acc0, acc1 = left.reshape(TILE_M, 2, STRIP).permute(0, 2, 1).split()
    acc2, acc3 = right.reshape(TILE_M, 2, STRIP).permute(0, 2, 1).split()
    d = d0 + tl.arange(0, STRIP)
    _emit(
        acc0, d, bias_ptr, position_ptr, tokens_ptr, out_ptr, out_row, n, i, is_patch, is_token, D,
        PARTS, POSITION, TOKENS and not BOXES, UPCAST,
    )  # fmt: skip
    d += STRIP
    _emit(
        acc1, d, bias_ptr, position_ptr, tokens_ptr, out_ptr, out_row, n, i, is_patch, is_token, D,
        PARTS, POSITION, TOKENS and not BOXES, UPCAST,
    )  # fmt: skip
    d += STRIP
    _emit(
        acc2, d, bias_ptr, position_ptr, tokens_ptr, out_ptr, out_row, n, i, is_patch, is_token, D,
        PARTS, POSITION, TOKENS and not BOXES, UPCAST,
    )  # fmt: skip
    d += STRIP
    _emit(
        acc3, d, bias_ptr, position_ptr, tokens_ptr, out_ptr, out_row, n, i, is_patch, is_token, D,
        PARTS, POSITION, TOKENS and not BOXES, UPCAST,
    )  # fmt: skip
    if BOXES and TOKENS and PARTS == 1:
        d = d0 + tl.arange(0, TILE_D)
        clip = tl.cdiv(m0, per_clip)  # the tile that holds a clip's first window stores its tokens
        while clip * per_clip < tl.minimum(m0 + TILE_M, rows):
            number = c * 0
            while number < c:
                token = tl.load(tokens_ptr + number.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
                at = out_ptr + (clip.to(tl.int64) * (N + c) + place + number) * D + d
                tl.store(at, _round(token, out_ptr.dtype.element_ty, UPCAST), mask=d < D)
                number += 1
            clip += 1


@triton.jit(do_not_specialize=_SIZES)
def _join_kernel(
    partial_ptr, bias_ptr, position_ptr, tokens_ptr, out_ptr,
    rows, N, D, c, place,
    PARTS: tl.constexpr, POSITION: tl.constexpr, TOKENS: tl.constexpr, UPCAST: tl.constexpr,
    TILE_M: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """out[b, l(n), d] = partial[0, row, d] + partial[1, row, d] + ... + bias[d] + position[n, d], and the tokens.

    Traffic in elements: PARTS*B*N*D reads in float32, B*(N + c)*D writes. Source: reference.py.
    """
    tiles_d = tl.cdiv(D, TILE_D)
    m = tl.program_id(0) // tiles_d * TILE_M + tl.arange(0, TILE_M)
    d = tl.program_id(0) % tiles_d * TILE_D + tl.arange(0, TILE_D)
    _b, n, i, is_patch, is_token = _row_of_output(m, rows, N, c, place)
    at = partial_ptr + m.to(tl.int64)[:, None] * D + d[None, :]
    acc = tl.zeros((TILE_M, TILE_D), tl.float32)
    for _part in tl.static_range(PARTS):
        acc += tl.load(at, mask=is_patch[:, None] & (d < D)[None, :], other=0.0)
        at += rows.to(tl.int64) * D
    _emit(
        acc, d, bias_ptr, position_ptr, tokens_ptr, out_ptr, m.to(tl.int64), n, i, is_patch, is_token, D,
        1, POSITION, TOKENS, UPCAST,
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _weight_kernel(
    grad_ptr, log_mel_ptr, bits_ptr, fill_ptr, partial_ptr,
    rows, per_split, T, N, n_t, D, c, place,
    K: tl.constexpr, F: tl.constexpr, PF: tl.constexpr, ST: tl.constexpr, SF: tl.constexpr,
    HIDDEN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    TILE_D: tl.constexpr, TILE_K: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    """partial[s, d, k] = sum over the patches r = b*N + n of split s of grad[b, l(n), d] x[b, window n, k].

    x is fill[b] where bits say that it is hidden.
    Traffic in elements: B*N*D + B*T*F reads from memory for each pass (every tile of k reads grad again, every tile of
    d the windows), splits*D*K writes in float32. Source: the derivative of reference.py's product.
    """
    tiles_k = tl.cdiv(K, TILE_K)
    d = tl.program_id(0) // tiles_k * TILE_D + tl.arange(0, TILE_D)
    k0 = tl.program_id(0) % tiles_k * TILE_K
    k = k0 + tl.arange(0, TILE_K)
    split = tl.program_id(1)
    inside = _inside(k, F, PF)
    acc = tl.zeros((TILE_D, TILE_K), tl.float32)
    for r0 in range(split * per_split, tl.minimum((split + 1) * per_split, rows), TILE_R):
        r = r0 + tl.arange(0, TILE_R)  # per_split is a multiple of TILE_R, so only `rows` cuts a tile
        b, n = r // N, r % N
        out_row = b.to(tl.int64) * (N + c) + n + tl.where(n >= place, c, 0)
        grad = tl.load(
            grad_ptr + out_row[:, None] * D + d[None, :], mask=(r < rows)[:, None] & (d < D)[None, :], other=0.0
        )
        x = tl.load(
            log_mel_ptr + _window(b, n, T, n_t, F, PF, ST, SF)[:, None] + inside[None, :],
            mask=(r < rows)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        if HIDDEN:
            word = (b.to(tl.int64) * T + n % n_t * ST) * ((F + 63) // 64)
            fill = tl.load(fill_ptr + b, mask=r < rows, other=0.0)[:, None]
            x = tl.where(_hidden(bits_ptr, word, n // n_t * SF, k0, k, r < rows, K, F, PF, TILE_K), fill, x)
        if UPCAST:
            grad, x = grad.to(tl.float32), x.to(tl.float32)
        else:
            grad = grad.to(x.dtype)  # under autocast the output, and so its gradient, is wider than the product
        acc = tl.dot(tl.trans(grad), x, acc, input_precision=PRECISION)  # (TILE_D, TILE_R) @ (TILE_R, TILE_K)
    at = partial_ptr + split.to(tl.int64) * D * K + d.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(at, acc, mask=(d < D)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _log_mel_kernel(
    grad_ptr, weight_ptr, bits_ptr, out_ptr,
    T, N, n_t, D, c, place,
    B,
    K: tl.constexpr, F: tl.constexpr, PF: tl.constexpr, ST: tl.constexpr, SF: tl.constexpr,
    HIDDEN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_F: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """out[b, j*st + r, f] = sum over bands, i and d of grad[b, l(band, j - i), d] weight[d, r + i*st, f - band*sf].

    A gather: frame t = j*st + r lies in the windows that start i strides before j, so that a program keeps r and takes
    rows (b, j). Every cell adds its windows in the same order, and none is written twice; a hidden cell's gradient is 0.
    Traffic in elements: B*N*D + D*K reads from memory, B*T*F writes. Source: the derivative of reference.py's product.
    """
    J = tl.cdiv(T, ST)
    m = tl.program_id(0) // ST * TILE_M + tl.arange(0, TILE_M)
    r = tl.program_id(0) % ST  # neighbours share their rows of grad
    f0 = tl.program_id(1) * TILE_F
    f = f0 + tl.arange(0, TILE_F)
    b, j = m // J, m % J
    t = j * ST + r
    is_cell = (b < B) & (t < T)
    windows = tl.maximum(K // PF - r + ST - 1, 0) // ST  # i with r + i*st < pt
    first = tl.maximum(f0 - PF + SF, 0) // SF  # the bands that reach into these bins
    last = tl.minimum((f0 + TILE_F - 1) // SF, N // n_t - 1)
    tiles_d = tl.cdiv(D, TILE_D)
    acc = tl.zeros((TILE_M, TILE_F), tl.float32)
    for step in range(0, tl.maximum(last - first + 1, 0) * windows * tiles_d):
        d = step % tiles_d * TILE_D + tl.arange(0, TILE_D)
        i = step // tiles_d % windows
        band = first + step // (tiles_d * windows)
        is_window = is_cell & (j >= i) & (j - i < n_t)
        n = band * n_t + j - i
        out_row = b.to(tl.int64) * (N + c) + n + tl.where(n >= place, c, 0)
        fp = f - band * SF
        at = grad_ptr + out_row[:, None] * D + d[None, :]
        grad = tl.load(at, mask=is_window[:, None] & (d < D)[None, :], other=0.0)
        at = weight_ptr + d.to(tl.int64)[:, None] * K + ((r + i * ST) * PF + fp)[None, :]
        weight = tl.load(at, mask=(d < D)[:, None] & ((fp >= 0) & (fp < PF) & (f < F))[None, :], other=0.0)
        if UPCAST:
            grad, weight = grad.to(tl.float32), weight.to(tl.float32)
        else:
            grad = grad.to(weight.dtype)
        acc = tl.dot(grad, weight, acc, input_precision=PRECISION)  # (TILE_M, TILE_D) @ (TILE_D, TILE_F)
    cell = b.to(tl.int64) * T + t
    if HIDDEN:
        words = bits_ptr + cell[:, None] * ((F + 63) // 64) + (f // 64)[None, :]
        word = tl.load(words, mask=is_cell[:, None] & (f < F)[None, :], other=0)
        acc = tl.where((word >> (f % 64).to(tl.int64)[None, :]) & 1 != 0, 0.0, acc)
    at = out_ptr + cell[:, None] * F + f[None, :]
    tl.store(at, _round(acc, out_ptr.dtype.element_ty, UPCAST), mask=is_cell[:, None] & (f < F)[None, :])


@triton.jit
def _lowest(n):
    """An int64 with its lowest n bits set, n in 0..64."""
    one = n.to(tl.int64) * 0 + 1
    return tl.where(n < 64, (one << tl.minimum(n, 63).to(tl.int64)) - 1, -1)


@triton.jit(do_not_specialize=_SIZES)
def _bits_kernel(
    rectangles_ptr, bits_ptr,
    T, M,
    WORDS: tl.constexpr, TILE_T: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Bit i of bits[b, t, w] is set where one of clip b's M rectangles covers frame t and bin 64*w + i; they may overlap.

    Traffic: 4*M reads a program, a word for every 64 cells written. Source: spec_mask/reference.py, `covered`.
    """
    blocks = tl.cdiv(T, TILE_T)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * TILE_T + tl.arange(0, TILE_T)
    w = tl.arange(0, TILE_W)
    plane = tl.zeros((TILE_T, TILE_W), tl.int64)
    for m in range(M):
        row_ptr = rectangles_ptr + (b * M + m) * 4
        t0, t1 = tl.load(row_ptr), tl.load(row_ptr + 1)
        low = tl.minimum(tl.maximum(tl.load(row_ptr + 2) - 64 * w, 0), 64)
        high = tl.minimum(tl.maximum(tl.load(row_ptr + 3) - 64 * w, low), 64)
        word = _lowest(high) ^ _lowest(low)
        plane |= tl.where(((t >= t0) & (t < t1))[:, None], word[None, :], 0)
    at = bits_ptr + (b * T + t)[:, None] * WORDS + w[None, :]
    tl.store(at, plane, mask=(t < T)[:, None] & (w < WORDS)[None, :])
