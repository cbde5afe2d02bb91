"""The least that a model should beat: logistic regression on the mean and standard deviation of each mel bin."""

import numpy as np
import torch

from fftp.errors import UserError
from fftp.frontend import FrontEnd, FrontEndSettings
from train import metrics
from train.data.pack import Pack
from train.feed import Feed
from train.samples import Resident

CLIPS_AT_A_TIME = 64
MOST_ITERATIONS = 2000


def logistic(packed: Pack, front_end: FrontEndSettings, multi_label: bool) -> dict[str, float]:
    """Its figures on the test split, trained on the training split; a class for each label, as the models have them.

    front_end: not normalising. Raises UserError where scikit-learn is absent.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError as error:
        raise UserError(
            "The baseline needs the package scikit-learn: install it with `pip install scikit-learn`."
        ) from error
    train, test = (_features(packed, packed.indices(split), front_end) for split in ("train", "test"))
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    targets, truth = (packed.labels[packed.indices(split)] for split in ("train", "test"))
    if not multi_label:
        model = LogisticRegression(max_iter=MOST_ITERATIONS).fit(train, targets.argmax(1))
        scores = np.zeros_like(truth)
        scores[:, model.classes_] = model.predict_proba(test)
        return metrics.single_label(scores, truth)
    scores = np.zeros_like(truth)
    for k in range(truth.shape[1]):
        if 0 < targets[:, k].sum() < len(targets):  # a class with both kinds of clips
            model = LogisticRegression(max_iter=MOST_ITERATIONS).fit(train, targets[:, k])
            scores[:, k] = model.predict_proba(test)[:, 1]
    return metrics.multi_label(scores, truth)


def _features(packed: Pack, indices: np.ndarray, front_end: FrontEndSettings) -> np.ndarray:
    """(clips, 2 F): each bin's mean and standard deviation over the clip's own frames."""
    feed = Feed(Resident(packed, torch.device("cpu")), indices, FrontEnd(front_end))
    found = []
    for part in np.array_split(np.arange(len(indices)), -(-len(indices) // CLIPS_AT_A_TIME)):
        log_mel, length = feed.raw(part)  # (B, T, F)
        frames = feed.front_end.valid_frames(length)[:, None, None]
        own = torch.arange(log_mel.shape[1])[None, :, None] < frames  # (B, T, 1)
        mean = (log_mel * own).sum(1) / frames[:, 0]
        variance = ((log_mel - mean[:, None]) ** 2 * own).sum(1) / frames[:, 0]
        found.append(torch.cat([mean, variance.sqrt()], 1).numpy())
    return np.concatenate(found)
