"""Samples to log-mel."""

from kernels.fbank.op import fbank, remove_mean
from kernels.fbank.reference import FbankSettings

__all__ = ["FbankSettings", "fbank", "remove_mean"]
