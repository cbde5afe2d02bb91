"""The front end in Triton: waveform to log-mel in one kernel, and normalisation with its noise in another.

The DFT of a frame of n_fft = R * Q samples is split as Cooley and Tukey do it: sample n = Q j + r, bin k = k1 + R k2. The
sum over j is a real FFT of R points, additions in float32 on R tensors that each hold Q values of r; the sum over r is a
product with one small matrix for each k1. docs/INTERNALS.md has the drawing, and the errors of this and of other ways.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels import draws
from kernels import philox as keyed
from kernels.fbank.reference import LOG_FLOOR, FbankSettings, mel_matrix, window

_NOISE = tl.constexpr(keyed.NOISE << 16)
_NOISE_SCALE = tl.constexpr(draws.NOISE_SCALE)
_FLOOR = tl.constexpr(LOG_FLOOR)
POINTS = (64, 2048)  # the shortest and the longest transform; one of 4096 does not fit the registers
PRECISION = "tf32x3"  # of the products: three of TensorFloat-32 carry a float32
CELLS, WARPS = 1024, 4  # cells of a clip that one program normalises, and its warps; not measured on a GPU


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Frames that one program transforms, warps for it, and loads of matrices in flight. None was timed on a GPU."""

    frames: int
    warps: int
    stages: int


def tile(n_fft: int) -> Tile:
    """The same on every architecture: the frames' samples live in registers, of which all have 64 Ki."""
    if n_fft <= 512:
        return Tile(frames=32, warps=8, stages=3)
    return Tile(frames=16 * 1024 // n_fft, warps=8, stages=1)  # more stages would not fit sm_80's shared memory


INTERPRETED = Tile(frames=16, warps=1, stages=1)


def radix(n_fft: int) -> int:
    """R; Q = n_fft / R is 16 at least, as a product of matrices wants it."""
    return 32 if n_fft > 1024 else min(16, n_fft // 16)


def slots(R: int) -> list[int]:
    """k1 of the R / 2 - 1 complex outputs of `_real_fft`, in its order; 0 and R / 2 are real and come last."""
    numbers, N = [], R
    while N >= 4:
        numbers += [(4 * _reversed(m, N // 4) + 1) * (R // N) for m in range(N // 4)]
        N //= 2
    return numbers


def _reversed(m: int, n: int) -> int:
    """m with its log2(n) bits in the opposite order."""
    return int(f"{m:0{n.bit_length() - 1}b}"[::-1], 2) if n > 1 else 0


@lru_cache(maxsize=16)
def tables(settings: FbankSettings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Window `[R * Q]`, matrices `[R / 2, 2, 2 * Q, Q]` and filters `[R / 2, mels, Q]`, float32, rounded once.

    Slot s turns the pair of outputs (re, im) of the real FFT into matrices[s, 0] re + matrices[s, 1] im: the real parts of
    eight bins, their imaginary parts, the next eight bins. The last slot has the two outputs that are real, 0 and R / 2,
    whose spectra are half as long, side by side. The filters' columns are in the bins' order, and the half of a spectrum
    above the Nyquist frequency is the other half mirrored. mels is n_mels, filled up to a power of two.
    """
    n_fft, R = settings.n_fft, radix(settings.n_fft)
    Q = n_fft // R
    r, k2 = torch.arange(Q, dtype=torch.float64), torch.arange(Q)
    matrices, bins = [], []
    for k1 in slots(R):
        k = k1 + R * k2
        angle = 2 * math.pi / n_fft * ((k[:, None] * r) % n_fft)
        matrices.append([angle.cos(), -angle.sin(), angle.sin(), angle.cos()])
        bins.append(torch.minimum(k, n_fft - k))
    half = R * torch.arange(Q // 2)
    k = torch.cat([half, R // 2 + half])
    angle = 2 * math.pi / n_fft * ((k[:, None] * r) % n_fft)
    first = (k2 < Q // 2).double()[:, None]
    matrices.append([part for e in (first, 1 - first) for part in (angle.cos() * e, -angle.sin() * e)])
    bins.append(k)
    taken = torch.stack([torch.stack(m) for m in matrices]).float()  # (R / 2, 4, Q, Q)
    taken = taken.view(R // 2, 2, 2, Q // 8, 8, Q).transpose(2, 3).contiguous().view(R // 2, 2, 2 * Q, Q)
    filters = mel_matrix(settings)[:, torch.stack(bins)].transpose(0, 1)  # (R / 2, n_mels, Q)
    filters = torch.nn.functional.pad(filters, (0, 0, 0, mels(settings.n_mels) - settings.n_mels))
    taper = torch.nn.functional.pad(window(settings, torch.float32), (0, n_fft - settings.frame))
    return taper, taken, filters.contiguous()


def mels(n_mels: int) -> int:
    """Rows of the filters."""
    return max(16, triton.next_power_of_2(n_mels))


def constants(settings: FbankSettings) -> dict[str, object]:
    """What `_fbank_kernel` is compiled with for these settings, the tile apart."""
    R = radix(settings.n_fft)
    cos, sin = turns(R)
    sizes = {"FRAME": settings.frame, "HOP": settings.hop, "F": settings.n_mels, "MELS": mels(settings.n_mels)}
    return sizes | {"R": R, "Q": settings.n_fft // R, "COS": cos, "SIN": sin, "PRECISION": PRECISION}


def turns(R: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """cos and -sin of 2 pi n / R for n in 0..R-1: the twiddle factors, exact where they are 0 or 1."""
    exact = {0: (1.0, 0.0), 1: (0.0, -1.0), 2: (-1.0, 0.0), 3: (0.0, 1.0)}
    both = [
        exact[4 * n // R] if 4 * n % R == 0 else (math.cos(2 * math.pi * n / R), -math.sin(2 * math.pi * n / R))
        for n in range(R)
    ]
    return tuple(c for c, _ in both), tuple(s for _, s in both)


@triton.jit
def _turn(re, im, n: tl.constexpr, COS: tl.constexpr, SIN: tl.constexpr):
    """(re + i im) exp(-2 pi i n / R)."""
    if n == 0:
        return re, im
    else:
        return re * COS[n] - im * SIN[n], re * SIN[n] + im * COS[n]


@triton.jit
def _fft(re, im, N: tl.constexpr, R: tl.constexpr, COS: tl.constexpr, SIN: tl.constexpr):
    """DFT over tuples of N tensors, in bit-reversed order."""
    if N == 1:
        return re, im
    else:
        half: tl.constexpr = N // 2
        sum_re, sum_im, rest_re, rest_im = (), (), (), ()
        for n in tl.static_range(half):
            sum_re += (re[n] + re[n + half],)
            sum_im += (im[n] + im[n + half],)
            a, b = _turn(re[n] - re[n + half], im[n] - im[n + half], n * (R // N), COS, SIN)
            rest_re += (a,)
            rest_im += (b,)
        sum_re, sum_im = _fft(sum_re, sum_im, half, R, COS, SIN)
        rest_re, rest_im = _fft(rest_re, rest_im, half, R, COS, SIN)
        return sum_re + rest_re, sum_im + rest_im


@triton.jit
def _real_fft(x, N: tl.constexpr, R: tl.constexpr, COS: tl.constexpr, SIN: tl.constexpr):
    """DFT over a tuple of N real tensors: outputs as `slots` lists them, then the two real ones.

    With u = x[:N/2] - x[N/2:], the outputs 1, 5, 9, ... are the complex DFT of (u[n] - i u[n + N/4]) exp(-2 pi i n / N);
    3, 7, ... are their conjugates, and the even ones the same of x[:N/2] + x[N/2:].
    """
    half: tl.constexpr = N // 2
    if N == 2:
        return (x[0] + x[1],), (x[0] - x[1],)
    else:
        quarter: tl.constexpr = N // 4
        even, re, im = (), (), ()
        for n in tl.static_range(half):
            even += (x[n] + x[n + half],)
        for n in tl.static_range(quarter):
            a, b = _turn(x[n] - x[n + half], x[n + half + quarter] - x[n + quarter], n * (R // N), COS, SIN)
            re += (a,)
            im += (b,)
        re, im = _fft(re, im, quarter, R, COS, SIN)
        more_re, more_im = _real_fft(even, half, R, COS, SIN)
        return re + more_re, im + more_im


@triton.jit(do_not_specialize=["W", "T", "n_frames", "tiles"])
def _fbank_kernel(
    waveform_ptr, length_ptr, roll_ptr, window_ptr, matrices_ptr, filters_ptr, out_ptr,
    W, T, n_frames, tiles, preemphasis,
    FRAME: tl.constexpr, HOP: tl.constexpr, F: tl.constexpr, ROLL: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, COS: tl.constexpr, SIN: tl.constexpr,
    PRECISION: tl.constexpr, TILE_T: tl.constexpr, MELS: tl.constexpr,
):  # fmt: skip
    """out[b, (t + roll[b]) mod T] = log(max(filters |DFT(window * preemphasis(frame t - its mean))|^2, floor)).

    Rows behind the clip's last whole frame become zero. One program makes TILE_T rows of one clip: a row's place in its
    tile, and so its bits, do not depend on the batch. Traffic in elements: B*W reads from memory (what windows share, and
    the second read for the pre-emphasis, are served by the cache), B*T*F writes; each program reads the matrices and
    the filters from the cache, n_fft*(2*Q + MELS/2). Source: reference.py.
    """
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t0 = tl.program_id(0) % tiles * TILE_T
    t = t0 + tl.arange(0, TILE_T)
    frames = (tl.maximum(tl.load(length_ptr + b) - FRAME + HOP, 0) // HOP).to(tl.int32)
    valid = tl.minimum(frames, n_frames)
    f = tl.arange(0, MELS)
    row = t.to(tl.int64)
    if ROLL:
        row = (row + tl.load(roll_ptr + b) % T + T) % T
    out = out_ptr + (b * T + row)[None, :] * F + f[:, None]
    inside = (t < T)[None, :] & (f < F)[:, None]
    if t0 >= valid:
        tl.store(out, tl.zeros((MELS, TILE_T), tl.float32), mask=inside)
    else:
        is_frame = (t < valid)[None, :]
        r = tl.arange(0, Q)
        frame_ptr = waveform_ptr + b * W + t.to(tl.int64)[None, :] * HOP
        rows, total = (), tl.zeros((Q, TILE_T), tl.float32)
        for j in tl.static_range(R):
            n = j * Q + r
            x = tl.zeros((Q, TILE_T), tl.float32)
            if j * Q < FRAME:
                x = tl.load(frame_ptr + n[:, None], mask=is_frame & (n < FRAME)[:, None], other=0.0)
                total += x
            rows += (x,)
        mean = (tl.sum(total, 0) / FRAME)[None, :] * (1.0 - preemphasis)  # what is left of it after the pre-emphasis
        tapered = ()
        for j in tl.static_range(R):
            x = rows[j]
            if j * Q < FRAME:
                n = j * Q + r
                before = tl.maximum(n - 1, 0)  # Kaldi repeats the first sample
                past = tl.load(frame_ptr + before[:, None], mask=is_frame & (n < FRAME)[:, None], other=0.0)
                x = ((x - preemphasis * past) - mean) * tl.load(window_ptr + n)[:, None]
            tapered += (x,)
        re, im = _real_fft(tapered, R, R, COS, SIN)
        i = tl.arange(0, 2 * Q)
        energy = tl.zeros((MELS, TILE_T), tl.float32)
        for s in range(R // 2):
            a, c = re[0], im[0]
            for k in tl.static_range(1, R // 2):
                a, c = tl.where(s == k, re[k], a), tl.where(s == k, im[k], c)
            at = matrices_ptr + s * (4 * Q * Q) + i[:, None] * Q + r[None, :]
            # Frames are the right side of each product: that one waits in shared memory, not in registers.
            parts = tl.dot(tl.load(at), a, input_precision=PRECISION)  # (2 Q, Q) @ (Q, TILE_T)
            parts = tl.dot(tl.load(at + 2 * Q * Q), c, parts, input_precision=PRECISION)
            power = tl.sum((parts * parts).reshape(Q // 8, 2, 8, TILE_T), 1).reshape(Q, TILE_T)
            filters = tl.load(filters_ptr + s * (Q * MELS) + f[:, None] * Q + r[None, :])
            energy = tl.dot(filters, power, energy, input_precision=PRECISION)  # (MELS, Q) @ (Q, TILE_T)
        energy = tl.where(energy < _FLOOR, _FLOOR, energy)  # not the maximum: NaN stays
        tl.store(out, tl.where(is_frame, tl.log(energy), 0.0), mask=inside)


@triton.jit(do_not_specialize=["stride_b", "stride_t", "stride_f", "cells", "F", "blocks"])
def _normalise_kernel(
    log_mel_ptr, seed_ptr, epoch_ptr, tickets_ptr,
    stride_b, stride_t, stride_f,
    cells, F, blocks, mean, scale,
    NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x[b, t, f] = (x - mean) / scale, + uniform(word (t*F + f) mod 4 of block (t*F + f) / 4) * the clip's scale.

    Traffic in elements: B*T*F reads and writes. The reference's roundings, in its order: with products and sums left
    apart (enable_fp_fusion=False) the bits are the same. Source: reference.py and kernels.draws.draw_noise.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    cell = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    at = log_mel_ptr + b * stride_b + (cell // F).to(tl.int64) * stride_t + (cell % F).to(tl.int64) * stride_f
    x = tl.load(at, mask=cell < cells, other=0.0)
    x = tl.div_rn(x - mean, tl.zeros_like(x) + scale)
    if NOISE:
        seed = tl.load(seed_ptr)
        epoch, ticket = tl.load(epoch_ptr).to(tl.uint32), tl.load(tickets_ptr + b).to(tl.uint32)
        zero = ticket * 0
        of_clip, _, _, _ = tl.philox(seed, zero + _NOISE, zero, epoch, ticket)
        of_clip = _uniform(of_clip)
        number = (tl.program_id(0) % blocks * (BLOCK // 4) + 1 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        none = number * 0
        w0, w1, w2, w3 = tl.philox(seed, none + _NOISE, number, none + epoch, none + ticket)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK)  # 0, 1, 2, 3 of a block, then the next one
        x += _uniform(words) * tl.div_rn(of_clip, of_clip * 0 + _NOISE_SCALE)
    tl.store(at, x, mask=cell < cells)


@triton.jit
def _uniform(word):
    """The top 24 bits as a float32 in [0, 1): exact."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
