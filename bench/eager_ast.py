"""AST as plain PyTorch has it, layer by layer: the peer of the fused blocks. It also computes class tokens alone in its last
block, so that it is compared by its operations."""

import torch
import torch.nn.functional as nnf

import kernels
from fftp import ast_model


class EagerAST(ast_model.AST):
    """The same parameters and results; a model becomes one by its `__class__`."""

    def features(self, log_mel: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(log_mel, keep=keep)
        for block in self.blocks[:-1]:
            x = _block(block, x)
        return self.norm(_block(self.blocks[-1], x, self.config.tokens)).mean(1)


def _block(block, x, rows=None):
    attention, normed = block.attention, block.norm1(x)
    whole = rows is None
    mixed = kernels.attention(attention.qkv(normed), attention.heads) if whole else attention.mixed(normed, rows)
    x = x[:, :rows] + attention.proj(mixed)
    return x + block.fc2(nnf.gelu(block.fc1(block.norm2(x))))
