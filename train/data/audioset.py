"""AudioSet in the three forms in which people hold it, which may also be mixed: several labels a clip, no validation list.

- The official segment CSVs and class list, with a folder of files named by YTID in any format.
- AST's JSON lists, {"data": [{"wav": path, "labels": "mid,mid"}]}, with the class list.
- Parquet shards as on the Hugging Face hub (train.data.shards).

Files are found anywhere below the data root by their name: YTID, YYTID or YTID_anything. Listed clips without a file are
left out and counted, as happens in every copy.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fftp import audio
from fftp.errors import UserError
from train.data import shards
from train.data.clips import Clip, DataSet, Row, data_folder, listed, nearest

CLASS_LIST = "class_labels_indices.csv"
CLIP_SECONDS = 10.0
# Where the lists lie when no setting says so, as patterns below the data root.
USUAL = {
    "segment CSVs": {"train": ("balanced_train_segments.csv",), "test": ("eval_segments.csv",)},
    "JSON lists": {
        "train": ("balanced_train*.json", "datafiles/balanced_train*.json", "data/datafiles/balanced_train*.json"),
        "test": ("eval*.json", "datafiles/eval*.json", "data/datafiles/eval*.json"),
    },
    "parquet shards": {"train": ("data/bal_train", "bal_train"), "test": ("data/eval", "eval")},
}
_YTID = 11  # letters of a YouTube id


@dataclass(frozen=True)
class Entry:
    """A line of a list: a clip as it is named there."""

    video_id: str
    mids: tuple[str, ...]
    where: str  # of the line, for sentences
    path: Path | None = None  # as a JSON list gives it, which may be another machine's
    row: Row | None = None
    segment: tuple[float, float] | None = None  # seconds
    names: tuple[str, ...] = ()  # of the labels, where a shard gives them


def load(settings: Any) -> DataSet:
    """The clips of `settings.train_list` and `settings.test_list`, comma-separated, or of the usual lists below the root.

    Classes stand in the class list's order, else (shards alone) in the order of their machine ids. UserError for lists
    that are absent or laid out otherwise, an id twice, and a label that is not in the class list.
    """
    root = data_folder(settings.data_root, "audioset")
    lists = _lists(root, settings)
    entries = {split: [entry for path in paths for entry in _read(path)] for split, paths in lists.items()}
    everything = [entry for split in entries.values() for entry in split]
    _refuse_twice(everything)
    names = _class_list(root, everything)
    number = {mid: i for i, mid in enumerate(names)}
    for entry in everything:
        for mid in entry.mids:
            if mid not in number:
                raise UserError(f"{entry.where} gives {entry.video_id} the label '{mid}'{nearest(mid, tuple(number))}")
    files = _Files(root) if any(entry.row is None for entry in everything) else None
    clips, absent = [], []
    for split, listed_clips in entries.items():
        for entry in listed_clips:
            source = entry.row or files.find(entry)
            if source is None:
                absent.append(entry.video_id)
                continue
            labels = tuple(number[mid] for mid in entry.mids)
            clips.append(Clip(source, labels, split, entry.video_id, entry.segment))
    for split, paths in lists.items():
        if not entries[split]:
            raise UserError(f"{listed([str(path) for path in paths])} names no clip: give another list.")
        if not any(clip.split == split for clip in clips):
            raise UserError(
                f"None of the {len(entries[split])} ids in {listed([str(path) for path in paths])} has a file below {root}: "
                "put the files there."
            )
    return DataSet("audioset", tuple(names.values()), tuple(clips), True, CLIP_SECONDS, True, tuple(absent))


def _lists(root: Path, settings: Any) -> dict[str, list[Path]]:
    """The lists of each split. UserError when they are absent, or there in several forms."""
    given = {"train": settings.train_list, "test": settings.test_list}
    chosen = {}
    for split, text in given.items():
        chosen[split] = [root / Path(part.strip()).expanduser() for part in text.split(",") if part.strip()]
        for path in chosen[split]:
            if not path.exists():
                raise UserError(
                    f"--{split}-list: {path} does not exist: give lists below the data root, or full paths."
                )
    if all(chosen.values()):
        return chosen
    usual = {
        form: {split: chosen[split] or _usual(root, patterns[split], split) for split in given}
        for form, patterns in USUAL.items()
    }
    whole = [form for form, lists in usual.items() if all(lists.values())]
    if not whole:
        raise UserError(
            f"{root} holds no lists of AudioSet ({' or '.join(patterns['train'][0] for patterns in USUAL.values())}, and the "
            "same of the evaluation set): put them there, or name them with --train-list and --test-list."
        )
    if len(whole) > 1:
        raise UserError(
            f"{root} holds AudioSet's lists as {' and as '.join(whole)}: choose with --train-list and --test-list."
        )
    return usual[whole[0]]


def _usual(root: Path, patterns: tuple[str, ...], split: str) -> list[Path]:
    """The list that fits the first pattern which any fits; a folder counts when it holds shards. UserError for several."""
    for pattern in patterns:
        found = [path for path in sorted(root.glob(pattern)) if path.is_file() or any(path.glob("*.parquet"))]
        if len(found) > 1:
            raise UserError(f"{root} holds {found[0].name} and {found[1].name}: choose with --{split}-list.")
        if found:
            return found
    return []


def _read(path: Path) -> Iterator[Entry]:
    if path.is_dir() or path.suffix == ".parquet":
        return _from_shards(path)
    return _from_json(path) if path.suffix == ".json" else _from_csv(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): get it anew.") from error


def _from_csv(path: Path) -> Iterator[Entry]:
    """The lines of a segment CSV: YTID, start_seconds, end_seconds, "mid,mid"; comments begin with #."""
    lines = _text(path).splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True))]
        try:
            video_id, start, end, labels = cells[0], float(cells[1]), float(cells[2]), cells[3]
            if len(cells) != 4 or not 0 <= start < end < float("inf"):
                raise ValueError
        except (ValueError, IndexError):
            raise UserError(
                f"Line {number} of {path} is {line[:60]!r}, where AudioSet's segment lists have YTID, start_seconds, "
                'end_seconds, "labels": give a list in that form.'
            ) from None
        yield Entry(video_id, _mids(labels), f"Line {number} of {path}", segment=(start, end))


def _from_json(path: Path) -> Iterator[Entry]:
    try:
        entries = [(str(entry["wav"]), str(entry["labels"])) for entry in json.loads(_text(path))["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} is no list as AST has them, {{"data": [{{"wav": path, "labels": "mid,mid"}}, ...]}} '
            f"({type(error).__name__}: {error}): give one in that form."
        ) from None
    for number, (wav, labels) in enumerate(entries, 1):
        yield Entry(_video_id(Path(wav).stem), _mids(labels), f"Entry {number} of {path}", path=Path(wav))


def _from_shards(path: Path) -> Iterator[Entry]:
    for shard in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        for number, said in enumerate(shards.labels_of(shard)):
            where = f"Row {number} of {shard}"
            yield Entry(said.video_id, said.labels, where, row=Row(shard, number), names=said.names)


def _mids(labels: str) -> tuple[str, ...]:
    return tuple(filter(None, (label.strip() for label in labels.split(","))))


def _refuse_twice(entries: list[Entry]) -> None:
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.video_id in seen:
            raise UserError(
                f"{entry.where} names {entry.video_id} again, after {seen[entry.video_id]}: take one of the two out."
            )
        seen[entry.video_id] = entry.where


def _class_list(root: Path, entries: list[Entry]) -> dict[str, str]:
    """Machine id -> name, in the order of the classes. UserError where only the class list can say it, and is absent."""
    path = next((place for place in (root / CLASS_LIST, root / "data" / CLASS_LIST) if place.is_file()), None)
    if path is None:
        if any(entry.row is None for entry in entries):
            raise UserError(f"{root} has no {CLASS_LIST}: put AudioSet's class list there.")
        named = {m: n for entry in entries for m, n in zip(entry.mids, entry.names or entry.mids, strict=False)}
        return dict(sorted(named.items()))
    lines = list(csv.DictReader(_text(path).splitlines()))
    try:
        rows = sorted((int(line["index"]), line["mid"], line["display_name"]) for line in lines)
        if [row[0] for row in rows] != list(range(len(rows))) or len({row[1] for row in rows}) != len(rows) or not rows:
            raise ValueError
    except (KeyError, ValueError, TypeError):
        raise UserError(
            f"{path} is no class list: it needs the columns index, mid, display_name, indices from 0 up, each mid once."
        ) from None
    return {mid: name for _, mid, name in rows}


def _video_id(stem: str) -> str:
    """The YTID in a file's name; other names stand for themselves."""
    if len(stem) == _YTID + 1 and stem.startswith("Y"):
        return stem[1:]
    return stem[:_YTID] if stem[_YTID : _YTID + 1] == "_" else stem


class _Files:
    """The audio files below a folder by YTID."""

    def __init__(self, root: Path):
        self.root, self.exact, self.within = root, defaultdict(list), defaultdict(list)
        for path in audio.list_audio(root):
            self.exact[path.stem].append(path)
            self.within[_video_id(path.stem)].append(path)

    def find(self, entry: Entry) -> Path | None:
        """The file of a clip: where its list says, if it is there, else by its id. UserError when two have the id."""
        if entry.path is not None and (self.root / entry.path).is_file():
            return self.root / entry.path
        found = self.exact.get(entry.video_id) or self.within.get(entry.video_id) or []
        if len(found) > 1:
            raise UserError(f"Two files are called {entry.video_id}, {found[0]} and {found[1]}: keep one of them.")
        return found[0] if found else None
