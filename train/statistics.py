"""python -m train.statistics: a data set's normalisation constants and class counts, beside the recipe's.

With --baseline also what logistic regression on mean spectra reaches on the test split: the least to beat.
"""

import sys

import numpy as np
import torch

from fftp import command, run_folder
from fftp.errors import UserError
from fftp.frontend import FrontEnd, FrontEndSettings, Statistics
from kernels import FbankSettings, draws
from train import baseline, data, settings
from train.data.clips import SPLITS
from train.data.pack import Pack, pack
from train.feed import Feed
from train.samples import Resident

MOST_CLIPS = 20000  # training clips that are looked at; their choice is keyed
CLIPS_AT_A_TIME = 64


def measure(
    packed: Pack, front_end: FrontEndSettings, seed: int, most: int = MOST_CLIPS
) -> tuple[Statistics, Statistics]:
    """Log-mel of the training clips: (as the model gets them, padding included; their own frames alone).

    The first is what AST's published constants are. Raises UserError where all is silence: nothing to normalise by.
    """
    feed = Feed(Resident(packed, torch.device("cpu")), packed.indices("train"), FrontEnd(front_end))
    padded, sound = Statistics(), Statistics()
    chosen = np.sort(draws.shuffle(seed, 0, len(feed))[:most])
    for part in np.array_split(chosen, -(-len(chosen) // CLIPS_AT_A_TIME)):
        log_mel, length = feed.raw(part)
        padded.add(log_mel)
        sound.add(log_mel, feed.front_end.valid_frames(length))
    if sound.std == 0:
        raise UserError("All training clips are silent: the log-mel has no spread to normalise by; check the files.")
    return padded, sound


def main(arguments: list[str] | None = None) -> int:
    """The command; it takes the flags of train.run, of which those for data and front end matter. Returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        flags = [word for word in words if word != "--baseline"]
        wanted, given = settings.from_flags(flags, "python -m train.statistics", __doc__)
        settings.check_data(wanted, given)
        fbank = FbankSettings(n_mels=wanted.mels)
        dataset = data.load(wanted)
        packed = pack(dataset, fbank.sample_rate, fbank.frame, wanted.skip_bad_files, workers=wanted.workers or None)
        front_end = front_end_of(wanted, dataset, fbank)
        show(packed, *measure(packed, front_end, wanted.seed), wanted)
        if "--baseline" in words:
            figures = baseline.logistic(packed, front_end, dataset.multi_label)
            text = ", ".join(
                f"{label} {100 * figures[name]:.2f} %" for name, label in run_folder.FIGURES.items() if name in figures
            )
            print(f"# logistic regression on the mean and deviation of each mel bin, test clips: {text}")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return command.closed_pipe()


def front_end_of(wanted: settings.Settings, dataset: data.DataSet, fbank: FbankSettings) -> FrontEndSettings:
    """The run's front end, not normalising yet."""
    longest = min(fbank.samples(wanted.frames), round(dataset.clip_seconds * fbank.sample_rate))
    return FrontEndSettings(T=wanted.frames, clip_samples=longest, mean=0.0, std=0.5, fit=wanted.fit, fbank=fbank)


def show(packed: Pack, padded: Statistics, sound: Statistics, wanted: settings.Settings) -> None:
    """Print the constants as recipe lines, how they differ from the recipe's, and the clips of each class."""
    print(f"mean = {padded.mean:.4f}\nstd = {padded.std:.4f}")
    if wanted.mean is not None:
        differ = f"mean {padded.mean - wanted.mean:+.4f}, std {padded.std - wanted.std:+.4f}"
        print(f"# the recipe has mean {wanted.mean:.4f} and std {wanted.std:.4f}; these differ by {differ}")
    print(f"# without the frames that pad clips to {wanted.frames}: mean {sound.mean:.4f}, std {sound.std:.4f}")
    seconds = packed.length / packed.sample_rate
    span = f"{seconds.min():.2f} to {seconds.max():.2f} s"
    print(f"# {len(seconds)} clips of {span}, {seconds.sum() / 3600:.2f} hours in all")
    counts = {split: packed.labels[packed.indices(split)].sum(0).astype(int) for split in SPLITS}
    width = max(len("class"), *(len(name) for name in packed.classes))
    print(f"# {'class':<{width}} " + " ".join(f"{split:>10}" for split in SPLITS))
    for k, name in enumerate(packed.classes):
        print(f"# {name:<{width}} " + " ".join(f"{counts[split][k]:>10}" for split in SPLITS))


if __name__ == "__main__":
    sys.exit(main())
