"""Patch embedding in bfloat16 as a linear layer's product (kernels/linear), for processors that multiply bfloat16.

Without gradients; by tiles full-frequency windows are read where they lie, one stride behind the other.
"""

import torch

from kernels.linear import native
from kernels.native import recorded
from kernels.patch_embed import reference

refuses = native.refuses


def patch_embed(log_mel, weight, bias, stride, position, tokens, place, rectangles=None, fill=None, panels=None):
    """As `reference.patch_embed`, and by that where gradients are wanted; the product takes bfloat16, bias and position are
    added to what it rounds."""
    if recorded(log_mel, weight, bias, position, tokens):
        return reference.patch_embed(log_mel, weight, bias, stride, position, tokens, place, rectangles, fill)
    log_mel, rows = reference.hide(log_mel, rectangles, fill).to(torch.bfloat16), weight.flatten(1)
    products = native.linear(reference.windows(log_mel, weight.shape[2:], stride), rows, panels)
    if position is None:
        return reference.join((products + bias).to(products.dtype), None, tokens, place)
    return reference.join(products, position + bias, tokens, place)
