"""What is kept of an evaluation, clip by clip, for `python -m fftp.report` and whoever looks further."""

from pathlib import Path

import numpy as np

from fftp import scores
from train import metrics
from train.data.pack import Pack

# Clips that lie in no file are kept with the scores: those with the highest loss, 32 kB for each second.
KEPT = 100
_LEAST = 1e-12  # of a probability, before its logarithm


def keep(
    run: Path,
    split: str,
    packed: Pack,
    figures: dict[str, float],
    probabilities: np.ndarray,
    targets: np.ndarray,
    multi_label: bool,
) -> None:
    """Write the split's scores into the run's folder: probabilities and targets `[n, C]` as `loop.evaluate` gives them."""
    indices = packed.indices(split)
    losses = losses_of(probabilities, targets, multi_label)
    in_file = isinstance(packed.samples, np.memmap)
    kept = np.array([], np.int64) if in_file else np.sort(np.argsort(-losses, kind="stable")[:KEPT])
    spans = [slice(packed.start[i], packed.start[i] + packed.length[i]) for i in indices[kept]]
    of_class = metrics.average_precisions if multi_label else metrics.confusion
    scores.write(
        run,
        scores.Scores(
            split=split,
            multi_label=multi_label,
            figures=figures,
            spread=metrics.spread(probabilities, targets, multi_label),
            names=tuple(packed.names[i] for i in indices),
            pack=str(packed.samples.filename) if in_file else "",
            per_class=of_class(probabilities, targets),
            probabilities=probabilities,
            targets=targets.astype(np.uint8),
            losses=losses,
            start=packed.start[indices],
            length=packed.length[indices],
            kept=kept,
            samples=np.concatenate([np.empty(0, np.int16), *(packed.samples[span] for span in spans)]),
        ),
    )


def losses_of(probabilities: np.ndarray, targets: np.ndarray, multi_label: bool) -> np.ndarray:
    """Each clip's loss, float64 `[n]`: -log of its class's probability, or the binary cross-entropy summed over classes."""
    p = probabilities.astype(np.float64)
    if not multi_label:
        return -np.log(np.maximum((p * targets).sum(1), _LEAST))
    right = np.where(targets > 0, p, 1 - p)
    return -np.log(np.maximum(right, _LEAST)).sum(1)
