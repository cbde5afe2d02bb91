"""The words of `kernels.philox` in Triton: one launch instead of some hundred, which a captured step would feel."""

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 256, 4  # counters to a program


@triton.jit(do_not_specialize=["N"])
def _words_kernel(key_ptr, c0_ptr, c1_ptr, c2_ptr, c3_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """out[w, i] = word w of the counter (c0[i], c1[i], c2[i], c3[i]) under the key; all int64, `[N]` and `[4, N]`."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    c0 = tl.load(c0_ptr + i, mask=inside, other=0).to(tl.uint32)
    c1 = tl.load(c1_ptr + i, mask=inside, other=0).to(tl.uint32)
    c2 = tl.load(c2_ptr + i, mask=inside, other=0).to(tl.uint32)
    c3 = tl.load(c3_ptr + i, mask=inside, other=0).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(key_ptr), c0, c1, c2, c3)
    tl.store(out_ptr + i, a.to(tl.int64), mask=inside)
    tl.store(out_ptr + N + i, b.to(tl.int64), mask=inside)
    tl.store(out_ptr + 2 * N + i, c.to(tl.int64), mask=inside)
    tl.store(out_ptr + 3 * N + i, d.to(tl.int64), mask=inside)


def words(key: torch.Tensor, counters: list[torch.Tensor]) -> torch.Tensor:
    """The four words of each counter, int64 `[4, N]`: key int64 `[1]`, counters four int64 tensors `[N]`."""
    counters = [c.contiguous() for c in counters]
    N = counters[0].numel()
    out = torch.empty((4, N), dtype=torch.int64, device=key.device)
    if N:
        _words_kernel[(triton.cdiv(N, BLOCK),)](key, *counters, out, N, BLOCK=BLOCK, num_warps=WARPS)
    return out
