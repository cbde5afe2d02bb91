"""train.evaluate --in-a-row: accuracy of clips in one stream, clip by clip what a stream of those clips says."""

import json

import numpy as np
import pytest

import fftp
from fftp.errors import UserError
from kernels import draws
from tests import live, runs
from train import evaluate, running_sound
from train.data.pack import Pack

SECOND = 16_000


def pack_of(count) -> Pack:
    """Clips of a second, the first two shorter, with a label each."""
    length = np.full(count, SECOND)
    length[:2] = (5000, 12_345)
    return Pack(
        samples=np.concatenate([live.sound(n / SECOND, seed=i) for i, n in enumerate(length)]),
        start=np.cumsum(length) - length,
        length=length,
        labels=np.eye(5, dtype=np.float32)[np.arange(count) % 5],
        splits=np.zeros(count, np.int8),
        names=tuple(map(str, range(count))),
        classes=live.LABELS,
        skipped=[],
        sample_rate=SECOND,
    )


@pytest.mark.parametrize("name", ["carried", "ast"])
def test_places_are_those_of_one_stream(name, monkeypatch):
    """Right and wrong of each clip by one long recording, its answers a second apart."""
    classifier, packed = live.classifier(live.MODELS[name]), pack_of(9)
    indices = np.arange(1, 9)
    monkeypatch.setattr(running_sound, "STREAMS", 6)
    found, judged = running_sound.in_a_row(classifier, packed, indices, 3)
    chosen = indices[draws.shuffle(0, 0, 8)[:6]]
    orders = [chosen[draws.shuffle(0, k, 6)] for k in (1, 2, 3)]
    assert all(sorted(order) == sorted(chosen) for order in orders)
    right = np.zeros((6, 3))
    for row, clips in enumerate(np.stack(orders, 1)):
        whole = np.zeros(3 * SECOND, np.int16)
        for place, i in enumerate(clips):
            own = packed.samples[packed.start[i] : packed.start[i] + packed.length[i]]
            whole[place * SECOND : place * SECOND + len(own)] = own
        answers = fftp.stream(classifier, hop=1.0).push(whole)
        right[row] = [a.probabilities.argmax() == i % 5 for a, i in zip(answers, clips, strict=True)]
    assert found == right.mean(0).tolist()
    assert judged == 6
    assert 0 < right.sum() < 18


def test_a_sliding_window_forgets_all(monkeypatch):
    """What hears no further back than a clip has one accuracy at every place."""
    classifier = live.classifier(live.MODELS["two ways"])
    found, judged = running_sound.in_a_row(classifier, pack_of(10), np.arange(2, 10), 2)
    assert judged == 8
    assert found[0] == found[1] > 0


def test_the_command(tmp_path, capsys):
    flags = ["--fused", "--epochs", 1, "--model", "aum", *(f"--{k}={v}" for k, v in live.CARRIED.items())]
    runs.train(capsys, tmp_path / "run", *flags, "--frames", 98)
    shown = runs.run(capsys, tmp_path / "run", "--in-a-row", 2, command=evaluate.main)
    figures = json.loads(shown.out)
    assert len(figures["in_a_row"]) == 2
    assert figures["clips_in_a_row"] == 20
    assert figures["in_a_row"][0] == pytest.approx(figures["accuracy"], abs=0.051)  # one clip's rounding
    for value, said in (("two", "--in-a-row takes a whole number"), ("0", "--in-a-row takes how many clips")):
        assert said in runs.run(capsys, tmp_path / "run", "--in-a-row", value, command=evaluate.main).sentence
    assert "''" in runs.run(capsys, tmp_path / "run", "--in-a-row", command=evaluate.main).sentence


def test_clips_of_several_labels_and_too_short_ones_are_refused():
    classifier = live.classifier(live.MODELS["carried"])
    classifier.multi_label = True
    with pytest.raises(UserError, match="each of one label"):
        running_sound.in_a_row(classifier, pack_of(3), np.arange(3), 2)
    short = live.classifier(live.MODELS["carried"], clip_samples=1600)
    with pytest.raises(UserError, match=r"an answer takes 0.115 s of sound, more than a clip has"):
        running_sound.in_a_row(short, pack_of(3), np.arange(3), 2)
