"""A training step, data to optimiser, through the code that train.run runs.

On a CPU: AST-tiny by the recipe of Speech Commands (noise of one second, 12 classes), beside the same model in plain eager
PyTorch. Each system is a process of its own, since the backends and what the allocator keeps are a process's. On a GPU:
AST-base and AuM-base on ten-second clips, and the share of the matrix products' rate that the step's products reach.
"""

import multiprocessing
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from bench import eager_ast, systems, training
from bench.bench_patch_embed import GRIDS
from bench.measure import Case, Figures, ceiling
from fftp import allocator
from kernels import FbankSettings, dispatch
from train import run, settings
from train.data.clips import ARRAY_RATE, Clip, DataSet
from train.data.pack import pack

RECIPE = "speechcommands/default"
CLIPS, CLASSES = 256, 12
ROUNDS = 9
STEP_PASSES = 3  # forward, and twice as many products backward
LOSS_BOUND = 0.02  # of the first loss, relative, between types; seen 1e-4


def cases(device: str) -> Iterator[Case | Figures]:
    dispatch.use_fused(True)
    if device == "cuda":
        for name in ("(128, 10)/1", "(128, 50)/10"):
            for model in systems.MODELS:
                yield _row(model, name)
        return
    plain = {
        "eager float32": partial(_candidate, "float32", False),
        "eager autocast": partial(_candidate, "bfloat16", False),
    }
    given = settings.Settings(**settings.read_recipe(RECIPE))
    yield Case(
        part="step",
        case={
            "model": "AST-tiny",
            "grid": "(128, 10)/4",
            "frames": given.frames,
            "B": given.batch_size,
            "dtype": "auto",
        },
        backend=f"attention {dispatch.select('attention', device, 'bfloat16').name}",
        ours=partial(_candidate, "auto", True),
        peers=plain,
        correct=lambda: abs(_process("auto", True).step() / _process("float32", False).step() - 1) < LOSS_BOUND,
        rounds=ROUNDS,
    )


def _candidate(precision, fused, sets):
    process = _process(precision, fused)
    return lambda i: process.step()


@cache
def _process(precision, fused):
    return Process(precision, fused)


class Process:
    """A training run in a process of its own that takes a step whenever it is asked to."""

    def __init__(self, precision: str, fused: bool):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, precision, fused), daemon=True).start()

    def step(self) -> float:
        """Take one step; returns its loss."""
        self._pipe.send("step")
        return self._pipe.recv()


def _serve(pipe, precision, fused):
    if fused:
        allocator.keep_memory()
    dispatch.use_fused(fused)
    with tempfile.TemporaryDirectory() as folder:
        losses = _losses(_trainer(precision, fused, Path(folder)))
        while True:
            try:
                pipe.recv()
            except EOFError:
                return
            pipe.send(next(losses))


def _trainer(precision, fused, folder):
    given = settings.read_recipe(RECIPE) | {"fused": fused, "precision": precision, "device": "cpu", "epochs": 1000}
    wanted, fbank, device = settings.Settings(**given), FbankSettings(), torch.device("cpu")
    dataset = _noise()
    packed = pack(dataset, fbank.sample_rate, fbank.frame)
    resolved = run.resolve(wanted, packed, dataset, fbank, device, None)
    task = run.build(wanted, resolved, packed, dataset, fbank, device, folder)
    if not fused:
        task.model.__class__ = eager_ast.EagerAST
    return training.Unsaved(task, lambda step, total: None)


def _noise():
    rng = np.random.default_rng(0)
    samples = rng.integers(-3000, 3000, (CLIPS, ARRAY_RATE), dtype=np.int16)
    clips = tuple(Clip(w, (i % CLASSES,), "train", str(i)) for i, w in enumerate(samples))
    return DataSet("noise", tuple(f"class {i}" for i in range(CLASSES)), clips, multi_label=False, clip_seconds=1.0)


def _losses(trainer):
    """The loss of one step after the other."""
    number = 0
    while True:
        epoch = number // trainer.order.steps
        inputs = trainer.step.inputs(trainer.plain.divided(trainer.order.epoch(epoch)), epoch)
        for _ in range(trainer.order.steps):
            yield float(trainer.step(number, epoch, islice(inputs, trainer.plain.parts)))
            number += 1


def _row(model, name):
    grid = GRIDS[name]
    return Figures(
        part="step",
        case={"model": f"{model}-base", "grid": name, "patches": grid.N, "B": training.BATCH["cuda"]},
        backend=dispatch.select("patch_embed" if model == "ast" else "selective_scan", "cuda", "float32").name,
        correct=lambda: systems.agrees(model, "base", grid, torch.float32, "cuda"),
        figures=lambda: _figures(model, grid),
    )


def _figures(model, grid):
    found = training.measured(model, "base", grid, "cuda")
    rate = 2 * STEP_PASSES * systems.config(model, "base", grid).macs().all * found["batch"] / found["step_ms"] / 1e9
    return found | {"tflops": rate, "share": rate / ceiling("cuda").matmul_tflops}
