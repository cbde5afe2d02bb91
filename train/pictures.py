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
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend()
    figures.save(figure, path)


def confusion_matrix(counts: np.ndarray, labels: tuple[str, ...], path: Path) -> None:
    """Rows are the truth, in percent of its clips."""
    C = len(labels)
    side = min(16.0, max(3.6, 2.4 + 0.42 * C))
    figure = figures.figure(side, side)
    axes = figure.subplots()
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(C), labels, rotation=90)
    axes.set_yticks(range(C), labels)
    axes.set(xlabel="taken for", ylabel="truth", title="Confusion, %")
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


def systems_curves(histories: dict[str, list[list[dict]]], path: Path) -> None:
    """Training loss and validation figure of several systems by epoch: the mean over seeds, each seed thin behind it."""
    figure = figures.figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    first = next(iter(histories.values()))[0][0]
    name = next((n for n in ("map", "accuracy") if f"validation_{n}" in first), None)
    panels = [(left, "train_loss", 1)] + ([(right, f"validation_{name}", 100)] if name else [])
    for k, (label, runs) in enumerate(histories.items()):
        for axes, field, scale in panels:
            curves = [scale * np.array([line[field] for line in history]) for history in runs]
            if len(runs) > 1:
                for curve in curves:
                    axes.plot(range(1, len(curve) + 1), curve, color=f"C{k}", alpha=0.25, linewidth=0.8)
            shared = min(map(len, curves))  # seeds may have stopped in other epochs (--until-accuracy)
            mean = np.mean([curve[:shared] for curve in curves], 0)
            axes.plot(range(1, shared + 1), mean, color=f"C{k}", marker=".", label=label)
    left.set(xlabel="epoch", ylabel="loss", title="Training loss (augmented)")
    shown = {"map": "mAP", "accuracy": "accuracy", None: ""}[name]
    right.set(
        xlabel="epoch", ylabel=f"{shown}, %" if name else "", title="Validation" if name else "No validation split"
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8)
    figures.save(figure, path)


def patches_against_score(points: list[tuple[str, int, list[float], int, float]], metric: str, path: Path) -> None:
    """The paper's Figure 4 beside ours: (system, our patches, our scores in %, the paper's patches and mAP) of each system.

    The first is the square one. Bars are standard deviations over seeds.
    """
    figure = figures.figure(9, 3.8)
    left, right = figure.subplots(1, 2)
    paper = [(patches, [score]) for _, _, _, patches, score in points]
    ours = [(patches, scores) for _, patches, scores, _, _ in points]
    for axes, pairs, title in ((left, paper, "Paper: AudioSet-18k, mAP in %"), (right, ours, f"Ours: {metric} in %")):
        square, *full = pairs
        full = sorted(full)
        means = [np.mean(scores) for _, scores in full]
        bars = [np.std(scores, ddof=1) if len(scores) > 1 else 0 for _, scores in full]
        axes.errorbar([n for n, _ in full], means, yerr=bars, marker="o", capsize=3, label="full-frequency, SpecMask")
        bar = np.std(square[1], ddof=1) if len(square[1]) > 1 else 0
        axes.errorbar(
            [square[0]],
            [np.mean(square[1])],
            yerr=bar,
            marker="s",
            capsize=3,
            linestyle="none",
            label="square, SpecAugment",
        )
        axes.set(xlabel="patches", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figures.save(figure, path)
