"""Data sets. Each module here knows one layout and turns it into a `DataSet`; nothing else in the project does.

To add one: write a module with `load(settings) -> DataSet` and give it a line in `LOADERS`.
"""

from typing import Any

from fftp.errors import UserError
from train.data import audioset, folder, speechcommands, synth
from train.data.clips import SPLITS, Clip, DataSet, check_classes, nearest

__all__ = ["LOADERS", "SPLITS", "Clip", "DataSet", "check_classes", "load"]

LOADERS = {
    "synth": synth.load,
    "speechcommands": speechcommands.load,
    "audioset": audioset.load,
    "folder": folder.load,
}


def load(settings: Any) -> DataSet:
    """The data set that `settings.data` names; its loader reads the settings that concern it.

    UserError for an unknown name, a data folder that is absent, empty or laid out otherwise, or no training clips.
    """
    if settings.data not in LOADERS:
        raise UserError(f"There is no data set '{settings.data}'{nearest(settings.data, tuple(LOADERS))}")
    dataset = LOADERS[settings.data](settings)
    if not dataset.counts()["train"]:
        raise UserError(f"The data set '{dataset.name}' has no training clips: check its split lists or columns.")
    return dataset
