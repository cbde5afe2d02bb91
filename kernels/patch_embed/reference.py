"""Patch embedding as it is defined: cut the windows out, multiply, add bias and position, put the class tokens in."""

import torch
import torch.nn.functional as nnf

from kernels.spec_mask.reference import covered


def patch_embed(log_mel, weight, bias, stride, position, tokens, place, rectangles=None, fill=None):
    """out = [patches before place, tokens, patches after], patch n = weight @ window n + bias + position[n].

    With rectangles and fill the windows are cut from `hide(log_mel, rectangles, fill)`.
    """
    log_mel = hide(log_mel, rectangles, fill)
    D, _, pt, pf = weight.shape
    windows = log_mel.unfold(1, pt, stride[0]).unfold(2, pf, stride[1])  # (B, n_t, n_f, pt, pf), a view
    patches = windows.transpose(1, 2).flatten(3).flatten(1, 2)  # (B, N, pt * pf), frequency band outer, time inner
    embedded = nnf.linear(patches, weight.view(D, -1), bias)  # (B, N, K) @ (K, D) -> (B, N, D)
    return join(embedded, position, tokens, place)


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
