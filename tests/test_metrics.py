"""The figures of merit against scikit-learn's, and where that has no answer against what is written."""

import numpy as np
import pytest
from sklearn import metrics as judge

from train import metrics

# Ours and scikit-learn's add the same float64 terms in another order: seen up to 2.2e-16, times 50.
CLOSE = 1e-14


def scored(seed, n, C, levels=None, share=0.3):
    """Random scores (rounded to so many levels: ties) and targets."""
    rng = np.random.default_rng(seed)
    scores = rng.random((n, C)).astype(np.float32)
    if levels:
        scores = np.floor(scores * levels) / levels
    return scores, (rng.random((n, C)) < share).astype(np.float32)


@pytest.mark.parametrize("levels", [None, 10, 2, 1], ids=["distinct", "some ties", "two values", "one value"])
@pytest.mark.parametrize(("n", "C"), [(97, 7), (500, 3), (2, 1)])
def test_average_precision_and_auc_of_each_class(n, C, levels):
    scores, targets = scored(n + C, n, C, levels)
    targets[0], targets[-1] = 1, 0  # both kinds in every class
    expected = [judge.average_precision_score(targets[:, k], scores[:, k]) for k in range(C)]
    np.testing.assert_allclose(metrics.average_precisions(scores, targets), expected, rtol=0, atol=CLOSE)
    expected = [judge.roc_auc_score(targets[:, k], scores[:, k]) for k in range(C)]
    np.testing.assert_allclose(metrics.aucs(scores, targets), expected, rtol=0, atol=CLOSE)


def test_means_are_over_the_classes_that_have_positives():
    scores, targets = scored(0, 60, 6, levels=8)
    targets[:, 2] = 0  # never there: in neither mean
    targets[:, 4] = 1  # always there: average precision 1, and no AUC
    got = metrics.multi_label(scores, targets)
    with_positives, with_both = [0, 1, 3, 4, 5], [0, 1, 3, 5]
    assert got["map"] == pytest.approx(
        judge.average_precision_score(targets[:, with_positives], scores[:, with_positives], average="macro"), abs=CLOSE
    )
    assert got["auc"] == pytest.approx(judge.roc_auc_score(targets[:, with_both], scores[:, with_both]), abs=CLOSE)
    assert got["classes_scored"] == 5
    assert np.isnan(metrics.average_precisions(scores, targets)[2])
    assert np.isnan(metrics.aucs(scores, targets)[[2, 4]]).all()


@pytest.mark.parametrize("positive", [0.0, 1.0], ids=["no positives", "all positives"])
@pytest.mark.parametrize("n", [1, 5])
def test_one_kind_alone_gives_no_auc(n, positive):
    got = metrics.multi_label(np.linspace(0, 1, n)[:, None], np.full((n, 1), positive))
    assert np.isnan([got["auc"], got["d_prime"]]).all()
    assert got["map"] == 1 if positive else np.isnan(got["map"])


def test_d_prime_is_asts():
    # AST's log of a model on AudioSet: mAUC 0.961010, d' 2.4926. One positive that outranks 96,101 of 100,000 negatives
    # has that area exactly.
    scores = np.append(np.arange(100_000), 96_100.5)[:, None]
    targets = np.append(np.zeros(100_000), 1)[:, None]
    got = metrics.multi_label(scores, targets)
    assert got["auc"] == pytest.approx(0.961010, abs=1e-12)
    assert round(got["d_prime"], 4) == 2.4926


def test_perfect_ranking_keeps_d_prime_finite():
    got = metrics.multi_label(np.arange(6.0)[:, None], np.array([0, 0, 0, 1, 1, 1.0])[:, None])
    assert got["auc"] == got["map"] == 1
    assert np.isfinite(got["d_prime"])
    assert got["d_prime"] > 9


@pytest.mark.parametrize(("n", "C"), [(1, 3), (97, 7), (300, 12)])
def test_accuracy_balanced_accuracy_and_confusion(n, C):
    rng = np.random.default_rng(n)
    scores = np.round(rng.random((n, C)), 1)  # ties: the lowest class wins, as with numpy's argmax
    truth = rng.integers(0, max(1, C - 1), n)  # the last class never occurs
    targets = np.eye(C)[truth]
    got, guess = metrics.single_label(scores, targets), scores.argmax(1)
    recall = judge.recall_score(truth, guess, labels=np.unique(truth), average="macro", zero_division=0)
    assert got["accuracy"] == pytest.approx(judge.accuracy_score(truth, guess), abs=CLOSE)
    assert got["balanced_accuracy"] == pytest.approx(recall, abs=CLOSE)
    expected = judge.confusion_matrix(truth, guess, labels=range(C))
    assert (metrics.confusion(scores, targets) == expected).all()


@pytest.mark.parametrize("levels", [None, 5], ids=["distinct", "ties"])
def test_a_weight_is_so_many_copies_of_a_clip(levels):
    scores, targets = scored(3, 60, 1, levels)
    weight = np.random.default_rng(4).integers(0, 4, (3, 60))
    got = metrics._weighted_average_precision(scores[:, 0], targets[:, 0] > 0, weight.astype(float))
    for w, value in zip(weight, got, strict=True):
        expected = judge.average_precision_score(np.repeat(targets[:, 0], w), np.repeat(scores[:, 0], w))
        assert value == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (1, 1), (81, 263), (1499, 1525)])
def test_wilsons_interval_holds_what_the_count_does_not_contradict(right, n):
    """Its ends are the shares p at which what was seen lies Z standard errors of p away; 0 and 1 stay inside."""
    for end, own in zip(metrics.wilson(right, n), (right == 0, right == n), strict=True):
        assert 0 <= end <= 1
        expected = metrics.Z * (end * (1 - end) / n) ** 0.5
        assert abs(right / n - end) == pytest.approx(expected, abs=1e-7)  # the root of an end's 1e-16
        assert not own or min(end, 1 - end) < 1e-12


def test_spread_of_balanced_accuracy_is_that_of_means_of_shares():
    """Classes of 400 and 100 clips, 90 % and 70 % found: the variance is the mean of p (1 - p) / n over 2 classes, halved."""
    truth = np.repeat([0, 1], [400, 100])
    guess = truth.copy()
    guess[:40], guess[400:430] = 1, 0
    scores, targets = np.eye(2)[guess], np.eye(2)[truth]
    got = metrics.spread(scores, targets, False)
    a, b = got["balanced_accuracy"]
    assert (a + b) / 2 == pytest.approx(0.8)
    expected = metrics.Z * (0.9 * 0.1 / 400 + 0.7 * 0.3 / 100) ** 0.5 / 2
    assert (b - a) / 2 == pytest.approx(expected, rel=0.25)  # 100 draws know it within 7 %, times 3.5
    assert got["accuracy"] == metrics.wilson(430, 500)
    assert metrics.spread(scores, targets, False) == got


def test_spread_of_map_covers_the_figure_and_narrows_with_clips():
    widths = []
    for n in (100, 1600):
        scores, targets = scored(5, n, 4)
        targets[:, 2] = 0  # a class without clips counts for nothing
        a, b = metrics.spread(scores, targets, True)["map"]
        assert 0 <= a < metrics.multi_label(scores, targets)["map"] < b <= 1
        widths.append(b - a)
    assert 2 < widths[0] / widths[1] < 8  # 4, by the square root
    assert metrics.spread(scores, np.zeros_like(targets), True) == {}
