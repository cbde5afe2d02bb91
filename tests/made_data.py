"""What the tests of data share: settings, data sets of empty files, and recordings of noise."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from train.data.clips import Clip, DataSet
from train.data.pack import Pack, pack

RATE = 16_000


def settings(**changed) -> SimpleNamespace:
    fields = {
        "data": "folder", "data_root": None, "seed": 0, "words": "", "download": False, "train_list": "", "test_list": "",
        "csv": "", "csv_file": "file",
        "csv_labels": "label", "csv_split": "split", "label_separator": ";", "test_fold": "", "validation_fold": "",
        "validation_share": 0.1, "multi_label": False, "synth_train": 40, "synth_validation": 20, "synth_test": 20,
    }  # fmt: skip
    return SimpleNamespace(**(fields | {name: str(v) if isinstance(v, Path) else v for name, v in changed.items()}))


def make_tree(root: Path, *names: str) -> Path:
    """Files in `root` that have names and nothing in them: the data sets read no audio."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def splits(dataset: DataSet) -> dict[str, str]:
    return {clip.name: clip.split for clip in dataset.clips}


def labels(dataset: DataSet) -> dict[str, tuple[str, ...]]:
    return {clip.name: tuple(dataset.classes[i] for i in clip.labels) for clip in dataset.clips}


def make_files(folder: Path, count: int, rate=RATE) -> list[Path]:
    """WAV files of noise, each 1000 samples longer than the one before."""
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:03d}.wav" for i in range(count)]
    for i, path in enumerate(paths):
        soundfile.write(path, rng.integers(-(2**15), 2**15, 1000 * (i + 1), dtype=np.int16), rate)
    return paths


def data_set(sources, splits=("train", "validation", "test")) -> DataSet:
    """Clips of two classes, the splits in turn."""
    clips = tuple(
        Clip(source, (i % 2,), splits[i % len(splits)], source.name if isinstance(source, Path) else str(i))
        for i, source in enumerate(sources)
    )
    return DataSet("made", ("a", "b"), clips, multi_label=False, clip_seconds=1.0)


def packed(sources, **how) -> Pack:
    return pack(data_set(sources), RATE, progress=False, **how)


def clip(result: Pack, i: int) -> np.ndarray:
    return result.samples[result.start[i] : result.start[i] + result.length[i]]
