"""The training loop: epochs, evaluation, checkpoints. What a run computes depends on its settings alone."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import islice

import numpy as np
import torch

from fftp import checkpoint
from fftp.errors import UserError
from train import graph, metrics, parallel, state, step
from train.feed import Feed, Order
from train.step import Step, Task

EVALUATION_BATCH = 128
CHECK_EVERY = 50  # steps between looks at the device's finite flag on a GPU; on a CPU looking is free
STEP_FLOPS = 2 * 3  # of a clip, for each multiply-accumulate of its forward: the backward takes twice as many again
FEW = 10  # steps that first_loss and last_loss of an epoch are means of
TIME_FIELDS = ("seconds", "samples_per_second", "step_ms", "tflops")  # fields that no two runs share


@torch.inference_mode()
def evaluate(task: Task, feed: Feed) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """(figures, scores `[n, C]`, targets `[n, C]`) of a split, clips in the pack's order; the same on every process.

    Over several processes each scores a span of the clips.
    """
    task.model.eval()
    scores, targets, losses = [], [], [torch.zeros((), device=task.device)]
    with closing(feed.evaluation(EVALUATION_BATCH, parallel.share(len(feed)))) as batches:
        for batch in batches:
            with step.autocast(task):
                logits = task.model(batch.log_mel)
            loss = step.loss_of(logits, batch.targets, task.settings, task.config.multi_label)
            losses.append(loss * len(batch.indices))
            scores.append(task.config.probabilities(logits))
            targets.append(batch.targets)
    task.model.train()
    none = torch.empty(0, len(task.config.labels))
    here = [torch.cat([none, *(part.cpu() for part in parts)]).numpy() for parts in (scores, targets)]
    losses, scores, targets = zip(*parallel.gather((float(torch.stack(losses).sum()), *here)), strict=True)
    score, target = np.concatenate(scores), np.concatenate(targets)
    figures = metrics.multi_label(score, target) if task.config.multi_label else metrics.single_label(score, target)
    return {"loss": sum(losses) / len(feed), **figures}, score, target


class Trainer:
    """A run over its epochs. `progress` is what last/state.json holds, and what metrics.jsonl is written from."""

    def __init__(self, task: Task, on_step: Callable[[int, int], None]):
        s = task.settings
        self.task, self.on_step = task, on_step
        self.order = Order(task.train, s.batch_size, s.seed, s.balanced)
        self.total = s.epochs * self.order.steps
        if s.max_steps:
            self.total = min(self.total, s.max_steps)
        self.epochs = math.ceil(self.total / self.order.steps)
        self.plain = Step(task, self.order, self.total)
        self.step = self.plain if graph.reason_against(task) else graph.Graphed(self.plain)
        self.averages = state.Averages()
        self.progress = {"epoch": 0, "seconds": 0.0, "history": [], "best": None}

    def resume(self) -> bool:
        """Take up last/ where there is one."""
        folder = self.task.out / "last"
        parallel.first(lambda: checkpoint.recover(folder))
        if not folder.is_dir():
            return False
        restored = (folder, self.task.model, self.plain.optimiser, self.averages, self.plain.average)
        self.progress = parallel.together(lambda: state.restore(*restored))
        return True

    def epoch(self) -> dict:
        """Train and validate one epoch, save it, and return its line of metrics.jsonl."""
        started = time.perf_counter()
        number = self.progress["epoch"]
        first = number * self.order.steps
        steps = self.order.epoch(number)[: self.total - first]
        losses = torch.zeros(len(steps), device=self.task.device)
        with closing(self.step.inputs(self.plain.divided(steps), number)) as inputs:
            for i in range(len(steps)):
                losses[i] = self._step(first + i, number, islice(inputs, self.plain.parts))
        self._refuse_broken(number)
        losses = losses.cpu()
        seconds = time.perf_counter() - started
        rate, model = len(steps) * self.order.batch_size / seconds, step.trained(self.task)
        kept = self.task.settings.keep_tokens or None
        line = {
            "epoch": number + 1,
            "step": first + len(steps),
            "train_loss": float(losses.mean()),
            "first_loss": float(losses[:FEW].mean()),
            "last_loss": float(losses[-FEW:].mean()),
            "lr": step.learning_rate(self.task.settings, first + len(steps) - 1, self.total),
            "samples_per_second": rate,
            "step_ms": 1000 * seconds / len(steps),
            "tflops": rate * STEP_FLOPS * (model.macs(kept).all - model.spared(kept)) / 1e12,
        }
        if every := self.task.settings.log_every:
            kept = range(every - 1 - first % every, len(steps), every)
            line["losses"] = {str(first + i + 1): float(losses[i]) for i in kept}
        if self.task.validation is not None:
            with self.plain.evaluated():
                figures, _, _ = evaluate(self.task, self.task.validation)
            line |= {f"validation_{name}": value for name, value in figures.items()}
        self.progress["seconds"] += time.perf_counter() - started
        line["seconds"] = self.progress["seconds"]
        self._keep(line)
        return line

    def _step(self, number: int, epoch: int, inputs: Iterable) -> torch.Tensor:
        """One step, counted from 0 over the run; returns its loss, which is overwritten by the next one."""
        loss = self.step(number, epoch, inputs)
        if self.task.device.type == "cpu" or number % CHECK_EVERY == CHECK_EVERY - 1:
            self._refuse_broken(epoch)
        self.on_step(number + 1, self.total)
        return loss

    def _refuse_broken(self, epoch: int) -> None:
        number = int(self.plain.broken_step)
        if number < 0:
            return
        at = number - epoch * self.order.steps
        positions, _ = self.order.epoch(epoch)[at]
        names = [self.task.train.pack.names[i] for i in self.task.train.indices[positions[:3]]]
        kept = (
            f"the last good checkpoint is {self.task.out / 'last'}"
            if self.progress["epoch"]
            else "nothing was saved yet"
        )
        raise UserError(
            f"The loss or its gradient was no longer finite at step {number + 1} (epoch {epoch + 1}, batch {at + 1}, clips "
            f"{', '.join(names)}, ...), and no weight was changed from there on: "
            f"try a lower --lr or more --warmup-epochs; {kept}."
        )

    def _keep(self, line: dict) -> None:
        """Take the epoch into the progress, and have it saved."""
        task, progress = self.task, self.progress
        progress["epoch"] += 1
        progress["history"].append(line)
        score = line.get(f"validation_{task.key_metric}")
        better = score is not None and (progress["best"] is None or score > progress["best"]["score"])
        if better:
            progress["best"] = {"epoch": line["epoch"], "score": score}
        if line["epoch"] > self.epochs - task.settings.average_last:
            self.averages.add(task.model)
        parallel.first(lambda: self._save(better))

    def _save(self, better: bool) -> None:
        """Write best/ where the epoch is the best so far, and last/; a kill between the two repeats the epoch."""
        task = self.task
        if better:
            with checkpoint.replacing(task.out / "best") as beside, self.plain.evaluated():
                checkpoint.save(beside, task.model, task.config)
        kept = (self.plain.optimiser, self.averages, self.plain.average, self.progress)
        state.save(task.out / "last", task.model, task.config, *kept)

    @property
    def reached(self) -> bool:
        """Whether an epoch's validation has reached settings.until_accuracy, where there is one."""
        mark, best = self.task.settings.until_accuracy, self.progress["best"]
        return bool(mark) and best is not None and best["score"] >= mark

    @property
    def done(self) -> bool:
        return self.reached or self.progress["epoch"] >= self.epochs
