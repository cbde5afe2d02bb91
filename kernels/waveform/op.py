"""The public door of the wave stage: checks, and the choice of backend."""

import torch

from kernels import dispatch


def waveforms(
    samples: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    W: int,
    gain: torch.Tensor | None = None,
    partner: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Clips of a pack as a batch of waveforms, float32 `[B, W]` in -1..1, without their means, zero behind their ends.

    samples: int16 `[n]`, all clips end to end. start, length: int64 `[B]`, samples; a clip longer than W is cut to it.
    gain: float32 `[B]`, factors of the clips. partner: (start, length, weight) of the clips to mix in, int64, int64 and
    float32 `[B]`: weight * clip + (1 - weight) * partner, each without its own mean and cut or followed by zeros to the
    clip's length, and then without the mean of the mixture (mixup as AST's dataloader.py has it). Where weight is 1 the
    clip stays as it is.

    Row b depends on its own clips alone, bit for bit. Raises ValueError for another shape or type.
    """
    B = start.numel()
    if samples.ndim != 1 or samples.dtype != torch.int16:
        raise ValueError(f"samples is int16 (n,), got {samples.dtype} {tuple(samples.shape)}")
    given = {"start": start, "length": length}
    if partner is not None:
        given |= {"partner's start": partner[0], "partner's length": partner[1]}
    for name, tensor in given.items():
        if tensor.shape != (B,) or tensor.dtype != torch.int64:
            raise ValueError(f"{name} is int64 ({B},), got {tensor.dtype} {tuple(tensor.shape)}")
    for name, factor in (("gain", gain), ("partner's weight", None if partner is None else partner[2])):
        if factor is not None and (factor.shape != (B,) or factor.dtype != torch.float32):
            raise ValueError(f"{name} is float32 ({B},), got {factor.dtype} {tuple(factor.shape)}")
    if W < 1:
        raise ValueError(f"W is at least 1 sample, got {W}")
    return dispatch.choose("waveforms", samples)(samples, start, length, W, gain, partner)
