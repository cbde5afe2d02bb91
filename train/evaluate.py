"""python -m train.evaluate CHECKPOINT: a trained model's figures on a split, its own data set's or another's.

Flags are those of train.run that say where data lies (--data, --data-root, --csv ..., --skip-bad-files, --device, --precision,
--fused); what is not given is as in the run that trained the model. --scores keeps what was said of each clip in the run's
folder, scores_SPLIT.npz, for `python -m fftp.report`. --in-a-row N adds the accuracy of clips heard 1st to N-th in one stream.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from fftp import checkpoint
from fftp.errors import UserError
from fftp.frontend import FrontEnd
from fftp.predict import Classifier
from kernels import dispatch
from train import data, loop, machine, scored, settings
from train.data.clips import SPLITS, check_classes, nearest
from train.data.pack import pack
from train.feed import Feed
from train.running_sound import check, in_a_row
from train.samples import source_of
from train.step import Task

ALL = "all"  # the splits together


def evaluate(path: str, split: str, flags: list[str], keep_scores: bool = False, places: int | None = None) -> dict:
    """Figures of the checkpoint on a split, or on all clips: accuracy and balanced accuracy, or mAP, AUC and d'.

    keep_scores: write the clips' scores into `path`, the folder of a run or of a checkpoint. places: also the accuracy at
    so many places in one stream (`train.running_sound`).

    Raises UserError for a damaged checkpoint, other classes, or a split without clips.
    """
    model, config = checkpoint.load(path)
    asked, given = settings.from_flags(flags, "python -m train.evaluate CHECKPOINT")
    changes = {name: getattr(asked, name) for name in given}
    wanted = replace(settings.from_saved(config.settings), **changes)
    settings.check_data(wanted, given)
    dispatch.use_fused(wanted.fused)
    dataset = data.load(wanted)
    check_classes(dataset.classes, config.labels)
    fbank = config.front_end.fbank
    packed = pack(dataset, fbank.sample_rate, fbank.frame, wanted.skip_bad_files, workers=wanted.workers or None)
    device = machine.device_of(wanted.device)
    chosen = np.arange(len(packed.names)) if split == ALL else packed.indices(split)
    feed = Feed(source_of(packed, device, wanted.device_memory_share), chosen, FrontEnd(config.front_end))
    if not len(feed):
        raise UserError(f"The data set has no clips in its {split} split: take another by --split.")
    if given & {"data", "data_root", "csv"} and len(feed) < len(packed.names):
        print(
            f"{len(feed)} of {len(packed.names)} clips are in the {split} split: --split all takes every one.",
            file=sys.stderr,
        )
    task = Task(
        settings=wanted,
        config=config,
        model=model.to(device),
        train=feed,
        validation=None,
        device=device,
        precision=machine.precision_of(wanted.precision, device),
        out=Path(path),
    )
    if places is not None:  # before the work, not after it
        check(config.multi_label, places)
    figures, scores, targets = loop.evaluate(task, feed)
    if keep_scores:
        try:
            scored.keep(task.out, split, packed, figures, scores, targets, config.multi_label)
        except OSError as error:
            raise UserError(
                f"--scores cannot write into {path} ({error.strerror}): copy the run's folder first."
            ) from None
    about = {"checkpoint": str(checkpoint.find(path)), "split": split, "clips": len(feed), **figures}
    if places is None:
        return about
    classifier = Classifier(model, config, device.type, str(task.precision).removeprefix("torch."))
    row, judged = in_a_row(classifier, packed, feed.indices, places)
    return about | {"in_a_row": row, "clips_in_a_row": judged}


def main(arguments: list[str] | None = None) -> int:
    """The command; prints one JSON object and returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        print(
            "usage: python -m train.evaluate CHECKPOINT [--split train|validation|test|all] [--scores] [--in-a-row N] "
            "[FLAGS OF train.run]"
        )
        return 0 if arguments else 2
    split = "test"
    try:
        dispatch.check_overrides()
        split = _taken(arguments, "--split", split)
        places = _taken(arguments, "--in-a-row", None)
        if not (places is None or places.isdecimal()):
            raise UserError(f"--in-a-row takes a whole number, how many clips one stream has, not {places!r}.")
        if split not in (*SPLITS, ALL):
            raise UserError(f"--split {split!r} is no split{nearest(split, (*SPLITS, ALL))}")
        if not arguments or arguments[0].startswith("-"):
            raise UserError(
                "the run's folder or a checkpoint comes first: python -m train.evaluate CHECKPOINT [flags]."
            )
        keep = "--scores" in arguments[1:]
        if keep and split == ALL:
            raise UserError("--scores keeps those of one split: name it by --split, or leave --scores out.")
        flags = [word for word in arguments[1:] if word != "--scores"]
        figures = evaluate(arguments[0], split, flags, keep, None if places is None else int(places))
        print(json.dumps(figures))
        return 0
    except (UserError, dispatch.BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _taken(arguments, flag, default):
    """What stands behind a flag, and both taken out of the arguments; an empty text where nothing does."""
    if flag not in arguments:
        return default
    at = arguments.index(flag)
    value = "".join(arguments[at + 1 : at + 2])
    del arguments[at : at + 2]
    return value


if __name__ == "__main__":
    sys.exit(main())
