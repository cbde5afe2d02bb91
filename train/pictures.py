"""Pictures of a run: learning curves, and the confusion matrix or the average precision of each class."""

from pathlib import Path

import numpy as np

from fftp import figures


def learning_curves(history: list[dict], path: Path) -> None:
    """Loss and validation figures by epoch."""
    figure = figures.figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in history]
    left.plot(epochs, [line["train_loss"] for line in history], marker=".", label="training (augmented)")
    names = [n for n in ("accuracy", "balanced_accuracy", "map", "auc") if f"validation_{n}" in history[0]]
    if "validation_loss" in history[0]:
        left.plot(epochs, [line["validation_loss"] for line in history], marker=".", label="validation")
    for name in names:
        values = [100 * line[f"validation_{name}"] for line in history]
        right.plot(epochs, values, marker=".", label=name.replace("_", " ").replace("map", "mAP"))
    left.set(xlabel="epoch", ylabel="loss", title="Loss")
    right.set(xlabel="epoch", ylabel="percent", title="Validation" if names else "Validation: none in this data set")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figures.save(figure, path)


def confusion_matrix(counts: np.ndarray, labels: tuple[str, ...], path: Path) -> None:
    """Rows are the truth, in percent of its clips."""
    C = len(labels)
    side = min(16.0, 2.4 + 0.42 * C)
    figure = figures.figure(side, side)
    axes = figure.subplots()
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(C), labels, rotation=90)
    axes.set_yticks(range(C), labels)
    axes.set(xlabel="taken for", ylabel="truth", title="Confusion, % of the class's clips")
    if C <= 40:
        for i, j in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[i, j] > 55 else "black"
            axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    figures.save(figure, path)


def average_precision(values: np.ndarray, labels: tuple[str, ...], path: Path, most: int = 60) -> None:
    """AP of each class that has positives, sorted; the best and worst where there are too many."""
    order = [k for k in np.argsort(values) if np.isfinite(values[k])]
    left_out = max(0, len(order) - most)
    if left_out:
        order = order[: most // 2] + order[-(most // 2) :]
    figure = figures.figure(7, 1.4 + 0.2 * len(order))
    axes = figure.subplots()
    axes.barh([labels[k] for k in order], [100 * values[k] for k in order], color="#4878a8")
    axes.margins(y=0.01)
    axes.set(
        xlim=(0, 100),
        xlabel="average precision, %",
        title="AP by class" + (f" ({left_out} between left out)" if left_out else ""),
    )
    figures.save(figure, path)
