"""Figures of merit from scores `[n, C]` (higher is likelier) and targets `[n, C]` of zeros and ones."""

from statistics import NormalDist

import numpy as np

Z = NormalDist().inv_cdf(0.975)  # standard deviations to either side that hold 95 %
DRAWS = 100  # of the clips, for a standard error within some 7 % of its own value


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
    return float(_weighted_average_precision(score, positive, np.ones((1, len(score))))[0])


def _weighted_average_precision(score, positive, weight):
    """AP where clip i counts weight[d, i] times, for each d: `[n]`, `[n]`, `[draws, n]` -> `[draws]`; NaN without positives."""
    if not positive.any():
        return np.full(len(weight), np.nan)
    order = np.argsort(-score, kind="stable")
    score, positive, weight = score[order], positive[order], weight[:, order]
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # ties share one threshold
    found, seen = (np.cumsum(w, 1)[:, last] for w in (weight * positive, weight))
    with np.errstate(invalid="ignore"):  # a draw may hold no positive at all
        recall = found / found[:, -1:]
    return np.sum(np.diff(recall, prepend=0.0) * found / np.maximum(seen, 1), 1)


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


def spread(scores: np.ndarray, targets: np.ndarray, several: bool) -> dict[str, tuple[float, float]]:
    """95 % intervals over the draw of clips: what other clips from the same source may give the same model.

    several: labels a clip. Wilson's for accuracy; for balanced_accuracy, or map, the figure with its standard error over
    DRAWS draws of n from the n clips, by a fixed seed.
    """
    n = len(scores)
    rng = np.random.default_rng(0)
    weight = np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(DRAWS)]).astype(
        float
    )  # (draws, n)
    if several:
        name, value = "map", multi_label(scores, targets)["map"]
        drawn = np.stack(
            [_weighted_average_precision(s, t > 0, weight) for s, t in zip(scores.T, targets.T, strict=True)]
        )
    else:
        right = (scores.argmax(1) == targets.argmax(1)).astype(float)
        name, value = "balanced_accuracy", single_label(scores, targets)["balanced_accuracy"]
        with np.errstate(invalid="ignore"):
            drawn = ((weight * right) @ targets / (weight @ targets)).T  # (C, draws)
    drawn = drawn[np.isfinite(drawn).any(1)]
    drawn = drawn[:, np.isfinite(drawn).any(0)]
    if drawn.shape[1] < 2 or not len(drawn):
        return {}
    error = Z * float(np.nanmean(drawn, 0).std(ddof=1))
    found = {name: (max(0.0, value - error), min(1.0, value + error))}
    return found if several else {"accuracy": wilson(int(right.sum()), n), **found}


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's (1927) 95 % interval of a share of which `right` of n were seen; inside 0..1 also where none or all were."""
    share, z = right / n, Z * Z / n
    middle, half = share + z / 2, Z * (share * (1 - share) / n + z / (4 * n)) ** 0.5
    return (max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z)))
