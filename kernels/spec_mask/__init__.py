"""SpecMask and SpecAugment: draw the rectangles, paint them."""

from kernels.spec_mask.op import apply_spec_augment, apply_spec_mask, draw_spec_augment, draw_spec_mask, paint

__all__ = ["apply_spec_augment", "apply_spec_mask", "draw_spec_augment", "draw_spec_mask", "paint"]
