"""Multi-head self-attention on the product that holds queries, keys and values."""

from kernels.attention.op import attention

__all__ = ["attention"]
