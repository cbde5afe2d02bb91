"""Data sets: what each layout gives, and what is said when something is missing."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from made_data import labels, make_tree, settings, splits
from recordings import RECORDINGS, needs_recordings

from fftp.errors import UserError
from train import data
from train.data import synth


def test_unknown_data_set_names_the_nearest():
    with pytest.raises(UserError, match=r"no data set 'speechcommand'; did you mean speechcommands\?"):
        data.load(settings(data="speechcommand"))


@pytest.mark.parametrize("name", ["speechcommands", "folder"])
def test_data_root_missing_or_empty(tmp_path, name):
    with pytest.raises(UserError, match="give their folder with --data-root"):
        data.load(settings(data=name))
    with pytest.raises(UserError, match="does not exist"):
        data.load(settings(data=name, data_root=tmp_path / "none"))
    with pytest.raises(UserError, match="is empty"):
        data.load(settings(data=name, data_root=tmp_path))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (("a",), "the data lacks b;"),
        (("a", "b", "c"), "the data has c besides;"),
        (("a", "c"), "the data lacks b and the data has c besides;"),
        (("b", "a"), "class 0 is b in the data and a in the checkpoint;"),
    ],
)
def test_classes_that_do_not_match(found, said):
    data.check_classes(("a", "b"), ("a", "b"))
    with pytest.raises(UserError, match=said):
        data.check_classes(found, ("a", "b"))


def test_synth_is_balanced_and_keyed():
    dataset = data.load(settings(data="synth"))
    assert dataset.counts() == {"train": 40, "validation": 20, "test": 20}
    assert dataset.classes == synth.CLASSES
    per_class = np.bincount([clip.labels[0] for clip in dataset.clips])
    assert per_class.tolist() == [8] * 10
    for clip in dataset.clips:
        assert clip.source.dtype == np.int16
        assert clip.source.shape == (16_000,)
    # The same seed gives the same clips however many are asked for; another seed or split gives none of them.
    again = data.load(settings(data="synth", synth_train=10, synth_validation=30))
    known = {clip.name: clip.source for clip in dataset.clips}
    assert all(np.array_equal(clip.source, known[clip.name]) for clip in again.clips if clip.name in known)
    digests = {hashlib.sha256(clip.source.tobytes()).digest() for clip in dataset.clips}
    others = {
        hashlib.sha256(clip.source.tobytes()).digest() for clip in data.load(settings(data="synth", seed=1)).clips
    }
    assert len(digests) == 80
    assert not digests & others


def test_synth_too_few():
    with pytest.raises(UserError, match="--synth-validation is 9: give at least 10"):
        data.load(settings(data="synth", synth_validation=9))


def log_mel(clip: np.ndarray, n_mels=128) -> np.ndarray:
    """A plain log-mel spectrogram, float32 (98, n_mels): 25 ms windows every 10 ms, triangles in mel."""
    mel = 1127 * np.log1p(np.arange(257) * 31.25 / 700)  # (257,)
    edge = np.linspace(1127 * np.log1p(20 / 700), mel[-1], n_mels + 2)
    up = (mel[:, None] - edge[:-2]) / (edge[1:-1] - edge[:-2])  # (257, n_mels)
    down = (edge[2:] - mel[:, None]) / (edge[2:] - edge[1:-1])
    bank = np.maximum(0, np.minimum(up, down)).astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(clip / np.float32(32768), 400)[::160]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(400).astype(np.float32), 512)) ** 2
    return np.log(spectrum @ bank + 1e-6)  # (98, 257) @ (257, n_mels) -> (98, n_mels)


def test_synth_is_not_told_by_its_mean_spectrum():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    def means(split, count):
        return np.stack([log_mel(synth.make(0, split, i)).mean(axis=0) for i in range(count)])

    classes = np.arange(2000) % 10
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    with threadpool_limits(1):  # threads only get in the way of such small products
        score = model.fit(means("train", 2000), classes).score(means("test", 500), classes[:500])
    assert 0.1 < score <= 0.6


def test_folder_a_class(tmp_path):
    names = [f"{word}/{i}.wav" for word in ("dog", "cat") for i in range(20)]
    make_tree(tmp_path, *names, "docs/readme.txt", ".git/x.wav")
    dataset = data.load(settings(data_root=tmp_path))
    assert dataset.classes == ("cat", "dog")
    assert dataset.counts() == {"train": 32, "validation": 4, "test": 4}
    # Held out by the smallest digest of the name, two of twenty in each class: the choice of a clip is its own.
    for word in dataset.classes:
        of_word = sorted(
            (name for name in names if name.startswith(word)), key=lambda n: hashlib.sha256(n.encode()).digest()
        )
        assert {splits(dataset)[name] for name in of_word[:2]} == {"validation"}
        assert {splits(dataset)[name] for name in of_word[2:4]} == {"test"}


def test_folder_with_splits(tmp_path):
    make_tree(tmp_path, "Train/dog/a.wav", "Train/cat/a.wav", "val/dog/b.wav", "test/cat/c.wav", "other/cat/d.wav")
    dataset = data.load(settings(data_root=tmp_path))
    assert splits(dataset) == {
        "Train/dog/a.wav": "train",
        "Train/cat/a.wav": "train",
        "val/dog/b.wav": "validation",
        "test/cat/c.wav": "test",
    }
    make_tree(tmp_path, "test/cow/e.wav")
    with pytest.raises(UserError, match="no training clips of cow"):
        data.load(settings(data_root=tmp_path))


def test_folder_without_classes(tmp_path):
    make_tree(tmp_path, "a.wav")
    with pytest.raises(UserError, match="no folders with audio files"):
        data.load(settings(data_root=tmp_path))
    make_tree(tmp_path, "dog/a.wav")
    with pytest.raises(UserError, match="recordings of 1 class: two or more"):
        data.load(settings(data_root=tmp_path))
    with pytest.raises(UserError, match="name the file with --csv"):
        data.load(settings(data_root=tmp_path, test_fold="1"))


def csv_tree(root: Path, table: str, name="list.csv") -> Path:
    make_tree(root, *(f"audio/{i}.wav" for i in range(1, 9)))
    (root / name).write_text(table)
    return root


SPLIT_TABLE = "file,label,split\n1.wav,dog,train\n2.wav,cat,Training\n3.wav,dog,dev\n4.wav,cat,eval\n"


def test_csv_with_splits(tmp_path):
    dataset = data.load(settings(data_root=csv_tree(tmp_path, SPLIT_TABLE), csv="list.csv"))
    assert dataset.classes == ("cat", "dog")
    assert splits(dataset) == {
        "audio/1.wav": "train",
        "audio/2.wav": "train",
        "audio/3.wav": "validation",
        "audio/4.wav": "test",
    }
    alone = data.load(settings(csv=tmp_path / "list.csv"))  # an absolute CSV is its own data root
    assert splits(alone) == splits(dataset)


def test_csv_with_several_labels(tmp_path):
    table = "file\tlabel\n1.wav\tdog; rain\n2.wav\train\n1.wav\twind\n3.wav\t\n4.wav\tdog\n5.wav\tdog\n6.wav\train\n"
    csv_tree(tmp_path, table, "list.tsv")
    dataset = data.load(settings(data_root=tmp_path, csv="list.tsv", multi_label=True))
    assert dataset.multi_label
    assert dataset.classes == ("dog", "rain", "wind")
    assert labels(dataset)["audio/1.wav"] == ("dog", "rain", "wind")
    assert labels(dataset)["audio/3.wav"] == ()
    with pytest.raises(UserError, match="the labels dog, rain: pass --multi-label"):
        data.load(settings(data_root=tmp_path, csv="list.tsv"))


@pytest.mark.parametrize(
    ("cells", "separator", "noted"),
    [
        (("dog|rain", "rain", "dog|wind", "dog|rain|wind", "wind|rain", "dog", "rain|dog"), ";", True),
        (("dog|rain", "rain", "dog|wind", "dog|rain|wind", "wind|rain", "dog", "rain|dog"), "|", False),
        (("Speech, male", "rain", "rain", "Speech, male", "rain", "rain", "rain"), ";", False),  # a comma in a name
        (("dog|rain; rain", "rain", "dog", "dog", "rain", "dog", "rain"), ";", False),
    ],
    ids=["another one", "the right one", "a comma in a name", "both"],
)
def test_a_separator_that_no_label_has_is_noted(cells, separator, noted, tmp_path):
    table = "file\tlabel\n" + "".join(f"{i % 6 + 1}.wav\t{cell}\n" for i, cell in enumerate(cells))
    csv_tree(tmp_path, table, "list.tsv")
    said = data.load(settings(data_root=tmp_path, csv="list.tsv", multi_label=True, label_separator=separator)).note
    assert ("add --label-separator '|'" in said) == noted
    assert bool(said) == noted


@pytest.mark.parametrize(
    ("table", "changed", "said"),
    [
        ("path,label\n1.wav,a\n", {}, r"no column 'file': name one of its columns \(path, label\) with --csv-file"),
        (SPLIT_TABLE, {"csv_labels": "class"}, "no column 'class': name one .* with --csv-labels"),
        (SPLIT_TABLE, {"csv_split": "fold"}, "no column 'fold': name one .* with --csv-split"),
        ("file,label\n1.wav,a\n", {"test_fold": "1"}, "no column 'split'"),
        (SPLIT_TABLE, {"test_fold": "5"}, r"no fold '5' in its column 'split': hold out one of Training, dev"),
        ("file,label,split\n1.wav,a,3\n", {}, r"holds '3', which names no split: .* --test-fold"),
        ("file,label,split\n", {}, "has no lines below its header"),
        ("", {}, "has no lines below its header"),
        ("file,label\n1.wav,a\nx.wav,b\n,b\n", {}, r"2 of the 3 files .* are not in .*: x\.wav, \(empty\);"),
        ("file,label\n1.wav,a\n1.wav,b\n", {}, r"lists audio/1\.wav more than once"),
        ("file,label\n1.wav,a\n2.wav,\n", {}, r"gives no label for audio/2\.wav"),
        ("file,label\n1.wav,a\n2.wav,b\n", {"validation_share": 0.0}, "no validation split, and --validation-share"),
        ("file,label,split\n1.wav,a,test\n2.wav,b,val\n", {}, "no training clips of a, b"),
    ],
)  # fmt: skip
def test_csv_that_does_not_fit(tmp_path, table, changed, said):
    with pytest.raises(UserError, match=said):
        data.load(settings(data_root=csv_tree(tmp_path, table), csv="list.csv", **changed))


def test_csv_that_is_missing_or_not_text(tmp_path):
    root = csv_tree(tmp_path, SPLIT_TABLE)
    with pytest.raises(UserError, match=r"none\.csv cannot be read \(No such file or directory\)"):
        data.load(settings(data_root=root, csv="none.csv"))
    (root / "list.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="not a CSV file in UTF-8"):
        data.load(settings(data_root=root, csv="list.csv"))


@needs_recordings
@pytest.mark.parametrize("fold", range(1, 6))
def test_esc10_as_it_is(fold):
    pytest.importorskip("soundfile", reason="the length of a recording needs soundfile.")
    esc10 = {"data_root": RECORDINGS / "esc10", "csv": "esc10.csv", "csv_file": "filename", "csv_labels": "category"}
    dataset = data.load(settings(**esc10, csv_split="fold", test_fold=str(fold)))
    assert dataset.counts() == {"train": 290, "validation": 30, "test": 80}
    assert len(dataset.classes) == 10
    assert dataset.clip_seconds == 5.0
    lines = {line["filename"]: line for line in csv.DictReader(_lines(RECORDINGS / "esc10" / "esc10.csv"))}
    for clip in dataset.clips:
        line = lines[clip.name.removeprefix("audio/")]
        assert dataset.classes[clip.labels[0]] == line["category"]
        assert (clip.split == "test") == (line["fold"] == str(fold))
    validation = str(fold % 5 + 1)
    both = data.load(settings(**esc10, csv_split="fold", test_fold=str(fold), validation_fold=validation))
    assert both.counts() == {"train": 240, "validation": 80, "test": 80}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
