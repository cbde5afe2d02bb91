"""Both directions of the selective scan, and the causal convolution before it; for one direction also token by token."""

from kernels.selective_scan.op import (
    causal_conv,
    causal_conv_step,
    causal_conv_steps,
    selective_scan,
    selective_scan_step,
    selective_scan_steps,
)

__all__ = [
    "causal_conv",
    "causal_conv_step",
    "causal_conv_steps",
    "selective_scan",
    "selective_scan_step",
    "selective_scan_steps",
]
