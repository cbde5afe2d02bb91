"""The operations that run on the device, each with a plain PyTorch reference that defines it.

`kernels.dispatch` says which backend runs. Nothing here knows of models, settings or files.
"""

from kernels.attention import attention
from kernels.fbank import FbankSettings, fbank, normalise
from kernels.gelu import gelu
from kernels.linear import linear, linear_panels, panels_of
from kernels.norm import layer_norm, rms_norm
from kernels.patch_embed import patch_embed
from kernels.selective_scan import (
    causal_conv,
    causal_conv_step,
    causal_conv_steps,
    selective_scan,
    selective_scan_step,
    selective_scan_steps,
)
from kernels.spec_mask import apply_spec_augment, apply_spec_mask, draw_spec_augment, draw_spec_mask, paint
from kernels.waveform import remove_mean, waveforms

__all__ = [
    "FbankSettings",
    "apply_spec_augment",
    "apply_spec_mask",
    "attention",
    "causal_conv",
    "causal_conv_step",
    "causal_conv_steps",
    "draw_spec_augment",
    "draw_spec_mask",
    "fbank",
    "gelu",
    "layer_norm",
    "linear",
    "linear_panels",
    "normalise",
    "paint",
    "panels_of",
    "patch_embed",
    "remove_mean",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
    "selective_scan_steps",
    "waveforms",
]
