"""SpecMask as a layer, for training loops of one's own."""

import torch
from torch import nn

import kernels
from fftp.augment import AugmentSettings, clip_level
from kernels.spec_mask.op import FULL_SHARE
from kernels.spec_mask.reference import covered


class SpecMask(nn.Module):
    """Hides full-height slices and smaller rectangles of spectrograms while training; hands them on otherwise.

    Paper, section III-B and Algorithm 1. area: cells to hide, which the last rectangle may exceed; the paper has 20 % of ten
    seconds (25,600, with max_width 128) and 1,024 of 128 x 128 (with max_width 16). max_width: frames, max_height: bins.
    full_share: of the rectangles are full height. fill: "mean", each clip's own, or a number, in the spectrogram's units.
    Raises ValueError for sizes below 1 and shares outside 0..1.
    """

    def __init__(
        self,
        area: int = AugmentSettings.mask_area,
        max_width: int = AugmentSettings.mask_width,
        max_height: int = AugmentSettings.mask_height,
        full_share: float = FULL_SHARE,
        fill: float | str = "mean",
    ):
        super().__init__()
        if isinstance(fill, str) and fill != "mean":
            raise ValueError(f'fill is a number or "mean", got {fill!r}')
        self.sizes = {"budget": area, "max_width": max_width, "max_height": max_height, "full_share": full_share}
        self.fill = fill
        kernels.draw_spec_mask(0, 0, torch.zeros(1, dtype=torch.int64), 1, 1, **self.sizes)  # says what cannot be

    def forward(
        self, log_mel: torch.Tensor, seed: int | None = None, epoch: int = 0, tickets: torch.Tensor | None = None
    ) -> torch.Tensor:
        """log_mel `[B, T, F]` or `[T, F]`, frames before bins; a new tensor, without a gradient where it is hidden.

        Each call draws anew from torch's generator. With a seed the masks depend on (seed, epoch, ticket) alone, whatever the
        batch and the device; tickets int64 `[B]`: the clips' places in the epoch's order, without them 0, 1, 2...
        """
        if not self.training:
            return log_mel
        x = log_mel[None] if log_mel.ndim == 2 else log_mel
        if x.ndim != 3:
            raise ValueError(f"SpecMask takes log_mel (B, T, F) or (T, F), got {tuple(log_mel.shape)}")
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        if tickets is None:
            tickets = torch.arange(x.shape[0], device=x.device)
        held = x.detach()
        fill = clip_level(held.float()) if self.fill == "mean" else held.new_full(x.shape[:1], self.fill).float()
        if x.requires_grad:
            rectangles = kernels.draw_spec_mask(seed, epoch, tickets, *x.shape[1:], **self.sizes)[0]
            masked = torch.where(covered(rectangles, *x.shape[1:]), fill[:, None, None].to(x.dtype), x)
        else:
            masked = held.clone(memory_format=torch.contiguous_format)
            kernels.apply_spec_mask(masked, fill, seed, epoch, tickets, **self.sizes)
        return masked[0] if log_mel.ndim == 2 else masked

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in (*self.sizes.items(), ("fill", self.fill)))
