"""Both directions of the selective scan, and the causal convolution before it."""

from kernels.selective_scan.op import causal_conv, selective_scan

__all__ = ["causal_conv", "selective_scan"]
