"""The selective scan as one loop of the graph, for torch.export and ONNX (whose Scan it becomes): the reference's equations.

The reference unrolls its tokens, which makes graphs of a hundred thousand nodes. What runs here eagerly is compiled first, so
it is for `fftp.export` alone.
"""

import torch
from torch._higher_order_ops.scan import scan

from kernels.selective_scan import reference


def selective_scan(u, delta, A, B, C, D, z, delta_bias, A_backward, reverse):
    """As `reference.selective_scan`."""
    return reference.by(_scan, u, delta, A, B, C, D, z, delta_bias, A_backward, reverse)


def _scan(u, delta, A, B, C, reverse):
    """<s_t, C_t> for every t, `[B, L, E]`. Only the recurrence itself is in the loop."""
    decay = torch.exp(delta[..., None] * A).transpose(0, 1)  # (L, B, E, S)
    given = ((delta * u)[..., None] * B[:, :, None]).transpose(0, 1)
    if reverse:
        decay, given = decay.flip(0), given.flip(0)

    def advance(state, inputs):
        decay, given = inputs
        state = decay * state + given
        return state, state.clone()

    _, states = scan(advance, torch.zeros_like(decay[0]), (decay, given))
    if reverse:
        states = states.flip(0)
    return (states.transpose(0, 1) * C[:, :, None]).sum(-1)
