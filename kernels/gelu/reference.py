"""Bias and exact GELU (Hendrycks and Gimpel, 2016) in plain PyTorch, in any float type."""

import torch.nn.functional as nnf


def gelu(x, bias, wide):
    """z Phi(z) in x's type, with z = x + bias in the type `wide` and Phi the normal distribution."""
    z = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    return nnf.gelu(z).to(x.dtype)
