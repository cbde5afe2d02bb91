"""How long things take: a run, judged by a few of its steps, and a clip alone."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fftp import checkpoint
from kernels import dispatch
from train import loop, settings
from train import run as train_run
from train.feed import Feed

WARM_UP, MEASURED, MEASURED_CLIPS = 2, 5, 32  # steps and test clips that are timed
ROUNDS = 21  # of one clip through every model


def of_run(flags: list[str]) -> tuple[float, str]:
    """(seconds that `python -m train.run flags` takes here, what was measured). Nothing of it is kept but packed data."""
    wanted, _ = settings.from_flags(flags)
    with tempfile.TemporaryDirectory(prefix="fftp-") as folder:
        task, packed, _ = train_run.prepare(replace(wanted, out=folder), Path(folder))

        def short(steps: int) -> loop.Trainer:
            few = replace(wanted, max_steps=steps, average_last=0, out=folder)
            return loop.Trainer(replace(task, settings=few, validation=None), lambda *_: None)

        whole = loop.Trainer(task, lambda *_: None)
        short(WARM_UP).epoch()
        step = short(MEASURED).epoch()["step_ms"] / 1000
        test = packed.indices("test")
        some = Feed(task.train.source, test[:MEASURED_CLIPS], task.train.front_end)
        loop.evaluate(task, some)
        started = time.perf_counter()
        loop.evaluate(task, some)
        clip = (time.perf_counter() - started) / len(some)
    evaluated = len(test) + whole.epochs * len(packed.indices("validation"))
    said = f"{whole.total} steps of {1000 * step:.0f} ms, {evaluated} clips evaluated at {1000 * clip:.1f} ms"
    return whole.total * step + evaluated * clip, said


@torch.inference_mode()
def alone(runs: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Milliseconds for one clip from log-mel to logits in float32, of each run's model; the first one's time over it.

    The models take turns, so that what else the machine does hits all alike: medians of the times and of the ratios of a round.
    """
    dispatch.use_fused(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models, inputs = [], []
    for out in runs.values():
        model, config = checkpoint.load(out)
        models.append(model.to(device))
        inputs.append(torch.zeros(1, config.model.grid.T, config.model.grid.F, device=device))
    times = np.empty((ROUNDS, len(models)))  # milliseconds
    for i in range(-WARM_UP, ROUNDS):
        for j, (model, log_mel) in enumerate(zip(models, inputs, strict=True)):
            started = time.perf_counter()
            model(log_mel).cpu()
            if i >= 0:
                times[i, j] = 1000 * (time.perf_counter() - started)
    median, ratio = np.median(times, 0), np.median(times[:, :1] / times, 0)
    return {name: {"latency_ms": float(median[j]), "latency_ratio": float(ratio[j])} for j, name in enumerate(runs)}


def text(seconds: float) -> str:
    """For people: seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
