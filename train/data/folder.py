"""Your own recordings: one folder a class, or a CSV whose columns name the file, its labels and its split or fold."""

import csv
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fftp import audio
from fftp.errors import UserError
from train.data.clips import Clip, DataSet, data_folder, listed

# How people call the three splits, as folders and in CSV files.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def load(settings: Any) -> DataSet:
    """The recordings below `settings.data_root`, as its class folders or, where `settings.csv` names one, a CSV says.

    Where no validation split is given, `validation_share` of each class's training clips becomes it: those with the
    smallest SHA-256 of their name, so that the choice survives new clips. Where no test split is given, as many again
    (the next smallest) become the test split. UserError names what is missing and what is there.
    """
    if settings.csv and Path(settings.csv).expanduser().is_absolute() and not settings.data_root:
        root = Path(settings.csv).expanduser().parent
    else:
        root = data_folder(settings.data_root, "folder")
    note = ""
    if settings.csv:
        table, classes, note = _from_csv(root, settings)
    elif settings.test_fold or settings.validation_fold:
        raise UserError("Folds are a column of a CSV: name the file with --csv, or leave --test-fold out.")
    else:
        table, classes = _from_folders(root)
    if len(classes) < 2:
        raise UserError(f"{root} has recordings of {len(classes)} class{'es' * (not classes)}: two or more are needed.")
    number = {name: i for i, name in enumerate(classes)}
    clips = [Clip(path, tuple(number[label] for label in labels), split, name) for path, labels, split, name in table]
    for split in ("validation", "test"):
        clips = _hold_out(clips, split, settings.validation_share)
    if not settings.multi_label:
        _check_every_class_trains(clips, classes, root)
    return DataSet("folder", classes, tuple(clips), settings.multi_label, _clip_seconds(clips), note=note)


# A row of the table: the file, its labels, its split, and its name.
Row = tuple[Path, tuple[str, ...], str, str]


def _from_folders(root: Path) -> tuple[list[Row], tuple[str, ...]]:
    """root/class/... or root/train/class/..., root/validation/class/..., root/test/class/...."""
    subfolders = _subfolders(root)
    has_splits = any(SPLIT_NAMES.get(folder.name.lower()) == "train" for folder in subfolders)
    tops = {folder: SPLIT_NAMES.get(folder.name.lower()) for folder in subfolders} if has_splits else {root: "train"}
    rows = [
        (path, (folder.name,), split, path.relative_to(root).as_posix())
        for top, split in tops.items()
        if split
        for folder in _subfolders(top)
        for path in audio.list_audio(folder)
    ]
    if not rows:
        raise UserError(f"{root} has no folders with audio files: put a folder for each class there, or give a --csv.")
    return rows, tuple(sorted({labels[0] for _, labels, _, _ in rows}))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _note_separator(path: Path, cells: list[str], separator: str) -> str:
    """A sentence where no cell of labels holds the separator and another one would make labels that come again and again."""
    if any(separator in cell for cell in cells if separator):
        return ""
    for other in (",", "|", ";"):
        parts = [part.strip() for cell in cells for part in cell.split(other)]
        if other != separator and len(parts) > len(cells) and len(set(parts)) < len(set(cells)):
            return (
                f"note: no label of {path} holds the separator {separator!r}, and some hold {other!r}: if that stands "
                f"between labels, add --label-separator {other!r}."
            )
    return ""


def _from_csv(root: Path, settings: Any) -> tuple[list[Row], tuple[str, ...], str]:
    """Rows, classes, and what there is to say of them."""
    path = root / Path(settings.csv).expanduser()
    lines = _read_csv(path)
    _check_columns(path, tuple(lines[0]), settings)
    splits = _splits(path, lines, settings)
    files = _find_files(path, root, [line[settings.csv_file].strip() for line in lines])
    rows: dict[Path, Row] = {}
    for line, split, file in zip(lines, splits, files, strict=True):
        name = os.path.relpath(file, root) if file.is_relative_to(root) else line[settings.csv_file].strip()
        labels = _labels(path, line, name, settings)
        if file in rows:
            labels = _merged(path, rows[file], labels, split, settings.multi_label)
        rows[file] = (file, labels, split, Path(name).as_posix())
    classes, note = tuple(sorted({label for row in rows.values() for label in row[1]})), ""
    if settings.multi_label:
        note = _note_separator(path, [line[settings.csv_labels] for line in lines], settings.label_separator)
    return list(rows.values()), classes, note


def _read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV (tab-separated where its suffix is .tsv), at least one."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", restval=""))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the CSV file with --csv.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({error}): save it as one.") from error
    if not lines:
        raise UserError(f"{path} has no lines below its header: give a CSV that lists the recordings.")
    return lines


def _check_columns(path: Path, present: tuple[str, ...], settings: Any) -> None:
    wanted = {"--csv-file": settings.csv_file, "--csv-labels": settings.csv_labels}
    # A CSV may have no splits at all; one that has folds, or names its column, must have that column.
    if settings.csv_split and (settings.test_fold or settings.validation_fold or settings.csv_split != "split"):
        wanted["--csv-split"] = settings.csv_split
    for flag, column in wanted.items():
        if column not in present:
            columns = ", ".join(str(name) for name in present)
            raise UserError(f"{path} has no column '{column}': name one of its columns ({columns}) with {flag}.")


def _splits(path: Path, lines: list[dict[str, str]], settings: Any) -> list[str]:
    """The split of each line: from folds where one is held out, else from the words in the column, else all train."""
    column = settings.csv_split
    if not column or column not in lines[0]:
        return ["train"] * len(lines)
    values = [line[column].strip() for line in lines]
    present = ", ".join(sorted(set(values))[:12])
    if settings.test_fold or settings.validation_fold:
        held_out = {settings.validation_fold: "validation", settings.test_fold: "test"}
        for fold in filter(None, held_out):
            if fold not in values:
                raise UserError(f"{path} has no fold '{fold}' in its column '{column}': hold out one of {present}.")
        return [held_out.get(value, "train") if value else "train" for value in values]
    for value in values:
        if value.lower() not in SPLIT_NAMES:
            raise UserError(
                f"The column '{column}' of {path} holds '{value}', which names no split: use train, validation and "
                f"test, or hold out one of its folds ({present}) with --test-fold."
            )
    return [SPLIT_NAMES[value.lower()] for value in values]


def _labels(path: Path, line: dict[str, str], name: str, settings: Any) -> tuple[str, ...]:
    cell, separator = line[settings.csv_labels], settings.label_separator
    labels = tuple(dict.fromkeys(label.strip() for label in (cell.split(separator) if separator else [cell])))
    labels = tuple(filter(None, labels))
    if not labels and not settings.multi_label:
        raise UserError(f"{path} gives no label for {name}: fill the column '{settings.csv_labels}' in.")
    if len(labels) > 1 and not settings.multi_label:
        raise UserError(f"{path} gives {name} the labels {listed(labels)}: pass --multi-label to train on several.")
    return labels


def _merged(path: Path, row: Row, labels: tuple[str, ...], split: str, multi_label: bool) -> tuple[str, ...]:
    """A file on several lines has the labels of all of them, if it may have several and stays in one split."""
    if not multi_label or split != row[2]:
        raise UserError(f"{path} lists {row[3]} more than once: keep one line, or pass --multi-label and one split.")
    return tuple(dict.fromkeys((*row[1], *labels)))


def _find_files(path: Path, root: Path, names: Iterable[str]) -> list[Path]:
    """Each name's file: beside the CSV, below the data root, or in the folder `audio` of either."""
    places = list(dict.fromkeys((path.parent, root, path.parent / "audio", root / "audio")))
    found, missing = [], []
    for name in names:
        file = next((place / name for place in places if name and (place / name).is_file()), None)
        found.append(file or path)
        if file is None:
            missing.append(name or "(empty)")
    if missing:
        below = listed([str(place) for place in places], 4)
        raise UserError(
            f"{len(missing)} of the {len(found)} files that {path} lists are not in {below}: {listed(missing)}; put "
            "them there or take their lines out."
        )
    return found


def _hold_out(clips: list[Clip], split: str, share: float) -> list[Clip]:
    """`clips` as they are where `split` has some, else with `share` of each class's training clips in it."""
    if any(clip.split == split for clip in clips):
        return clips
    if not 0 < share < 0.5:
        raise UserError(f"The data has no {split} split, and --validation-share is {share}: give 0 < share < 0.5.")
    by_class = defaultdict(list)
    for i, clip in enumerate(clips):
        if clip.split == "train":
            by_class[clip.labels[:1]].append(i)
    chosen: set[int] = set()
    for members in by_class.values():
        members.sort(key=lambda i: hashlib.sha256(clips[i].name.encode()).digest())
        count = max(1, round(share * len(members)))
        chosen.update(members[:count] if count < len(members) else ())
    return [replace(clip, split=split) if i in chosen else clip for i, clip in enumerate(clips)]


def _check_every_class_trains(clips: list[Clip], classes: tuple[str, ...], root: Path) -> None:
    trained = {label for clip in clips if clip.split == "train" for label in clip.labels}
    missing = [name for i, name in enumerate(classes) if i not in trained]
    if missing:
        raise UserError(f"{root} has no training clips of {listed(missing)}: add some, or leave the class out.")


def _clip_seconds(clips: list[Clip]) -> float:
    """The length that nine of ten clips do not exceed, judged by 32 of them, in seconds."""
    lengths = []
    for clip in clips[:: -(-len(clips) // 32)]:
        try:
            lengths.append(audio.duration(clip.source, clip.name))
        except UserError:
            continue  # packing names all bad files together
    return round(float(np.quantile(lengths, 0.9, method="higher")), 3) if lengths else 1.0
