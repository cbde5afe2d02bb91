"""AST, the Audio Spectrogram Transformer (Gong, Chung and Glass, 2021), over any patch grid.

The model reads top to bottom: configuration, parts, whole, initialisation. It equals the original code (commit 31088be)
in tests/test_ast_model.py, logits and every gradient.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import nn

import kernels
from fftp.hub import Pretrained
from fftp.inference import check_norms, product
from fftp.patching import Macs, PatchEmbed, PatchGrid
from kernels import ranges
from kernels.sdpa import sdpa

SIZES = {
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "base": {"dim": 768, "depth": 12, "heads": 12},
}
BACKBONE_EPS = 1e-6  # LayerNorm in the blocks
HEAD_EPS = 1e-5  # LayerNorm in the head


@dataclass(frozen=True, kw_only=True)
class ASTConfig:
    """tokens: 2 for the class and distillation tokens of DeiT, as AST has them; 1 for the class token alone. eps: of every
    LayerNorm, as transformers has it; None is 1e-6 in the backbone and 1e-5 in the head, as AST's own code."""

    grid: PatchGrid
    classes: int
    dim: int = 192
    depth: int = 12
    heads: int = 3
    tokens: Literal[1, 2] = 2
    positions: Literal["learned", "none"] = "learned"
    eps: float | None = None

    def __post_init__(self):
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not a multiple of heads={self.heads}")

    def macs(self, kept: int | None = None) -> Macs:
        """Multiply-accumulates of one clip, all blocks whole. What is run is less by `spared`.

        kept: patches that go through the encoder, where it is not all of them.
        """
        D, L = self.dim, (kept or self.grid.N) + self.tokens
        paper = self.grid.embed_macs(D) + self.depth * 12 * L * D * D + D * self.classes
        return Macs(paper, paper + self.depth * 2 * L * L * D)

    def spared(self, kept: int | None = None) -> int:
        """Multiply-accumulates of `macs().all` that no result depends on: the last block's, for all but the class tokens."""
        N = kept or self.grid.N
        return N * (10 * self.dim**2 + 2 * (N + self.tokens) * self.dim)


class Attention(nn.Module):
    """Multi-head self-attention, as `product` gives it; rows of qkv are q, k, v, each head by head."""

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x, rows: int | None = None):
        """rows: what only the first so many tokens see; all tokens are looked at."""
        return product(self.proj, self.mixed(x, rows))

    def mixed(self, x, rows: int | None = None):
        """What proj takes: each head's mixture of values, `[B, L or rows, D]`."""
        if rows is None:
            # A GPU's product adds the bias on its way out, and no attention there would.
            x, bias = (self.qkv(x), None) if x.is_cuda else product(self.qkv, x)
            return kernels.attention(x, self.heads, bias)
        D = x.shape[2]
        q = self._some(x[:, :rows], slice(0, D)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self._some(x, slice(D, None)).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = sdpa(q, k, v)  # (B, H, rows, D / H)
        return out.transpose(1, 2).flatten(2)

    def _some(self, x, part):
        """Some of qkv's outputs."""
        if x.is_cuda and type(self.qkv) is nn.Linear:  # it adds the bias on its way out
            bias = self.qkv.bias
            return nnf.linear(x, self.qkv.weight[part], bias if bias is None else bias[part])
        x, bias = product(self.qkv, x, part)
        return x if bias is None else (x + bias).to(x.dtype)

    def weights(self, x):
        """The attention itself, softmax(q k^T / sqrt(D / H)), `[B, H, L, L]`: what is never written down otherwise."""
        qkv = self.qkv(x).float().unflatten(2, (3, self.heads, -1))  # (B, L, 3, H, D / H)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def norm(layer: nn.LayerNorm, x, residual=None, bias=None, dtype=None):
    """(`layer` of the sum of x, residual and bias; the sum in float32), in one pass: as `kernels.layer_norm`."""
    return kernels.layer_norm(x, residual, bias, layer.weight, layer.bias, layer.eps, dtype)


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)); the exact GELU.

    Tokens go from block to block as x, residual and bias, `[B, L, D]` or `[D]`, whose sum they are without what is None: the
    next norm takes it.
    """

    def __init__(self, D: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, eps=BACKBONE_EPS)
        self.attention = Attention(D, heads)
        self.norm2 = nn.LayerNorm(D, eps=BACKBONE_EPS)
        self.fc1 = nn.Linear(D, 4 * D)
        self.fc2 = nn.Linear(4 * D, D)

    def forward(self, x, residual=None, bias=None, rows: int | None = None):
        """rows: the first so many tokens of the result alone, `[B, rows, D]`: what a last block is asked for."""
        x, residual = norm(self.norm1, x, residual, bias)
        x, bias = self.attention(x, rows)
        x, residual = norm(self.norm2, x, residual[:, :rows], bias)
        x, bias = product(self.fc2, kernels.gelu(*product(self.fc1, x)))
        return x, residual, bias


class AST(nn.Module, Pretrained):
    """Normalised log-mel `[B, T, F]` to logits `[B, C]`."""

    def __init__(self, config: ASTConfig):
        super().__init__()
        self.config = config
        self.embed = PatchEmbed(config.grid, config.dim, config.tokens, "head", config.positions)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=BACKBONE_EPS)
        self.head_norm = nn.LayerNorm(config.dim, eps=HEAD_EPS)
        self.head = nn.Linear(config.dim, config.classes)
        if config.eps is not None:
            for layer in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
                layer.eps = config.eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """AST's from-scratch initialisation (imagenet_pretrain=False): the patch embedding and the head keep the library's
        default, the rest is normal with std 0.02, as the original's order of construction has it."""
        for block in self.blocks:
            for linear in (block.attention.qkv, block.attention.proj, block.fc1, block.fc2):
                nn.init.normal_(linear.weight, std=0.02)
                nn.init.zeros_(linear.bias)
        bound = (self.config.grid.pt * self.config.grid.pf) ** -0.5
        nn.init.uniform_(self.embed.weight, -bound, bound)
        nn.init.uniform_(self.embed.bias, -bound, bound)
        nn.init.normal_(self.embed.class_token, std=0.02)
        if self.embed.position is not None:
            nn.init.normal_(self.embed.position, std=0.02)

    def features(self, log_mel: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """The mean of the class tokens after the last norm, `[B, D]`; of the last block nobody asks for other tokens.

        keep: int64 `[B, K]`, ascending, the patches that go through the encoder; without it all do.
        """
        check_norms(self.norm.weight)
        stream = (self.embed(log_mel, keep=keep),)
        with ranges.range("encoder"):
            for block in self.blocks[:-1]:
                stream = block(*stream)
            stream = self.blocks[-1](*stream, rows=self.config.tokens)
        x, residual, bias = stream
        return norm(self.norm, x, residual, bias, residual.dtype)[0].mean(1)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Features `[B, D]` to logits `[B, C]`."""
        with ranges.range("head"):
            return self.head(self.head_norm(features))

    def forward(self, log_mel: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        return self.classify(self.features(log_mel, keep))

    def attentions(self, log_mel: torch.Tensor) -> list[torch.Tensor]:
        """Each block's attention, `[B, H, L, L]`."""
        stream, seen = (self.embed(log_mel),), []
        for block in self.blocks:
            seen.append(block.attention.weights(norm(block.norm1, *stream)[0]))
            stream = block(*stream)
        return seen

    def undecayed(self) -> set[str]:
        """Names of parameters that weight decay leaves alone: vectors, biases, norms, tokens, positions."""
        named = self.named_parameters()
        return {n for n, p in named if p.ndim < 2 or n in ("embed.class_token", "embed.position")}

    def matrices(self) -> dict[str, int]:
        """Names of the encoder's weights -> how many matrices lie in each, one below the other: what Muon moves."""
        found = {}
        for i in range(self.config.depth):
            found |= {f"blocks.{i}.attention.qkv.weight": 3}
            found |= {f"blocks.{i}.{name}.weight": 1 for name in ("attention.proj", "fc1", "fc2")}
        return found
