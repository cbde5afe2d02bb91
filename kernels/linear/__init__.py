"""The product of a linear layer, without its bias."""

from kernels.linear.op import linear

__all__ = ["linear"]
