"""Packed samples to the waveforms of a batch."""

from kernels.waveform.op import waveforms
from kernels.waveform.reference import remove_mean

__all__ = ["remove_mean", "waveforms"]
