"""Residual addition and RMSNorm (Zhang and Sennrich, 2019) in plain PyTorch, in any float type."""

import torch.nn.functional as nnf


def rms_norm(x, residual, weight, eps, dtype, wide):
    """(total / sqrt(mean(total^2) + eps) * weight in dtype, total), with total = residual + x in the type `wide`."""
    total = x.to(wide) if residual is None else residual.to(wide) + x.to(wide)
    return nnf.rms_norm(total, weight.shape, weight.to(wide), eps).to(dtype), total
