"""What a checkpoint said of every clip of a split, kept beside the run: `scores_test.npz`. Training writes it, pages read it.

Arrays of numbers and one JSON text: loading it runs no code.
"""

import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fftp import checkpoint
from fftp.errors import UserError

# What numpy and json raise over bytes that are not what they were.
_DAMAGE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """A split's n clips in the pack's order, and what was said of them.

    figures: the split's metrics. spread: 95 % interval of some of them, over the draw of clips. per_class: clips of class i
    taken for class j, int64 `[C, C]`, or with several labels a clip each class's average precision, float64 `[C]`.
    probabilities float32 and targets uint8 `[n, C]`; losses float64 `[n]`, of each clip alone.
    pack: the file of int16 samples in which clip i is `start[i] : start[i] + length[i]`; "" where the clips were made in
    memory, and then `samples` has the clips numbered in `kept`, end to end.
    """

    split: str
    multi_label: bool
    figures: dict[str, float]
    spread: dict[str, tuple[float, float]]
    names: tuple[str, ...]
    pack: str
    per_class: np.ndarray
    probabilities: np.ndarray
    targets: np.ndarray
    losses: np.ndarray
    start: np.ndarray
    length: np.ndarray
    kept: np.ndarray
    samples: np.ndarray

    @property
    def worst(self) -> np.ndarray:
        """The clips' numbers, the highest loss first."""
        return np.argsort(-self.losses, kind="stable")


_TEXTS = ("split", "multi_label", "figures", "spread", "names", "pack")
_ARRAYS = tuple(name for name in Scores.__dataclass_fields__ if name not in _TEXTS)


def file_of(run: Path, split: str) -> Path:
    return run / f"scores_{split}.npz"


def write(run: Path, scores: Scores) -> None:
    """Into the run's folder, whole or not at all; the same bytes for the same scores."""
    text = json.dumps({name: getattr(scores, name) for name in _TEXTS}).encode()
    arrays = {name: getattr(scores, name) for name in _ARRAYS}
    written = io.BytesIO()
    np.savez_compressed(written, about=np.frombuffer(text, np.uint8), **arrays)
    checkpoint.replace(file_of(run, scores.split), written.getvalue())


def read(run: Path, split: str) -> Scores | None:
    """The scores of a split, or None where none were written. Raises UserError for a damaged file."""
    path = file_of(run, split)
    try:
        with np.load(path, allow_pickle=False) as held:
            about = json.loads(held["about"].tobytes())
            arrays = {name: held[name] for name in _ARRAYS}
        texts = {name: about[name] for name in _TEXTS}
        texts["names"] = tuple(map(str, texts["names"]))
        texts["spread"] = {name: (float(a), float(b)) for name, (a, b) in texts["spread"].items()}
        read = Scores(**texts, **arrays)
        n, C = read.probabilities.shape
        whole = {len(read.names), len(read.losses), len(read.start), len(read.length)} == {
            n
        } and read.targets.shape == (n, C)
        if not whole or read.per_class.shape != ((C,) if read.multi_label else (C, C)):
            raise ValueError("its arrays do not fit together")
        return read
    except FileNotFoundError:
        return None
    except _DAMAGE as error:
        raise UserError(
            f"{path} is damaged: write it anew by `python -m train.evaluate {run} --split {split} --scores`."
        ) from error
