"""What `train.run` builds before it trains, for tests that call single steps."""

from pathlib import Path

import torch

from kernels import FbankSettings
from train import run, samples
from train.settings import Settings
from train.step import Task


def task_of(device: str = "cpu", streamed: bool = False, **changed) -> Task:
    """A small AST on a few made sounds, its initial weights by the seed; changed: settings."""
    small = {"synth_train": 22, "synth_validation": 10, "synth_test": 10, "batch_size": 7, "frames": 32, "mels": 32}
    small |= {"patch_time": 8, "time_stride": 8, "depth": 1, "epochs": 4, "warmup_epochs": 1.0, "precision": "float32"}
    small |= {"mask_height": 32, "mask_width": 6, "mask_area": 120, "mask_max_frequency": 9, "mask_max_time": 9}
    wanted = Settings(**small | changed, device=device)
    fbank = FbankSettings(n_mels=wanted.mels)
    dataset, packed = run.load(wanted, fbank)
    where = torch.device(device)
    resolved = run.resolve(wanted, packed, dataset, fbank, where, None)
    task = run.build(wanted, resolved, packed, dataset, fbank, where, Path("unused"))
    if streamed:
        task.train.source = samples.Streamed(packed, where)
    return task
