"""The residual stream's addition and the norm behind it, in one pass."""

from kernels.norm.op import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
