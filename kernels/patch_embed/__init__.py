"""Log-mel to tokens."""

from kernels.patch_embed.op import patch_embed

__all__ = ["patch_embed"]
