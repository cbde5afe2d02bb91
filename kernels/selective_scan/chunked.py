"""The Triton scan of few clips, chunks of tokens side by side, as an operator of PyTorch: forward only.

It makes every exponential twice, and a clip's steps in sequence are few: `triton` keeps a GPU busy with a batch, this
one answers sooner with a single clip. Tested in the interpreter and compiled ahead of time (bench/compile.py); not yet timed
on a GPU.
"""

import torch
import triton
from triton import knobs

from kernels.dispatch import BackendError
from kernels.selective_scan import chunked_kernel as kernel
from kernels.selective_scan import fused


def selective_scan(u, delta, A, B, C, D, z, delta_bias, A_backward, reverse):
    """As `reference.selective_scan`, for every type but float64. Raises BackendError where gradients are wanted."""
    given = (u, delta, A, B, C, D, z, delta_bias, A_backward)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        raise BackendError("selective_scan=triton_chunked has no gradients: call it under torch.no_grad().")
    return scan(*fused.precise(*given), reverse).to(u.dtype)


@torch.library.custom_op("fftp::selective_scan_chunked", mutates_args=())
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
) -> torch.Tensor:
    """Output `[B, L, E]` in u's type; inputs as in `fused.scan`."""
    batch, L, E = u.shape
    S, two = A.shape[1], A_backward is not None
    out = torch.empty((batch, L, E), dtype=u.dtype, device=u.device)
    if not out.numel():
        return out
    at, tokens = fused._block("scan", u), kernel.chunk(L)
    chunks, directions = triton.cdiv(L, tokens), 1 + two
    ends, starts = torch.empty((2, directions, batch, chunks, E, S), dtype=torch.float32, device=u.device)
    totals = torch.empty((directions, batch, chunks, E), dtype=torch.float32, device=u.device)
    # Where there are two directions, the first leaves its sums here for the second.
    sums = torch.empty((batch, L, E), dtype=torch.float32, device=u.device) if two else out
    inputs, strides = fused._inputs(u, delta, A, B, C, D, z, delta_bias, A_backward)
    u, delta, A, A_backward, B, _, _, _, delta_bias = inputs
    ways = {"TWO": two, "REVERSE": reverse}
    constants = ways | fused._constants(at, A) | {"CHUNK": tokens}
    programs = batch * chunks * triton.cdiv(E, at.channels)
    kernel._ends_kernel[(programs, directions)](
        u, delta, A, A_backward, B, delta_bias, ends, totals,
        *strides[:3], batch, L, E, S, chunks, **constants, num_warps=at.warps,
    )  # fmt: skip
    kernel._carry_kernel[(batch * triton.cdiv(E * S, kernel.CARRIED), directions)](
        A, A_backward, ends, totals, starts,
        batch, E, S, chunks,
        **ways, INTERPRETED=knobs.runtime.interpret, BLOCK=kernel.CARRIED, num_warps=kernel.CARRY_WARPS,
    )  # fmt: skip
    kernel._outputs_kernel[(programs,)](
        *inputs, out, sums, starts,
        batch, L, chunks, *strides, E, S, **constants, num_warps=at.warps,
    )  # fmt: skip
    return out


@scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, A_backward, reverse):
    return torch.empty_like(u, memory_format=torch.contiguous_format)
