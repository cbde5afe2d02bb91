"""How well a model hears one clip after another in one stream: its accuracy by a clip's place in the row."""

import math

import numpy as np

from fftp.errors import UserError
from fftp.predict import Classifier
from fftp.streaming import Stream
from kernels import draws
from train.data.pack import Pack

STREAMS = 400  # clips judged at every place, where a split has so many
SEED = 0  # of their orders


def check(multi_label: bool, places: int) -> None:
    """Raises UserError where `in_a_row` cannot judge."""
    if multi_label or places < 1:
        raise UserError("--in-a-row takes how many clips one stream has, 1 or more, each of one label: leave it out.")


def in_a_row(classifier: Classifier, packed: Pack, indices: np.ndarray, places: int) -> tuple[list[float], int]:
    """(accuracy of clips heard 1st, 2nd, ... of so many in one stream, clips judged at each place).

    The same clips, drawn from those of `indices`, stand at every place, in an order of its own: figures differ by what
    was heard before alone. A clip takes the time of a training clip, with silence behind a shorter one, and is judged by the
    answer at its end. Raises UserError for clips of several labels, and for ones too short for an answer.
    """
    check(classifier.multi_label, places)
    settings = classifier.config.front_end
    hop = settings.fbank.hop / settings.fbank.sample_rate  # s
    slot = math.ceil(settings.clip_samples / settings.fbank.hop)  # frames from clip to clip
    count = min(STREAMS, len(indices))
    chosen = indices[draws.shuffle(SEED, 0, len(indices))[:count]]
    orders = [chosen[draws.shuffle(SEED, 1 + place, count)] for place in range(places)]
    right = np.zeros(places, dtype=np.int64)
    for row in range(count):
        stream = Stream(classifier, slot * hop)
        for place, order in enumerate(orders):
            answers = stream.push(_padded(packed, order[row], settings.clip_samples, slot * settings.fbank.hop))
            if not answers:
                raise UserError(f"--in-a-row: an answer takes {stream.shortest:g} s of sound, more than a clip has.")
            right[place] += answers[-1].probabilities.argmax() == packed.labels[order[row]].argmax()
    return [float(share) for share in right / count], count


def _padded(packed, i, W, size):
    samples = np.zeros(size, np.int16)
    n = min(int(packed.length[i]), W)
    samples[:n] = packed.samples[packed.start[i] : packed.start[i] + n]
    return samples
