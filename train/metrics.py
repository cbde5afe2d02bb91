"""Figures of merit from scores `[n, C]` (higher is likelier) and targets `[n, C]` of zeros and ones."""

from statistics import NormalDist

import numpy as np


def single_label(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """accuracy over clips, and balanced_accuracy: the mean over classes (that have clips) of their share found."""
    guess, truth = scores.argmax(1), targets.argmax(1)  # the lowest index wins ties
    right = guess == truth
    recall = [right[truth == k].mean() for k in np.unique(truth)]
    return {"accuracy": float(right.mean()), "balanced_accuracy": float(np.mean(recall))}


def multi_label(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """map, auc, d_prime: means over the classes that have positives (auc: negatives as well), and how many those are.

    d' = sqrt(2) * inverse normal CDF of the mean AUC, as AST reports it.
    """
    precision = average_precisions(scores, targets)
    areas = aucs(scores, targets)
    auc = float(np.nanmean(areas)) if np.isfinite(areas).any() else float("nan")
    d_prime = 2**0.5 * NormalDist().inv_cdf(min(max(auc, 1e-12), 1 - 1e-12)) if np.isfinite(auc) else float("nan")
    return {
        "map": float(np.nanmean(precision)) if np.isfinite(precision).any() else float("nan"),
        "auc": auc,
        "d_prime": d_prime,
        "classes_scored": int(np.isfinite(precision).sum()),
    }


def average_precisions(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """AP of each class, `[C]`: the sum over distinct thresholds, descending, of (R_n - R_(n-1)) P_n; NaN without positives."""
    return np.array([_average_precision(scores[:, k], targets[:, k] > 0) for k in range(scores.shape[1])])


def _average_precision(score, positive):
    if not positive.any():
        return np.nan
    order = np.argsort(-score, kind="stable")
    score, positive = score[order], positive[order]
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # ties share one threshold
    found = np.cumsum(positive)[last]
    recall = found / found[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * found / (last + 1)))


def aucs(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class, `[C]`: how often a positive outranks a negative, ties half; NaN without both."""
    return np.array([_auc(scores[:, k], targets[:, k] > 0) for k in range(scores.shape[1])])


def _auc(score, positive):
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return np.nan
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1; tied scores share their mean rank
    return float((rank[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def confusion(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Clips of class i taken for class j, int64 `[C, C]`."""
    C = scores.shape[1]
    return np.bincount(targets.argmax(1) * C + scores.argmax(1), minlength=C * C).reshape(C, C)
