"""Logistic regression on mean spectra: what it can tell apart it does, what it cannot it does not."""

import re
import sys

import numpy as np
import pytest
from made_data import RATE

from fftp.errors import UserError
from fftp.frontend import FrontEndSettings
from kernels import FbankSettings
from train import baseline, statistics
from train.data.clips import Clip, DataSet
from train.data.pack import pack

pytest.importorskip("sklearn", reason="the baseline needs scikit-learn.")
LENGTH = RATE // 2


def noise(rng, low: bool, high: bool) -> np.ndarray:
    """Half a second of noise below 1 kHz, above 4 kHz, both, or neither (faint and white)."""
    spectrum = np.fft.rfft(rng.standard_normal(LENGTH))
    frequency = np.fft.rfftfreq(LENGTH, 1 / RATE)
    gain = 0.01 + low * (frequency < 1000) + high * (frequency > 4000)
    return np.clip(np.fft.irfft(spectrum * gain) * 3000, -32768, 32767).astype(np.int16)


def made(label_of, multi_label=True, never=()):
    """60 training and 40 test clips; `label_of(low, high, rng)` says which of three classes a clip has."""
    rng, clips = np.random.default_rng(0), []
    for number in range(100):
        low, high = bool(number & 1), bool(number & 2)
        labels = label_of(low, high, rng)
        if number < 60:
            labels = tuple(label for label in labels if label not in never)
        clips.append(Clip(noise(rng, low, high), labels, "train" if number < 60 else "test", str(number)))
    return pack(DataSet("made", ("a", "b", "c"), tuple(clips), multi_label, 0.5), RATE, progress=False)


def figures(packed, multi_label=True):
    front_end = FrontEndSettings(
        T=64, clip_samples=LENGTH, mean=0.0, std=0.5, fit="pad", fbank=FbankSettings(n_mels=128)
    )
    return baseline.logistic(packed, front_end, multi_label)


def both(low, high, rng):
    return (0,) * low + (1,) * high


def test_several_labels_by_where_the_energy_lies():
    found = figures(made(both))
    assert found["map"] == pytest.approx(1.0)
    assert found["classes_scored"] == 2  # no clip has the third


def test_what_the_spectrum_does_not_say_stays_near_chance():
    found = figures(made(lambda low, high, rng: (int(rng.integers(0, 2)),)))
    assert 0.3 < found["map"] < 0.7


def test_a_class_without_training_clips_has_no_score():
    found = figures(made(both, never=(1,)))
    assert found["auc"] == pytest.approx((1.0 + 0.5) / 2)  # all ties: as often right as wrong


def test_one_label():
    found = figures(made(lambda low, high, rng: (low + 2 * high if low + 2 * high < 3 else 0,), False), False)
    assert found["accuracy"] > 0.9


def test_the_command_prints_it(capsys):
    flags = ["--synth-train", "60", "--synth-validation", "10", "--synth-test", "40", "--mean", "-5", "--std", "4"]
    assert statistics.main(flags) == 0
    plain = capsys.readouterr().out
    assert statistics.main([*flags, "--baseline"]) == 0
    more = capsys.readouterr().out
    assert more.startswith(plain)
    (accuracy,) = re.findall(r"logistic regression .* test clips: accuracy ([\d.]+) %", more.removeprefix(plain))
    assert 5 < float(accuracy) < 60  # ten classes; synth's mean spectra say little
    assert re.search(
        r"# the recipe has mean -5.0000 and std 4.0000; these differ by mean [+-]\d\.\d{4}, std [+-]\d", plain
    )


def test_it_needs_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        figures(made(both))
