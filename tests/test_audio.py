"""Sound files: what is read, and what is refused by name."""

import csv
import io
import pickle
import struct
import sys

import numpy as np
import pytest
from recordings import RECORDINGS, needs_recordings

from fftp import audio
from fftp.errors import UserError

soundfile = pytest.importorskip("soundfile", reason="sound files need soundfile.")
pytest.importorskip("soxr", reason="resampling needs soxr.")

RATE = 16_000


def manifest() -> list[dict[str, str]]:
    path = RECORDINGS / "misc" / "manifest.csv"
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []


def wav_bytes(samples, rate=RATE, **how) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", **how)
    return buffer.getvalue()


def tone(seconds=1.0, rate=RATE, hertz=440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


GOOD = [row for row in manifest() if row["expected"] == "ok" and row["file"] != "ten_ms.wav"]
BAD = {
    "empty.wav": r"is empty \(0 bytes\)",
    "text.wav": "is not audio that libsndfile can read",
    "truncated_header.wav": "is damaged or cut short",
    "truncated_data.wav": "is truncated: its header declares 16000 samples, the file holds 4500",
    "header_says_more.wav": "is truncated: its header declares 160000 samples, the file holds 16000",
    "truncated.flac": "is damaged or cut short",
    "no_samples.wav": "holds no samples",
    "nan_float.wav": "holds NaN or infinite samples",
    "ten_ms.wav": "is 10 ms long, shorter than one 25 ms analysis window",
}


@needs_recordings
def test_every_file_of_the_manifest_is_tested():
    assert {row["file"] for row in manifest()} == {row["file"] for row in GOOD} | set(BAD)


@needs_recordings
@pytest.mark.parametrize("row", GOOD, ids=lambda row: row["file"])
@pytest.mark.parametrize("form", ["path", "bytes"])
def test_good_files(row, form):
    path = RECORDINGS / "misc" / row["file"]
    source = path if form == "path" else path.read_bytes()
    samples, rate = audio.read(source)
    assert samples.dtype == np.float32
    assert rate == int(row["sample_rate"])
    # An MP3's length depends on the decoder, by up to two of its frames of 1152 samples.
    tolerance = 2304 if path.suffix == ".mp3" else 0
    assert samples.shape[1] == int(row["channels"])
    assert abs(len(samples) - int(row["frames_in_header"])) <= tolerance
    waveform = audio.load(source, RATE)
    assert waveform.dtype == np.float32
    assert waveform.ndim == 1
    assert waveform.flags.c_contiguous
    assert abs(len(waveform) - len(samples) * RATE / rate) <= 1
    assert np.isfinite(waveform).all()
    assert audio.duration(source) == pytest.approx(int(row["frames_in_header"]) / rate, abs=tolerance / rate + 1e-9)


@needs_recordings
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("form", ["path", "bytes"])
def test_bad_files(name, form):
    path = RECORDINGS / "misc" / name
    with pytest.raises(audio.BadAudio, match=BAD[name]) as caught:
        audio.load(path if form == "path" else path.read_bytes(), RATE, name=name)
    assert caught.value.name == name
    assert str(caught.value).startswith(f"{name} {caught.value.reason}")
    assert "remove this file." in str(caught.value)


@needs_recordings
def test_float_files_keep_what_is_above_full_scale():
    samples, _ = audio.read(RECORDINGS / "misc" / "float32_over_full_scale.wav")
    assert np.abs(samples).max() == pytest.approx(1.5, abs=1e-3)


def test_bad_audio_crosses_processes():
    error = pickle.loads(pickle.dumps(audio.BadAudio("x.wav", "holds no samples")))
    assert (error.name, error.reason, str(error)) == (
        "x.wav",
        "holds no samples",
        "x.wav holds no samples: mend, replace or remove this file.",
    )


def test_missing_file(tmp_path):
    with pytest.raises(audio.BadAudio, match=r"none\.wav cannot be opened \(No such file or directory\)"):
        audio.load(tmp_path / "none.wav", RATE)


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF, 0xFFFFFFFF - 36])
def test_wav_of_unknown_length_is_read(size):
    content = wav_bytes(tone(), subtype="PCM_16")
    at = content.index(b"data") + 4
    streamed = content[:at] + struct.pack("<I", size) + content[at + 4 :]
    assert len(audio.read(streamed)[0]) in ((RATE, 0) if size == 0 else (RATE,))


@pytest.mark.parametrize("lost", [1, 2, 3, 1001])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "ULAW", "IMA_ADPCM"])
def test_wav_cut_anywhere_in_its_samples(subtype, lost):
    content = wav_bytes(tone(1.01), subtype=subtype)
    tail = len(content) - content.index(b"data") - 8 - struct.unpack_from("<I", content, content.index(b"data") + 4)[0]
    with pytest.raises(audio.BadAudio, match="is truncated: its header declares"):
        audio.load(content[: len(content) - max(tail, 0) - lost], RATE, name="cut.wav")


@pytest.mark.parametrize("lost", [1, 2000])
@pytest.mark.parametrize(("container", "subtype"), [("AIFF", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_other_containers_that_are_cut(container, subtype, lost):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(), RATE, format=container, subtype=subtype)
    assert len(audio.load(buffer.getvalue(), RATE)) == RATE
    with pytest.raises(audio.BadAudio, match=r"^cut is truncated: it"):
        audio.load(buffer.getvalue()[:-lost], RATE, name="cut")


def test_wav_with_chunks_before_and_after_the_samples():
    content = wav_bytes(tone(), subtype="PCM_16")
    at = content.index(b"data")
    odd = b"note" + struct.pack("<I", 3) + b"abc\0"  # an odd chunk is padded to an even length
    more = content[:at] + odd + content[at:] + odd
    more = more[:4] + struct.pack("<I", len(more) - 8) + more[8:]
    assert np.array_equal(audio.read(more)[0], audio.read(content)[0])


def test_mono_is_the_mean_of_the_channels():
    samples = np.stack([tone(), -0.5 * tone(), np.zeros(RATE)], axis=1).astype(np.float32)
    assert np.allclose(audio.to_mono(samples, RATE, RATE), samples.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_resampling_keeps_a_tone(rate):
    waveform = audio.to_mono(tone(rate=rate)[:, None].astype(np.float32), rate, RATE)
    assert len(waveform) == RATE
    inside = slice(RATE // 10, -RATE // 10)  # the filter has no signal to see beyond the ends
    # -60 dB of the tone: soxr's HQ is 20-bit, the margin is for its pass band.
    assert np.abs(waveform[inside] - tone()[inside]).max() < 5e-4


@pytest.mark.parametrize(("samples", "accepted"), [(399, False), (400, True)])
def test_shortest_clip(samples, accepted):
    content = wav_bytes(tone()[:samples])
    if accepted:
        assert len(audio.load(content, RATE, 400)) == samples
    else:
        with pytest.raises(audio.BadAudio, match=r"is 24\.9 ms long, shorter than one 25 ms analysis window"):
            audio.load(content, RATE, 400)


@pytest.mark.parametrize("name", ["soundfile", "soxr"])
def test_package_that_is_not_installed(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"^Sound files need the package {name}: install it with"):
        audio.load(wav_bytes(tone(rate=8000), 8000) if name == "soxr" else b"RIFF", RATE)


def test_list_audio(tmp_path):
    for name in ("b.WAV", "a.flac", "deep/er/c.ogg", "._a.flac", ".hidden/d.wav", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [path.relative_to(tmp_path).as_posix() for path in audio.list_audio(tmp_path)] == [
        "a.flac",
        "b.WAV",
        "deep/er/c.ogg",
    ]
    with pytest.raises(UserError, match="is not a folder"):
        audio.list_audio(tmp_path / "none")


def put_ffmpeg(folder, monkeypatch, body: str) -> None:
    """A stand-in for ffmpeg on PATH: a script that is called with ffmpeg's arguments."""
    script = folder / "ffmpeg"
    script.write_text(f"#!{sys.executable}\nimport sys, shutil\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(audio, "find_spec", lambda name: None)


@pytest.mark.parametrize("form", ["path", "bytes"])
def test_ffmpeg_reads_what_libsndfile_does_not(tmp_path, monkeypatch, form):
    decoded = wav_bytes(np.stack([tone(), tone()], axis=1), subtype="FLOAT")
    (tmp_path / "decoded").write_bytes(decoded)
    put_ffmpeg(tmp_path, monkeypatch, f"shutil.copy({str(tmp_path / 'decoded')!r}, sys.argv[-1])")
    clip = tmp_path / "clip.m4a"
    clip.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(1000))
    samples, rate = audio.read(clip if form == "path" else clip.read_bytes())
    assert (samples.shape, rate) == ((RATE, 2), RATE)


def test_ffmpeg_fails_too(tmp_path, monkeypatch):
    put_ffmpeg(tmp_path, monkeypatch, "sys.exit(1)")
    with pytest.raises(audio.BadAudio, match=r"^clip is not audio that libsndfile or ffmpeg can read: mend"):
        audio.read(b"no audio", "clip")


def test_no_other_decoder(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(audio, "find_spec", lambda name: None)
    with pytest.raises(audio.BadAudio, match="neither torchcodec nor ffmpeg is installed"):
        audio.read(b"no audio", "clip")
