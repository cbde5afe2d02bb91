"""SpecMask and SpecAugment in Triton: one program draws a sample's rectangles, and paints them where it is asked to.

The same words of Philox, the same decisions and the same results, bit for bit, as `reference.py`; docs/INTERNALS.md
explains the kernels to someone who has never seen Triton. Seed, epoch and tickets are read from device memory, so that
a CUDA graph draws anew at each replay, and nothing here waits for the device.
"""

import torch
import triton
import triton.language as tl

from kernels import philox as keyed

_MASK = tl.constexpr(keyed.SPEC_MASK << 16)
_AUGMENT = tl.constexpr(keyed.SPEC_AUGMENT << 16)
TILE_T, TILE_F = 16, 128  # frames and bins painted by one store; not measured on a GPU
WARPS = 8  # four spill in Triton 3.6; not measured on a GPU

# Settings vary from test to test and take 1 as a value, which Triton would compile in: it gets one kernel instead.
_SETTINGS = ["T", "F", "budget", "max_width", "max_height", "full_threshold", "shapes", "attempts", "snap"]
_LAYOUT = ["stride_b", "stride_t", "stride_f"]


@triton.jit
def _below(word, n):
    """word * n / 2^32, rounded down: a uniform integer in 0..n-1; int32 in the shape of word."""
    return tl.umulhi(word, (word * 0) + n.to(tl.uint32)).to(tl.int32)


@triton.jit
def _paint_one(clip_ptr, row_ptr, value, T, F, stride_t, stride_f, TILE_T: tl.constexpr, TILE_F: tl.constexpr):
    """clip[t0:t1, f0:f1] = value for the rectangle at row_ptr, cut to T x F.

    Traffic: 4 reads, (t1 - t0)*(f1 - f0) writes; no cell is read.
    """
    t0 = tl.maximum(tl.load(row_ptr), 0)
    t1 = tl.minimum(tl.load(row_ptr + 1), T)
    f0 = tl.maximum(tl.load(row_ptr + 2), 0)
    f1 = tl.minimum(tl.load(row_ptr + 3), F)
    t1 = tl.where(f0 < f1, t1, t0)  # nothing high takes no time
    t = t0
    while t < t1:
        frames = t + tl.arange(0, TILE_T)
        f = f0
        while f < f1:
            bins = f + tl.arange(0, TILE_F)
            cells = clip_ptr + frames.to(tl.int64)[:, None] * stride_t + bins.to(tl.int64)[None, :] * stride_f
            inside = (frames < t1)[:, None] & (bins < f1)[None, :]
            tl.store(cells, value, mask=inside)
            f += TILE_F
        t += TILE_T


@triton.jit(do_not_specialize=_SETTINGS + _LAYOUT)
def _spec_mask_kernel(
    seed_ptr, epoch_ptr, tickets_ptr, rectangles_ptr, count_ptr, area_ptr, log_mel_ptr, fill_ptr,
    stride_b, stride_t, stride_f,
    T, F, budget, max_width, max_height, full_threshold, shapes, attempts, snap,
    CLIP: tl.constexpr, PAINT: tl.constexpr, LANES: tl.constexpr, TILE_T: tl.constexpr, TILE_F: tl.constexpr,
):  # fmt: skip
    """Algorithm 1 of the paper for one sample (source: reference.py).

    Shape by shape, while the area is below the budget: size from words (a, b, c) of attempt 0; places from words (x, y)
    of attempts 1..attempts, a lane of the vector each; the lowest lane that overlaps no accepted rectangle wins.
    Traffic: 3 reads, 4*shapes + 2 writes, 4 reads for each pair of a shape and an earlier rectangle; with PAINT
    the area in writes. The accepted rectangles are walked one by one: a table of lanes x rectangles spills.
    """
    b = tl.program_id(0).to(tl.int64)
    seed = tl.load(seed_ptr)
    epoch = tl.load(epoch_ptr).to(tl.uint32)
    ticket = tl.load(tickets_ptr + b).to(tl.uint32)
    rows_ptr = rectangles_ptr + b * shapes * 4
    lane = tl.arange(0, LANES)
    none = lane.to(tl.uint32) * 0
    tries = none + _MASK + 1 + lane.to(tl.uint32)
    zero = ticket * 0
    area = zero.to(tl.int64)
    shape, count = zero.to(tl.int32), zero.to(tl.int32)
    while (area < budget) & (shape < shapes):
        number = shape.to(tl.uint32)
        tall, low, wide, _ = tl.philox(seed, zero + _MASK, number, epoch, ticket)
        full = tall.to(tl.int64) < full_threshold  # in 64 bits: the threshold of probability 1 is 2^32
        height = tl.where(full, F, 1 + _below(low, max_height))
        width = 1 + _below(wide, max_width)
        if CLIP:  # the last rectangle ends on the first column that reaches the budget
            columns = tl.maximum(budget - area + height - 1, 1) // height
            width = tl.maximum(tl.minimum(width.to(tl.int64), columns), 1).to(tl.int32)
        width = tl.minimum((width + snap - 1) // snap * snap, T)
        x, y, _, _ = tl.philox(seed, tries, none + number, none + epoch, none + ticket)
        t0 = _below(x, (T - width) // snap + 1) * snap
        f0 = _below(y, F - height + 1)
        free = lane < attempts
        other = count * 0
        while other < count:
            row_ptr = rows_ptr + other * 4
            s0, s1 = tl.load(row_ptr), tl.load(row_ptr + 1)
            g0, g1 = tl.load(row_ptr + 2), tl.load(row_ptr + 3)
            free = free & ((t0 >= s1) | (t0 + width <= s0) | (f0 >= g1) | (f0 + height <= g0))
            other += 1
        first = tl.min(tl.where(free, lane, LANES), 0)
        if first < LANES:
            start = tl.sum(tl.where(lane == first, t0, 0), 0)
            bottom = tl.sum(tl.where(lane == first, f0, 0), 0)
            row_ptr = rows_ptr + count * 4
            tl.store(row_ptr, start)
            tl.store(row_ptr + 1, start + width)
            tl.store(row_ptr + 2, bottom)
            tl.store(row_ptr + 3, bottom + height)
            count += 1
            area += width.to(tl.int64) * height
        tl.debug_barrier()  # the next shape's threads must see this row
        shape += 1
    unused = count * 4
    while unused < shapes * 4:
        tl.store(rows_ptr + unused + lane, lane * 0, mask=unused + lane < shapes * 4)
        unused += LANES
    tl.store(count_ptr + b, count)
    tl.store(area_ptr + b, area.to(tl.int32))
    if PAINT:
        value = tl.load(fill_ptr + b)
        row = count * 0
        while row < count:
            _paint_one(log_mel_ptr + b * stride_b, rows_ptr + row * 4, value, T, F, stride_t, stride_f, TILE_T, TILE_F)
            row += 1


@triton.jit(do_not_specialize=["T", "F", "max_frequency", "max_time", *_LAYOUT])
def _spec_augment_kernel(
    seed_ptr, epoch_ptr, tickets_ptr, rectangles_ptr, count_ptr, area_ptr, log_mel_ptr, fill_ptr,
    stride_b, stride_t, stride_f,
    T, F, max_frequency, max_time,
    PAINT: tl.constexpr, TILE_T: tl.constexpr, TILE_F: tl.constexpr,
):  # fmt: skip
    """One frequency mask and one time mask for one sample: width = u in param, start = s in (axis - width).

    Traffic: 3 reads, 10 writes; with PAINT the two rectangles in writes. Source: reference.py; Park et al., 2019.
    """
    b = tl.program_id(0).to(tl.int64)
    seed = tl.load(seed_ptr)
    epoch = tl.load(epoch_ptr).to(tl.uint32)
    ticket = tl.load(tickets_ptr + b).to(tl.uint32)
    zero = ticket * 0
    u, s, _, _ = tl.philox(seed, zero + _AUGMENT, zero, epoch, ticket)
    bins = _below(u, max_frequency)
    f0 = _below(s, F - bins)
    u, s, _, _ = tl.philox(seed, zero + _AUGMENT + 1, zero, epoch, ticket)
    frames = _below(u, max_time)
    t0 = _below(s, T - frames)
    rows_ptr = rectangles_ptr + b * 8
    tl.store(rows_ptr, f0 * 0)
    tl.store(rows_ptr + 1, f0 * 0 + T)
    tl.store(rows_ptr + 2, f0)
    tl.store(rows_ptr + 3, f0 + bins)
    tl.store(rows_ptr + 4, t0)
    tl.store(rows_ptr + 5, t0 + frames)
    tl.store(rows_ptr + 6, t0 * 0)
    tl.store(rows_ptr + 7, t0 * 0 + F)
    tl.store(count_ptr + b, bins * 0 + 2)
    tl.store(area_ptr + b, bins * T + frames * F)
    if PAINT:
        tl.debug_barrier()  # painting reads the rows back
        clip_ptr = log_mel_ptr + b * stride_b
        value = tl.load(fill_ptr + b)
        _paint_one(clip_ptr, rows_ptr, value, T, F, stride_t, stride_f, TILE_T, TILE_F)
        _paint_one(clip_ptr, rows_ptr + 4, value, T, F, stride_t, stride_f, TILE_T, TILE_F)


@triton.jit(do_not_specialize=["T", "F", "M", *_LAYOUT])
def _paint_kernel(
    log_mel_ptr, rectangles_ptr, fill_ptr,
    stride_b, stride_t, stride_f,
    T, F, M,
    TILE_T: tl.constexpr, TILE_F: tl.constexpr,
):  # fmt: skip
    """log_mel[b, t0:t1, f0:f1] = fill[b] for one rectangle of one sample; an empty one costs its four numbers.

    Traffic: 5 reads, the rectangle in writes. Source: reference.py.
    """
    b = (tl.program_id(0) // M).to(tl.int64)
    row_ptr = rectangles_ptr + tl.program_id(0).to(tl.int64) * 4
    value = tl.load(fill_ptr + b)
    _paint_one(log_mel_ptr + b * stride_b, row_ptr, value, T, F, stride_t, stride_f, TILE_T, TILE_F)


def draw_spec_mask(
    seed, epoch, tickets, T, F, *, budget, max_width, max_height, full_share, shapes, attempts, clip, snap
):
    """As `reference.draw_spec_mask`."""
    threshold = round(full_share * 2**32)
    return draw_spec_mask_op(
        *_keys(seed, epoch, tickets), T, F, budget, max_width, max_height, threshold, shapes, attempts, clip, snap
    )


def apply_spec_mask(
    log_mel, fill, seed, epoch, tickets, *, budget, max_width, max_height, full_share, shapes, attempts, clip, snap
):
    """As `reference.apply_spec_mask`, in one kernel: what draws a clip's rectangles paints them, and reads no cell."""
    threshold, keys = round(full_share * 2**32), _keys(seed, epoch, tickets)
    return apply_spec_mask_op(
        log_mel, fill, *keys, budget, max_width, max_height, threshold, shapes, attempts, clip, snap
    )


def draw_spec_augment(seed, epoch, tickets, T, F, *, max_frequency, max_time):
    """As `reference.draw_spec_augment`."""
    return draw_spec_augment_op(*_keys(seed, epoch, tickets), T, F, max_frequency, max_time)


def apply_spec_augment(log_mel, fill, seed, epoch, tickets, *, max_frequency, max_time):
    """As `reference.apply_spec_augment`, in one kernel."""
    return apply_spec_augment_op(log_mel, fill, *_keys(seed, epoch, tickets), max_frequency, max_time)


def paint(log_mel, rectangles, fill):
    """As `reference.paint`: only the masked cells are touched, and none of them is read."""
    paint_op(log_mel, rectangles, fill)
    return log_mel


# The operators below are what tracing sees: the ones that paint say that they change log_mel in place.


@torch.library.custom_op("fftp::draw_spec_mask", mutates_args=())
def draw_spec_mask_op(
    seed: torch.Tensor,
    epoch: torch.Tensor,
    tickets: torch.Tensor,
    T: int,
    F: int,
    budget: int,
    max_width: int,
    max_height: int,
    full_threshold: int,
    shapes: int,
    attempts: int,
    clip: bool,
    snap: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rectangles int32 `[B, shapes, 4]`, count `[B]`, area `[B]`; full_threshold is a probability times 2^32."""
    settings = (budget, max_width, max_height, full_threshold, shapes, attempts, clip, snap)
    return _launch_spec_mask(seed, epoch, tickets, T, F, *settings)


@torch.library.custom_op("fftp::apply_spec_mask", mutates_args=("log_mel",))
def apply_spec_mask_op(
    log_mel: torch.Tensor,
    fill: torch.Tensor,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    tickets: torch.Tensor,
    budget: int,
    max_width: int,
    max_height: int,
    full_threshold: int,
    shapes: int,
    attempts: int,
    clip: bool,
    snap: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `draw_spec_mask_op`; log_mel `[B, T, F]` is set to fill `[B]` inside the rectangles."""
    settings = (budget, max_width, max_height, full_threshold, shapes, attempts, clip, snap)
    return _launch_spec_mask(seed, epoch, tickets, *log_mel.shape[1:], *settings, log_mel, fill)


@draw_spec_mask_op.register_fake
def _(seed, epoch, tickets, T, F, budget, max_width, max_height, full_threshold, shapes, attempts, clip, snap):
    return _traced(tickets, shapes)


@apply_spec_mask_op.register_fake
def _(
    log_mel, fill, seed, epoch, tickets, budget, max_width, max_height, full_threshold, shapes, attempts, clip, snap
):  # fmt: skip
    return _traced(tickets, shapes)


@torch.library.custom_op("fftp::draw_spec_augment", mutates_args=())
def draw_spec_augment_op(
    seed: torch.Tensor, epoch: torch.Tensor, tickets: torch.Tensor, T: int, F: int, max_frequency: int, max_time: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rectangles int32 `[B, 2, 4]`, count `[B]`, area `[B]`."""
    return _launch_spec_augment(seed, epoch, tickets, T, F, max_frequency, max_time)


@torch.library.custom_op("fftp::apply_spec_augment", mutates_args=("log_mel",))
def apply_spec_augment_op(
    log_mel: torch.Tensor,
    fill: torch.Tensor,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    tickets: torch.Tensor,
    max_frequency: int,
    max_time: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `draw_spec_augment_op`; log_mel `[B, T, F]` is set to fill `[B]` inside the rectangles."""
    return _launch_spec_augment(seed, epoch, tickets, *log_mel.shape[1:], max_frequency, max_time, log_mel, fill)


@draw_spec_augment_op.register_fake
def _(seed, epoch, tickets, T, F, max_frequency, max_time):
    return _traced(tickets, 2)


@apply_spec_augment_op.register_fake
def _(log_mel, fill, seed, epoch, tickets, max_frequency, max_time):
    return _traced(tickets, 2)


@torch.library.custom_op("fftp::paint", mutates_args=("log_mel",))
def paint_op(log_mel: torch.Tensor, rectangles: torch.Tensor, fill: torch.Tensor) -> None:
    """log_mel `[B, T, F]` is set to fill `[B]` inside the rectangles int32 `[B, M, 4]`."""
    B, M, _ = rectangles.shape
    if B * M:
        # The fill takes its rounding here: the interpreter's own cast to bfloat16 truncates.
        _paint_kernel[(B * M,)](
            log_mel, rectangles.contiguous(), fill.to(log_mel.dtype).contiguous(),
            *log_mel.stride(),
            *log_mel.shape[1:], M,
            TILE_T=TILE_T, TILE_F=TILE_F, num_warps=WARPS,
        )  # fmt: skip


@paint_op.register_fake
def _(log_mel, rectangles, fill):
    return None


def _launch_spec_mask(
    seed, epoch, tickets, T, F, budget, max_width, max_height, full_threshold, shapes, attempts, clip, snap,
    log_mel=None, fill=None,
):  # fmt: skip
    B = tickets.numel()
    rectangles, count, area = _outputs(tickets, shapes)
    if B:
        spectrogram, value, strides = _target(log_mel, fill, rectangles)
        _spec_mask_kernel[(B,)](
            seed, epoch, tickets.contiguous(), rectangles, count, area, spectrogram, value,
            *strides,
            T, F, budget, min(max_width, T), min(max_height, F), full_threshold, shapes, attempts, snap,
            CLIP=clip, PAINT=log_mel is not None, LANES=max(triton.next_power_of_2(attempts), 16),
            TILE_T=TILE_T, TILE_F=TILE_F, num_warps=WARPS,
        )  # fmt: skip
    return rectangles, count, area


def _launch_spec_augment(seed, epoch, tickets, T, F, max_frequency, max_time, log_mel=None, fill=None):
    B = tickets.numel()
    rectangles, count, area = _outputs(tickets, 2)
    if B:
        spectrogram, value, strides = _target(log_mel, fill, rectangles)
        _spec_augment_kernel[(B,)](
            seed, epoch, tickets.contiguous(), rectangles, count, area, spectrogram, value,
            *strides,
            T, F, min(max_frequency, F), min(max_time, T),
            PAINT=log_mel is not None, TILE_T=TILE_T, TILE_F=TILE_F, num_warps=WARPS,
        )  # fmt: skip
    return rectangles, count, area


def _keys(seed, epoch, tickets):
    """Seed and epoch as tensors on the tickets' device: those that are there already stay themselves, for graphs."""
    return keyed.on_device(seed, tickets.device), keyed.on_device(epoch, tickets.device), tickets


def _outputs(tickets, M):
    """Rectangles, count and area, not yet written: the kernel writes all of them."""
    like = {"dtype": torch.int32, "device": tickets.device}
    return (
        torch.empty(tickets.numel(), M, 4, **like),
        torch.empty(tickets.numel(), **like),
        torch.empty(tickets.numel(), **like),
    )


def _traced(tickets, M):
    """What `_outputs` makes, for tracing."""
    B = tickets.shape[0]
    return tuple(tickets.new_empty(shape, dtype=torch.int32) for shape in ((B, M, 4), (B,), (B,)))


def _target(log_mel, fill, unused):
    """What is painted, with what, and its strides; a tensor that is never touched where nothing is."""
    if log_mel is None:
        return unused, unused, (0, 0, 0)
    return log_mel, fill.to(log_mel.dtype).contiguous(), log_mel.stride()
