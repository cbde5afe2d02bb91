"""From indices of clips to the model's input: gather, mixup, log-mel, masks, noise. Everything keyed, nothing stateful."""

from dataclasses import dataclass

import numpy as np
import torch

import kernels
from fftp.augment import Augment
from fftp.frontend import FrontEnd
from kernels import draws, ranges
from train.data.pack import Pack

INT16_SCALE = 1 / 32768.0


@dataclass(frozen=True, eq=False)
class Batch:
    """log_mel `[B, T, F]`, normalised; targets float32 `[B, C]`; indices of the clips in the pack, on the host."""

    log_mel: torch.Tensor
    targets: torch.Tensor
    indices: np.ndarray


class Feed:
    """Batches of one split.

    W: samples taken of a clip, from its start; shorter clips are followed by zeros.
    """

    def __init__(self, pack: Pack, indices: np.ndarray, front_end: FrontEnd, device: torch.device):
        self.pack, self.indices, self.front_end, self.device = pack, indices, front_end, device
        s = front_end.settings
        self.W = max(s.fbank.frame, s.clip_samples)

    def __len__(self) -> int:
        return len(self.indices)

    def _waves(self, indices):
        """(waveform float32 `[B, W]`, length int64 `[B]`) of clips of the pack."""
        samples = np.zeros((len(indices), self.W), dtype=np.int16)
        length = np.minimum(self.pack.length[indices], self.W)
        for row, start, n in zip(samples, self.pack.start[indices], length, strict=True):
            row[:n] = self.pack.samples[start : start + n]
        waveform = torch.from_numpy(samples).to(self.device).float().mul_(INT16_SCALE)
        return waveform, torch.from_numpy(length).to(self.device)

    def _targets(self, indices):
        return torch.from_numpy(self.pack.labels[indices]).to(self.device)

    def raw(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(un-normalised log-mel `[B, T, F]`, length in samples `[B]`) of clips of the split."""
        waveform, length = self._waves(self.indices[positions])
        return self.front_end.log_mel(waveform, length), length

    def plain(self, positions: np.ndarray) -> Batch:
        """Clips as they are, without augmentation; positions within the split."""
        indices = self.indices[positions]
        with ranges.range("load"):
            waveform, length = self._waves(indices)
        with ranges.range("front end"):
            log_mel = self.front_end(waveform, length)
        return Batch(log_mel, self._targets(indices), indices)

    def augmented(self, positions: np.ndarray, tickets: np.ndarray, epoch: int, augment: Augment) -> Batch:
        """Clips with the augmentation of their tickets in this epoch."""
        indices = self.indices[positions]
        ticket = torch.from_numpy(tickets).to(self.device)
        targets = self._targets(indices)
        with ranges.range("load"):
            waveform, length = self._waves(indices)
            waveform, targets = self._mixed(waveform, length, targets, ticket, epoch, augment)
        with ranges.range("front end"):
            roll = augment.roll(epoch, ticket)
            log_mel = self.front_end.log_mel(waveform, length, roll)
        with ranges.range("mask"):
            augment.mask(log_mel, self.front_end.valid_frames(length), epoch, ticket, roll)
            self.front_end.normalise(log_mel)
            augment.add_noise(log_mel, epoch, ticket)
        return Batch(log_mel, targets, indices)

    def _mixed(self, waveform, length, targets, ticket, epoch, augment):
        """Gain and mixup on waveforms; labels mix as the waveforms do (AST, src/dataloader.py)."""
        gain = augment.gain(epoch, ticket)
        if gain is not None:
            waveform = waveform * gain[:, None]
        drawn = augment.mixup(epoch, ticket, len(self.indices))
        if drawn is None:
            return waveform, targets
        mixed, partner, weight = drawn
        weight = torch.where(mixed, weight, 1.0)[:, None]
        others = self.indices[partner.cpu().numpy()]
        other, other_length = self._waves(others)
        other = kernels.remove_mean(other, other_length)
        # The partner is cut to the first clip's length, or followed by zeros up to it.
        inside = torch.arange(self.W, device=self.device) < length[:, None]
        mix = weight * kernels.remove_mean(waveform, length) + (1 - weight) * torch.where(inside, other, 0.0)
        waveform = torch.where(mixed[:, None], mix, waveform)
        return waveform, weight * targets + (1 - weight) * self._targets(others)


class Order:
    """Which clips an epoch's steps take: full batches of a keyed shuffle, or of keyed balanced draws.

    batch_size is cut to the split; the last partial batch is dropped, so that every step has the same shape.
    """

    def __init__(self, feed: Feed, batch_size: int, seed: int, balanced: bool):
        self.n, self.seed = len(feed), seed
        self.batch_size = min(batch_size, self.n)
        self.steps = self.n // self.batch_size
        self.weights = class_weights(feed.pack.labels[feed.indices]) if balanced else None

    def epoch(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(positions in the split, tickets) of each step."""
        if self.weights is None:
            order = draws.shuffle(self.seed, epoch, self.n)
        else:
            order = draws.balanced(self.seed, epoch, self.weights, self.n)
        tickets = np.arange(self.n, dtype=np.int64)
        spans = [slice(i * self.batch_size, (i + 1) * self.batch_size) for i in range(self.steps)]
        return [(order[s], tickets[s]) for s in spans]


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Integer weight of each clip, in proportion to the sum of 1 / (clips of the class) over its labels (AST,
    egs/audioset/gen_weight_file.py); the sum of all stays below 2^31."""
    share = labels @ (1.0 / np.maximum(labels.sum(0), 1.0))
    return np.maximum(1, np.floor(share * (2.0**30 / share.sum()))).astype(np.int64)
