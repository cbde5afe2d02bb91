"""One optimiser step: micro-batches, forward, loss, backward, clipping, AdamW, schedule, moving average.

Whatever changes from step to step lies in tensors that are filled in place, so that the same calls can be captured in a
CUDA graph (train.graph). Over several processes each works on its share of the batch, and all end with the same weights.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf

from fftp import checkpoint, lead
from fftp.augment import Augment
from fftp.errors import UserError
from kernels import ranges
from train import parallel
from train.averaging import MovingAverage
from train.feed import Batch, Feed, Order
from train.muon import Muon
from train.settings import Settings

HEAD = ("head.", "head_norm.")  # how names of the head's parameters start; all others are the body's
Part = tuple[np.ndarray, np.ndarray]  # positions in the split, and tickets, of some of a step's clips


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Everything a run works on."""

    settings: Settings
    config: checkpoint.CheckpointConfig
    model: torch.nn.Module
    train: Feed
    validation: Feed | None
    device: torch.device
    precision: torch.dtype
    out: Path
    began_from: dict[str, Any] | None = None  # train.start.about, under --init

    @property
    def key_metric(self) -> str:
        return "map" if self.config.multi_label else "accuracy"


def trained(task: Task):
    """The model's configuration with the grid that a step runs it on: longer than its own under --lead."""
    model, s = task.config.model, task.settings
    return replace(model, grid=lead.grid_of(model.grid, s.lead_clips)) if s.lead else model


def autocast(task: Task):
    return torch.autocast(task.device.type, dtype=torch.bfloat16, enabled=task.precision == torch.bfloat16)


def optimiser_of(
    model: torch.nn.Module,
    settings: Settings,
    lr: tuple[torch.Tensor, torch.Tensor] | None = None,
    precision: torch.dtype = torch.float32,
) -> torch.optim.Adam:
    """AdamW without decay on what the model names (vectors, tokens, positions, scan decays), Muon on the model's matrices
    beside it, or Adam with L2 on everything.

    lr: tensors on the model's device that hold the learning rates of the moment, the head's and the body's; without
    them, settings' own throughout. Where the two are one rate there are no groups for them. precision: of Muon's products.
    """
    adam, scale = settings.optimiser == "adam", settings.body_lr_scale
    rates = (settings.lr, scale * settings.lr) if lr is None else lr
    kept, groups = set() if adam else model.undecayed(), {}
    for name, parameter in model.named_parameters():
        body = scale != 1 and not name.startswith(HEAD)
        groups.setdefault((name in kept, body), []).append(parameter)
    groups = [
        {"params": held, "weight_decay": 0.0 if spared else settings.weight_decay, "lr": rates[body]}
        for (spared, body), held in sorted(groups.items())
    ]
    how = {"betas": (settings.beta1, settings.beta2), "fused": True, "capturable": lr is not None and lr[0].is_cuda}
    if settings.optimiser == "muon":
        named = dict(model.named_parameters())
        return Muon(groups, {named[name]: count for name, count in model.matrices().items()}, precision, **how)
    return (torch.optim.Adam if adam else torch.optim.AdamW)(groups, **how)


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """Linear warm-up from 0, then a cosine down to lr_end of the peak, or steps down by epochs; step counts from 0.

    An epoch's share of the run is 1 / epochs, also where max_steps shortens it. The steps are PyTorch's MultiStepLR
    with milestones step_from, step_from + step_every and so on, taken at the end of epochs as AST's loop does.
    """
    warm = min(round(total * settings.warmup_epochs / settings.epochs), total - 1)
    if step < warm:
        return settings.lr * (step + 1) / warm
    if settings.schedule == "step":
        epoch = step * settings.epochs // total
        downs = 1 + (epoch - settings.step_from) // settings.step_every if epoch >= settings.step_from else 0
        return settings.lr * settings.step_factor**downs
    share = (step - warm) / max(1, total - warm)
    return settings.lr * (settings.lr_end + (1 - settings.lr_end) * 0.5 * (1 + math.cos(math.pi * share)))


def loss_of(logits: torch.Tensor, targets: torch.Tensor, settings: Settings, multi_label: bool) -> torch.Tensor:
    """Cross-entropy with soft targets (mean over B), or binary cross-entropy (mean over B x C); in float32."""
    if settings.loss == "bce" or (settings.loss == "auto" and multi_label):
        return nnf.binary_cross_entropy_with_logits(logits.float(), targets)
    targets = targets / targets.sum(1, keepdim=True).clamp_min(1e-8)
    return nnf.cross_entropy(logits.float(), targets, label_smoothing=settings.label_smoothing)


class Step:
    """`step(number, epoch, batches)`: one optimiser step of a run of `total`; its loss stands in `loss` until the next.

    A step takes settings.batch_size clips (order.batch_size, where the split has fewer) over all processes, each of
    them in settings.accumulate micro-batches. Every loss is weighted by its clips, so that their sum is the mean over
    the whole batch, however unequal the parts are.

    broken: 1 from the first loss or gradient on that is not finite, and then no weight changes; broken_step: its number.
    Raises UserError when there are not enough clips for so many parts.
    """

    def __init__(self, task: Task, order: Order, total: int):
        s, device = task.settings, task.device
        self.task, self.total, self.clips, self.parts = task, total, order.batch_size, s.accumulate
        check_parts(self.clips, self.parts)
        grid = task.config.model.grid
        self.augment = Augment(s, s.seed, grid.T, grid.F, grid)
        self.forward = parallel.shared(task.model, device)
        # The CPU's AdamW takes the rate as a float64, as it would take a number; CUDA's as a float32.
        self.rate = torch.zeros((), dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device)
        self.body_rate = torch.zeros_like(self.rate)
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.broken = torch.zeros((), device=device)
        self.broken_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.optimiser = optimiser_of(task.model, s, (self.rate, self.body_rate), task.precision)
        # PyTorch warns of steps outside of a capture: the ones before it, and all of --graph off.
        self.optimiser._warned_capturable_if_run_uncaptured = True
        self.average = MovingAverage(task.model, s.average_decay) if s.average_decay else None

    def evaluated(self) -> contextlib.AbstractContextManager:
        """Inside, the model has the weights that are evaluated and kept: their moving average, where there is one."""
        return self.average.in_place() if self.average else contextlib.nullcontext()

    def divided(self, steps: list[Part]) -> list[Part]:
        """The micro-batches of this process, step by step: settings.accumulate for each."""
        here = parallel.share(self.clips)
        cuts = parallel.pieces(here.stop - here.start, self.parts)
        return [(p[here][cut], t[here][cut]) for p, t in steps for cut in cuts]

    def inputs(self, parts: list[Part], epoch: int) -> Iterator[Batch]:
        """What the calls of an epoch take, settings.accumulate at a time."""
        return self.task.train.training(parts, epoch, self.augment)

    def __call__(self, number: int, epoch: int, batches: Iterable[Batch]) -> torch.Tensor:
        self.aim(number)
        self.update(batches)
        return self.loss

    def aim(self, number: int) -> None:
        """Fill in what belongs to a step, counted from 0."""
        self.number.fill_(number)
        rate = learning_rate(self.task.settings, number, self.total)
        self.rate.fill_(rate)
        self.body_rate.fill_(self.task.settings.body_lr_scale * rate)

    def update(self, batches: Iterable[Batch]) -> None:
        """Gradients of all micro-batches, then the weights. Nothing in here reads a number from the device."""
        self.loss.zero_()
        for i, batch in enumerate(batches):
            with contextlib.nullcontext() if i + 1 == self.parts else self._unshared():
                self.loss += self._gradients(batch)
        parallel.add(self.loss)  # so that all processes stop where one's loss is not finite
        with ranges.range("optimiser"):
            bad = ~torch.isfinite(self.loss)
            if self.task.settings.clip_norm:
                norm = torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), self.task.settings.clip_norm)
                bad = bad | ~torch.isfinite(norm)
            self.broken_step.copy_(torch.where(bad & (self.broken == 0), self.number, self.broken_step))
            self.broken.copy_(torch.maximum(self.broken, bad.float()))
            self.optimiser.found_inf = self.broken
            self.optimiser.step()
            if self.average:
                self.average.update(self.number, self.broken)
            self.optimiser.zero_grad(set_to_none=True)

    def _gradients(self, batch: Batch) -> torch.Tensor:
        """Add a micro-batch's gradients; returns its part of the loss, detached."""
        task = self.task
        with autocast(task):
            ends = () if batch.ends is None else (batch.ends,)  # AST knows of none
            logits = self.forward(batch.log_mel, batch.keep, *ends)
        loss = loss_of(logits, batch.targets, task.settings, task.config.multi_label)
        loss = loss * (len(batch.targets) / self.clips)
        with ranges.range("backward"):
            (loss * parallel.size()).backward()  # the processes' gradients are averaged, and their sum is wanted
        return loss.detach()

    def _unshared(self):
        """While gradients are still being added up, nothing is sent to other processes."""
        return self.forward.no_sync() if parallel.size() > 1 else contextlib.nullcontext()


def check_parts(clips: int, parts: int) -> None:
    """Raises UserError unless every process has a clip for each of its micro-batches."""
    processes = parallel.size()
    if clips // processes >= parts:
        return
    among = f" for {processes} processes" if processes > 1 else ""
    cure = "take fewer processes, or a larger --batch-size"
    if clips >= processes:
        cure = f"take --accumulate {clips // processes} or less"
    raise UserError(f"--accumulate {parts}: a step has {clips} clips{among}, too few for one in each part: {cure}.")
