"""The wave stage in Triton: sums of the samples, then gather, gain, means, mixup and zeros in one pass.

Samples are 16-bit integers, so that their sums are exact in 64 bits, in any order: every mean follows from three such
sums, and a row depends on its own clips alone. No gradients: samples carry none. Tested in the interpreter, compiled
ahead of time (bench/compile.py), and run on an H200 (LOG.md).
"""

import torch
import triton
import triton.language as tl

from kernels.waveform import reference

_SCALE = tl.constexpr(reference.SCALE)
CHUNK, WARPS = 4096, 8  # samples of a clip that one program takes (their sum fits 32 bits), and its warps; not measured
BLOCK_CHUNKS = 64  # sums that are added at a time
MOST_PROGRAMS = 2**31 - 1  # of a launch


@triton.jit
def _samples(samples_ptr, start_ptr, b, i, n):
    """samples[start[b] + i] before the end of the clip, then 0; int32 in the shape of i."""
    return tl.load(samples_ptr + (tl.load(start_ptr + b) + i), mask=i < n, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["W", "chunks"])
def _sums_kernel(
    samples_ptr, start_ptr, length_ptr, other_start_ptr, other_length_ptr, sums_ptr,
    W, chunks,
    PARTNER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """sums[b, :, c] = sums over chunk c of the clip, of its partner, and of the partner as far as the clip goes.

    Traffic: W samples read for each clip and partner, 3 sums written for each chunk. Exact: the samples are integers.
    """
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    i = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    n = tl.minimum(tl.load(length_ptr + b), W)
    at = sums_ptr + b * 3 * chunks + chunk
    tl.store(at, tl.sum(_samples(samples_ptr, start_ptr, b, i, n), 0).to(tl.int64))
    if PARTNER:
        m = tl.minimum(tl.load(other_length_ptr + b), W)
        other = _samples(samples_ptr, other_start_ptr, b, i, m)
        tl.store(at + chunks, tl.sum(other, 0).to(tl.int64))
        tl.store(at + 2 * chunks, tl.sum(tl.where(i < n, other, 0), 0).to(tl.int64))


@triton.jit
def _total(sums_ptr, chunks, BLOCK: tl.constexpr):
    """The sum over a clip's chunks, in -1..1 times samples: float64, exact below 2^53."""
    total = tl.zeros((BLOCK,), tl.int64)
    c = chunks * 0
    while c < chunks:
        place = c + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + place, mask=place < chunks, other=0)
        c += BLOCK
    return tl.sum(total, 0).to(tl.float64) * _SCALE


@triton.jit(do_not_specialize=["W", "chunks"])
def _waveforms_kernel(
    samples_ptr, start_ptr, length_ptr, gain_ptr, other_start_ptr, other_length_ptr, weight_ptr, sums_ptr, out_ptr,
    W, chunks,
    GAIN: tl.constexpr, PARTNER: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, i] = own - mean before the clip's end, then 0; with a partner w*(own - mean) + (1 - w)*(other - mean) - mean.

    Means are rounded once, from float64: that of the mixture is (w*sum(own - mean) + (1 - w)*sum(other - mean)) / n, each
    sum over the clip's n samples and from exact sums of integers. Traffic: W samples read for each clip and partner,
    and a few sums for each program; B*W writes. Source: reference.py.
    """
    b = (tl.program_id(0) // chunks).to(tl.int64)
    i = (tl.program_id(0) % chunks).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    n = tl.minimum(tl.load(length_ptr + b), W)
    count = tl.maximum(n, 1).to(tl.float64)
    total = _total(sums_ptr + b * 3 * chunks, chunks, BLOCK)
    own = _samples(samples_ptr, start_ptr, b, i, n).to(tl.float32) * _SCALE
    if GAIN:
        gain = tl.load(gain_ptr + b)
        own *= gain
        total *= gain.to(tl.float64)
    mean = (total / count).to(tl.float32)
    own -= mean
    if PARTNER:
        weight = tl.load(weight_ptr + b)
        rest = 1.0 - weight
        m = tl.minimum(tl.load(other_length_ptr + b), W)
        other = _samples(samples_ptr, other_start_ptr, b, i, m).to(tl.float32) * _SCALE
        other_total = _total(sums_ptr + (b * 3 + 1) * chunks, chunks, BLOCK)
        other_mean = (other_total / tl.maximum(m, 1).to(tl.float64)).to(tl.float32)
        shared = _total(sums_ptr + (b * 3 + 2) * chunks, chunks, BLOCK)
        # What is left of each clip's sum when its rounded mean is off every sample.
        left = total - mean.to(tl.float64) * n.to(tl.float64)
        other_left = shared - other_mean.to(tl.float64) * tl.minimum(n, m).to(tl.float64)
        of_mixture = (weight.to(tl.float64) * left + rest.to(tl.float64) * other_left) / count
        mixture = weight * own + rest * tl.where(i < m, other - other_mean, 0.0) - of_mixture.to(tl.float32)
        own = tl.where(weight == 1.0, own, mixture)
    tl.store(out_ptr + b * W + i, tl.where(i < n, own, 0.0), mask=i < W)


def waveforms(samples, start, length, W, gain, partner):
    """As `reference.waveforms`."""
    other_start, other_length, weight = (None, None, None) if partner is None else partner
    return gathered(samples, start, length, W, gain, other_start, other_length, weight)


@torch.library.custom_op("fftp::waveforms", mutates_args=())
def gathered(
    samples: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    W: int,
    gain: torch.Tensor | None,
    other_start: torch.Tensor | None,
    other_length: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    """Clips of a pack, float32 `[B, W]`, as `reference.waveforms`; the last three are given together."""
    B, chunks = start.numel(), triton.cdiv(W, CHUNK)
    out = torch.empty(B, W, dtype=torch.float32, device=samples.device)
    if not B:
        return out
    if B * chunks > MOST_PROGRAMS:
        raise ValueError(f"a launch takes {MOST_PROGRAMS} chunks of {CHUNK} samples at most, got {B * chunks}")
    sums = torch.empty(B, 3, chunks, dtype=torch.int64, device=samples.device)
    samples, start, length = samples.contiguous(), start.contiguous(), length.contiguous()
    mixed = other_start is not None
    other = (start, length) if not mixed else (other_start.contiguous(), other_length.contiguous())
    _sums_kernel[(B * chunks,)](
        samples, start, length, *other, sums,
        W, chunks,
        PARTNER=mixed, CHUNK=CHUNK, num_warps=WARPS,
    )  # fmt: skip
    _waveforms_kernel[(B * chunks,)](
        samples, start, length, out if gain is None else gain.contiguous(),
        *other, weight.contiguous() if mixed else out, sums, out,
        W, chunks,
        GAIN=gain is not None, PARTNER=mixed, CHUNK=CHUNK, BLOCK=BLOCK_CHUNKS, num_warps=WARPS,
    )  # fmt: skip
    return out


@gathered.register_fake
def _(samples, start, length, W, gain, other_start, other_length, weight):
    return samples.new_empty(start.numel(), W, dtype=torch.float32)
