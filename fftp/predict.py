"""python -m fftp.predict CHECKPOINT FILE-OR-FOLDER...: classify recordings of any format, rate and length."""

import csv
import json
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fftp import allocator, audio, checkpoint, command
from fftp.ahead import one_ahead
from fftp.errors import UserError
from fftp.frontend import FrontEnd
from fftp.inference import Prepared, precision_of

BATCH = 32  # windows that go through the model at a time


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of one recording.

    probabilities `[C]`: the mean over the windows. windows: (start, end) of each in seconds, with window_probabilities
    `[windows, C]`. embedding `[D]`: the encoder's features, mean over the windows. duration: seconds.
    """

    labels: tuple[str, ...]
    probabilities: np.ndarray
    windows: list[tuple[float, float]]
    window_probabilities: np.ndarray
    embedding: np.ndarray
    duration: float

    def top(self, k: int = 3) -> list[tuple[str, float]]:
        """The k likeliest labels with their probabilities, likeliest first."""
        return likeliest(self.labels, self.probabilities, k)


def likeliest(labels: tuple[str, ...], probabilities: np.ndarray, k: int) -> list[tuple[str, float]]:
    """The k likeliest of `[C]` probabilities with their labels, likeliest first."""
    order = np.argsort(-probabilities, kind="stable")[:k]
    return [(labels[i], float(probabilities[i])) for i in order]


class Classifier:
    """A trained model with its front end and labels: `fftp.load(path).predict(waveform, sample_rate)`.

    precision: "float32", "bfloat16" (of products; see `fftp.inference.Prepared`), or "auto": as the model was trained, and
    where that was left open bfloat16 if the processor multiplies it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: checkpoint.CheckpointConfig,
        device: str = "cpu",
        precision: str = "auto",
    ):
        self.model = model.to(device).eval()
        self.config, self.device = config, torch.device(device)
        trained = config.settings.get("precision", "auto")
        self.precision = precision_of(trained if precision == "auto" else precision, self.device)
        self.prepared = Prepared(self.model, self.precision)
        self.front_end = FrontEnd(config.front_end)
        self.labels, self.multi_label = config.labels, config.multi_label

    def predict(self, waveform, sample_rate: int) -> Prediction:
        """Classify one recording.

        waveform: array or tensor, `[samples]` or `[channels, samples]`, floats in -1..1 or integers (scaled by their range);
        channels are averaged. A recording longer than the model's input is cut into windows whose probabilities are averaged;
        a shorter one is padded as in training. Raises UserError for samples that are not finite or too few.
        """
        return self.predict_many([self.prepare(waveform, sample_rate)])[0]

    def prepare(self, waveform, sample_rate: int, name: str = "the waveform") -> np.ndarray:
        """Mono float32 `[samples]` at the model's rate. Raises UserError."""
        samples = np.asarray(waveform)
        if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[0] > samples.shape[1]):
            raise UserError(f"{name} has to be (samples,) or (channels, samples), not {samples.shape}: transpose it.")
        if np.issubdtype(samples.dtype, np.integer):
            limits = np.iinfo(samples.dtype)
            rest = 1.0 if limits.min == 0 else 0.0  # unsigned samples rest at half their range
            samples = samples / 2.0 ** (limits.bits - 1) - rest
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
            samples = np.atleast_2d(samples).T.astype(np.float32)  # (samples, channels)
        if not np.isfinite(samples).all():
            raise UserError(f"{name} holds NaN or infinite samples: clean it first.")
        rate = self.config.front_end.fbank.sample_rate
        mono = audio.to_mono(samples, sample_rate, rate)
        shortest = self.config.front_end.fbank.frame
        if len(mono) < shortest:
            milliseconds = 1000 * len(mono) / rate
            raise UserError(
                f"{name} is {milliseconds:.0f} ms long, shorter than one window of {1000 * shortest / rate:.0f} ms."
            )
        if not np.isfinite(mono).all():
            raise UserError(f"{name} holds samples too large for 32 bits: floats are in -1..1.")
        return mono

    def windows(self, n: int) -> list[tuple[int, int]]:
        """(start, end) in samples of the windows of a recording of n samples, as `FrontEndSettings.windows`."""
        return self.config.front_end.windows(n)

    def predict_many(self, recordings: list[np.ndarray]) -> list[Prediction]:
        """Predictions for recordings that `prepare` made; their windows go through the model together, BATCH at a time."""
        return list(self._predictions(self._batches(recordings)))

    def predict_each(self, recordings: Iterator[np.ndarray | UserError]) -> Iterator[Prediction | UserError]:
        """The same for as many as there are, in their order; what cannot be read is handed through in its place.

        A thread takes the recordings, one batch of windows ahead of the model, so that decoding and computing overlap. No more
        than two batches and the recording being cut are in memory.
        """
        with closing(one_ahead(self._batches(recordings))) as batches:
            yield from self._predictions(batches)

    def _batches(self, recordings):
        """([what is wrong, or (samples, windows) of a recording, as they begin], [at most BATCH pieces of waveform])."""
        begun, pieces = [], []
        for recording in recordings:
            if isinstance(recording, UserError):
                begun.append(recording)
                continue
            spans = self.windows(len(recording))
            begun.append((len(recording), spans))
            for start, end in spans:
                pieces.append(recording[start:end])
                if len(pieces) == BATCH:
                    yield begun, pieces
                    begun, pieces = [], []
        yield begun, pieces

    def _predictions(self, batches):
        waiting, rows = deque(), deque()  # recordings not yet answered; (probabilities, features) of windows
        for begun, pieces in batches:
            waiting += begun
            if pieces:
                rows += zip(*self._classified(pieces), strict=True)
            while waiting and (isinstance(waiting[0], UserError) or len(waiting[0][1]) <= len(rows)):
                first = waiting.popleft()
                if isinstance(first, UserError):
                    yield first
                    continue
                own = [rows.popleft() for _ in first[1]]
                yield self._prediction(*first, *map(np.stack, zip(*own, strict=True)))

    @torch.inference_mode()
    def _classified(self, pieces):
        """(probabilities `[pieces, C]`, features `[pieces, D]`) on the host."""
        embedding = self.prepared.features(self._input(pieces))
        probabilities = self.config.probabilities(self.prepared.classify(embedding))
        return probabilities.cpu().numpy(), embedding.float().cpu().numpy()

    def _prediction(self, n, spans, probabilities, features):
        rate = self.config.front_end.fbank.sample_rate
        times = [(start / rate, end / rate) for start, end in spans]
        return Prediction(self.labels, probabilities.mean(0), times, probabilities, features.mean(0), n / rate)

    def log_mel(self, waveform: np.ndarray) -> torch.Tensor:
        """The model's input `[1, T, F]` for the first window of a recording that `prepare` made."""
        start, end = self.windows(len(waveform))[0]
        return self._input([waveform[start:end]])

    def _input(self, pieces):
        longest = max(self.config.front_end.clip_samples, *(len(piece) for piece in pieces))
        waveform = torch.zeros(len(pieces), longest)
        for row, piece in zip(waveform, pieces, strict=True):
            row[: len(piece)] = torch.from_numpy(piece)
        length = torch.tensor([len(piece) for piece in pieces])
        return self.front_end(waveform.to(self.device), length.to(self.device))


def load(
    path: Path | str, device: str = "cpu", precision: Literal["auto", "float32", "bfloat16"] = "auto"
) -> Classifier:
    """The classifier of a checkpoint folder, or of a run's out folder. Raises UserError."""
    model, config = checkpoint.load(path)
    return Classifier(model, config, device, precision)


def device_of(wanted: str) -> str:
    """What --device auto, cpu or cuda stands for here. Raises UserError."""
    gpu = torch.cuda.is_available()
    if wanted == "cuda" and not gpu:
        raise UserError("--device cuda: this machine has no GPU that torch can use; take --device cpu, or auto.")
    return "cuda" if gpu and wanted != "cpu" else "cpu"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Classify recordings with a trained model."""

    top: int = 3
    """Classes to show for each recording."""
    json: bool = False
    """One JSON object a line, with the windows and their times."""
    csv: bool = False
    """CSV with a column for each class."""
    embeddings: str = ""
    """Write the encoder's features to this .npz file (arrays: files, embeddings)."""
    skip_bad_files: bool = False
    """Go on, and end with code 0, when some files cannot be read."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto is the training's, and where that left it open bfloat16 if the processor multiplies it."""


def recordings_of(paths: list[str]) -> list[Path]:
    """The files named and those in the folders named. Raises UserError for a path that is absent or an empty folder."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            below = audio.list_audio(path)
            if not below:
                raise UserError(
                    f"The folder {path} holds no sound files: give another folder, or the files themselves."
                )
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"There is no file or folder {path}: check the path.")
    return found


def predictions(classifier: Classifier, files: list[Path]) -> Iterator[tuple[Path, Prediction | UserError]]:
    """Each file with its prediction, or with what is wrong with it; windows of several files go through together."""
    with closing(classifier.predict_each(map(partial(_decoded, classifier), files))) as outcomes:
        yield from zip(files, outcomes, strict=True)


def _decoded(classifier, path):
    fbank = classifier.config.front_end.fbank
    try:
        return audio.load(path, fbank.sample_rate, fbank.frame)
    except UserError as error:
        return error


def as_objects(pairs: list[tuple[str, float]]) -> list[dict[str, str | float]]:
    """Labels with their probabilities as --json has them."""
    return [{"label": label, "probability": round(p, 6)} for label, p in pairs]


def as_text(pairs: list[tuple[str, float]]) -> str:
    """Labels with their probabilities as a line shows them."""
    return "   ".join(f"{label} {100 * p:5.1f} %" for label, p in pairs)


def _as_json(path, prediction, k):
    windows = [
        {"start": round(a, 3), "end": round(b, 3), "top": as_objects(likeliest(prediction.labels, row, k))}
        for (a, b), row in zip(prediction.windows, prediction.window_probabilities, strict=True)
    ]
    top = as_objects(prediction.top(k))
    return json.dumps({"file": str(path), "duration": round(prediction.duration, 3), "top": top, "windows": windows})


def show(classifier: Classifier, files: list[Path], options: Options) -> list[UserError]:
    """Print the predictions as asked; returns what is wrong with the files that could not be read."""
    bad, kept = [], []
    writer = csv.writer(sys.stdout)
    width = max(len(str(path)) for path in files)
    if options.csv:
        writer.writerow(["file", "duration", *classifier.labels])
    for path, outcome in predictions(classifier, files):
        if isinstance(outcome, UserError):
            bad.append(outcome)
            continue
        if options.embeddings:
            kept.append((str(path), outcome.embedding))
        if options.json:
            print(_as_json(path, outcome, options.top))
        elif options.csv:
            writer.writerow([path, f"{outcome.duration:.3f}", *(f"{p:.6f}" for p in outcome.probabilities)])
        else:
            print(f"{path!s:<{width}}  {outcome.duration:7.2f} s   {as_text(outcome.top(options.top))}")
    if options.embeddings and kept:
        target = Path(options.embeddings)
        try:
            np.savez(target, files=[name for name, _ in kept], embeddings=np.stack([e for _, e in kept]))
        except OSError as error:
            raise UserError(f"--embeddings {target} cannot be written ({error.strerror}): give another file.") from None
    return bad


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    from kernels import dispatch

    def classify(
        checkpoint: command.positional(str, "CHECKPOINT"),
        files: command.positional(list[str], "FILE-OR-FOLDER ..."),
        options: command.flat(Options),
    ) -> tuple[str, list[str], Options]:
        """Classify recordings of any format, rate and length with a trained model.

        Args:
            checkpoint: A checkpoint folder, or the out folder of a run.
            files: Sound files, and folders of them.
        """
        return checkpoint, files, options

    try:
        words = sys.argv[1:] if arguments is None else arguments
        takes = ("CHECKPOINT", "FILE-OR-FOLDER", "[MORE...]")
        path, files, options = command.parse(classify, words, "python -m fftp.predict", Options, takes)
        dispatch.check_overrides()
        dispatch.use_fused(True)
        allocator.keep_memory()
        if options.json and options.csv:
            raise UserError("--json and --csv are two formats: give one of them.")
        if options.top < 1:
            raise UserError(f"--top has to be at least 1, not {options.top}.")
        if options.embeddings and not options.embeddings.endswith(".npz"):
            raise UserError(f"--embeddings {options.embeddings}: the file's name has to end in .npz.")
        bad = show(load(path, device_of(options.device), options.precision), recordings_of(files), options)
    except (UserError, dispatch.BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return command.closed_pipe()
    for error in bad:
        print(f"{'skipped' if options.skip_bad_files else 'error'}: {error}", file=sys.stderr)
    return 2 if bad and not options.skip_bad_files else 0


if __name__ == "__main__":
    sys.exit(main())
