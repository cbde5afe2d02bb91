"""AudioSet in its three forms: the same recordings give the same pack, what is missing is counted, what is wrong is named."""

import csv
import io
import json
import os
import shutil

import numpy as np
import pytest
from made_data import RATE, clip, labels, settings, splits

from fftp import audio
from fftp.errors import UserError
from tests import runs
from train import data
from train.data import cache
from train.data.pack import pack

soundfile = pytest.importorskip("soundfile", reason="sound files need soundfile.")
pytest.importorskip("soxr", reason="resampling needs soxr.")

CLASSES = (("/m/09x0r", "Speech"), ("/t/dd00002", "Baby cry, infant cry"), ("/m/0bt9lr", "Dog"))
# Ids as YouTube has them, with what makes trouble in names; the last of each split has no file.
IDS = {
    "train": ("-0abcdefghi", "__bcdefghij", "CCcdefghijk", "cccdefghijk", "DDdefghijkl", "nofile_aaaa"),
    "eval": ("EEefghijklm", "FFfghij_lmn", "GGghijklmno", "nofile_bbbb"),
}
MIDS = ("/m/09x0r", "/m/0bt9lr,/t/dd00002", "/t/dd00002", "/m/09x0r,/m/0bt9lr")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FFTP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def listed():
    """(split, id, mids) of every clip that the lists name, in order."""
    number = 0
    for split, ids in IDS.items():
        for video_id in ids:
            yield split, video_id, MIDS[number % len(MIDS)]
            number += 1


def sound(number: int) -> bytes:
    """Half a second of noise as FLAC, the second at another rate and in stereo."""
    noise = np.random.default_rng(number).integers(-(2**14), 2**14, (8000, 2 if number == 1 else 1), dtype=np.int16)
    content = io.BytesIO()
    soundfile.write(content, noise, 44_100 if number == 1 else RATE, format="FLAC")
    return content.getvalue()


@pytest.fixture
def root(tmp_path):
    """The official form: files in folders, segment CSVs, the class list."""
    root = tmp_path / "audioset"
    for number, (split, video_id, _) in enumerate(listed()):
        if not video_id.startswith("nofile"):
            (root / split).mkdir(parents=True, exist_ok=True)
            (root / split / f"{video_id}.flac").write_bytes(sound(number))
    for split, name in (("train", "balanced_train_segments.csv"), ("eval", "eval_segments.csv")):
        rows = [f'{i}, 30.000, 40.000, "{mids}"\n' for s, i, mids in listed() if s == split]
        (root / name).write_text(
            "# Segments csv\n# num\n# YTID, start_seconds, end_seconds, positive_labels\n" + "".join(rows)
        )
    write_classes(root)
    return root


def write_classes(root):
    rows = "".join(f'{i},{mid},"{name}"\n' for i, (mid, name) in enumerate(CLASSES))
    (root / "class_labels_indices.csv").write_text("index,mid,display_name\n" + rows)


def to_json(root):
    """The same in AST's form, with the paths of another machine."""
    for split in IDS:
        entries = [{"wav": f"/data/sls/{s}/{i}.wav", "labels": mids} for s, i, mids in listed() if s == split]
        (root / f"{'balanced_train' if split == 'train' else 'eval'}.json").write_text(json.dumps({"data": entries}))
    for name in ("balanced_train_segments.csv", "eval_segments.csv"):
        (root / name).unlink()


def to_shards(root, target, rows_a_shard=3, without=()):
    """The same in the hub's form, with its schema."""
    pyarrow = pytest.importorskip("pyarrow", reason="parquet shards need pyarrow.")
    from pyarrow import parquet

    names = dict(CLASSES)
    for split, folder in (("train", "bal_train"), ("eval", "eval")):
        (target / "data" / folder).mkdir(parents=True)
        rows = []
        for number, (s, video_id, mids) in enumerate(listed()):
            if s != split or video_id.startswith("nofile"):
                continue
            row = {
                "video_id": video_id,
                "audio": {"bytes": sound(number), "path": f"audio/{folder}/{video_id}.flac"},
                "labels": mids.split(","),
                "human_labels": [names[mid] for mid in mids.split(",")],
            }
            rows.append({name: value for name, value in row.items() if name not in without})
        for i in range(0, len(rows), rows_a_shard):
            table = pyarrow.Table.from_pylist(rows[i : i + rows_a_shard])
            parquet.write_table(table, target / "data" / folder / f"{i // rows_a_shard:02d}.parquet")
    return target


def load(root, **changed):
    return data.load(settings(data="audioset", data_root=root, **changed))


def packed(root, skip_bad_files=False, **changed):
    return pack(load(root, **changed), RATE, skip_bad_files=skip_bad_files, progress=False)


def refused(root, **changed):
    with pytest.raises(UserError) as error:
        packed(root, **changed)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_official_form(root):
    dataset = load(root)
    present = [(s, i, mids) for s, i, mids in listed() if not i.startswith("nofile")]
    assert splits(dataset) == {i: "test" if s == "eval" else "train" for s, i, _ in present}
    assert [clip.name for clip in dataset.clips] == [i for _, i, _ in present]  # the list's order
    names = dict(CLASSES)
    assert labels(dataset) == {i: tuple(names[m] for m in mids.split(",")) for _, i, mids in present}
    assert dataset.classes == tuple(names.values())  # the class list's order, not the alphabet's
    assert dataset.absent == ("nofile_aaaa", "nofile_bbbb")
    assert (dataset.multi_label, dataset.copies_differ) == (True, True)


@pytest.mark.parametrize("form", ["json", "shards"])
def test_the_same_recordings_make_the_same_pack(root, tmp_path, form):
    expected = packed(root)
    if form == "json":
        to_json(root)
    else:
        root = to_shards(root, tmp_path / "hub")
        write_classes(root)
    found = packed(root)
    assert found.samples.tobytes() == expected.samples.tobytes()
    for name in ("start", "length", "labels", "splits"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert (found.names, found.classes) == (expected.names, expected.classes)
    assert found.absent == (("nofile_aaaa", "nofile_bbbb") if form == "json" else ())
    assert found.length.tolist()[:2] == [8000, round(8000 * RATE / 44_100)]


def test_shards_without_a_class_list_name_their_own(root, tmp_path):
    dataset = load(to_shards(root, tmp_path / "hub"))
    assert dataset.classes == ("Speech", "Dog", "Baby cry, infant cry")  # by machine id


def test_shards_are_read_once_and_row_by_row(root, tmp_path, monkeypatch):
    hub = to_shards(root, tmp_path / "hub", rows_a_shard=2)
    asked = []
    read = cache.shards.Reader.read
    monkeypatch.setattr(cache.shards.Reader, "read", lambda self, row: asked.append(row) or read(self, row))
    first = packed(hub)
    assert len(asked) == 2 * len(first.names)  # for the digest, and for decoding
    again = packed(hub)
    assert len(asked) == 2 * len(first.names)
    assert np.array_equal(first.samples, again.samples)


def test_forms_may_be_mixed_and_have_to_be_chosen(root, tmp_path):
    to_shards(root, root)
    assert "segment CSVs and as parquet shards: choose with --train-list and --test-list" in refused(root)
    chosen = packed(root, train_list="data/bal_train", test_list="eval_segments.csv")
    assert np.array_equal(
        chosen.samples, packed(root, train_list="balanced_train_segments.csv", test_list="data/eval").samples
    )
    one = load(root, train_list="data/bal_train/01.parquet,data/bal_train/00.parquet", test_list="data/eval")
    assert [clip.name for clip in one.clips][:2] == ["cccdefghijk", "DDdefghijkl"]


@pytest.mark.parametrize("name", ["Y{}.wav", "{}_30.000_40.000.wav", "{}_30000.wav", "{}.ogg", "sub/{}.wav"])
def test_names_that_people_give_files(root, name):
    old = root / "train" / f"{IDS['train'][1]}.flac"
    new = root / "train" / name.format(IDS["train"][1])
    new.parent.mkdir(exist_ok=True)
    soundfile.write(new, *soundfile.read(old))
    old.unlink()
    assert load(root).clips[1].source == new


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_segment_of_a_longer_file(root, form):
    """A whole recording in place of the clip: only the segment is taken."""
    whole = root / "train" / f"{IDS['train'][2]}.{form.lower()}"
    (root / "train" / f"{IDS['train'][2]}.flac").unlink()
    noise = np.random.default_rng(5).integers(-(2**13), 2**13, 43 * RATE, dtype=np.int16)
    soundfile.write(whole, noise, RATE, format=form)
    found = clip(packed(root), 2)
    assert len(found) == 10 * RATE
    expected = audio.load(whole, RATE)[30 * RATE : 40 * RATE] * 32768
    assert np.abs(found - np.clip(expected, -32768, 32767)).max() <= 0.5


@pytest.mark.parametrize(("seconds", "samples"), [(10.4, 10.4), (39.8, 9.8), (10.0, 10.0), (4.0, 4.0)])
def test_files_that_nearly_fit(root, seconds, samples):
    """Up to half a second too long is the clip itself, and up to half a second short of the segment's end will do."""
    whole = root / "train" / f"{IDS['train'][2]}.flac"
    soundfile.write(whole, np.random.default_rng(5).integers(-9, 9, round(seconds * RATE), dtype=np.int16), RATE)
    assert len(clip(packed(root), 2)) == round(samples * RATE)


@pytest.mark.parametrize("seconds", [25.0, 39.0])
def test_segment_past_the_end_of_its_file(root, seconds):
    name = IDS["train"][2]
    soundfile.write(root / "train" / f"{name}.flac", np.zeros(round(seconds * RATE), np.int16) + 5, RATE)
    assert f"{name} is {seconds:g} s long, and its segment is 30 to 40 s" in refused(root)
    kept = packed(root, skip_bad_files=True)
    assert kept.skipped == [(name, f"is {seconds:g} s long, and its segment is 30 to 40 s")]


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


BAD_LISTS = {
    "other columns": ("30.000, 40.000, ", "", "Line 4 of {csv} is"),
    "a header of other columns": ("# num", "file,label", "Line 2 of {csv} is 'file,label', where AudioSet's"),
    "too many columns": ("30.000,", "30.000, 1, ", "Line 4 of {csv} is"),
    "an end before its start": ("40.000", "20.000", "Line 4 of {csv} is"),
    "no numbers": ("30.000", "soon", "Line 4 of {csv} is"),
    "an id twice": ("__bcdefghij", "-0abcdefghi", "Line 5 of {csv} names -0abcdefghi again, after Line 4 of {csv}"),
    "an id of the other split": ("__bcdefghij", "EEefghijklm", "names EEefghijklm again, after Line 5 of {csv}"),
    "an unknown label": (
        "/m/09x0r",
        "/m/09x0",
        "Line 4 of {csv} gives -0abcdefghi the label '/m/09x0'; did you mean /m/09x0r",
    ),
}


@pytest.mark.parametrize(("old", "new", "said"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_bad_lists(root, old, new, said):
    path = root / "balanced_train_segments.csv"
    replace_in(path, old, new)
    assert said.format(csv=path) in refused(root)


@pytest.mark.parametrize(
    ("old", "new"),
    [("index,mid", "number,mid"), ("0,/m", "7,/m"), ("/t/dd00002", "/m/09x0r"), ("1,", "one,")],
    ids=["column", "gap", "twice", "no number"],
)
def test_bad_class_list(root, old, new):
    replace_in(root / "class_labels_indices.csv", old, new)
    assert "class_labels_indices.csv is no class list" in refused(root)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "class_labels_indices.csv").unlink(), "has no class_labels_indices.csv"),
        (lambda root: (root / "eval_segments.csv").unlink(), "holds no lists of AudioSet"),
        (lambda root: shutil.rmtree(root / "eval"), "None of the 4 ids in"),
        (lambda root: shutil.copy(root / "train" / "DDdefghijkl.flac", root / "DDdefghijkl.wav"), "Two files are called DD"),
        (lambda root: (root / "eval_segments.csv").write_bytes(b"\xff\xfe\xfa"), "cannot be read"),
    ],
    ids=["no classes", "no list", "no files", "two files", "no text"],
)  # fmt: skip
def test_what_is_missing_is_named(root, change, said):
    change(root)
    assert said in refused(root)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"data": [{"wav": "x"}]}', '{"data": 3}', '{"data": ["x"]}'], ids=lambda text: text
)
def test_bad_json(root, text):
    to_json(root)
    (root / "eval.json").write_text(text)
    assert "eval.json is no list as AST has them" in refused(root)


@pytest.mark.parametrize("place", ["", "datafiles", "data/datafiles"])
def test_the_names_of_asts_own_lists(root, place):
    to_json(root)
    (root / place).mkdir(parents=True, exist_ok=True)
    (root / "balanced_train.json").rename(root / place / "balanced_train_data_type1_2_mean.json")
    (root / "eval.json").rename(root / place / "eval_data.json")
    assert load(root).counts() == {"train": 5, "validation": 0, "test": 3}
    (root / place / "eval_data_2.json").touch()
    assert "holds eval_data.json and eval_data_2.json: choose with --test-list" in refused(root)


def test_lists_that_do_not_exist(root):
    assert "--train-list: " in refused(root, train_list="absent.csv")
    assert "absent.csv does not exist" in refused(root, train_list="eval_segments.csv,absent.csv")


@pytest.mark.parametrize("column", ["video_id", "audio", "labels"])
def test_shard_that_lacks_a_column(root, tmp_path, column):
    hub = to_shards(root, tmp_path / "hub", without=(column,))
    assert f"00.parquet has no column '{column}'" in refused(hub)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_shard_that_is_cut_short(root, tmp_path, kept):
    hub = to_shards(root, tmp_path / "hub")
    shard = hub / "data" / "bal_train" / "01.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(kept * len(content))])
    assert f"The shard {shard} is missing, damaged or cut short" in refused(hub)


def test_shard_damaged_within_keeps_what_was_packed(root, tmp_path, monkeypatch, cache_folder):
    """Its end, with the table of contents, is whole: only reading the recordings shows it."""
    monkeypatch.setattr(cache, "_COMMIT_BYTES", 1)
    hub = to_shards(root, tmp_path / "hub", rows_a_shard=2)
    whole = packed(hub)
    shutil.rmtree(cache_folder / "packs")  # the digests stay: nothing is read again before packing
    shard = hub / "data" / "bal_train" / "01.parquet"
    content, times = shard.read_bytes(), shard.stat()
    from pyarrow import parquet

    group = parquet.read_metadata(shard).row_group(0)
    (column,) = [c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "audio.bytes"]
    at = column.dictionary_page_offset or column.data_page_offset
    shard.write_bytes(content[:at] + bytes(40) + content[at + 40 :])
    set_times(shard, times)
    assert f"The shard {shard} is missing, damaged or cut short" in refused(hub)
    (left,) = (cache_folder / "packs").iterdir()
    assert cache.finished(left) == [8000, len(clip(whole, 1))]
    shard.write_bytes(content)
    set_times(shard, times)
    decoded = count_decoded(monkeypatch)
    assert packed(hub).samples.tobytes() == whole.samples.tobytes()
    assert len(decoded) == len(whole.names) - 2


def set_times(path, status):
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def count_decoded(monkeypatch) -> list:
    decoded, load = [], audio.load
    monkeypatch.setattr(audio, "load", lambda *how: decoded.append(how) or load(*how))
    return decoded


def test_shard_that_vanishes_between_two_runs(root, tmp_path, cache_folder):
    hub = to_shards(root, tmp_path / "hub")
    whole = packed(hub)
    shard = hub / "data" / "bal_train" / "01.parquet"
    shard.rename(tmp_path / "elsewhere")
    before = runs.files(cache_folder)
    said = refused(hub)
    assert f"are gone (1: {shard}): put them back" in said
    assert runs.files(cache_folder) == before
    less = packed(hub, skip_bad_files=True)
    assert less.names == tuple(name for name in whole.names if name not in IDS["train"][3:])
    assert packed(hub).names == less.names  # what was accepted once is not asked again
    (tmp_path / "elsewhere").rename(shard)
    assert packed(hub).samples.tobytes() == whole.samples.tobytes()


def test_shards_of_another_list_may_go(root, tmp_path, cache_folder):
    hub = to_shards(root, tmp_path / "hub")
    other = hub / "data" / "unbal_train"
    (hub / "data" / "bal_train").rename(other)
    lists = {"train_list": "data/unbal_train", "test_list": "data/eval"}
    names = packed(hub, **lists).names
    other.rename(hub / "data" / "bal_train")
    assert packed(hub).names == names


def test_shards_need_pyarrow(root, tmp_path, monkeypatch):
    import sys

    (tmp_path / "hub" / "data" / "bal_train").mkdir(parents=True)
    (tmp_path / "hub" / "data" / "bal_train" / "00.parquet").touch()
    shutil.copytree(tmp_path / "hub" / "data" / "bal_train", tmp_path / "hub" / "data" / "eval")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(tmp_path / "hub") == (
        "Parquet shards need the package pyarrow: install it with `pip install pyarrow`."
    )


def test_training_on_it(root, tmp_path, capsys):
    """No validation list: the last epoch is reported, from last/; clips.csv says which clips there were."""
    flags = ("--data", "audioset", "--data-root", root, "--batch-size", 2, "--frames", 64, "--mixup", 0.5, "--balanced")
    result = runs.train(capsys, tmp_path / "run", *flags)
    assert (result["reported_epoch"], result["validation"], result["absent_clips"]) == (2, {}, 2)
    assert 0 < result["metrics"]["map"] <= 1
    assert not (tmp_path / "run" / "best").exists()
    rows = list(csv.DictReader((tmp_path / "run" / "clips.csv").read_text().splitlines()))
    assert [row["name"] for row in rows if row["state"] == "absent"] == ["nofile_aaaa", "nofile_bbbb"]
    used = {row["name"]: row["split"] for row in rows if row["state"] == "used"}
    assert used == splits(load(root))
    from train import evaluate

    ended = runs.run(capsys, tmp_path / "run", command=evaluate.main)
    assert json.loads(ended.out)["map"] == result["metrics"]["map"]
    assert json.loads(ended.out)["checkpoint"].endswith("last")


def test_there_is_no_accuracy_to_stop_at(root, tmp_path, capsys):
    flags = ("--data", "audioset", "--data-root", root, "--until-accuracy", 0.1, "--out", tmp_path / "run")
    said = runs.run(capsys, *flags).sentence
    assert "--until-accuracy needs a validation list, which the data set 'audioset' has not" in said
    assert not (tmp_path / "run").exists()


def test_bad_lists_through_the_command(root, tmp_path, capsys):
    replace_in(root / "eval_segments.csv", "EEefghijklm", "-0abcdefghi")
    flags = ("--data", "audioset", "--data-root", root, "--out", tmp_path / "run")
    assert "names -0abcdefghi again" in runs.run(capsys, *flags).sentence
    assert not (tmp_path / "run").exists()
