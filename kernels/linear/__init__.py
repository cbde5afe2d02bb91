"""The product of a linear layer, without its bias."""

from kernels.linear.op import linear, linear_panels, panels_of

__all__ = ["linear", "linear_panels", "panels_of"]
