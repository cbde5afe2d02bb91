"""From indices of clips to the model's input: gather, mixup, perturbation, log-mel, masks, noise.

Everything keyed, nothing stateful.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

import kernels
from fftp import lead
from fftp.ahead import one_ahead
from fftp.augment import Augment
from fftp.frontend import FrontEnd
from kernels import draws, ranges
from train.samples import Clips, Resident, Streamed, to_device


@dataclass(frozen=True, eq=False)
class Batch:
    """log_mel `[B, T, F]`, normalised; targets float32 `[B, C]`; indices of the clips in the pack, on the host (None where
    the clips were named by a tensor); keep int64 `[B, K]`, the patches to look at (None for all). Under --lead log_mel is
    `[B, T', F]`, rows with other clips in front, and ends int64 `[B]` says after how many patches each clip ends."""

    log_mel: torch.Tensor
    targets: torch.Tensor
    indices: np.ndarray | None
    keep: torch.Tensor | None = None
    ends: torch.Tensor | None = None


class Feed:
    """Batches of one split.

    W: samples taken of a clip, from its start; shorter clips are followed by zeros.
    """

    def __init__(self, source: Resident | Streamed, indices: np.ndarray, front_end: FrontEnd):
        self.source, self.indices, self.front_end = source, indices, front_end
        self.pack, self.device = source.pack, source.device
        self._numbers = torch.from_numpy(indices).to(self.device)
        s = front_end.settings
        self.W = max(s.fbank.frame, s.clip_samples)

    def __len__(self) -> int:
        return len(self.indices)

    def raw(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(un-normalised log-mel `[B, T, F]`, length in samples `[B]`) of clips of the split."""
        clips = self._fetched(positions)
        waveform = kernels.waveforms(clips.samples, clips.start, clips.length, self.W)
        return self.front_end.log_mel(waveform, clips.length, centred=True), clips.length

    def plain(self, positions: np.ndarray, gathered: Clips | None = None) -> Batch:
        """Clips as they are, without augmentation; positions within the split.

        gathered: the clips, where they have been fetched already.
        """
        with ranges.range("load"):
            clips = self._fetched(positions) if gathered is None else self.source.arrived(gathered)
        with ranges.range("front end"):
            waveform = kernels.waveforms(clips.samples, clips.start, clips.length, self.W)
            log_mel = self.front_end.log_mel(waveform, clips.length, centred=True)
            self.front_end.normalise(log_mel)
        return Batch(log_mel, clips.labels, self.indices[positions])

    def augmented(
        self,
        positions: np.ndarray | torch.Tensor,
        tickets: np.ndarray | torch.Tensor,
        epoch: int | torch.Tensor,
        augment: Augment,
        gathered: Clips | None = None,
    ) -> Batch:
        """Clips with the augmentation of their tickets in this epoch.

        gathered: the clips, behind them those that stand in front of them under --lead, and behind all these their
        partners in mixup, where they have been fetched already. positions and tickets `[B]` and epoch `[1]` may be int64
        tensors on the device, for a CUDA graph that reads them anew each time; where samples are streamed, gathered has to
        be given then.
        """
        with ranges.range("load"):
            every, ticket = augment.with_leads(positions, tickets, epoch, len(self))
            ticket = self._here(ticket)
            drawn = augment.mixup(epoch, ticket, len(self))
            if gathered is not None:
                clips = self.source.arrived(gathered)
            elif isinstance(self.source, Resident):
                clips = self._looked_up(every, drawn)
            else:
                clips = self.source.arrived(self._gathered(positions, tickets, epoch, augment))
        B = len(every)
        start, length, targets = clips.start[:B], clips.length[:B], clips.labels[:B]
        partner = None
        if drawn is not None:
            mixed, _, weight = drawn
            weight = torch.where(mixed, weight, 1.0)
            partner = (clips.start[B:], clips.length[B:], weight)
            targets = weight[:, None] * targets + (1 - weight[:, None]) * clips.labels[B:]
        with ranges.range("front end"):
            waveform = kernels.waveforms(clips.samples, start, length, self.W, augment.gain(epoch, ticket), partner)
            rate = self.front_end.settings.fbank.sample_rate
            waveform = augment.perturbed(waveform, length, rate, epoch, ticket)
            roll = augment.roll(epoch, ticket)
            log_mel = self.front_end.log_mel(waveform, length, roll, centred=True)
        with ranges.range("mask"):
            valid = self.front_end.valid_frames(length)
            keep = augment.kept(augment.mask(log_mel, valid, epoch, ticket, roll))
            self.front_end.normalise(log_mel, augment.noise(epoch, ticket))
        indices = None if isinstance(positions, torch.Tensor) else self.indices[positions]
        patches = augment.lead_patches(epoch, ticket[: len(positions)])
        if patches is None:
            return Batch(log_mel, targets, indices, keep)
        rows = lead.in_a_row(log_mel, patches, augment.grid)
        return Batch(rows, targets[: len(positions)], indices, None, augment.grid.N + patches)

    def evaluation(self, batch_size: int, span: slice = slice(None)) -> Iterator[Batch]:
        """The split in its own order, or a span of it, `plain`; where samples are streamed, gathered one batch ahead."""
        positions = np.arange(len(self))[span]
        parts = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
        if isinstance(self.source, Resident):
            yield from map(self.plain, parts)
            return
        with closing(one_ahead(self._fetched(part, wait=False) for part in parts)) as coming:
            yield from map(self.plain, parts, coming)

    def training(self, steps: list[tuple[np.ndarray, np.ndarray]], epoch: int, augment: Augment) -> Iterator[Batch]:
        """A batch for each (positions, tickets), `augmented`; where samples are streamed, gathered one batch ahead."""
        with closing(self.coming(steps, epoch, augment)) as coming:
            for positions, tickets, gathered in coming:
                yield self.augmented(positions, tickets, epoch, augment, gathered)

    def coming(
        self, steps: list[tuple[np.ndarray, np.ndarray]], epoch: int, augment: Augment
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Clips | None]]:
        """Each (positions, tickets) with what `augmented` wants gathered: where samples are streamed, one batch ahead."""
        if isinstance(self.source, Resident):
            yield from ((*picked, None) for picked in steps)
            return
        with closing(one_ahead(self._gathered(*picked, epoch, augment) for picked in steps)) as gathered:
            for picked, clips in zip(steps, gathered, strict=True):
                yield *picked, clips

    def _here(self, numbers):
        """Numbers from the host or from the device, on the device."""
        return numbers if isinstance(numbers, torch.Tensor) else to_device(torch.from_numpy(numbers), self.device)

    def _fetched(self, positions, wait=True):
        indices = self.indices[positions]
        if isinstance(self.source, Resident):
            return self.source.clips(to_device(torch.from_numpy(indices), self.device), self.W)
        clips = self.source.clips(indices, self.W)
        return self.source.arrived(clips) if wait else clips

    def _looked_up(self, positions, drawn):
        """Clips and partners on the device; a clip that is not mixed is its own partner. The host waits for nothing."""
        own = self._numbers[self._here(positions)]
        if drawn is None:
            return self.source.clips(own, self.W)
        mixed, partner, _ = drawn
        return self.source.clips(torch.cat([own, torch.where(mixed, self._numbers[partner], own)]), self.W)

    def _gathered(self, positions, tickets, epoch, augment):
        """The same from the host, with all that is drawn drawn there, so that nothing waits for the device."""
        positions, tickets = augment.with_leads(positions, tickets, epoch, len(self))
        own = self.indices[positions]
        drawn = augment.partners(epoch, tickets, len(self))
        if drawn is None:
            return self.source.clips(own, self.W)
        mixed, partner = drawn
        return self.source.clips(np.concatenate([own, np.where(mixed, self.indices[partner], own)]), self.W)


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
