"""Packing: the right samples, once, whatever happens on the way."""

import io
import os

import numpy as np
import pytest
from made_data import RATE, clip, data_set, make_files, packed
from recordings import RECORDINGS, needs_recordings

from fftp import audio
from fftp.errors import UserError
from train.data import decode, synth
from train.data.clips import Clip, DataSet
from train.data.pack import pack

soundfile = pytest.importorskip("soundfile", reason="sound files need soundfile.")
pytest.importorskip("soxr", reason="resampling needs soxr.")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FFTP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_sixteen_bit_files_are_packed_as_they_are(tmp_path):
    files = make_files(tmp_path / "files", 7)
    result = packed(files)
    assert result.samples.dtype == np.int16
    assert result.length.tolist() == [1000 * (i + 1) for i in range(7)]
    assert result.names == tuple(path.name for path in files)
    for i, path in enumerate(files):
        assert np.array_equal(clip(result, i), soundfile.read(path, dtype="int16")[0])
    assert [result.indices(split).tolist() for split in ("train", "validation", "test")] == [[0, 3, 6], [1, 4], [2, 5]]
    assert result.labels.dtype == np.float32
    assert result.labels.tolist() == [[1, 0], [0, 1]] * 3 + [[1, 0]]
    assert (result.classes, result.skipped, result.sample_rate) == (("a", "b"), [], RATE)


def test_bytes_channels_rates_and_full_scale(tmp_path):
    buffer = io.BytesIO()
    samples = np.stack([np.full(8000, 1.5), np.full(8000, 1.1)], axis=1)
    samples[:4000] *= -1
    soundfile.write(buffer, samples, 8000, format="WAV", subtype="FLOAT")
    result = packed([buffer.getvalue()])
    assert result.length.tolist() == [RATE]
    assert (clip(result, 0)[100], clip(result, 0)[-100]) == (-32768, 32767)


@pytest.mark.parametrize(
    ("form", "subtype"),
    [("WAV", "PCM_24"), ("FLAC", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("AIFF", "PCM_24")],
)
def test_finer_samples_are_rounded_to_sixteen_bits(tmp_path, form, subtype):
    samples = np.random.default_rng(0).uniform(-1, 1, (RATE, 2))
    path = tmp_path / f"x.{form.lower()}"
    soundfile.write(path, samples, RATE, format=form, subtype=subtype)
    exact = soundfile.read(path, dtype="float64")[0].mean(1)
    error = np.abs(clip(packed([path]), 0) / 32768 - exact)
    # Half a step of 16 bits, and float32's rounding of the mean of two.
    assert error.max() <= 0.5 / 32768 + 2**-24
    assert error.max() > 0.49 / 32768


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3.4e38], ids=["nan", "inf", "-inf", "overflow"])
def test_samples_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    good = make_files(tmp_path, 3)
    samples = np.zeros((8000, 2), np.float32)
    samples[100] = bad  # in both channels, whose sum overflows
    soundfile.write(tmp_path / "bad.wav", samples, 8000, subtype="FLOAT")
    with pytest.raises(
        UserError, match=r"1 file is unusable: bad\.wav holds (NaN or infinite samples|samples too large)"
    ):
        packed([*good, tmp_path / "bad.wav"])
    kept = packed([*good, tmp_path / "bad.wav"], skip_bad_files=True)
    assert [name for name, _ in kept.skipped] == ["bad.wav"]
    assert kept.names == tuple(path.name for path in good)


def test_several_labels():
    clips = tuple(Clip(np.zeros(400, np.int16), labels, "train", str(labels)) for labels in [(0, 2), (), (1,)])
    result = pack(DataSet("made", ("a", "b", "c"), clips, True, 1.0), RATE, progress=False)
    assert result.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_arrays_are_packed_in_memory(cache_folder):
    arrays = [synth.make(0, "train", i) for i in range(4)]
    result = packed(arrays)
    assert not isinstance(result.samples, np.memmap)
    assert all(np.array_equal(clip(result, i), array) for i, array in enumerate(arrays))
    assert not cache_folder.exists()
    with pytest.raises(UserError, match="made at 16000 Hz"):
        pack(data_set(arrays), 32_000)
    with pytest.raises(UserError, match="shorter than one analysis window of 16001 samples"):
        pack(data_set(arrays), RATE, 16_001)


def test_processes_give_what_one_gives(tmp_path, monkeypatch):
    files = make_files(tmp_path / "files", 30)
    (tmp_path / "files" / "bad.wav").write_bytes(b"")
    files.insert(11, tmp_path / "files" / "bad.wav")
    monkeypatch.setattr(decode, "_SMALL", 0)
    monkeypatch.setattr(decode, "_JOB_FILES", 2)
    alone = packed(files, skip_bad_files=True, workers=1)
    monkeypatch.setenv("FFTP_CACHE", str(tmp_path / "other"))
    together = packed(files, skip_bad_files=True, workers=2)
    assert np.array_equal(alone.samples, together.samples)
    assert np.array_equal(alone.start, together.start)
    assert alone.names == together.names
    assert alone.skipped == together.skipped == [("bad.wav", "is empty (0 bytes)")]


class Deadly:
    """A source that ends the process which it is sent to, as a decoder with a defect may."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_decoder_that_dies_takes_only_its_clip_along(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_SMALL", 0)
    monkeypatch.setattr(decode, "_JOB_FILES", 2)
    files = make_files(tmp_path, 7)
    tasks = [decode.Task(path, path.name, 1000) for path in files]
    tasks[3] = decode.Task(Deadly(), "deadly", 1000)
    found = list(decode.decode_all(tasks, RATE, audio.WINDOW, workers=1))
    assert found[3] == "ends the process that decodes it"
    for i in (0, 1, 2, 4, 5, 6):
        assert np.array_equal(found[i], soundfile.read(files[i], dtype="int16")[0])


def refuse_to_decode(*_):
    raise AssertionError("a clip was decoded again")


def test_bad_files_are_refused_together(tmp_path, cache_folder):
    files = make_files(tmp_path / "files", 10)
    for path in files[2:9]:
        path.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        packed(files)
    said = str(caught.value)
    assert said.startswith("Of the data set's 10 recordings 7 files are unusable: 002.wav is empty (0 bytes); 003.wav ")
    assert said.endswith("; and 2 more; mend or remove them, or pass --skip-bad-files to go on without them.")
    assert not any((cache_folder / "packs").iterdir())


@needs_recordings
def test_every_awkward_file(tmp_path, monkeypatch):
    files = audio.list_audio(RECORDINGS / "misc")
    bad = {
        "empty.wav", "text.wav", "truncated_header.wav", "truncated_data.wav", "header_says_more.wav", "truncated.flac",
        "no_samples.wav", "nan_float.wav", "ten_ms.wav",
    }  # fmt: skip
    result = packed(files, skip_bad_files=True)
    assert {name for name, _ in result.skipped} == bad
    assert set(result.names) == {path.name for path in files} - bad
    assert len(result.length) == len(files) - len(bad) == 10
    for i, name in enumerate(result.names):
        expected = np.clip(audio.load(RECORDINGS / "misc" / name, RATE) * 32768, -32768, 32767)
        assert np.abs(clip(result, i) - expected).max() <= 0.5
    # The pack in the cache knows what was skipped, and why.
    monkeypatch.setattr(audio, "load", refuse_to_decode)
    again = packed(files, skip_bad_files=True)
    assert (again.names, again.skipped) == (result.names, result.skipped)
    assert np.array_equal(again.start, result.start)
    with pytest.raises(UserError, match="9 files are unusable"):
        packed(files)


def test_what_was_skipped_is_tried_again_with_a_new_decoder(tmp_path, monkeypatch):
    files = make_files(tmp_path / "files", 7)
    files[6].write_bytes(b"\0\0\0\x20ftypM4A ")
    monkeypatch.setattr(audio, "other_decoders", lambda: ())
    assert len(packed(files, skip_bad_files=True).skipped) == 1
    monkeypatch.setattr(audio, "other_decoders", lambda: ("ffmpeg",))
    monkeypatch.setattr(audio, "_read_ffmpeg", lambda _: (np.zeros((500, 1), np.float32), RATE))
    result = packed(files, skip_bad_files=True)
    assert (result.skipped, result.length[-1]) == ([], 500)


def test_split_without_a_usable_clip(tmp_path):
    files = make_files(tmp_path / "files", 3)
    files[1].write_bytes(b"")
    with pytest.raises(UserError, match=r"All 1 recordings of the validation split are unusable .*001\.wav is empty"):
        packed(files, skip_bad_files=True)


def test_file_that_vanishes(tmp_path):
    files = make_files(tmp_path / "files", 7)
    files[3].unlink()
    with pytest.raises(UserError, match=r"1 file is unusable: 003\.wav cannot be opened"):
        packed(files)


@needs_recordings
def test_a_word_of_speech_commands(tmp_path):
    files = audio.list_audio(RECORDINGS / "speech_commands_12" / "zero")
    result = packed(files)
    assert len(result.length) == 482
    assert (result.length.max(), result.skipped) == (16_000, [])
