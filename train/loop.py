"""The training loop: steps, epochs, evaluation, checkpoints. What a step computes depends on the settings alone."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf

from fftp import checkpoint
from fftp.augment import Augment
from fftp.errors import UserError
from kernels import ranges
from train import metrics, state
from train.feed import Batch, Feed, Order
from train.settings import Settings

EVALUATION_BATCH = 128
CHECK_EVERY = 50  # steps between looks at the device's finite flag on a GPU; on a CPU looking is free
FEW = 10  # steps that first_loss and last_loss of an epoch are means of
TIME_FIELDS = ("seconds", "samples_per_second", "step_ms")  # fields that no two runs share


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

    @property
    def key_metric(self) -> str:
        return "map" if self.config.multi_label else "accuracy"


def autocast(task: Task):
    return torch.autocast(task.device.type, dtype=torch.bfloat16, enabled=task.precision == torch.bfloat16)


def optimiser_of(model: torch.nn.Module, settings: Settings) -> torch.optim.Adam:
    """AdamW without decay on what the model names (vectors, tokens, positions, scan decays), or Adam with L2 on everything."""
    how = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "fused": True}
    if settings.optimiser == "adam":
        return torch.optim.Adam(model.parameters(), weight_decay=settings.weight_decay, **how)
    kept = model.undecayed()
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if n not in kept], "weight_decay": settings.weight_decay},
        {"params": [p for n, p in named if n in kept], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **how)


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


@torch.inference_mode()
def evaluate(task: Task, feed: Feed) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """(figures, scores `[n, C]`, targets `[n, C]`) of a split, clips in the pack's order."""
    task.model.eval()
    scores, targets, losses = [], [], []
    with closing(feed.evaluation(EVALUATION_BATCH)) as batches:
        for batch in batches:
            with autocast(task):
                logits = task.model(batch.log_mel)
            losses.append(loss_of(logits, batch.targets, task.settings, task.config.multi_label) * len(batch.indices))
            scores.append(task.config.probabilities(logits))
            targets.append(batch.targets)
    task.model.train()
    score, target = torch.cat(scores).cpu().numpy(), torch.cat(targets).cpu().numpy()
    figures = metrics.multi_label(score, target) if task.config.multi_label else metrics.single_label(score, target)
    return {"loss": float(torch.stack(losses).sum()) / len(feed), **figures}, score, target


class Trainer:
    """A run over its epochs. `progress` is what last/state.json holds, and what metrics.jsonl is written from."""

    def __init__(self, task: Task, on_step: Callable[[int, int], None]):
        s = task.settings
        self.task, self.on_step = task, on_step
        self.optimiser = optimiser_of(task.model, s)
        self.augment = Augment(s, s.seed, task.config.model.grid.T, task.config.model.grid.F)
        self.order = Order(task.train, s.batch_size, s.seed, s.balanced)
        self.total = s.epochs * self.order.steps
        if s.max_steps:
            self.total = min(self.total, s.max_steps)
        self.epochs = math.ceil(self.total / self.order.steps)
        self.averages = state.Averages()
        self.progress = {"epoch": 0, "seconds": 0.0, "history": [], "best": None}
        # 1 from the first loss that is not finite on: the fused optimiser then leaves every weight alone.
        self.broken = torch.zeros((), device=task.device)
        self.broken_step = torch.full((), -1, dtype=torch.int64, device=task.device)

    def resume(self) -> bool:
        """Take up last/ where there is one."""
        folder = self.task.out / "last"
        checkpoint.recover(folder)
        if not folder.is_dir():
            return False
        self.progress = state.restore(folder, self.task.model, self.optimiser, self.averages)
        return True

    def epoch(self) -> dict:
        """Train and validate one epoch, save it, and return its line of metrics.jsonl."""
        started = time.perf_counter()
        number = self.progress["epoch"]
        first = number * self.order.steps
        steps = self.order.epoch(number)[: self.total - first]
        with closing(self.task.train.training(steps, number, self.augment)) as batches:
            losses = [self._step(first + i, number, batch) for i, batch in enumerate(batches)]
        self._refuse_broken(number)
        seconds = time.perf_counter() - started
        line = {
            "epoch": number + 1,
            "step": first + len(steps),
            "train_loss": float(torch.stack(losses).mean()),
            "first_loss": float(torch.stack(losses[:FEW]).mean()),
            "last_loss": float(torch.stack(losses[-FEW:]).mean()),
            "lr": self.optimiser.param_groups[0]["lr"],
            "samples_per_second": len(steps) * self.order.batch_size / seconds,
            "step_ms": 1000 * seconds / len(steps),
        }
        if every := self.task.settings.log_every:
            kept = range(every - 1 - first % every, len(steps), every)
            line["losses"] = {str(first + i + 1): float(losses[i]) for i in kept}
        if self.task.validation is not None:
            line |= {f"validation_{k}": v for k, v in evaluate(self.task, self.task.validation)[0].items()}
        self.progress["seconds"] += time.perf_counter() - started
        line["seconds"] = self.progress["seconds"]
        self._keep(line)
        return line

    def _step(self, step: int, epoch: int, batch: Batch) -> torch.Tensor:
        task, s = self.task, self.task.settings
        with autocast(task):
            logits = task.model(batch.log_mel)
        loss = loss_of(logits, batch.targets, s, task.config.multi_label)
        with ranges.range("backward"):
            loss.backward()
        with ranges.range("optimiser"):
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate(s, step, self.total)
            bad = ~torch.isfinite(loss.detach())
            if s.clip_norm:
                norm = torch.nn.utils.clip_grad_norm_(task.model.parameters(), s.clip_norm)
                bad = bad | ~torch.isfinite(norm)
            self.broken_step.copy_(torch.where(bad & (self.broken == 0), step, self.broken_step))
            self.broken.copy_(torch.maximum(self.broken, bad.float()))
            self.optimiser.found_inf = self.broken
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        if task.device.type == "cpu" or step % CHECK_EVERY == CHECK_EVERY - 1:
            self._refuse_broken(epoch)
        self.on_step(step + 1, self.total)
        return loss.detach()

    def _refuse_broken(self, epoch: int) -> None:
        step = int(self.broken_step)
        if step < 0:
            return
        at = step - epoch * self.order.steps
        positions, _ = self.order.epoch(epoch)[at]
        names = [self.task.train.pack.names[i] for i in self.task.train.indices[positions[:3]]]
        kept = (
            f"the last good checkpoint is {self.task.out / 'last'}"
            if self.progress["epoch"]
            else "nothing was saved yet"
        )
        raise UserError(
            f"The loss or its gradient was no longer finite at step {step + 1} (epoch {epoch + 1}, batch {at + 1}, clips "
            f"{', '.join(names)}, ...), and no weight was changed from there on: "
            f"try a lower --lr or more --warmup-epochs; {kept}."
        )

    def _keep(self, line: dict) -> None:
        """Take the epoch into the progress, and write best/ and last/; a kill between the two repeats the epoch."""
        task, progress = self.task, self.progress
        progress["epoch"] += 1
        progress["history"].append(line)
        score = line.get(f"validation_{task.key_metric}")
        if score is not None and (progress["best"] is None or score > progress["best"]["score"]):
            progress["best"] = {"epoch": line["epoch"], "score": score}
            with checkpoint.replacing(task.out / "best") as beside:
                checkpoint.save(beside, task.model, task.config)
        if line["epoch"] > self.epochs - task.settings.average_last:
            self.averages.add(task.model)
        state.save(task.out / "last", task.model, task.config, self.optimiser, self.averages, progress)

    @property
    def done(self) -> bool:
        return self.progress["epoch"] >= self.epochs
