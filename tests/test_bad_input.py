"""Every kind of bad input through the command line: code 2, one sentence, no traceback, nothing half-written."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch

from fftp import checkpoint, predict
from tests import runs
from tests.made_data import RATE, make_files
from train import run as train_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The out folder of a finished run on synth."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert train_run.main([*runs.TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs flags that have to be refused, with an --out that must stay unmade; returns the sentence."""

    def refuse(*flags):
        out = tmp_path / "out"
        said = runs.run(capsys, *runs.TINY, "--out", out, *flags).sentence
        assert not out.exists()
        assert said.endswith((".", "?"))
        return said

    return refuse


def make_bad(folder):
    """Files that are no usable recording: name -> a word of what is said about it."""
    import soundfile

    good = make_files(folder, 8)
    whole = good[7].read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "header.wav").write_bytes(whole[:30])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_bytes(b"These are words, and no sound at all. " * 9)
    with_nan = np.zeros(RATE, dtype=np.float32)
    with_nan[100] = np.nan
    soundfile.write(folder / "nan.wav", with_nan, RATE, subtype="FLOAT")
    soundfile.write(folder / "short.wav", np.zeros(399, dtype=np.int16), RATE)
    soundfile.write(folder / "nothing.wav", np.zeros(0, dtype=np.int16), RATE)
    return {
        "cut.wav": "truncated",
        "header.wav": "",
        "empty.wav": "is empty",
        "text.wav": "is not audio",
        "nan.wav": "NaN",
        "short.wav": "shorter than one 25 ms analysis window",
        "nothing.wav": "holds no samples",
    }


@pytest.mark.parametrize("data", ["folder", "speechcommands"])
def test_data_folder_missing_empty_or_not_given(refused, tmp_path, data):
    absent, empty = tmp_path / "absent", tmp_path / "empty"
    empty.mkdir()
    assert f"{absent} does not exist" in refused("--data", data, "--data-root", absent)
    assert f"{empty} is empty" in refused("--data", data, "--data-root", empty)
    assert "--data-root" in refused("--data", data)


def test_folders_without_recordings(refused, tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "notes.txt").touch()
    assert "has no folders with audio files" in refused("--data", "folder", "--data-root", tmp_path / "data")


def test_too_few_recordings_to_test_on(refused, tmp_path):
    for name in ("a", "b"):
        make_files(tmp_path / "data" / name, 1)
    assert "no test clips" in refused("--data", "folder", "--data-root", tmp_path / "data")


def test_bad_files_are_listed_and_left_out_only_when_asked(refused, tmp_path, capsys):
    bad = make_bad(tmp_path / "data" / "a")
    make_files(tmp_path / "data" / "b", 8)
    flags = ("--data", "folder", "--data-root", tmp_path / "data", "--batch-size", 5, "--frames", 64)
    said = refused(*flags)
    assert f"{len(bad)} files are unusable" in said
    assert "and 2 more" in said  # five by name, the rest counted
    assert "--skip-bad-files" in said
    assert all(f"a/{name}" in said for name in sorted(bad)[:5])
    result = runs.train(capsys, tmp_path / "out", *flags, "--skip-bad-files")
    skipped = {entry["file"]: entry["reason"] for entry in result["skipped_files"]}
    assert set(skipped) == {f"a/{name}" for name in bad}
    for name, word in bad.items():
        assert word in skipped[f"a/{name}"]
    assert sum(result["clips"].values()) == 16


@pytest.mark.parametrize("kind", ["cut", "header", "empty", "text", "nan", "short", "nothing"])
def test_each_kind_of_bad_file_is_named(refused, tmp_path, kind):
    word = make_bad(tmp_path / "all")[f"{kind}.wav"]
    for name in ("a", "b"):
        make_files(tmp_path / "data" / name, 4)
    shutil.copy(tmp_path / "all" / f"{kind}.wav", tmp_path / "data" / "b" / "wrong.wav")
    said = refused("--data", "folder", "--data-root", tmp_path / "data")
    assert "1 file is unusable: b/wrong.wav" in said
    assert word in said


def test_silence_is_data_but_nothing_else_than_silence_is_not(refused, tmp_path, capsys):
    import soundfile

    for name in ("a", "b"):
        make_files(tmp_path / "data" / name, 6)
    soundfile.write(tmp_path / "data" / "a" / "silent.wav", np.zeros(RATE, dtype=np.int16), RATE)
    flags = ("--data", "folder", "--data-root", tmp_path / "data", "--batch-size", 5, "--frames", 64)
    assert np.isfinite(runs.train(capsys, tmp_path / "good", *flags)["train_loss"])
    for path in (tmp_path / "data").rglob("*.wav"):
        soundfile.write(path, np.zeros(RATE, dtype=np.int16), RATE)
    assert "silent" in refused(*flags)


def test_patch_wider_or_higher_than_the_clip(refused):
    said = refused("--frames", 20, "--patch-time", 21, "--mask-width", 5)
    assert "21 frames is wider than the clip of 20 frames" in said
    assert "--patch-time" in said
    assert "higher than the 32 bins" in refused("--patch", "square", "--patch-freq", 40, "--mels", 32)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--recipe", "sinth"], "did you mean synth"),
        (["--bach-size", "3"], "did you mean --batch-size"),
        (["--augment", "specmsk"], "did you mean specmask"),
        (["--synth-train", "3"], "--synth-train is 3"),
    ],
)
def test_unknown_words_and_values(refused, flags, named):
    assert named in refused(*flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data-root", "recordings"], "--data synth makes its own: add --data folder"),
        (["--csv", "clips.csv"], "--csv is for --data folder, and this is --data synth"),
        (
            ["--data", "folder", "--data-root", "recordings", "--words", "yes,no"],
            "--words is for --data speechcommands",
        ),
        (["--data", "audioset", "--data-root", "recordings", "--multi-label"], "--multi-label is for --data folder"),
    ],
)
def test_flags_of_another_data_set(refused, flags, said):
    """Without that a run would train on other sounds than its user thinks."""
    assert said in refused(*flags)


def test_unknown_speech_commands_word(refused, tmp_path):
    for name in ("yes", "no"):
        make_files(tmp_path / "data" / name, 3)
    for number, split in enumerate(("validation", "testing")):
        (tmp_path / "data" / f"{split}_list.txt").write_text(f"yes/00{number}.wav\nno/00{number}.wav\n")
    said = refused("--data", "speechcommands", "--data-root", tmp_path / "data", "--words", "yess,no")
    assert "did you mean yes?" in said


def test_out_that_holds_another_run(trained, tmp_path, capsys):
    before = runs.files(trained)
    said = runs.run(capsys, *runs.TINY, "--out", trained).sentence
    assert f"--out {trained} holds something already" in said
    assert "--resume" in said
    assert runs.files(trained) == before
    (tmp_path / "file").touch()
    assert "holds something" in runs.run(capsys, *runs.TINY, "--out", tmp_path / "file").sentence
    assert "cannot be made" in runs.run(capsys, *runs.TINY, "--out", tmp_path / "file" / "below").sentence


def test_no_gpu_and_no_such_backend(refused, monkeypatch):
    if not torch.cuda.is_available():
        assert "no GPU" in refused("--device", "cuda")
    monkeypatch.setenv("FFTP_BACKEND", "fbank=fastest")
    assert "fbank has no backend 'fastest'; there are triton, native, reference" in refused()
    monkeypatch.setenv("FFTP_BACKEND", "nonsense")
    assert "'nonsense' names none of" in refused()
    monkeypatch.setenv("FFTP_BACKEND", "patch_embed=triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "which cannot run" in refused("--device", "cpu")


def broken_checkpoint(trained, tmp_path, how):
    folder = shutil.copytree(trained / "best", tmp_path / "checkpoint")
    weights, config = folder / "model.safetensors", folder / "config.json"
    written = json.loads(config.read_text())
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "header cut":
        weights.write_bytes(weights.read_bytes()[:5])
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "config cut":
        config.write_text(config.read_text()[:300])
    elif how == "of another library":
        config.write_text(json.dumps({"architectures": ["ASTForAudioClassification"], "num_mel_bins": 128}))
    elif how == "a list":
        config.write_text("[1, 2]")
    elif how == "of another model":
        written["architecture"]["dim"] = 96
        config.write_text(json.dumps(written))
    elif how == "deeper":
        written["architecture"]["depth"] = 2
        config.write_text(json.dumps(written))
    elif how == "of a later version":
        written["architecture"]["novelty"] = 1
        config.write_text(json.dumps(written))
    return folder


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("truncated", "model.safetensors is truncated or not a safetensors file"),
        ("header cut", "model.safetensors is truncated or not a safetensors file"),
        ("no weights", "model.safetensors is missing"),
        ("no config", "is not a checkpoint of this library"),
        ("config cut", "config.json is damaged"),
        ("of another library", "config.json is not of a checkpoint of this library"),
        ("a list", "config.json is not of a checkpoint of this library"),
        ("of another model", "is of another model"),
        ("deeper", "blocks.1.norm1.weight"),
        ("of a later version", "config.json is damaged or of another version"),
    ],
)
def test_checkpoints_that_are_none(trained, tmp_path, capsys, how, named):
    folder = broken_checkpoint(trained, tmp_path, how)
    sound = make_files(tmp_path / "sounds", 1)[0]
    ended = runs.run(capsys, folder, sound, command=predict.main)
    assert named in ended.sentence
    assert str(folder) in ended.sentence
    assert ended.out == ""


def test_checkpoint_that_is_absent_or_a_file(tmp_path, capsys):
    sound = make_files(tmp_path / "sounds", 1)[0]
    for path, named in ((tmp_path / "absent", "There is no checkpoint at"), (sound, "is not a checkpoint")):
        assert named in runs.run(capsys, path, sound, command=predict.main).sentence


def test_class_list_that_does_not_match(tmp_path, capsys):
    for name in ("a", "b"):
        make_files(tmp_path / "data" / name, 6)
    out = tmp_path / "run"
    flags = ("--data", "folder", "--data-root", tmp_path / "data", "--batch-size", 4, "--frames", 64)
    runs.train(capsys, out, *flags)
    (out / "result.json").unlink()
    (tmp_path / "data" / "b").rename(tmp_path / "data" / "c")
    said = runs.run(capsys, "--resume", "--out", out).sentence
    assert "the data lacks b and the data has c besides" in said


@pytest.mark.parametrize("write", [1, 2, 3], ids=["settings", "first epoch", "second epoch"])
def test_disk_that_is_full(tmp_path, capsys, monkeypatch, write):
    """The disk fills up at the first settings.json, in the first epoch's checkpoint, and in the second's."""
    out, seen, whole = tmp_path / "run", [], {}
    real = checkpoint.write

    def full(path, content):
        if write == 3 and (out / "last").exists() and not whole:
            whole.update({f: (out / "last" / f).read_bytes() for f in ("model.safetensors", "state.safetensors")})
        stage = 1 if path.name.startswith("settings") else 3 if whole else 2
        if stage == write and path.name in ("settings.json.new", "state.safetensors"):
            path.write_bytes(content[: len(content) // 2])
            seen.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, content)

    monkeypatch.setattr(checkpoint, "write", full)
    said = runs.run(capsys, *runs.TINY, "--out", out).sentence
    assert f"The disk of {out} is full: make room" in said
    assert len(seen) == 1
    assert not [name for name in runs.files(out) if ".new" in name or ".old" in name]
    monkeypatch.undo()
    if write == 3:
        assert whole == {name: (out / "last" / name).read_bytes() for name in whole}
    # What the sentence says goes on.
    again = (*runs.TINY, "--out", out) if "run this command again" in said else said.split("`")[1].split()[3:]
    assert ("--resume" in again) == (write > 1)
    ended = runs.run(capsys, *again)
    assert ended.code == 0, ended.err
    assert runs.result(out)["epochs"] == 2


def test_disk_of_the_cache_that_is_full(refused, tmp_path, monkeypatch):
    for name in ("a", "b"):
        make_files(tmp_path / "data" / name, 5)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("FFTP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", full)
    said = refused("--data", "folder", "--data-root", tmp_path / "data")
    assert f"{tmp_path / 'cache'} is full" in said
    assert not list((tmp_path / "cache" / "packs").iterdir())


def test_a_defect_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(train_run, "build", lambda *arguments: {}["a defect"])
    with pytest.raises(KeyError, match="a defect"):
        train_run.main([*runs.TINY, "--out", str(tmp_path / "run")])
