"""Training steps as `train.run` takes them, on ten-second clips of noise with AudioSet's classes: how long, how much memory,
and where the time goes."""

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

from bench import memory, systems
from fftp.frontend import STATISTICS
from fftp.patching import PatchGrid
from kernels import FbankSettings, dispatch, ranges
from train import loop, run
from train.data.clips import ARRAY_RATE, Clip, DataSet
from train.data.pack import pack
from train.settings import Settings

SECONDS = 10
BATCH = {"cpu": 4, "cuda": 32}  # the paper's is 32
STEPS = {"cpu": 2, "cuda": 12}  # of an epoch
LABELS_A_CLIP = 2
# The paper's AudioSet runs: section IV-A; SpecAugment's sizes beside square patches are AST's.
MASKS = {
    "fftp": {"augment": "specmask", "mask_area": 25600, "mask_width": 128, "mask_height": 128},
    "square": {"augment": "specaugment", "mask_max_frequency": 48, "mask_max_time": 192},
}


class Unsaved(loop.Trainer):
    """The trainer of `train.run`, whose epochs leave no checkpoint."""

    def _keep(self, line):
        self.progress["epoch"] += 1
        self.progress["history"].append(line)


@contextmanager
def trainer(
    model: str, size: str, grid: PatchGrid, device: str, precision: str = "auto", batch: int = 0
) -> Iterator[Unsaved]:
    """Takes epochs of `STEPS` steps each; the first one warms up."""
    patch = "fftp" if grid.full_frequency else "square"
    geometry = {"patch_time": grid.pt, "time_stride": grid.st}
    geometry |= {} if grid.full_frequency else {"patch_freq": grid.pf, "freq_stride": grid.sf}
    mean, std = STATISTICS["audioset"]
    batch = batch or BATCH[device]
    wanted = Settings(
        fused=True, model=model, size=size, patch=patch, frames=grid.T, **geometry, **MASKS[patch], mixup=0.5,
        epochs=3, batch_size=batch, warmup_epochs=1, device=device, precision=precision, mean=mean, std=std,
    )  # fmt: skip
    dispatch.use_fused(True)
    fbank, dataset, where = FbankSettings(), noise(batch * STEPS[device]), torch.device(device)
    packed = pack(dataset, fbank.sample_rate, fbank.frame)
    resolved = run.resolve(wanted, packed, dataset, fbank, where, None)
    with tempfile.TemporaryDirectory() as folder:
        task = run.build(wanted, resolved, packed, dataset, fbank, where, Path(folder))
        yield Unsaved(task, lambda step, total: None)


@cache
def noise(clips: int) -> DataSet:
    """Training clips of noise, each with two of AudioSet's number of classes."""
    rng = np.random.default_rng(0)
    samples = rng.integers(-3000, 3000, (clips, SECONDS * ARRAY_RATE), dtype=np.int16)
    labels = rng.integers(0, systems.CLASSES, (clips, LABELS_A_CLIP))
    made = [
        Clip(w, tuple(map(int, two)), "train", str(i)) for i, (w, two) in enumerate(zip(samples, labels, strict=True))
    ]
    classes = tuple(f"class {i}" for i in range(systems.CLASSES))
    return DataSet("noise", classes, tuple(made), multi_label=True, clip_seconds=SECONDS)


def measured(model: str, size: str, grid: PatchGrid, device: str) -> dict[str, float | int | str | None]:
    """Milliseconds of a step (data to optimiser) in the second epoch, what it was measured with, and the bytes held at the
    most: weights, gradients, optimiser, activations."""
    with trainer(model, size, grid, device) as made:
        growth = memory.peak(lambda: (made.epoch(), made.epoch()), device)
        return {
            "step_ms": made.progress["history"][-1]["step_ms"],
            "batch": made.order.batch_size,
            "steps": made.order.steps,
            "precision": str(made.task.precision).removeprefix("torch."),
            "peak_bytes": None if growth is None else growth + memory.held(made.task.model),
        }


class Spans:
    """Times of the spans of `kernels.ranges`: the host's clock on a CPU, the stream's on a GPU."""

    def __init__(self, device: str):
        self.device, self.seen = device, defaultdict(list)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        first = self._now()
        yield
        self.seen[name].append((first, self._now()))

    def _now(self):
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> dict[str, float]:
        """The sum of each part's spans, in the order of a step."""
        if self.device == "cpu":
            sums = {name: 1000 * sum(b - a for a, b in spans) for name, spans in self.seen.items()}
        else:
            torch.cuda.synchronize()
            sums = {name: sum(a.elapsed_time(b) for a, b in spans) for name, spans in self.seen.items()}
        return {name: sums[name] for name in ranges.PARTS if name in sums}
