"""python -m fftp.report RUN_DIR: one HTML page of a run, with nothing outside of it."""

import shlex
import sys
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fftp import audio, checkpoint, command, predict, run_folder, scores
from fftp.ast_model import AST
from fftp.augment import Augment, AugmentSettings
from fftp.errors import UserError
from fftp.explain import attention_rollout
from fftp.page import cards, classes, markup, media, summary
from fftp.page.cards import Card
from fftp.run_folder import Run
from fftp.scores import Scores

LIMIT = 20_000_000  # bytes of a page
CLIPS = "<!--clips-->"  # where they go: a comment, which no text of a run can be
TAGS = 400  # bytes around a card's picture and sound
GUESSES = 3  # labels shown of each clip
NO_FILE = "Its recording is not where the run found it"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write one HTML page of a run, for any browser, without a network."""

    out: Path | None = None
    """The page; default: report.html in the run's folder."""
    clips: int = 24
    """How many clips to show, those with the highest loss."""
    data_root: Path | None = None
    """Where the recordings lie now, if not where the run found them."""
    split: Literal["test", "validation"] = "test"
    """The clips that it is about. Those of validation: `python -m train.evaluate RUN_DIR --split validation --scores` first."""


class Recordings:
    """The clips' samples: kept with the scores, in the pack that the run made, or in files below the data root."""

    def __init__(self, run: Run, held: Scores, given: Path | None, rate: int, frame: int):
        root = given or run.settings.get("data_root")
        self.scores, self.given, self.rate, self.frame = held, given, rate, frame
        self.root = Path(root).expanduser() if root else None
        self.kept = {int(i): held.samples[a : a + n] for i, a, n in _spans(held)}
        self.pack = self._open_pack()

    def _open_pack(self):
        path = Path(self.scores.pack)
        if not self.scores.pack or self.given is not None or not path.is_file() or not path.stat().st_size:
            return np.empty(0, np.int16)
        return np.memmap(path, np.int16, "r")

    def of(self, i: int) -> np.ndarray:
        """float32 `[samples]` in -1..1. Raises UserError where there is none."""
        start, length = int(self.scores.start[i]), int(self.scores.length[i])
        if i in self.kept:
            return self.kept[i].astype(np.float32) / 2**15
        if start + length <= len(self.pack):
            return self.pack[start : start + length].astype(np.float32) / 2**15
        path = self.root / self.scores.names[i] if self.root else None
        if path is None or not path.is_file():
            raise UserError(NO_FILE)
        return audio.load(path, self.rate, self.frame)


def _spans(held):
    """(clip, start within the kept samples, length) of each kept clip."""
    length = held.length[held.kept]
    return zip(held.kept, np.cumsum(length) - length, length, strict=True)


class Show:
    """Cards of clips: what needs the model is left out where the folder has none."""

    def __init__(self, run: Run, held: Scores, recordings: Recordings, classifier: predict.Classifier | None):
        self.run, self.scores, self.recordings, self.classifier = run, held, recordings, classifier
        self.missing = Counter()
        if classifier is not None:
            own = {field.name for field in fields(AugmentSettings)} & set(run.settings)
            chosen = AugmentSettings(**{name: run.settings[name] for name in own})
            grid = classifier.config.model.grid
            self.augment = Augment(chosen, run.settings["seed"], grid.T, grid.F)

    def card(self, rank: int, room: int) -> Card:
        """The clip with the rank-th highest loss (from 1), in `room` bytes."""
        held = self.scores
        i = int(held.worst[rank - 1])
        p, own = held.probabilities[i], np.flatnonzero(held.targets[i])
        labels = self.run.classes
        made = Card(
            rank=rank,
            name=held.names[i],
            loss=float(held.losses[i]),
            true=tuple(labels[k] for k in own),
            true_probabilities=tuple(float(p[k]) for k in own),
            guesses=[(labels[k], float(p[k])) for k in np.argsort(-p, kind="stable")[:GUESSES]],
            seconds=0.0,
        )
        try:
            samples = self.recordings.of(i)
        except UserError as error:
            self.missing[str(error)] += 1
            return made
        return self._with_media(made, samples, room)

    def _with_media(self, made, samples, room):
        rate = self.recordings.rate
        log_mel = None
        if self.classifier is not None:
            samples = samples[: max(self.recordings.frame, self.classifier.config.front_end.clip_samples)]
            made, log_mel = self._seen(made, samples)
        made = replace(made, seconds=len(samples) / rate)
        room -= len(cards.markup(replace(made, picture="")).encode()) + TAGS
        if log_mel is not None:
            best = media.BITRATES[0] * 125 * 4 / 3 * (made.seconds + 0.2)
            made = replace(made, picture=media.spectrogram(log_mel, int(max(room / 5, room - best))))
            room -= len(made.picture or "")
        made = replace(made, audio=media.sound(samples, rate, room))
        if made.audio is None:
            self.missing["Its sound does not fit into a page of 20 MB, or could not be written as MP3"] += 1
        return made

    def _seen(self, made, samples):
        """The card with masks and rollout, and its log-mel `[frames, F]`, un-normalised."""
        front_end = self.classifier.front_end
        s, length = front_end.settings, torch.tensor([len(samples)])
        normalised = self.classifier.log_mel(samples)
        log_mel = normalised * (2 * s.std) + s.mean
        frames = int(front_end.valid_frames(length))
        sound = log_mel[0, :frames].numpy()
        made = replace(made, shape=(frames, s.F))
        rectangles = self.augment.rectangles(0, torch.tensor([made.rank - 1]))
        if rectangles is not None:
            fill = float(self.augment.fill(log_mel, torch.tensor([frames]), None))
            painted = media.colour(fill, *media.levels(sound))
            made = replace(made, rectangles=rectangles[0].numpy(), fill=painted)
        if isinstance(self.classifier.model, AST):
            made = replace(
                made, rollout=attention_rollout(self.classifier.model, normalised)[0, :frames].mean(1).numpy()
            )
        return made, sound


def page(run: Run, options: Options) -> str:
    """The whole page. Raises UserError for scores or a checkpoint that are damaged."""
    held = scores.read(run.folder, options.split)
    if held is not None and held.probabilities.shape[1] != len(run.classes):
        raise UserError(f"{scores.file_of(run.folder, options.split)} is of another run: it has other classes.")
    classifier = _classifier(run.folder)
    titles = {"curves": "Learning curves", "classes": "Classes", "clips": "Most wrong about", "settings": "Settings"}
    if held is not None:
        titles["classes"] = "Average precision by class" if held.multi_label else "Confusion"
    parts = [
        summary.head(run, classifier.config if classifier else None, titles),
        '<main id="main">',
        summary.tiles(run, held, options.split),
        markup.section("curves", titles["curves"], summary.learning(run)),
        markup.section("classes", titles["classes"], _classes(run, held, options.split)),
        markup.section("clips", titles["clips"], CLIPS),
        markup.section("settings", titles["settings"], summary.settings(run)),
        "</main>\n<footer><p>Written by <code>python -m fftp.report</code>. Everything is in this file.</p></footer>",
    ]
    around = markup.page(summary.name_of(run), "\n".join(parts))
    before, after = around.split(CLIPS)
    return before + _clips(run, held, classifier, options, LIMIT - len(around.encode())) + after


def _classifier(folder):
    try:
        found = checkpoint.find(folder)
    except UserError:
        return None  # a folder without weights still has its figures
    return predict.load(found)


def _classes(run, held, split):
    if held is None:
        return _no_scores(run, split)
    if held.multi_label:
        return classes.average_precision(held.per_class, held.targets.sum(0), run.classes)
    return classes.confusion(held.per_class, run.classes)


def _no_scores(run, split):
    command = f"python -m train.evaluate {shlex.quote(str(run.folder))} --split {split} --scores"
    return markup.missing(
        f"What was said of each {split} clip is not in this folder. This writes it, for a page made anew:", command
    )


def _clips(run, held, classifier, options, room):
    if held is None:
        return _no_scores(run, options.split)
    shown = min(options.clips, len(held.names))
    if not shown:
        return markup.note("No clips were asked for: --clips 0.")
    fbank = classifier.config.front_end.fbank if classifier else None
    rate, frame = (fbank.sample_rate, fbank.frame) if fbank else (16_000, audio.WINDOW)
    show = Show(run, held, Recordings(run, held, options.data_root, rate, frame), classifier)
    room = (room - 10_000) // shown  # what stands above the cards
    made = [cards.markup(show.card(rank, room)) for rank in range(1, shown + 1)]
    notes = [f"{shown} of {len(held.names):,} {options.split} clips, those with the highest loss."]
    if classifier is None:
        notes.append("There is no checkpoint in this folder: no spectrograms, masks and attention.")
    else:
        notes.append("Pictures are log-mel, low bins at the bottom; padding is left out.")
        if show.augment.settings.augment != "none":
            notes.append("Masks are drawn with the run's settings and seed, as training would.")
        looks = isinstance(classifier.model, AST)
        notes.append(
            "Under them is attention rollout over time, the dashed line its mean over the model's input."
            if looks
            else "AuM has no attention: there is no rollout."
        )
    gone = [markup.missing(f"{_reason(run, reason)} ({n} of {shown} clips).") for reason, n in show.missing.items()]
    return "\n".join(
        [markup.note(" ".join(notes)), *gone, cards.switches(), cards.tools(), '<div class="cards">', *made, "</div>"]
    )


def _reason(run, reason):
    if reason != NO_FILE:
        return reason.rstrip(".")
    root = run.settings.get("data_root")
    return f"{reason}{f', {root}' if root else ''}: say where it is by --data-root"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    from kernels import dispatch

    def report(run_dir: command.positional(Path, "RUN_DIR"), options: command.flat(Options)) -> tuple[Path, Options]:
        """Write one HTML page of a run, for any browser, without a network.

        Args:
            run_dir: The out folder of a run.
        """
        return run_dir, options

    try:
        words = sys.argv[1:] if arguments is None else arguments
        folder, options = command.parse(report, words, "python -m fftp.report", Options, ("RUN_DIR",))
        if options.clips < 0:
            raise UserError(f"--clips has to be 0 or more, not {options.clips}.")
        dispatch.check_overrides()
        dispatch.use_fused(True)
        target = options.out or folder / ("report.html" if options.split == "test" else f"report_{options.split}.html")
        content = page(run_folder.read(folder), options).encode()
        try:
            checkpoint.replace(target, content)
        except OSError as error:
            raise UserError(
                f"The page {target} cannot be written ({error.strerror}): give another place by --out."
            ) from None
    except (UserError, dispatch.BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{target} ({len(content) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
