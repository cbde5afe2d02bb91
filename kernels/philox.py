"""Philox-4x32-10, the counter-based generator behind every random draw (Salmon et al., SC 2011).

key = the 64-bit seed; counter = (c0, c1, c2, c3), four 32-bit words; out come four 32-bit words. There is no state:
any word of any draw can be had at once, on any device, in any order. Two twins live here, numpy and torch, and give
the words of Triton's `tl.philox` bit for bit.

    c0 = purpose * 2^16 + attempt    what is drawn, and which try
    c1 = shape                       number of the rectangle or cell, 0 where there is none
    c2 = epoch
    c3 = ticket                      the sample's place in the epoch's order
"""

import numpy as np
import torch

from kernels import dispatch

_M32 = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57  # multipliers of the round function
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85  # what each round adds to the key

# Purposes are appended, never renumbered: a number is part of what a seed means.
SHUFFLE, CROP, ROLL, GAIN, MIXUP, LAMBDA, NOISE, SPEC_MASK, SPEC_AUGMENT, DROP_PATH, BALANCED = range(11)
SHIFT, SPEED, BACKGROUND, LEAD = range(11, 15)

_BLOCK = 16384  # counters at a time: nine int64 buffers of this length stay in a core's second-level cache


def philox_numpy(seed: int, c0, c1=0, c2=0, c3=0) -> tuple[np.ndarray, ...]:
    """Four uint32 arrays; the counters are integers or integer arrays and broadcast."""
    m32, shift = np.uint64(_M32), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(c).astype(np.uint64) & m32 for c in np.broadcast_arrays(c0, c1, c2, c3))
    k0, k1 = int(seed) & _M32, (int(seed) >> 32) & _M32
    for _ in range(10):
        a, b = np.uint64(_ROUND_A) * c0, np.uint64(_ROUND_B) * c2
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ np.uint64(k0), b & m32, (a >> shift) ^ c3 ^ np.uint64(k1), a & m32
        k0, k1 = (k0 + _WEYL_A) & _M32, (k1 + _WEYL_B) & _M32
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))


def philox(seed, c0, c1=0, c2=0, c3=0) -> tuple[torch.Tensor, ...]:
    """Four int64 tensors with values in [0, 2^32).

    seed: int or int64 tensor of one element, read as an unsigned 64-bit number. c0 to c3: integers or int64 tensors
    that broadcast; the result is on the device of the first tensor among them (the CPU when there is none).
    """
    device = next((c.device for c in (c0, c1, c2, c3) if isinstance(c, torch.Tensor)), torch.device("cpu"))
    counters = [_counter(c, device) for c in (c0, c1, c2, c3)]
    shape = torch.broadcast_shapes(*(c.shape for c in counters))
    flat = [c.expand(shape).reshape(-1) for c in counters]
    found = dispatch.choose("philox", flat[0])(on_device(seed, device), flat)
    return tuple(word.view(shape) for word in found)


def words(key: torch.Tensor, counters: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """The four words of each counter, int64 `[N]` each: key int64 `[1]`, counters four int64 tensors `[N]`."""
    counters, key = [c & _M32 for c in counters], key.reshape(())
    k0, k1, N = key & _M32, (key >> 32) & _M32, counters[0].numel()
    if N <= _BLOCK or key.device.type != "cpu":
        return _rounds(counters, k0, k1)
    out = torch.empty(4, N, dtype=torch.int64)
    for i in range(0, N, _BLOCK):
        for word, part in zip(out, _rounds([c[i : i + _BLOCK] for c in counters], k0, k1), strict=True):
            word[i : i + _BLOCK] = part
    return out


def _rounds(counters: list[torch.Tensor], k0: torch.Tensor, k1: torch.Tensor) -> list[torch.Tensor]:
    c0, c1, c2, c3 = counters
    for _ in range(10):
        # The 64-bit products wrap in int64; their bits are right, and & _M32 after the arithmetic shift keeps the high word.
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = (b >> 32).bitwise_and_(_M32).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (a >> 32).bitwise_and_(_M32).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = b.bitwise_and_(_M32), a.bitwise_and_(_M32)
        k0, k1 = (k0 + _WEYL_A) & _M32, (k1 + _WEYL_B) & _M32
    return [c0, c1, c2, c3]


def _counter(c, device: torch.device) -> torch.Tensor:
    """A counter as int64 on the device; a number is filled in there, for the reason given in `on_device`."""
    if isinstance(c, torch.Tensor):
        return c.to(device=device, dtype=torch.int64)
    return torch.full((), int(c), dtype=torch.int64, device=device)


def on_device(number, device: torch.device) -> torch.Tensor:
    """A seed or an epoch as int64 `[1]`, with the bits of the unsigned 64-bit number; the host waits for nothing."""
    if isinstance(number, torch.Tensor):
        return number.to(device=device, dtype=torch.int64).reshape(1)
    # A fill takes its value along with its launch; copying one from the host would wait for the queue.
    return torch.full((1,), _signed(number), dtype=torch.int64, device=device)


def _signed(seed: int) -> int:
    """The int64 with the bits of the unsigned 64-bit seed."""
    seed = int(seed) & (2**64 - 1)
    return seed - 2**64 if seed >= 2**63 else seed


def below(word: torch.Tensor, n) -> torch.Tensor:
    """A uniform integer in 0..n-1 from a word: the high half of the product, no modulo. n below 2^31, may be a tensor."""
    return (word * n) >> 32


def passes(word: torch.Tensor, probability: float) -> torch.Tensor:
    """True with the given probability; 1 always passes, 0 never."""
    return word < round(probability * 2**32)


def uniform(word: torch.Tensor) -> torch.Tensor:
    """A float32 in [0, 1): the top 24 bits, so that the value is exact."""
    return (word >> 8).float() * 2.0**-24
