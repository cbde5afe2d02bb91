"""The residual stream's addition and the norm behind it, in one pass."""

from kernels.rms_norm.op import rms_norm

__all__ = ["rms_norm"]
