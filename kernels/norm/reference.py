"""Residual addition and norm, RMSNorm (Zhang and Sennrich, 2019) or LayerNorm (Ba et al., 2016), in any float type."""

import torch.nn.functional as nnf


def rms_norm(x, residual, weight, eps, dtype, wide):
    """(total / sqrt(mean(total^2) + eps) * weight in dtype, total), with total = residual + x in the type `wide`."""
    total = _total(x, residual, wide)
    return nnf.rms_norm(total, weight.shape, weight.to(wide), eps).to(dtype), total


def layer_norm(x, residual, bias, weight, shift, eps, dtype, wide):
    """((total - mean) / sqrt(var + eps) * weight + shift in dtype, total), with total = residual + x + bias in `wide`."""
    total = _total(x, residual, wide)
    if bias is not None:
        total = total + bias.to(wide)
    return nnf.layer_norm(total, weight.shape, weight.to(wide), shift.to(wide), eps).to(dtype), total


def _total(x, residual, wide):
    return x.to(wide) if residual is None else residual.to(wide) + x.to(wide)
