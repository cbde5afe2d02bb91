"""The public door of the scan: checks, precision, and the choice of backend."""

import torch

from kernels import dispatch


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    A_backward: torch.Tensor | None = None,
    reverse: bool = False,
) -> torch.Tensor:
    """Mamba's scan with gate, in one or both directions (AuM's mixer; equations in `reference`).

    u, delta, z `[B, L, E]`: inputs, raw step sizes, gate. B, C `[B, L, S]`. A `[E, S]`, negative; D, delta_bias `[E]`.
    A_backward `[E, S]`: add a second scan that runs the other way with these decays and the same D (AuM's Fo-Bi, "v1").
    reverse: the (first) scan runs from the last token to the first.

    Returns `[B, L, E]` in u's type. Every backend computes in float32 (float64 where u is), autocast or not: states and
    decays lose too much in bfloat16. Raises ValueError when shapes disagree or L is 0.
    """
    batch, L, E = u.shape if u.ndim == 3 else (0, 0, 0)
    S = A.shape[1] if A.ndim == 2 else 0
    wanted = {
        "delta": (delta, (batch, L, E)),
        "z": (z, (batch, L, E)),
        "A": (A, (E, S)),
        "B": (B, (batch, L, S)),
        "C": (C, (batch, L, S)),
        "D": (D, (E,)),
        "delta_bias": (delta_bias, (E,)),
    }
    if A_backward is not None:
        wanted["A_backward"] = (A_backward, (E, S))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} goes with u {tuple(u.shape)} and A {tuple(A.shape)} as {shape}, got {tuple(tensor.shape)}"
            )
    if L == 0 or S == 0:
        raise ValueError(f"the scan needs at least one token and one state, got L={L} and S={S}")
    with torch.autocast(u.device.type, enabled=False):
        scan = dispatch.choose("selective_scan", u)
        return scan(u, delta, A, B, C, D, z, delta_bias, A_backward, reverse)


def causal_conv(u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, reverse: bool = False) -> torch.Tensor:
    """silu of the depthwise convolution along time; u `[B, L, E]`, weight `[E, K]`, bias `[E]`.

    Tap K-1 is the present and the others the past (the future where reverse). Raises ValueError when shapes disagree.
    """
    if u.ndim != 3 or weight.ndim != 2 or weight.shape[0] != u.shape[2] or bias.shape != weight.shape[:1]:
        raise ValueError(
            "u (B, L, E) takes weight (E, K) and bias (E,), "
            f"got {tuple(u.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    return dispatch.choose("causal_conv", u)(u, weight, bias, reverse)
