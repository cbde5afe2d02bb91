"""A linear layer's bias and the exact GELU behind it, in one pass."""

from kernels.gelu.op import gelu

__all__ = ["gelu"]
