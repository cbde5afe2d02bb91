"""Patch embedding as it is defined: cut the windows out, multiply, add bias and position, put the class tokens in."""

import torch
import torch.nn.functional as nnf

from kernels.spec_mask.reference import covered


def patch_embed(log_mel, weight, bias, stride, position, tokens, place, rectangles=None, fill=None, panels=None):
    """out = [patches before place, tokens, patches after], patch n = weight @ window n + bias + position[n].

    With rectangles and fill the windows are cut from `hide(log_mel, rectangles, fill)`.
    """
    patches = windows(hide(log_mel, rectangles, fill), weight.shape[2:], stride)
    embedded = nnf.linear(patches, weight.flatten(1), bias)  # (B, N, K) @ (K, D) -> (B, N, D)
    return join(embedded, position, tokens, place)


def windows(log_mel, patch, stride):
    """The patches `[B, N, pt * pf]`, frequency band outer, time inner; a view where they have full frequency."""
    cut = log_mel.unfold(1, patch[0], stride[0]).unfold(2, patch[1], stride[1])  # (B, n_t, n_f, pt, pf)
    return cut.transpose(1, 2).flatten(3).flatten(1, 2)


def hide(log_mel, rectangles, fill):
    """log_mel with fill[b] inside sample b's rectangles, as `paint` on a clone; itself where there are none."""
    if rectangles is None:
        return log_mel
    value = fill.detach().to(log_mel.dtype)[:, None, None]
    return torch.where(covered(rectangles, *log_mel.shape[1:]), value, log_mel)


def join(embedded, position, tokens, place):
    """Add position `[N, D]` to the patches `[B, N, D]` and insert tokens `[c, D]` before patch number `place`."""
    if position is not None:
        embedded = embedded + position
    rows = tokens.to(embedded.dtype).expand(embedded.shape[0], -1, -1)  # (B, c, D)
    return torch.cat([embedded[:, :place], rows, embedded[:, place:]], 1)
