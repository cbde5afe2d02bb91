"""What every data set is made of: clips with labels and a split, and the names of the classes."""

from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from fftp.errors import UserError

SPLITS = ("train", "validation", "test")
ARRAY_RATE = 16_000  # Hz; of clips that are arrays: those made, not recorded


@dataclass(frozen=True)
class Row:
    """A recording in a parquet shard; its bytes are read when it is that row's turn (train.data.shards)."""

    shard: Path
    number: int


@dataclass(frozen=True, eq=False)
class Clip:
    """One recording: a file, the bytes of one, a shard's row, or int16 samples (W,) at ARRAY_RATE."""

    source: Path | bytes | Row | np.ndarray
    labels: tuple[int, ...]  # numbers of its classes
    split: str  # "train", "validation" or "test"
    name: str  # unique in the data set, and the same wherever the data set lies
    segment: tuple[float, float] | None = None  # seconds of the source that are the clip, where the source is longer

    @property
    def file(self) -> Path | None:
        """The file that it lies in, if any."""
        if isinstance(self.source, Row):
            return self.source.shard
        return self.source if isinstance(self.source, Path) else None


@dataclass(frozen=True, eq=False)
class DataSet:
    name: str
    classes: tuple[str, ...]
    clips: tuple[Clip, ...]
    multi_label: bool
    clip_seconds: float  # how long its longer clips typically are
    copies_differ: bool = False  # nobody has quite the same files: a run writes down which clips it had
    absent: tuple[str, ...] = ()  # names of clips that its lists name and that are not there
    note: str = ""  # a sentence for whoever starts a run on it

    def counts(self) -> dict[str, int]:
        """Clips in each split, every split named."""
        counted = Counter(clip.split for clip in self.clips)
        return {split: counted[split] for split in SPLITS}


def data_folder(data_root: str | None, what: str) -> Path:
    """`data_root` as a folder that holds something; `what` (the data set) is for the sentence. UserError otherwise."""
    if not data_root:
        raise UserError(f"The data set '{what}' lies in files: give their folder with --data-root.")
    root = Path(data_root).expanduser()
    if not root.is_dir():
        raise UserError(f"The data folder {root} does not exist: give an existing one with --data-root.")
    if next(root.iterdir(), None) is None:
        raise UserError(f"The data folder {root} is empty: put the data there, or give another with --data-root.")
    return root


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """The end of a sentence on a bad name: '; did you mean a or b?', or '; known are a, b, ...' where none is near."""
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known are {listed(sorted(known), 12)}."


def listed(names: list[str] | tuple[str, ...], most: int = 3) -> str:
    """'a, b, c and 7 more'."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def check_classes(found: tuple[str, ...], expected: tuple[str, ...]) -> None:
    """UserError, naming the difference, unless the data set's classes are those that a checkpoint was trained on."""
    found, expected = tuple(found), tuple(expected)
    if found == expected:
        return
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    differences = [f"the data lacks {listed(missing)}"] if missing else []
    differences += [f"the data has {listed(extra)} besides"] if extra else []
    if not differences:
        at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
        differences = [f"class {at} is {found[at]} in the data and {expected[at]} in the checkpoint"]
    raise UserError(
        f"The classes of the data ({len(found)}) are not those of the checkpoint ({len(expected)}): "
        f"{' and '.join(differences)}; use the data that the checkpoint was trained on, or train anew."
    )
