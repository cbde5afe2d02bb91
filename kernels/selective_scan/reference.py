"""The selective scan of Mamba (Gu and Dao, 2023) and the causal convolution before it, one step at a time.

Any float type; float64 makes it the oracle of every other form. The recurrence, for each clip and channel e:

    s_t = exp(delta_t A_e) s_(t-1) + delta_t u_t B_t        s in R^S, s_(-1) = 0
    y_t = <s_t, C_t> + D_e u_t                              delta = softplus(delta_raw + delta_bias)
    out_t = y_t silu(z_t)
"""

import torch
import torch.nn.functional as nnf


def selective_scan(u, delta, A, B, C, D, z, delta_bias, A_backward, reverse):
    """out = (y of the forward scan, plus y of a backward scan with A_backward where there is one) * silu(z)."""
    return by(_scan, u, delta, A, B, C, D, z, delta_bias, A_backward, reverse)


def by(scan, u, delta, A, B, C, D, z, delta_bias, A_backward, reverse):
    """`selective_scan` with the recurrence by `scan(u, delta, A, B, C, reverse)`, which gives <s_t, C_t>."""
    dtype = u.dtype
    u, delta, A, B, C, D, z, delta_bias, A_backward = precise(u, delta, A, B, C, D, z, delta_bias, A_backward)
    delta = nnf.softplus(delta + delta_bias)
    y = scan(u, delta, A, B, C, reverse) + D * u
    if A_backward is not None:
        y = y + scan(u, delta, A_backward, B, C, not reverse) + D * u
    return (y * nnf.silu(z)).to(dtype)


def precise(u, *others):
    """The tensors, None among them, in float32, or in float64 where u is."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    return [t if t is None else t.to(dtype) for t in (u, *others)]


def _scan(u, delta, A, B, C, reverse):
    """<s_t, C_t> for every t, `[B, L, E]`; from the end to the start where reverse."""
    L = u.shape[1]
    state = u.new_zeros(u.shape[0], *A.shape)  # (B, E, S)
    out = [None] * L
    for t in reversed(range(L)) if reverse else range(L):
        state, out[t] = _advance(state, u[:, t], delta[:, t], A, B[:, t], C[:, t])
    return torch.stack(out, 1)


def _advance(state, u, delta, A, B, C):
    """(s_t, <s_t, C_t>) from s_(t-1), the state `[B, E, S]`."""
    decay = torch.exp(delta[:, :, None] * A)  # (B, E, S)
    state = decay * state + (delta * u)[:, :, None] * B[:, None]
    return state, (state @ C[:, :, None]).squeeze(-1)  # (B, E, S) @ (B, S, 1) -> (B, E)


def selective_scan_steps(u, delta, A, B, C, D, z, delta_bias, state):
    """(out `[B, L, E]`, states `[B, L, E, S]`) of L tokens that go on from a state `[B, E, S]`."""
    dtype = u.dtype
    u, delta, A, B, C, D, z, delta_bias = precise(u, delta, A, B, C, D, z, delta_bias)
    delta = nnf.softplus(delta + delta_bias)
    decay = torch.exp(delta[..., None] * A)  # (B, L, E, S)
    entering, states = (delta * u)[..., None] * B[:, :, None], []
    for t in range(u.shape[1]):
        state = decay[:, t] * state + entering[:, t]
        states.append(state)
    states = torch.stack(states, 1)
    y = (states @ C[..., None]).squeeze(-1)  # (B, L, E, S) @ (B, L, S, 1) -> (B, L, E)
    return ((y + D * u) * nnf.silu(z)).to(dtype), states


def causal_conv(u, weight, bias, reverse):
    """silu(bias + sum_j weight[:, j] u_(t - K + 1 + j)), u before the start 0; u `[B, L, E]`, weight `[E, K]`."""
    L, K = u.shape[1], weight.shape[1]
    if reverse:
        padded, taps = nnf.pad(u, (0, 0, 0, K - 1)), weight.flip(1)
    else:
        padded, taps = nnf.pad(u, (0, 0, K - 1, 0)), weight
    total = bias + padded[:, :L] * taps[:, 0]
    for j in range(1, K):
        total = total + padded[:, j : j + L] * taps[:, j]
    return nnf.silu(total)


def causal_conv_steps(u, weight, bias, past):
    """(out `[B, L, E]`, inputs `[B, K - 1 + L, E]`) of L tokens, with the K - 1 inputs before them."""
    inputs, L = torch.cat([past, u], 1), u.shape[1]
    total = bias + inputs[:, :L] * weight[:, 0]
    for j in range(1, weight.shape[1]):
        total = total + inputs[:, j : j + L] * weight[:, j]
    return nnf.silu(total), inputs
