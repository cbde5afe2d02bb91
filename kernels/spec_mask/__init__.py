"""SpecMask and SpecAugment: draw the rectangles, paint them."""

from kernels.spec_mask.op import draw_spec_augment, draw_spec_mask, paint

__all__ = ["draw_spec_augment", "draw_spec_mask", "paint"]
