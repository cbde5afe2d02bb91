"""Prediction: any file, rate, channel count and length, in every form of output; and the scores are the evaluation's."""

import csv
import io
import json

import numpy as np
import pytest
import soundfile
import torch

import fftp
from fftp import predict
from tests import runs
from tests.made_data import RATE, make_files, packed
from tests.recordings import RECORDINGS, needs_recordings
from train import data
from train.data.pack import pack
from train.feed import Feed
from train.run import main as train
from train.samples import Resident
from train.settings import Settings

MISC = RECORDINGS / "misc"
CLIP = 16_000  # samples of synth's clips, and so of a window


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The out folder of a finished run on synth."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert train([*runs.TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def classifier(trained):
    return fftp.load(trained)


@pytest.fixture
def command(trained, capsys):
    """Runs `python -m fftp.predict` with the trained model."""
    return lambda *arguments: runs.run(capsys, trained, *arguments, command=predict.main)


def sine(seconds, rate, channels=1):
    """Float32 `[n, channels]`: another pitch in each channel."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(1, channels + 1) * t[:, None])).astype(np.float32)


def misc_files(good: bool):
    """Names of the files in the folder of good and awkward ones; an unsound one may have any other word."""
    if not MISC.is_dir():
        return []
    with open(MISC / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # ten_ms.wav opens, and is shorter than one analysis window.
    return [r["file"] for r in rows if (r["expected"] == "ok" and r["file"] != "ten_ms.wav") == good]


@needs_recordings
@pytest.mark.parametrize("name", misc_files(good=True) or ["none"])
def test_each_good_file(command, name):
    ended = command(MISC / name, "--json", "--top", 10)
    assert (ended.code, ended.err) == (0, "")
    answer = json.loads(ended.out)
    assert answer["duration"] == pytest.approx(soundfile.info(MISC / name).duration, abs=0.002)
    assert len(answer["windows"]) == np.ceil(answer["duration"] - 0.001)  # windows of a second, the last one moved back
    assert sum(entry["probability"] for entry in answer["top"]) == pytest.approx(1, abs=1e-5)  # six digits each


@needs_recordings
@pytest.mark.parametrize("name", misc_files(good=False) or ["none"])
def test_each_bad_file_is_refused_by_name(command, name):
    ended = command(MISC / name, "--json")
    assert name in ended.sentence
    assert ended.out == ""


def test_good_files_beside_bad_ones(command, tmp_path):
    good = make_files(tmp_path, 3)
    (tmp_path / "001a.wav").write_bytes(b"no sound")
    ended = command(tmp_path, "--json")
    assert [json.loads(line)["file"] for line in ended.out.splitlines()] == [str(path) for path in good]
    assert "001a.wav" in ended.sentence
    skipped = command(tmp_path, "--json", "--skip-bad-files")
    assert (skipped.code, skipped.out) == (0, ended.out)
    assert skipped.err.startswith(f"skipped: {tmp_path / '001a.wav'}")


def test_json(command, classifier, tmp_path):
    soundfile.write(tmp_path / "long.wav", sine(2.5, RATE), RATE)
    soundfile.write(tmp_path / "short.wav", sine(0.3, RATE), RATE)
    ended = command(tmp_path, "--json", "--top", 4)
    long, short = map(json.loads, ended.out.splitlines())
    for answer, seconds in ((long, 2.5), (short, 0.3)):
        assert list(answer) == ["file", "duration", "top", "windows"]
        assert answer["duration"] == seconds
        for ranked in (answer["top"], *(window["top"] for window in answer["windows"])):
            assert [set(entry) for entry in ranked] == [{"label", "probability"}] * 4
            assert {entry["label"] for entry in ranked} <= set(classifier.labels)
            values = [entry["probability"] for entry in ranked]
            assert values == sorted(values, reverse=True)
    assert [(w["start"], w["end"]) for w in long["windows"]] == [(0, 1), (1, 2), (1.5, 2.5)]
    assert [(w["start"], w["end"]) for w in short["windows"]] == [(0, 0.3)]


def test_csv(command, classifier, tmp_path):
    files = make_files(tmp_path, 2)
    rows = list(csv.reader(io.StringIO(command(*files, "--csv").out)))
    assert rows[0] == ["file", "duration", *classifier.labels]
    for row, file in zip(rows[1:], files, strict=True):
        expected = classifier.predict(*soundfile.read(file, dtype="int16"))
        assert row[0] == str(file)
        np.testing.assert_allclose([float(x) for x in row[2:]], expected.probabilities, atol=1e-6)  # six digits


def test_table(command, classifier, tmp_path):
    files = make_files(tmp_path, 2)
    lines = command(*files, "--top", 2).out.splitlines()
    for line, file in zip(lines, files, strict=True):
        top = classifier.predict(*soundfile.read(file, dtype="int16")).top(2)
        assert line.startswith(str(file))
        assert [word for word in line.split() if word in classifier.labels] == [label for label, _ in top]
        assert f"{100 * top[0][1]:.1f} %" in line


def test_embeddings(command, classifier, tmp_path):
    files = make_files(tmp_path / "in", 3)
    assert command(tmp_path / "in", "--embeddings", tmp_path / "made.npz").code == 0
    with np.load(tmp_path / "made.npz") as made:
        assert list(made["files"]) == [str(path) for path in files]
        expected = [classifier.predict(*soundfile.read(f, dtype="int16")).embedding for f in files]
        # Three in a batch there and one by one here: seen 0 of 3, and 1e-6 elsewhere; times five.
        np.testing.assert_allclose(made["embeddings"], expected, atol=5e-6)
    assert "cannot be written" in command(files[0], "--embeddings", tmp_path / "no" / "made.npz").sentence


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "needs FILE-OR-FOLDER"),
        (["absent.wav"], "There is no file or folder absent.wav"),
        (["EMPTY"], "holds no sound files"),
        (["EMPTY", "--json", "--csv"], "--json and --csv are two formats"),
        (["EMPTY", "--top", "0"], "--top has to be at least 1"),
        pytest.param(
            ["EMPTY", "--device", "cuda"],
            "no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: nothing to refuse"),
        ),
    ],
)
def test_requests_that_cannot_be_met(command, tmp_path, arguments, named):
    ended = command(*(tmp_path if word == "EMPTY" else word for word in arguments))
    assert named in ended.sentence
    assert ended.out == ""


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2), (16_000, 3), (48_000, 1), (11_025, 1)])
def test_any_rate_and_channels(classifier, command, tmp_path, rate, channels):
    samples = (sine(0.8, rate, channels) * 2**15).astype(np.int16)
    soundfile.write(tmp_path / "x.flac", samples, rate)
    answer = json.loads(command(tmp_path / "x.flac", "--json", "--top", 10).out)
    from_array = classifier.predict(samples.T, rate)
    assert from_array.duration == pytest.approx(0.8, abs=1e-3)
    got = {entry["label"]: entry["probability"] for entry in answer["top"]}
    for label, probability in zip(from_array.labels, from_array.probabilities, strict=True):
        assert got[label] == pytest.approx(float(probability), abs=1e-6)  # six digits


def test_whole_numbers_are_scaled_by_their_range(classifier):
    wave = (sine(1, RATE)[:, 0] * 120).round() / 128  # what 8 bits hold exactly
    expected = classifier.predict(wave, RATE).probabilities
    for samples in (
        (wave * 128).astype(np.int8),
        (wave * 128 + 128).astype(np.uint8),
        (wave * 2**15).astype(np.int16),
        (wave * 2.0**31).astype(np.int32),
        wave.astype(np.float64),
        torch.from_numpy(wave),
        np.stack([wave, wave]),
    ):
        assert (classifier.predict(samples, RATE).probabilities == expected).all()


@pytest.mark.parametrize(
    ("samples", "named"),
    [
        (np.zeros(399, np.int16), "is 25 ms long, shorter than one window of 25 ms"),
        (np.zeros(0, np.float32), "shorter than one window"),
        (np.full(9000, np.nan, np.float32), "NaN or infinite"),
        (np.full(9000, np.inf, np.float32), "NaN or infinite"),
        (np.zeros((9000, 2), np.float32), "transpose it"),
        (np.zeros((1, 2, 9000), np.float32), "has to be (samples,) or (channels, samples)"),
    ],
    ids=["short", "none", "nan", "infinite", "transposed", "three axes"],
)
def test_waveforms_that_are_none(classifier, samples, named):
    with pytest.raises(fftp.UserError) as error:
        classifier.predict(samples, RATE)
    assert named in str(error.value)


@pytest.mark.parametrize("rate", [RATE, 44_100])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300], ids=["nan", "inf", "-inf", "beyond float32"])
def test_one_bad_sample_is_refused_at_any_rate(classifier, rate, bad):
    wave = np.stack([sine(1, rate)[:, 0].astype(np.float64)] * 2)
    classifier.predict(wave, rate)
    wave[1, 500] = bad
    with pytest.raises(fftp.UserError, match="the waveform holds NaN or infinite samples"):
        classifier.predict(wave, rate)


def test_samples_that_overflow_on_the_way_are_refused(classifier):
    wave = np.full((2, RATE), 3.4e38, np.float32)  # finite, and their sum is not
    with pytest.raises(fftp.UserError, match="too large for 32 bits"):
        classifier.predict(wave, RATE)


@pytest.mark.parametrize(
    ("n", "starts"),
    [(400, [0]), (CLIP, [0]), (CLIP + 1, [0, 1]), (2 * CLIP, [0, CLIP]), (40_000, [0, CLIP, 24_000])],
)
def test_windows_cover_a_recording_and_are_averaged(classifier, n, starts):
    wave = np.random.default_rng(n).normal(size=n).astype(np.float32) * 0.1
    assert classifier.windows(n) == [(s, min(n, s + CLIP)) for s in starts]
    whole = classifier.predict(wave, RATE)
    parts = [classifier.predict(wave[a:b], RATE) for a, b in classifier.windows(n)]
    # In one batch here and one by one there: seen 1.2e-7, times five.
    np.testing.assert_allclose(whole.probabilities, np.mean([p.probabilities for p in parts], 0), atol=6e-7)
    np.testing.assert_allclose(whole.window_probabilities, [p.probabilities for p in parts], atol=6e-7)
    np.testing.assert_allclose(whole.embedding, np.mean([p.embedding for p in parts], 0), atol=5e-6)
    assert whole.windows == [(a / RATE, b / RATE) for a, b in classifier.windows(n)]
    assert whole.top(3)[0][1] == whole.probabilities.max()


def test_windows_of_several_files_go_through_together(classifier, monkeypatch):
    """Batches are full but for the last, also where a recording's windows begin in one and end in the next."""
    monkeypatch.setattr(predict, "BATCH", 4)
    rng = np.random.default_rng(0)
    lengths = [CLIP, 6 * CLIP - 5, 400, 9000, 2 * CLIP, CLIP]  # 1, 6, 1, 1, 2 and 1 windows
    waves = [0.1 * rng.normal(size=n).astype(np.float32) for n in lengths]
    bad = fftp.UserError("not this one")
    sizes, classified = [], classifier._classified
    monkeypatch.setattr(classifier, "_classified", lambda pieces: sizes.append(len(pieces)) or classified(pieces))
    outcomes = list(classifier.predict_each(iter([bad, *waves[:2], bad, *waves[2:], bad])))
    assert sizes == [4, 4, 4]
    assert [i for i, outcome in enumerate(outcomes) if outcome is bad] == [0, 3, 8]
    good = [outcome for outcome in outcomes if outcome is not bad]
    for wave, outcome, beside in zip(waves, good, classifier.predict_many(waves), strict=True):
        alone = classifier.predict(wave, RATE)
        assert (outcome.windows, outcome.duration) == (alone.windows, alone.duration)
        assert (outcome.probabilities == beside.probabilities).all()
        # Other sizes of batches: seen 1.2e-7 and 1e-6, times five.
        np.testing.assert_allclose(outcome.window_probabilities, alone.window_probabilities, atol=6e-7)
        np.testing.assert_allclose(outcome.embedding, alone.embedding, atol=5e-6)


def test_a_files_input_is_its_own_whatever_is_beside_it(classifier):
    rng = np.random.default_rng(1)
    pieces = [0.1 * rng.normal(size=n).astype(np.float32) for n in (CLIP, 400, 12_345, CLIP)]
    together = classifier._input(pieces)
    for piece, row in zip(pieces, together, strict=True):
        assert torch.equal(classifier._input([piece])[0], row)


def test_few_recordings_are_in_memory_at_a_time(classifier, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 4)
    read = []

    def recordings():
        for i in range(40):
            read.append(i)
            yield np.zeros(CLIP, np.float32)

    predictions = classifier.predict_each(recordings())
    for answered, _ in enumerate(predictions):
        assert len(read) <= 4 * (answered // 4 + 3)  # the batch answered, the one beside it, and the one being made
    assert len(read) == answered + 1 == 40


def test_nothing_to_predict(classifier):
    assert classifier.predict_many([]) == list(classifier.predict_each(iter([]))) == []


def test_scores_are_the_evaluations(classifier, trained):
    settings = Settings(**runs.result(trained)["settings"])
    made = pack(data.load(settings), RATE)
    feed = Feed(Resident(made, torch.device("cpu")), made.indices("test"), classifier.front_end)
    batch = feed.plain(np.arange(5))
    with torch.inference_mode():
        expected = classifier.config.probabilities(classifier.model(batch.log_mel)).numpy()
    for i, clip in enumerate(batch.indices):
        samples = made.samples[made.start[clip] : made.start[clip] + made.length[clip]]
        wave = classifier.prepare(samples, RATE)
        assert torch.equal(classifier.log_mel(wave)[0], batch.log_mel[i])
        # Five in a batch there, one here: seen 1.2e-7, times five.
        np.testing.assert_allclose(classifier.predict(samples, RATE).probabilities, expected[i], atol=6e-7)


def test_files_get_the_input_that_training_gives_them(classifier, tmp_path):
    """Shorter than a clip (padded) and longer (the first window), from the file and through the pack."""
    files = [*make_files(tmp_path, 3), tmp_path / "long.wav"]
    soundfile.write(files[-1], np.random.default_rng(0).integers(-9999, 9999, 20_000, dtype=np.int16), RATE)
    made = packed(files)
    feed = Feed(Resident(made, torch.device("cpu")), np.arange(len(files)), classifier.front_end)
    for i, file in enumerate(files):
        wave = classifier.prepare(*soundfile.read(file, dtype="int16"))
        assert torch.equal(classifier.log_mel(wave)[0], feed.plain(np.array([i])).log_mel[0])
