"""Packing: every clip decoded, mixed to mono and resampled once, end to end in one array of int16.

What comes from files lies memory-mapped in the cache (train.data.cache), so that the second start decodes nothing.
"""

import csv
import io
from dataclasses import dataclass

import numpy as np

from fftp import audio
from fftp.errors import UserError
from train.data import cache
from train.data.clips import ARRAY_RATE, SPLITS, DataSet
from train.data.decode import Task, decode_all


@dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
    """All clips of a data set. Clip i is `samples[start[i] : start[i] + length[i]]`."""

    samples: np.ndarray  # int16 (all samples,), memory-mapped from the cache where they come from files
    start: np.ndarray  # int64 (n,)
    length: np.ndarray  # int64 (n,), in samples
    labels: np.ndarray  # float32 (n, C), 1 for each class of the clip
    splits: np.ndarray  # int8 (n,), numbers into SPLITS
    names: tuple[str, ...]
    classes: tuple[str, ...]
    skipped: list[tuple[str, str]]  # (name, reason) of the files left out
    sample_rate: int  # Hz
    copies_differ: bool = False  # nobody has quite the same files
    absent: tuple[str, ...] = ()  # names of listed clips that are not there

    def indices(self, split: str) -> np.ndarray:
        """The numbers of a split's clips, rising: int64."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def listing(self) -> str:
        """Which clips there are, which were listed and are not there, and which could not be used: a CSV."""
        used = zip(self.names, self.splits, strict=True)
        rows = [("name", "split", "state"), *((name, SPLITS[split], "used") for name, split in used)]
        rows += [(name, "", "absent") for name in self.absent]
        rows += [(name, "", "skipped") for name, _ in self.skipped]
        written = io.StringIO()
        csv.writer(written, lineterminator="\n").writerows(rows)
        return written.getvalue()


def pack(
    dataset: DataSet,
    sample_rate: int,
    min_samples: int = audio.WINDOW,
    skip_bad_files: bool = False,
    progress: bool = True,
    workers: int | None = None,
) -> Pack:
    """The data set's clips at `sample_rate`, from the cache or decoded by `workers` processes (default: all cores).

    A file that is empty, truncated, no audio, not finite or shorter than `min_samples` (at `sample_rate`) is bad: all
    are found, then UserError names them, or with `skip_bad_files` they are left out and listed in `Pack.skipped`.
    UserError, too, when a split loses all its clips and when the cache folder is full or closed.
    """
    if all(isinstance(clip.source, np.ndarray) for clip in dataset.clips):
        return _pack_arrays(dataset, sample_rate, min_samples)
    room = cache.folder()
    with cache.explained(room):
        sizes, digests = cache.identify(dataset.clips, room, progress, skip_bad_files)
        path = room / "packs" / cache.key(dataset.clips, digests, sample_rate, min_samples)
        index = cache.read_index(path)
        if index is None:
            with_size = zip(dataset.clips, sizes, strict=True)
            tasks = [Task(clip.source, clip.name, size, clip.segment) for clip, size in with_size]
            with cache.unfinished(path) as beside:
                done = cache.finished(beside)
                decoded = decode_all(tasks[len(done) :], sample_rate, min_samples, workers)
                index = cache.write(beside, done, decoded, len(tasks), progress)
                _refuse_bad(dataset, cache.reasons(index), skip_bad_files)  # such a pack takes no name yet
                cache.take_name(beside, path)
    reasons = cache.reasons(index)
    _refuse_bad(dataset, reasons, skip_bad_files)
    samples = np.memmap(path / "samples.int16", dtype=np.int16, mode="r")
    return _assemble(dataset, samples, np.array(index["length"], dtype=np.int64), reasons, sample_rate)


def _pack_arrays(dataset: DataSet, sample_rate: int, min_samples: int) -> Pack:
    if sample_rate != ARRAY_RATE:
        raise UserError(f"The clips of '{dataset.name}' are made at {ARRAY_RATE} Hz: set that sample rate.")
    length = np.array([len(clip.source) for clip in dataset.clips], dtype=np.int64)
    if length.min() < min_samples:
        raise UserError(f"The clips of '{dataset.name}' are shorter than one analysis window of {min_samples} samples.")
    return _assemble(dataset, np.concatenate([clip.source for clip in dataset.clips]), length, {}, sample_rate)


def _assemble(
    dataset: DataSet, samples: np.ndarray, length: np.ndarray, reasons: dict[int, str], sample_rate: int
) -> Pack:
    """The Pack of the clips that were not skipped; `length` (all clips,) is 0 for those that were."""
    kept = np.flatnonzero(length)
    clips = [dataset.clips[i] for i in kept]
    labels = np.zeros((len(clips), len(dataset.classes)), dtype=np.float32)
    for row, clip in zip(labels, clips, strict=True):
        row[list(clip.labels)] = 1
    return Pack(
        samples=samples,
        start=(np.cumsum(length) - length)[kept],
        length=length[kept],
        labels=labels,
        splits=np.array([SPLITS.index(clip.split) for clip in clips], dtype=np.int8),
        names=tuple(clip.name for clip in clips),
        classes=dataset.classes,
        skipped=[(dataset.clips[i].name, reason) for i, reason in sorted(reasons.items())],
        sample_rate=sample_rate,
        copies_differ=dataset.copies_differ,
        absent=dataset.absent,
    )


def _refuse_bad(dataset: DataSet, reasons: dict[int, str], skip_bad_files: bool) -> None:
    if reasons and not skip_bad_files:
        bad = [f"{dataset.clips[i].name} {reason}" for i, reason in sorted(reasons.items())]
        files = "1 file is" if len(bad) == 1 else f"{len(bad)} files are"
        raise UserError(
            f"Of the data set's {len(dataset.clips)} recordings {files} unusable: {'; '.join(bad[:5])}"
            f"{f'; and {len(bad) - 5} more' if len(bad) > 5 else ''}; mend or remove them, or pass --skip-bad-files to "
            "go on without them."
        )
    left = {clip.split for i, clip in enumerate(dataset.clips) if i not in reasons}
    for split in SPLITS:
        lost = [i for i, clip in enumerate(dataset.clips) if clip.split == split]
        if lost and split not in left:
            name = dataset.clips[lost[0]].name
            raise UserError(
                f"All {len(lost)} recordings of the {split} split are unusable (the first: {name} {reasons[lost[0]]}): "
                "mend them or give other data."
            )
