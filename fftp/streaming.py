"""Sound as it comes: samples in pieces of any size, class probabilities every hop.

`stream = fftp.stream("runs/NAME")`, then `for answer in stream.push(samples): answer.top(3)` for each piece, and
`stream.finish()` for what is left. Samples are cut at multiples of the hop counted from the first one, never where a piece
ends, and each cut goes through the same operations in the same shapes: any pieces give the same bits.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import kernels
from fftp import audio
from fftp.ast_model import ASTConfig
from fftp.aum_model import AuMConfig
from fftp.checkpoint import CheckpointConfig
from fftp.errors import UserError
from fftp.predict import Classifier, likeliest, load

RATES = (1000, 768_000)  # Hz that a stream may have
INT16 = 2.0**-15  # a step of a 16-bit sample


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model says of a stream at one moment: probabilities `[C]`, and the sound they are about, `start` to `time`,
    in seconds from the stream's first sample."""

    labels: tuple[str, ...]
    probabilities: np.ndarray
    start: float
    time: float

    def top(self, k: int = 3) -> list[tuple[str, float]]:
        """The k likeliest labels with their probabilities, likeliest first."""
        return likeliest(self.labels, self.probabilities, k)


class Stream:
    """A classifier that hears samples as they come and answers every hop.

    hop: seconds, a whole number of the front end's frames (10 ms). rate: of the samples, Hz; None is the model's own.
    carry: False for a sliding window also where a state could be carried on: a model that was trained on single clips, without
    --lead, has never heard one word after another, and may not forget the first (LOG.md).
    carried: whether the model carries a state on (`Carried`) or is run anew on a sliding window (`Sliding`); then
    why_window says why, and window how long it is, seconds. shortest: seconds of sound that an answer takes. Raises UserError.

    Frames are those of the whole stream, so the 25 ms windows overlap from piece to piece. A clip's mean, which the front
    end takes off before cutting frames, is nothing that a stream has: since each frame's own mean is taken off as well, it
    makes a difference of float32's rounding only.
    """

    def __init__(self, classifier: Classifier, hop: float = 0.1, rate: int | None = None, carry: bool = True):
        config, fbank = classifier.config, classifier.config.front_end.fbank
        frame_seconds = fbank.hop / fbank.sample_rate
        frames = round(hop / frame_seconds) if math.isfinite(hop) else 0
        if frames < 1 or abs(frames * frame_seconds - hop) > 1e-6:
            raise UserError(
                f"The hop has to be a whole number of frames of {1000 * frame_seconds:g} ms, not {1000 * hop:g} ms."
            )
        rate = fbank.sample_rate if rate is None else rate
        if not float(rate).is_integer() or not RATES[0] <= rate <= RATES[1]:
            raise UserError(f"The rate of a stream is a whole number from {RATES[0]} to {RATES[1]} Hz, not {rate}.")
        self.classifier, self.hop, self.rate = classifier, frames * frame_seconds, int(rate)
        self.model_rate = fbank.sample_rate
        self.why_window = why_window(config) or (None if carry else "it was asked not to")
        self.carried = self.why_window is None
        self.window = None if self.carried else fbank.samples(_window_frames(config.front_end)) / fbank.sample_rate
        self.shortest = fbank.samples(config.model.grid.pt if self.carried else 1) / fbank.sample_rate
        self._fbank, self._hop = fbank, frames * fbank.hop
        self._buffer = np.zeros(
            fbank.frame + self._hop, np.float32
        )  # samples from the first frame that is not made yet
        self._pushed, self._finished = 0, False
        self._begin()

    def _begin(self):
        """Hear anew, from the samples pushed next."""
        self._began = self._pushed  # in samples at the stream's rate
        other_rate = self.rate != self._fbank.sample_rate
        self._resampler = audio.resampler(self.rate, self._fbank.sample_rate) if other_rate else None
        self._heard, self._due, self._filled, self._frames = 0, self._hop, 0, 0  # three of samples at the model's rate
        self._model = (Carried if self.carried else Sliding)(self.classifier)

    def push(self, samples: np.ndarray | torch.Tensor) -> list[Answer]:
        """Hear the next samples `[n]`, int16 or floats in -1..1, at the stream's rate; the answers that have come due, none
        or several.

        Samples of another rate are answered some hundredths of a second later, when the resampler lets them go. Raises
        UserError for other types and shapes and for samples that are not finite; the stream is then as before.
        """
        if self._finished:
            raise UserError("This stream is finished: open another one.")
        piece = _checked(samples)
        self._pushed += len(piece)
        return self._hear(piece if self._resampler is None else self._resampler.resample_chunk(piece))

    def gap(self, lost: int) -> list[Answer]:
        """Say that so many samples, at the stream's rate, never came. The last answer about the sound before, if there is any
        left to give; what comes next is heard anew, as a stream that begins there, and its times are after the gap. Raises
        UserError for a count below 0 and for a stream that is finished."""
        if self._finished or lost < 0:
            raise UserError(f"A gap is of 0 samples or more, in a stream that is not finished, not {lost}.")
        answers = self._ending()
        self._pushed += lost
        self._begin()
        return answers

    def finish(self) -> list[Answer]:
        """The end: answers about the sound since the last one. There are none where no whole frame has come since."""
        answers = [] if self._finished else self._ending()
        self._finished = True
        return answers

    def _ending(self):
        answers = []
        if self._resampler is not None:
            answers = self._hear(self._resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        return answers + (self._answer() if self._fbank.frames(self._filled) else [])

    def _hear(self, piece):
        answers = []
        while len(piece):
            n = min(len(piece), self._due - self._heard)
            self._buffer[self._filled : self._filled + n] = piece[:n]
            self._filled, self._heard, piece = self._filled + n, self._heard + n, piece[n:]
            if self._heard == self._due:
                self._due += self._hop
                answers += self._answer()
        return answers

    def _answer(self):
        """Make the frames that have come whole, and ask the model."""
        new = self._fbank.frames(self._filled)
        if new:
            waveform = torch.from_numpy(self._buffer[: self._filled])[None].to(self.classifier.device)
            self._model.hear(kernels.fbank(waveform, settings=self._fbank))
            used = new * self._fbank.hop
            left = self._buffer[used : self._filled].copy()
            self._buffer[: len(left)], self._filled, self._frames = left, len(left), self._frames + new
        probabilities = self._model.probabilities()
        if probabilities is None:
            return []
        began, rate = self._began / self.rate, self._fbank.sample_rate
        first = self._frames - self._model.frames_behind(self._frames)
        times = began + first * self._fbank.hop / rate, began + self._heard / rate
        return [Answer(self.classifier.labels, probabilities[0].cpu().numpy(), *times)]


def _checked(samples):
    """float32 `[n]`, a copy where it was not that already."""
    piece = samples.detach().cpu().numpy() if isinstance(samples, torch.Tensor) else np.asarray(samples)
    if piece.ndim != 1 or piece.dtype not in (np.int16, np.float32, np.float64):
        raise UserError(
            f"A stream takes int16, float32 or float64 samples of shape (n,), not {piece.dtype} {piece.shape}: "
            "average channels and convert first."
        )
    if piece.dtype == np.int16:
        return piece.astype(np.float32) * np.float32(INT16)
    if not np.isfinite(piece).all():
        raise UserError("The samples pushed hold NaN or infinite ones: clean them first.")
    return np.ascontiguousarray(piece, np.float32)


def why_window(config: CheckpointConfig) -> str | None:
    """Why a model needs its whole window at once, or None for one that carries a state on."""
    return why_not_carried(config.model, config.front_end.fit)


def why_not_carried(model: ASTConfig | AuMConfig, fit: str) -> str | None:
    """`why_window` of a model's configuration, with its front end's fit."""
    if not isinstance(model, AuMConfig):
        return "attention compares all of its window"
    if model.directions != "none":
        return "it scans backward too, from the window's end"
    if model.grid.n_f != 1:
        return "its square patches do not come in the order of time"
    if model.place != "end":
        return f"its class token stands in the {model.place} of the window and hears nothing behind it"
    if model.positions != "none":
        return "its positions end with the window"
    if fit != "pad":
        return "it was trained on stretched clips"
    return None


def _window_frames(front_end):
    """Frames of sound that a model is run on: those of a training clip, as far as its input goes."""
    frames = front_end.fbank.frames(front_end.clip_samples)
    return frames if front_end.fit == "resize" else min(frames, front_end.T)


class Sliding:
    """A model run anew at every hop, over the last frames: as many as a training clip has, and as many as have come where
    these are fewer, padded or stretched as a clip of that length is."""

    def __init__(self, classifier: Classifier):
        self.classifier, self.longest = classifier, _window_frames(classifier.config.front_end)
        self.window = None  # log-mel [1, n, F], not normalised

    def hear(self, log_mel: torch.Tensor) -> None:
        """The next frames `[1, n, F]`, not normalised."""
        window = log_mel if self.window is None else torch.cat([self.window, log_mel], 1)
        self.window = window[:, -self.longest :]

    def frames_behind(self, heard: int) -> int:
        """Frames that the answer is about, of those heard."""
        return self.window.shape[1]

    def probabilities(self) -> torch.Tensor | None:
        """`[1, C]`, or None before the first frame."""
        if self.window is None:
            return None
        front_end = self.classifier.front_end
        x = front_end.normalise(front_end.fitted(self.window))
        return self.classifier.config.probabilities(self.classifier.prepared(x))


class Carried:
    """A forward AuM that takes each patch once and keeps its state: constant work and memory however long the stream.

    Its answers are those of a whole pass over all frames so far, to rounding; the class token is read from a copy of
    the state.
    """

    def __init__(self, classifier: Classifier):
        self.classifier, self.prepared = classifier, classifier.prepared
        self.grid = classifier.config.model.grid
        with self.prepared.running(classifier.device):
            self.state = self.prepared.model.start(1)
        self.waiting, self.first = None, 0  # normalised frames that patches still need, and the first one's number
        self.said = None  # probabilities after the patches so far

    def hear(self, log_mel: torch.Tensor) -> None:
        """The next frames `[1, n, F]`, not normalised."""
        frames = self.classifier.front_end.normalise(log_mel)
        waiting = frames if self.waiting is None else torch.cat([self.waiting, frames], 1)
        pt, st = self.grid.pt, self.grid.st
        start = self.state.patches * st - self.first  # of the next patch; behind what waits where st > pt
        patches = max(0, (waiting.shape[1] - start - pt) // st + 1)
        if patches:
            with self.prepared.running(self.classifier.device):
                taken = waiting[:, start : start + (patches - 1) * st + pt]
                features, self.state = self.prepared.model.hear(taken, self.state)
            self.said = self.classifier.config.probabilities(self.prepared.classify(features))
        used = min(start + patches * st, waiting.shape[1])
        self.waiting, self.first = waiting[:, used:], self.first + used

    def frames_behind(self, heard: int) -> int:
        """Frames that the answer is about, of those heard: all."""
        return heard

    def probabilities(self) -> torch.Tensor | None:
        """`[1, C]`, or None before the first patch."""
        return self.said


def stream(
    checkpoint: Path | str | Classifier,
    hop: float = 0.1,
    rate: int | None = None,
    carry: bool = True,
    device: str = "cpu",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
) -> Stream:
    """A `Stream` of a checkpoint's model (a folder, a run's out folder, or what `fftp.load` gave). Raises UserError.

    hop: seconds from answer to answer. rate: Hz of the samples to come; None is the model's own, 16 kHz. carry: as `Stream`
    has it. device, precision: as `fftp.load` has them.
    """
    classifier = checkpoint if isinstance(checkpoint, Classifier) else load(checkpoint, device, precision)
    return Stream(classifier, hop, rate, carry)
