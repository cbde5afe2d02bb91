"""The public door of the scan: checks, precision, and the choice of backend."""

import torch

from kernels import dispatch
from kernels.selective_scan import reference


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
    more = {} if A_backward is None else {"A_backward": (A_backward, (E, S))}
    _check(u, delta, A, B, C, D, z, delta_bias, (batch, L, E), more)
    if L == 0 or S == 0:
        raise ValueError(f"the scan needs at least one token and one state, got L={L} and S={S}")
    with dispatch.unmixed(u.device.type):
        scan = dispatch.choose("selective_scan", u)
        return scan(u, delta, A, B, C, D, z, delta_bias, A_backward, reverse)


def selective_scan_step(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of `selective_scan`, forward: (out `[B, E]` in u's type, the state after it).

    u, delta, z `[B, E]`; B, C `[B, S]`; A, D and delta_bias as there; state `[B, E, S]`: the one after the token before, 0
    before the first, in float32 or float64. The given state is left as it is. Plain PyTorch on every device. Raises
    ValueError when shapes disagree.
    """
    _check_steps(u, delta, A, B, C, D, z, delta_bias, state, u.shape if u.ndim == 2 else (0, 0))
    rows = (t[:, None] for t in (u, delta, B, C, z))
    out, states = _steps(*rows, A, D, delta_bias, state)
    return out[:, 0], states[:, 0]


def selective_scan_steps(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next L tokens of `selective_scan`, forward: (out `[B, L, E]` in u's type, the states after each `[B, L, E, S]`).

    u, delta, z `[B, L, E]`; B, C `[B, L, S]`; state and the rest as for `selective_scan_step`, which this is L times. For
    few tokens: it keeps every state. Raises ValueError when shapes disagree.
    """
    _check_steps(u, delta, A, B, C, D, z, delta_bias, state, u.shape if u.ndim == 3 else (0, 0, 0))
    return _steps(u, delta, B, C, z, A, D, delta_bias, state)


def _check_steps(u, delta, A, B, C, D, z, delta_bias, state, rows):
    S = A.shape[1] if A.ndim == 2 else 0
    more = {"state": (state, (rows[0], rows[-1], S))}
    _check(u, delta, A, B, C, D, z, delta_bias, rows, more)


def _check(u, delta, A, B, C, D, z, delta_bias, rows, more):
    """rows: the shape of u, zeros where it has other axes. more: name -> (tensor, its shape)."""
    E, S = rows[-1], A.shape[1] if A.ndim == 2 else 0
    wanted = {
        "delta": (delta, tuple(rows)),
        "z": (z, tuple(rows)),
        "A": (A, (E, S)),
        "B": (B, (*rows[:-1], S)),
        "C": (C, (*rows[:-1], S)),
        "D": (D, (E,)),
        "delta_bias": (delta_bias, (E,)),
    }
    for name, (tensor, shape) in (wanted | more).items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} goes with u {tuple(u.shape)} and A {tuple(A.shape)} as {shape}, got {tuple(tensor.shape)}"
            )


def _steps(u, delta, B, C, z, A, D, delta_bias, state):
    with dispatch.unmixed(u.device.type):
        return reference.selective_scan_steps(u, delta, A, B, C, D, z, delta_bias, state)


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


def causal_conv_step(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, past: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of `causal_conv`, forward: (out `[B, E]`, the past after it).

    u `[B, E]`; past `[B, K - 1, E]`: the inputs before it, the oldest first, 0 before the first. The given past is left as it
    is. Plain PyTorch on every device. Raises ValueError when shapes disagree.
    """
    _check_conv_steps(u, weight, bias, past, "(B, E)", 2)
    out, inputs = reference.causal_conv_steps(u[:, None], weight, bias, past)
    return out[:, 0], inputs[:, 1:]


def causal_conv_steps(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, past: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next L tokens of `causal_conv`, forward: (out `[B, L, E]`, inputs `[B, K - 1 + L, E]`: the past after t tokens is
    inputs[:, t : t + K - 1]).

    u `[B, L, E]`; past as for `causal_conv_step`, which this is L times. Raises ValueError when shapes disagree.
    """
    _check_conv_steps(u, weight, bias, past, "(B, L, E)", 3)
    return reference.causal_conv_steps(u, weight, bias, past)


def _check_conv_steps(u, weight, bias, past, shape, axes):
    if u.ndim != axes or weight.ndim != 2 or past.shape != (u.shape[0], weight.shape[1] - 1, u.shape[-1]):
        raise ValueError(
            f"u {shape} and weight (E, K) take past (B, K - 1, E), "
            f"got {tuple(u.shape)}, {tuple(weight.shape)} and {tuple(past.shape)}"
        )
    if weight.shape[0] != u.shape[-1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"u {shape} takes weight (E, K) and bias (E,), "
            f"got {tuple(u.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
