"""An exponential moving average of the weights, which is evaluated in their place (Polyak and Juditsky, 1992)."""

import contextlib
from collections.abc import Iterator

import torch


class MovingAverage:
    """Float32 beside a model's weights: after step n, counted from 0, average += (1 - d) (weights - average).

    d = min(decay, (1 + n) / (10 + n)), so that the first steps are soon forgotten (TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        named = dict(model.named_parameters())
        self.names, self.weights = list(named), [p.detach() for p in named.values()]
        self.values = [weight.float().clone() for weight in self.weights]

    def update(self, number: torch.Tensor, broken: torch.Tensor) -> None:
        """Take in the weights after a step; number int64 and broken, 0 or 1, are scalars on the device. After a step that
        broke nothing changes any more. The host reads neither."""
        n = number.double()
        decay = ((1 + n) / (10 + n)).clamp_max(self.decay)
        difference = torch._foreach_sub(self.weights, self.values)
        torch._foreach_mul_(difference, ((1 - decay) * (1 - broken)).float())
        torch._foreach_add_(self.values, difference)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the model has the average's weights, in the same memory; behind it its own again."""
        own = [weight.clone() for weight in self.weights]
        self._fill(self.weights, self.values)
        try:
            yield
        finally:
            self._fill(self.weights, own)

    def saved(self) -> dict[str, torch.Tensor]:
        """The model's own weights, for `restore`; the average is what the checkpoint beside them holds."""
        return {f"weights.{name}": weight for name, weight in zip(self.names, self.weights, strict=True)}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The model has the average's weights, of a checkpoint; tensors are what `saved` gave."""
        self._fill(self.values, self.weights)
        self._fill(self.weights, [tensors[name] for name in self.saved()])

    @staticmethod
    def _fill(targets, sources):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
