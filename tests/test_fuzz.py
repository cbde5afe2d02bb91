"""Damaged sound files by the hundred: each is decoded or refused by name, and no good one is lost."""

import io

import numpy as np
import pytest
from made_data import RATE, clip, data_set
from recordings import RECORDINGS, needs_recordings

from fftp import audio
from train.data import decode, synth
from train.data.pack import pack

soundfile = pytest.importorskip("soundfile", reason="sound files need soundfile.")
pytest.importorskip("soxr", reason="resampling needs soxr.")

FORMS = {"wav": "WAV", "flac": "FLAC", "ogg": "OGG", "mp3": "MP3"}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FFTP_CACHE", str(tmp_path / "cache"))


def write(folder, sounds):
    """Every sound in every form: its files' paths."""
    folder.mkdir()
    paths = []
    for number, samples in enumerate(sounds):
        for suffix, form in FORMS.items():
            content = io.BytesIO()
            soundfile.write(content, samples, RATE, format=form)
            paths.append(folder / f"good{number:03d}.{suffix}")
            paths[-1].write_bytes(content.getvalue())
    return paths


def mutated(rng, content: bytes, other: bytes) -> bytes:
    """One of: flipped bits, a cut, another file's header in place of its own, a hole, a piece twice, both ends swapped."""
    damaged = bytearray(content)
    at = sorted(int(i) for i in rng.integers(0, len(content), 2))
    kind = rng.integers(0, 6)
    if kind == 0:
        for i in rng.integers(0, len(content) if rng.random() < 0.5 else 64, 1 + rng.integers(0, 30)):
            damaged[i] ^= 1 << rng.integers(0, 8)
    elif kind == 1:
        del damaged[int(rng.integers(0, len(content))) :]
    elif kind == 2:
        n = int(rng.integers(4, 200))
        damaged[:n] = other[:n]
    elif kind == 3:
        damaged[at[0] : at[1]] = bytes(at[1] - at[0])
    elif kind == 4:
        damaged[at[0] : at[0]] = content[at[0] : at[1]]
    else:
        damaged = damaged[at[0] :] + damaged[: at[0]]
    return bytes(damaged)


def mutate(paths, folder, count):
    rng = np.random.default_rng(0)
    contents = [path.read_bytes() for path in paths]
    folder.mkdir()
    made = []
    for number in range(count):
        one, other = rng.integers(0, len(paths), 2)
        made.append(folder / f"bad{number:04d}{paths[one].suffix}")
        made[-1].write_bytes(mutated(rng, contents[one], contents[other]))
    return made


def check(good, bad):
    """Pack both, in turn; returns how many of the damaged ones were decoded."""
    alone = pack(data_set(good, ("train",)), RATE, progress=False)
    sources = [
        path for pair in zip(bad, (good * (1 + len(bad) // len(good)))[: len(bad)], strict=True) for path in pair
    ]
    sources = list(dict.fromkeys([*sources, *good]))
    both = pack(data_set(sources, ("train",)), RATE, skip_bad_files=True, progress=False)
    skipped = dict(both.skipped)
    assert {*both.names, *skipped} == {path.name for path in sources}
    assert all(reason and "\n" not in reason for reason in skipped.values())
    place = {name: i for i, name in enumerate(both.names)}
    for i, name in enumerate(alone.names):
        assert np.array_equal(clip(both, place[name]), clip(alone, i)), name
    assert both.length.min() >= audio.WINDOW
    return len(both.names) - len(good)


def test_sixty_damaged_files(tmp_path):
    good = write(tmp_path / "good", [synth.make(3, "train", i) for i in range(3)])
    decoded = check(good, mutate(good, tmp_path / "bad", 60 - len(good)))
    assert 5 < decoded < 43  # some of each, or the damage shows nothing


@needs_recordings
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_thousand_damaged_files(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_SMALL", 0)
    files = audio.list_audio(RECORDINGS / "esc10")[::4]
    good = write(tmp_path / "good", [audio.load(path, RATE)[:RATE] for path in files])
    decoded = check(good, mutate(good, tmp_path / "bad", 1000))
    assert 100 < decoded < 900
