"""SpecMask and SpecAugment, drawn and painted, beside the same algorithm on the CPU and filling with indexing."""

from collections.abc import Iterator

import torch

import kernels
from bench.measure import Case
from kernels import dispatch
from kernels.spec_mask import reference

# The paper's settings: AudioSet, ten seconds, and Speech Commands, one second.
SETTINGS = {
    "AudioSet": {"T": 1000, "budget": 25600, "max_width": 128},
    "Speech Commands": {"T": 128, "budget": 1024, "max_width": 16},
}
F = 128


def cases(device: str) -> Iterator[Case]:
    for B in (32,) if device == "cpu" else (32, 256, 1):
        for name, sizes in SETTINGS.items():
            yield _case(name, sizes, B, device)


def _case(name, sizes, B, device):
    T, draw = sizes["T"], {k: v for k, v in sizes.items() if k != "T"} | {"max_height": F}
    dispatch.use_fused(True)
    backends = dispatch.select("apply_spec_mask", device, "float32").name
    peers = {
        "torch on the device": lambda sets: _candidate(_plain, B, T, draw, device, sets),
        "painting alone, by indexing": lambda sets: _indexing(B, T, draw, device, sets),
    }
    eager = ("painting alone, by indexing",)
    if device == "cuda":
        peers["drawn on the CPU, painted by indexing"] = lambda sets: _from_host(B, T, draw, device, sets)
        eager += ("drawn on the CPU, painted by indexing",)
    drawn, _, area = reference.draw_spec_mask(
        0, 0, torch.arange(B), T, F, full_share=0.7, shapes=64, attempts=100, clip=False, snap=1, **draw
    )
    return Case(
        part="spec_mask",
        case={"settings": name, "B": B, "T": T, "F": F, "cells": float(area.sum()) / B},
        backend=backends,
        ours=lambda sets: _candidate(_ours, B, T, draw, device, sets),
        peers=peers,
        correct=lambda: _correct(B, T, draw, device, drawn),
        set_bytes=4 * B * T * F,
        bytes=4.0 * float(area.sum()),
        eager=eager,
    )


def _given(B, T, device, sets):
    """(log-mels float32, seed, epoch, tickets, fill) on the device."""
    log_mels = [torch.randn(B, T, F, device=device) for _ in range(sets)]
    seed, epoch = torch.tensor([11], device=device), torch.tensor([2], device=device)
    return log_mels, seed, epoch, torch.arange(B, device=device), torch.randn(B, device=device)


def _candidate(function, B, T, draw, device, sets):
    log_mels, seed, epoch, tickets, fill = _given(B, T, device, sets)
    return lambda i: function(log_mels[i], seed, epoch, tickets, fill, T, draw)


def _ours(log_mel, seed, epoch, tickets, fill, T, draw):
    kernels.apply_spec_mask(log_mel, fill, seed, epoch, tickets, **draw)
    return log_mel


def _plain(log_mel, seed, epoch, tickets, fill, T, draw):
    more = {"full_share": 0.7, "shapes": 64, "attempts": 100, "clip": False, "snap": 1}
    return reference.paint(log_mel, reference.draw_spec_mask(seed, epoch, tickets, T, F, **draw, **more)[0], fill)


def _indexing(B, T, draw, device, sets):
    """Rectangles known, one slice after the other: the painting that a loader's Python does, and nothing else."""
    log_mels, seed, epoch, tickets, fill = _given(B, T, device, sets)
    rectangles = kernels.draw_spec_mask(seed, epoch, tickets, T, F, **draw)[0].tolist()
    values = fill.tolist()

    def paint(i):
        for clip, rows, value in zip(log_mels[i], rectangles, values, strict=True):
            for t0, t1, f0, f1 in rows:
                if t1 > t0:
                    clip[t0:t1, f0:f1] = value

    return paint


def _from_host(B, T, draw, device, sets):
    """Algorithm 1 on the CPU, in torch, for each batch; then slices of the GPU's spectrogram."""
    log_mels, _, _, _, fill = _given(B, T, device, sets)
    tickets, values = torch.arange(B), fill.tolist()
    more = {"full_share": 0.7, "shapes": 64, "attempts": 100, "clip": False, "snap": 1}

    def paint(i):
        rectangles = reference.draw_spec_mask(11, 2, tickets, T, F, **draw, **more)[0].tolist()
        for clip, rows, value in zip(log_mels[i], rectangles, values, strict=True):
            for t0, t1, f0, f1 in rows:
                if t1 > t0:
                    clip[t0:t1, f0:f1] = value

    return paint


def _correct(B, T, draw, device, drawn):
    """The same rectangles and the same cells as the reference's on the CPU, bit for bit."""
    log_mel, tickets = torch.randn(B, T, F), torch.arange(B)
    fill = torch.randn(B)
    wanted = _plain(log_mel.clone(), 11, 2, tickets, fill, T, draw)
    got = _ours(log_mel.clone().to(device), 11, 2, tickets.to(device), fill.to(device), T, draw)
    rectangles = kernels.draw_spec_mask(0, 0, tickets.to(device), T, F, **draw)[0]
    return torch.equal(got.cpu(), wanted) and torch.equal(rectangles.cpu(), drawn)
