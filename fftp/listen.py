"""python -m fftp.listen CHECKPOINT [FILE|-]: what a model says of sound while it comes, from a file, a pipe or a microphone."""

import json
import os
import queue
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np

from fftp import allocator, audio, command
from fftp.errors import UserError
from fftp.predict import as_objects, as_text, device_of, load
from fftp.streaming import Answer, Stream, stream

READ = 1 << 16  # bytes asked of a pipe at a time: what has come is taken at once
HELD = 5  # s of a microphone's sound that wait for the model at the most; what comes then is lost
WATCHED = 3  # s of sound over which the model's time is compared with it
BAR = 30  # characters of a probability of 1
SAMPLES = {"int16": np.dtype("<i2"), "float32": np.dtype("<f4")}


class Piece(NamedTuple):
    """The next samples, how many were lost before them, and what else there is to say."""

    samples: np.ndarray
    lost: int = 0
    note: str = ""


@dataclass(frozen=True)
class Source:
    """Where sound comes from: what it is called, its rate in Hz, and its pieces."""

    name: str
    rate: int
    pieces: Iterator[Piece]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Listen with a trained model."""

    hop: float = 0.1
    """Seconds from answer to answer, a whole number of the front end's 10 ms frames."""
    top: int = 3
    """Classes to show."""
    json: bool = False
    """One JSON object a line for each answer."""
    rate: int | None = None
    """Hz of standard input (default: the model's), or that a microphone is asked for (default: its own)."""
    raw: Literal["int16", "float32"] | None = None
    """Samples of standard input, little endian and mono; default int16."""
    fast: bool = False
    """A file as fast as the model can, not at the speed of its sound."""
    carry: bool = True
    """Carry the model's state on, where it can be; --no-carry runs every model anew on a sliding window."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto is the training's, and where that left it open bfloat16 if the processor multiplies it."""


def from_file(path: str, hop: float, fast: bool) -> Source:
    """A file of any format, in pieces of a hop, each when its sound would have come. Raises UserError."""
    samples, rate = audio.read(path)
    waveform = audio.to_mono(samples, rate, rate)
    return Source(path, rate, _paced(waveform, rate, max(1, round(hop * rate)), fast))


def _paced(waveform, rate, size, fast):
    began = time.monotonic()
    for start in range(0, len(waveform), size):
        piece = waveform[start : start + size]
        due = began + (start + len(piece)) / rate
        if not fast and due > time.monotonic():
            time.sleep(due - time.monotonic())
        yield Piece(piece)


def from_pipe(rate: int, kind: str) -> Source:
    """Standard input, raw samples. Raises UserError for a terminal."""
    if sys.stdin.isatty():
        raise UserError("Standard input is the keyboard: pipe raw samples into it, or name a file.")
    return Source("standard input", rate, _piped(SAMPLES[kind]))


def _piped(kind):
    left, first = b"", True
    while came := sys.stdin.buffer.read1(READ):
        came = left + came
        if first and came[:4] in (b"RIFF", b"fLaC", b"OggS"):
            raise UserError(
                "Standard input is a sound file, and raw samples are wanted: name the file, or pipe "
                "`ffmpeg -i FILE -f s16le -ac 1 -`."
            )
        whole = len(came) - len(came) % kind.itemsize
        left, first = came[whole:], first and len(came) < 4
        if whole:
            yield Piece(np.frombuffer(came[:whole], kind).astype(kind.newbyteorder("=")))
    if left:
        note = f"Standard input ended within a sample of {kind.itemsize} bytes: that one is left out."
        yield Piece(np.zeros(0, np.float32), note=note)


def from_microphone(rate: int | None) -> Source:
    """The system's default input. Raises UserError where there is none, or no package for it."""
    sounddevice = _sounddevice()
    try:
        rate = rate or int(sounddevice.query_devices(None, "input")["default_samplerate"])
        sounddevice.check_input_settings(channels=1, dtype="float32", samplerate=rate)
    except (sounddevice.PortAudioError, ValueError) as error:
        raise UserError(f"The microphone cannot be opened ({error}): plug one in, or name a file.") from None
    return Source("the microphone", rate, _heard(sounddevice, rate))


def _sounddevice() -> ModuleType:
    try:
        import sounddevice
    except (ModuleNotFoundError, OSError):  # OSError: the package is there, and PortAudio's library is not
        raise UserError(
            "A microphone needs the package sounddevice with PortAudio: install it with `pip install sounddevice`, "
            "or name a file, or - for standard input."
        ) from None
    return sounddevice


def _heard(sounddevice, rate):
    waiting, lost, ended = queue.Queue(), 0, None  # ended: when the last samples did, on the device's clock

    def callback(samples, frames, moment, status):
        nonlocal lost, ended
        if status.input_overflow and ended is not None:
            lost += max(1, round((moment.inputBufferAdcTime - ended) * rate))
        ended = moment.inputBufferAdcTime + frames / rate
        if waiting.qsize() * frames > HELD * rate:
            lost += frames
            return
        waiting.put(Piece(samples[:, 0].copy(), lost))
        lost = 0

    try:
        with sounddevice.InputStream(samplerate=rate, channels=1, dtype="float32", callback=callback) as microphone:
            while microphone.active or not waiting.empty():
                try:
                    yield waiting.get(timeout=1)
                except queue.Empty:
                    continue
    except sounddevice.PortAudioError as error:
        raise UserError(f"The microphone stopped ({error}): plug it in again.") from None


class Lines:
    """Answers as lines on standard output, and what there is to say on standard error."""

    def __init__(self, top: int, as_json: bool):
        self.top, self.as_json = top, as_json

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        return None

    def show(self, answer: Answer) -> None:
        top = answer.top(self.top)
        if self.as_json:
            times = {"start": round(answer.start, 3), "time": round(answer.time, 3)}
            print(json.dumps(times | {"top": as_objects(top)}), flush=True)
        else:
            print(f"{answer.time:9.2f} s   {as_text(top)}", flush=True)

    def say(self, sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)


class Table:
    """The newest answer as a table that stays in its place, by rich."""

    def __init__(self, top: int, console=None):
        from rich.live import Live

        self.top = top
        self.live = Live(console=console, auto_refresh=False)

    def __enter__(self):
        self.live.__enter__()
        return self

    def __exit__(self, *raised):
        return self.live.__exit__(*raised)

    def show(self, answer: Answer) -> None:
        from rich.table import Table as Rows
        from rich.text import Text

        rows = Rows(title=f"{answer.time:.2f} s", title_justify="left", show_header=False, box=None)
        for label, probability in answer.top(self.top):
            rows.add_row(Text(label), f"{100 * probability:5.1f} %", ("█" * round(BAR * probability)).ljust(BAR))
        self.live.update(rows, refresh=True)

    def say(self, sentence: str) -> None:
        self.live.console.print(sentence, style="yellow", markup=False, highlight=False)


def screen_of(options: Options) -> Lines | Table:
    """A table where standard output is a terminal and rich is there, else lines."""
    if not options.json and sys.stdout.isatty():
        try:
            return Table(options.top)
        except ModuleNotFoundError:
            pass
    return Lines(options.top, options.json)


def about(heard: Stream, source: Source) -> str:
    """The first line: what listens to what, and how."""
    every = f"an answer every {1000 * heard.hop:g} ms"
    rate = f" ({source.rate} Hz, resampled)" if source.rate != heard.model_rate else ""
    if heard.carried:
        return f"{source.name}{rate}: {every}, from a state that is carried on."
    why = f"this model carries no state on, since {heard.why_window}"
    return f"{source.name}{rate}: {every}, from a sliding window of {heard.window:g} s: {why}."


class Watch:
    """Whether the model keeps up: says so once when it takes longer than the sound does."""

    def __init__(self):
        self.sound, self.spent, self.said = 0.0, 0.0, False

    def slow(self, sound: float, spent: float) -> bool:
        """Whether that has to be said now, after so many more seconds."""
        self.sound, self.spent = self.sound + sound, self.spent + spent
        if self.sound < WATCHED:
            return False
        behind = self.spent > self.sound and not self.said
        self.said, self.sound, self.spent = self.said or behind, 0.0, 0.0
        return behind


def listen(heard: Stream, source: Source, screen: Lines | Table) -> None:
    """Show the answers until the sound ends. Raises UserError when it was too short for one."""
    watch, answered, samples = Watch(), False, 0
    screen.say(about(heard, source))

    def show(answers):
        nonlocal answered
        for answer in answers:
            screen.show(answer)
        answered = answered or bool(answers)

    for piece, lost, note in source.pieces:
        if lost:
            show(heard.gap(lost))
            note = f"{lost / source.rate:.2f} s of sound were lost at {samples / source.rate:.2f} s: heard anew from there."
        if note:
            screen.say(note)
        began = time.perf_counter()
        answers = heard.push(piece)
        slow = watch.slow(len(piece) / source.rate, time.perf_counter() - began)
        samples += lost + len(piece)
        show(answers)
        if slow:
            screen.say("The model takes longer than the sound: give a longer --hop, or take a smaller model.")
    show(heard.finish())
    if not answered:
        raise UserError(
            f"{source.name} ended after {1000 * samples / source.rate:.0f} ms, and the first answer "
            f"takes {1000 * heard.shortest:.0f} ms of sound."
        )


def source_of(file: str, options: Options, model_rate: int) -> Source:
    """What the command line names. Raises UserError for it, and for flags that it has no use for."""
    if file != "-" and options.raw:
        raise UserError("--raw is for standard input: name - for it, or leave --raw out.")
    if file in ("", "-") and options.fast:
        raise UserError("--fast is for files: what is live comes at its own speed.")
    if file not in ("", "-") and options.rate:
        raise UserError("--rate is for standard input and microphones: a file says its own rate, leave --rate out.")
    if file == "-":
        return from_pipe(options.rate or model_rate, options.raw or "int16")
    if not file:
        return from_microphone(options.rate)
    if not os.path.isfile(file):
        raise UserError(f"There is no file {file}: check the path.")
    return from_file(file, options.hop, options.fast)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    from kernels import dispatch

    def live(
        checkpoint: command.positional(str, "CHECKPOINT"),
        options: command.flat(Options),
        file: command.positional(str, "FILE") = "",
    ) -> tuple[str, Options, str]:
        """Show what a trained model says of sound while it comes.

        Args:
            checkpoint: A checkpoint folder, or the out folder of a run.
            file: A sound file, heard at the speed of its sound; - for standard input; nothing for the microphone.
        """
        return checkpoint, options, file

    try:
        words = sys.argv[1:] if arguments is None else arguments
        takes = ("CHECKPOINT", "[FILE | -]")
        path, options, file = command.parse(live, words, "python -m fftp.listen", Options, takes)
        dispatch.check_overrides()
        dispatch.use_fused(True)
        allocator.keep_memory()
        if options.top < 1:
            raise UserError(f"--top has to be at least 1, not {options.top}.")
        classifier = load(path, device_of(options.device), options.precision)
        source = source_of(file, options, classifier.config.front_end.fbank.sample_rate)
        heard = stream(classifier, options.hop, source.rate, options.carry)
        with ExitStack() as stack:
            listen(heard, source, stack.enter_context(screen_of(options)))
    except (UserError, dispatch.BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return command.closed_pipe()
    return 0


if __name__ == "__main__":
    sys.exit(main())
