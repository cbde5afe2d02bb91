"""Samples to log-mel."""

from kernels.fbank.op import fbank, normalise
from kernels.fbank.reference import FbankSettings

__all__ = ["FbankSettings", "fbank", "normalise"]
