"""What a run needs to go on exactly: the last/ checkpoint with the optimiser's tensors and the history."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from fftp import checkpoint
from fftp.errors import UserError
from train.averaging import MovingAverage


class Averages:
    """The mean of the weights of some epochs, summed in float64."""

    def __init__(self):
        self.count, self.total = 0, {}

    def add(self, model: torch.nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            tensor = tensor.double()
            self.total[name] = self.total[name] + tensor if name in self.total else tensor
        self.count += 1

    def mean(self) -> dict[str, torch.Tensor]:
        return {name: (tensor / self.count).float() for name, tensor in self.total.items()}


def save(
    folder: Path,
    model: torch.nn.Module,
    config: checkpoint.CheckpointConfig,
    optimiser: torch.optim.Optimizer,
    averages: Averages,
    moving: MovingAverage | None,
    progress: dict[str, Any],
) -> None:
    """Replace folder (last/) by the run's state after an epoch; progress is JSON: epoch, history, best and so on.

    As a checkpoint it is the model that is evaluated: with a moving average its own weights lie in state.safetensors.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {
        f"optimiser.{names[id(p)]}.{key}": value
        for p, state in optimiser.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    tensors |= {f"average.{name}": tensor for name, tensor in averages.total.items()}
    if moving:
        tensors |= moving.saved()
    with checkpoint.replacing(folder) as beside:
        with moving.in_place() if moving else contextlib.nullcontext():
            checkpoint.save(beside, model, config)
        checkpoint.write(beside / "state.safetensors", checkpoint.pack_tensors(tensors))
        written = progress | {"averaged": averages.count}
        checkpoint.write(beside / "state.json", json.dumps(written).encode())


def restore(
    folder: Path,
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    averages: Averages,
    moving: MovingAverage | None,
) -> dict[str, Any]:
    """Fill model, optimiser and averages from last/; returns progress. Raises UserError when it is damaged."""
    try:
        progress = json.loads((folder / "state.json").read_text())
        averages.count = progress["averaged"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'state.json'} is missing or damaged: the run cannot go on, start a new one."
        ) from error
    checkpoint.load_weights(model, folder / "model.safetensors")
    tensors = checkpoint.read_tensors(folder / "state.safetensors")
    if moving:
        moving.restore(tensors)
    averages.total = {n.removeprefix("average."): t for n, t in tensors.items() if n.startswith("average.")}
    for name, parameter in model.named_parameters():
        prefix = f"optimiser.{name}."
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        # The step count lies on the CPU or the device as the optimiser made it; its own loader would do the same.
        optimiser.state[parameter] = {
            key: value.to(parameter.device if key != "step" or parameter.is_cuda else "cpu")
            for key, value in state.items()
        }
    return progress
