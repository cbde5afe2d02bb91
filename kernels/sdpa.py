"""PyTorch's attention, which on a GPU is held to its fast kernels instead of hoped to take them."""

import torch
import torch.nn.functional as nnf
from torch.nn.attention import SDPBackend, sdpa_kernel

# Under torch.use_deterministic_algorithms cuDNN's is passed over, and FlashAttention's backward adds in a fixed order.
FAST = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v, `[B, H, L, d]`. Raises RuntimeError where no fast kernel takes the tensors."""
    if not held(q.device.type, q.dtype) or not q.numel():
        return nnf.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(FAST):
        return nnf.scaled_dot_product_attention(q, k, v)


def held(device: str, dtype: torch.dtype) -> bool:
    """Whether anything but FAST is an error: in the types that they take, on a GPU."""
    return device == "cuda" and dtype in (torch.bfloat16, torch.float16)
