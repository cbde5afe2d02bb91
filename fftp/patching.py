"""Patches: their geometry, their embedding, and what happens to weights when the geometry changes."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import nn

import kernels
from fftp.errors import UserError
from kernels import ranges
from kernels.spec_mask.reference import covered


class Macs(NamedTuple):
    """Multiply-accumulates of one clip.

    paper: what the paper's Table III counts (patch embedding, linear layers, head; no products between activations).
    all: the attention products or the scan as well. FLOPs are twice these.
    """

    paper: int
    all: int


@dataclass(frozen=True, kw_only=True)
class PatchGrid:
    """Where patches lie on a log-mel of T frames and F bins.

    pt, pf: patch in frames and bins; st, sf: stride in the same. pf == F is full-frequency temporal patching (paper,
    section III-A); the paper writes patches as (frequency, time), here time comes first as in the layout.
    Raises UserError when the patch does not fit.
    """

    T: int
    F: int
    pt: int
    pf: int
    st: int
    sf: int

    def __post_init__(self):
        for name in ("T", "F", "pt", "pf", "st", "sf"):
            if getattr(self, name) < 1:
                raise UserError(f"The patch grid's {name} has to be at least 1, not {getattr(self, name)}.")
        if self.pt > self.T:
            raise UserError(
                f"A patch of {self.pt} frames is wider than the clip of {self.T} frames: "
                f"take --patch-time {self.T} or less, or more --frames."
            )
        if self.pf > self.F:
            raise UserError(
                f"A patch of {self.pf} mel bins is higher than the {self.F} bins there are: "
                f"take --patch-freq {self.F} or less."
            )

    @property
    def n_t(self) -> int:
        return (self.T - self.pt) // self.st + 1

    @property
    def n_f(self) -> int:
        return (self.F - self.pf) // self.sf + 1

    @property
    def N(self) -> int:
        """Patches, and so tokens without the class tokens."""
        return self.n_t * self.n_f

    @property
    def full_frequency(self) -> bool:
        return self.pf == self.F

    def embed_macs(self, D: int) -> int:
        """Multiply-accumulates of embedding one clip in D dimensions."""
        return self.N * self.pt * self.pf * D


class PatchEmbed(nn.Module):
    """Log-mel `[B, T, F]` to the encoder's input `[B, N + c, D]`: patches, positions, class tokens.

    tokens: c, how many class tokens; place: "head", "middle" (before patch N // 2) or "end".
    positions: "learned" or "none". The position table `[c + N, D]` holds the class tokens' rows first, then the
    patches': for AuM, whose class token stands in the middle, it is not in sequence order, as in the original.
    Parameters: weight `[D, 1, pt, pf]`, bias `[D]`, class_token `[c, D]`, position `[c + N, D]`; the models initialise them.
    """

    panels: torch.Tensor | None = None  # the weight laid out, where it stays as it is (fftp/inference.py)

    def __init__(
        self,
        grid: PatchGrid,
        D: int,
        tokens: int = 1,
        place: Literal["head", "middle", "end"] = "head",
        positions: Literal["learned", "none"] = "learned",
    ):
        super().__init__()
        self.grid, self.tokens, self.where = grid, tokens, place
        self.place = self.place_among(grid.N)
        self.weight = nn.Parameter(torch.empty(D, 1, grid.pt, grid.pf))
        self.bias = nn.Parameter(torch.empty(D))
        self.class_token = nn.Parameter(torch.empty(tokens, D))
        self.position = nn.Parameter(torch.empty(tokens + grid.N, D)) if positions == "learned" else None

    def place_among(self, patches: int) -> int:
        """The class tokens' row where there are so many patches."""
        return {"head": 0, "middle": patches // 2, "end": patches}[self.where]

    def resized(self, grid: PatchGrid, method: Literal["pinv", "bilinear"] = "pinv") -> "PatchEmbed":
        """The same embedding for another grid: positions resized bilinearly, the kernel by `resize_kernel` where the patch
        differs. From square to full-frequency patches it is a start at best: most of what the kernel knew is lost."""
        positions = "none" if self.position is None else "learned"
        new = PatchEmbed(grid, self.weight.shape[0], self.tokens, self.where, positions)
        new.weight.data = resize_kernel(self.weight.data, grid.pt, grid.pf, method)
        new.bias.data, new.class_token.data = self.bias.data.clone(), self.class_token.data.clone()
        if self.position is not None:
            new.position.data = resize_positions(self.position.data, self.tokens, self.grid, grid)
        return new

    def forward(
        self,
        log_mel: torch.Tensor,
        rectangles: torch.Tensor | None = None,
        fill: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """rectangles, fill: cells to hide without changing log_mel, see `kernels.patch_embed`.

        keep: int64 `[B, K]`, ascending, the patches to keep, each with its position; the class tokens stand among them as
        they do among all, `[B, K + c, D]`. Raises ValueError when log_mel is not the grid's size.
        """
        if log_mel.ndim != 3 or log_mel.shape[1:] != (self.grid.T, self.grid.F):
            raise ValueError(
                f"log_mel is (B, T, F) with T={self.grid.T} and F={self.grid.F} from the grid, got {tuple(log_mel.shape)}"
            )
        with ranges.range("embed"):
            tokens, position = self.class_token, None
            if self.position is not None:
                tokens, position = tokens + self.position[: self.tokens], self.position[self.tokens :]
            stride = (self.grid.st, self.grid.sf)
            weights = (self.weight, self.bias, stride, position, tokens, self.place)
            x = kernels.patch_embed(log_mel, *weights, rectangles, fill, self.panels)
            return x if keep is None else self._kept(x, keep)

    def _kept(self, x, keep):
        here, place = torch.arange(self.tokens, device=x.device), self.place_among(keep.shape[1])
        patches = keep + self.tokens * (keep >= self.place)  # the class tokens stand before patch `place`
        own = (self.place + here).expand(len(keep), -1)
        rows = torch.cat([patches[:, :place], own, patches[:, place:]], 1)  # (B, K + c)
        return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))


def least_covered(rectangles: torch.Tensor, grid: PatchGrid, K: int) -> torch.Tensor:
    """The K patches of each clip of which masks hide the fewest cells, int64 `[B, K]`, ascending; of two alike the earlier.

    rectangles: int32 `[B, M, 4]` as (t0, t1, f0, f1), half open; a cell under two of them counts once. K is at most grid.N.
    """
    hidden = covered(rectangles, grid.T, grid.F).float()[:, None]
    patch, stride = (grid.pt, grid.pf), (grid.st, grid.sf)
    cells = nnf.avg_pool2d(hidden, patch, stride, divisor_override=1)[:, 0]  # (B, n_t, n_f), sums of ones
    order = cells.mT.flatten(1).long() * grid.N + torch.arange(grid.N, device=cells.device)  # no two alike
    return order.topk(K, largest=False, sorted=False).indices.sort(1).values


def resize_positions(position: torch.Tensor, tokens: int, old: PatchGrid, new: PatchGrid) -> torch.Tensor:
    """A position table `[c + N, D]` for another grid: class rows kept, the rest resized bilinearly with antialias.

    AuM's rule (src/flexi: resize_pos_embed); with FFTP the frequency axis has one row and only time is resized.
    """
    if (old.n_f, old.n_t) == (new.n_f, new.n_t):
        return position.clone()
    grid = position[tokens:].T.reshape(1, -1, old.n_f, old.n_t)  # (1, D, n_f, n_t)
    grid = nnf.interpolate(grid.float(), size=(new.n_f, new.n_t), mode="bilinear", antialias=True)
    rows = grid.flatten(2)[0].T.to(position.dtype)  # (N, D)
    return torch.cat([position[:tokens], rows])


def image_positions(position: torch.Tensor, tokens: int, old: PatchGrid, new: PatchGrid) -> torch.Tensor:
    """A position table `[c + N, D]` of a square image for the patches of a spectrogram, by AST's rule (src/models).

    Time first, then frequency: cut from the middle where the image has enough, else bilinear without antialias.
    """
    grid = position[tokens:].float().T.reshape(1, -1, old.n_f, old.n_t)  # (1, D, n_f, n_t)
    for axis, size in ((3, new.n_t), (2, new.n_f)):
        held = grid.shape[axis]
        if size <= held:
            grid = grid.narrow(axis, held // 2 - size // 2, size)
        else:
            shape = [*grid.shape[2:]]
            shape[axis - 2] = size
            grid = nnf.interpolate(grid, size=shape, mode="bilinear")
    return torch.cat([position[:tokens], grid.flatten(2)[0].T.to(position.dtype)])


def resize_kernel(weight: torch.Tensor, pt: int, pf: int, method: Literal["pinv", "bilinear"] = "pinv") -> torch.Tensor:
    """Patch weights `[D, 1, pt, pf]` for another patch size.

    pinv: FlexiViT's rule (Beyer et al., 2023): the new kernel answers a resized patch as the old one answered the patch.
    With B the matrix of bilinear resizing, w_new = pinv(B^T) w_old, in float64 with relative cut-off 1e-6: from 16 x 16 to
    10 x 128 B has rank 160 of 256, and without the cut the result explodes. bilinear: resized with antialias.
    """
    old = weight.shape[2:]
    if tuple(old) == (pt, pf):
        return weight.clone()
    if method == "bilinear":
        return nnf.interpolate(weight.float(), size=(pt, pf), mode="bilinear", antialias=True).to(weight.dtype)
    units = torch.eye(old[0] * old[1], dtype=torch.float64).view(-1, 1, *old)
    resize = nnf.interpolate(units, size=(pt, pf), mode="bilinear").flatten(1)  # (old, new), the transpose of B
    inverse = torch.linalg.pinv(resize, rtol=1e-6)  # (new, old)
    flat = weight.detach().double().flatten(1) @ inverse.T  # (D, old) @ (old, new) -> (D, new)
    return flat.view(-1, 1, pt, pf).to(weight.dtype)
