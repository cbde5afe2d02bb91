"""From indices of clips to the model's input: gather, mixup, log-mel, masks, noise. Everything keyed, nothing stateful."""

from dataclasses import dataclass

import numpy as np
import torch

import kernels
from fftp.augment import Augment
from fftp.frontend import FrontEnd
from kernels import draws, ranges
from train.data.pack import Pack


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

    def _packed(self, indices):
        """What holds these clips: (samples int16 `[n]`, start and length int64 `[B]`)."""
        length = np.minimum(self.pack.length[indices], self.W)
        spans = zip(self.pack.start[indices], length, strict=True)
        samples = np.concatenate([self.pack.samples[start : start + n] for start, n in spans])
        start = np.cumsum(length) - length
        return [torch.from_numpy(array).to(self.device) for array in (samples, start, length)]

    def _targets(self, indices):
        return torch.from_numpy(self.pack.labels[indices]).to(self.device)

    def raw(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(un-normalised log-mel `[B, T, F]`, length in samples `[B]`) of clips of the split."""
        packed = self._packed(self.indices[positions])
        return self.front_end.log_mel(kernels.waveforms(*packed, self.W), packed[2], centred=True), packed[2]

    def plain(self, positions: np.ndarray) -> Batch:
        """Clips as they are, without augmentation; positions within the split."""
        indices = self.indices[positions]
        with ranges.range("load"):
            packed = self._packed(indices)
        with ranges.range("front end"):
            log_mel = self.front_end.log_mel(kernels.waveforms(*packed, self.W), packed[2], centred=True)
            self.front_end.normalise(log_mel)
        return Batch(log_mel, self._targets(indices), indices)

    def augmented(self, positions: np.ndarray, tickets: np.ndarray, epoch: int, augment: Augment) -> Batch:
        """Clips with the augmentation of their tickets in this epoch."""
        indices = self.indices[positions]
        ticket = torch.from_numpy(tickets).to(self.device)
        targets = self._targets(indices)
        with ranges.range("load"):
            samples, start, length = self._packed(indices)
            samples, partner, targets = self._partners(samples, targets, ticket, epoch, augment)
        with ranges.range("front end"):
            waveform = kernels.waveforms(samples, start, length, self.W, augment.gain(epoch, ticket), partner)
            roll = augment.roll(epoch, ticket)
            log_mel = self.front_end.log_mel(waveform, length, roll, centred=True)
        with ranges.range("mask"):
            augment.mask(log_mel, self.front_end.valid_frames(length), epoch, ticket, roll)
            self.front_end.normalise(log_mel, augment.noise(epoch, ticket))
        return Batch(log_mel, targets, indices)

    def _partners(self, samples, targets, ticket, epoch, augment):
        """(samples that hold the partners too, what `kernels.waveforms` takes of them, targets mixed as the waveforms are)."""
        drawn = augment.mixup(epoch, ticket, len(self.indices))
        if drawn is None:
            return samples, None, targets
        mixed, partner, weight = drawn
        weight = torch.where(mixed, weight, 1.0)
        others = self.indices[partner.cpu().numpy()]
        more, start, length = self._packed(others)
        targets = weight[:, None] * targets + (1 - weight[:, None]) * self._targets(others)
        return torch.cat([samples, more]), (start + len(samples), length, weight), targets


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
