"""python -m fftp.listen: files, pipes and microphones, as lines, JSON or a table; what goes wrong is said in a sentence."""

import io
import json
import re
import signal
import sys
import types

import numpy as np
import pytest
import soundfile
import torch

import fftp
from fftp import checkpoint, listen
from fftp.predict import device_of
from kernels import dispatch
from tests import live, runs

RATE = 16_000
APART = (
    2e-3 if torch.cuda.is_available() else 2e-6
)  # a GPU computes in bfloat16, and pieces of other lengths round otherwise


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint folder of each of two models by name."""
    made = {}
    for name in ("carried", "two ways"):
        folder = made[name] = tmp_path_factory.mktemp("checkpoint")
        classifier = live.classifier(live.MODELS[name])
        checkpoint.save(folder, classifier.model, classifier.config)
    return made


@pytest.fixture
def command(folders, capsys):
    """Runs `python -m fftp.listen` with the model that carries its state on."""
    return lambda *words, model="carried": runs.run(capsys, folders[model], *words, command=listen.main)


@pytest.fixture
def file(tmp_path):
    soundfile.write(tmp_path / "word.wav", live.sound(0.75), RATE)
    return tmp_path / "word.wav"


def given(monkeypatch, content: bytes, terminal=False):
    """Standard input that holds so much and then closes."""
    pipe = types.SimpleNamespace(buffer=io.BytesIO(content), isatty=lambda: terminal)
    monkeypatch.setattr(sys, "stdin", pipe)


def objects(ended):
    return [json.loads(line) for line in ended.out.splitlines()]


def expected(folder, samples, rate=RATE, top=3, **how):
    """What a stream says, by the backends that the command takes: in bfloat16 others differ by more than APART."""
    dispatch.use_fused(True)
    stream = fftp.stream(folder, rate=rate, device=str(device_of("auto")), **how)
    return [
        {
            "start": round(answer.start, 3),
            "time": round(answer.time, 3),
            "top": [{"label": label, "probability": pytest.approx(p, abs=APART)} for label, p in answer.top(top)],
        }
        for answer in stream.push(samples) + stream.finish()
    ]


def test_a_file(command, folders, file):
    ended = command(file, "--fast", "--json", "--top", 2)
    assert ended.code == 0
    assert objects(ended) == expected(folders["carried"], live.sound(0.75), top=2)
    assert ended.err == f"{file}: an answer every 100 ms, from a state that is carried on.\n"
    lines = command(file, "--fast", "--hop", 0.25).out.splitlines()
    assert [line.split()[:2] for line in lines] == [["0.25", "s"], ["0.50", "s"], ["0.75", "s"]]
    (top,) = [a for a in expected(folders["carried"], live.sound(0.75), hop=0.25) if a["time"] == 0.5]
    shown = [f"{entry['label']} {100 * entry['probability'].expected:5.1f} %" for entry in top["top"]]
    assert lines[1].split("   ")[-3:] == shown


def test_a_model_that_cannot_carry_a_state_on(command, folders, file):
    ended = command(file, "--fast", "--json", model="two ways")
    assert objects(ended) == expected(folders["two ways"], live.sound(0.75))
    assert "from a sliding window of 0.995 s: this model carries no state on, since it scans backward too" in ended.err
    assert "it was asked not to" in command(file, "--fast", "--no-carry").err


def test_a_file_comes_at_the_speed_of_its_sound(command, file, monkeypatch):
    """On a clock that only waiting moves."""
    now, slept = [100.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(listen.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(listen.time, "sleep", sleep)
    at_speed = command(file, "--hop", 0.2, "--json")
    assert slept == pytest.approx([0.2, 0.2, 0.2, 0.15])
    fast = command(file, "--hop", 0.2, "--json", "--fast")
    assert (len(slept), fast.out) == (4, at_speed.out)


def test_standard_input(command, folders, monkeypatch):
    samples = live.sound(0.75)
    wanted = expected(folders["carried"], samples)
    for content, flags in (
        (samples.astype("<i2"), []),
        ((samples / 32768).astype("<f4"), ["--raw", "float32"]),
    ):
        given(monkeypatch, content.tobytes())
        ended = command("-", "--json", *flags)
        assert (ended.code, objects(ended)) == (0, wanted)
        assert ended.err == "standard input: an answer every 100 ms, from a state that is carried on.\n"
    slow = live.sound(0.75, 8000)
    given(monkeypatch, slow.tobytes())
    ended = command("-", "--json", "--rate", 8000)
    assert objects(ended) == expected(folders["carried"], slow, 8000)
    assert ended.err.startswith("standard input (8000 Hz, resampled): ")


def test_a_pipe_that_closes_within_a_sample(command, folders, monkeypatch):
    """And whose reads end within samples: the bytes are put together again."""
    samples = live.sound(0.75)
    given(monkeypatch, samples.tobytes() + b"\1")
    monkeypatch.setattr(listen, "READ", 999)
    ended = command("-", "--json")
    assert (ended.code, objects(ended)) == (0, expected(folders["carried"], samples))
    assert ended.err.endswith("Standard input ended within a sample of 2 bytes: that one is left out.\n")


@pytest.mark.parametrize(
    ("words", "content", "said"),
    [
        (["-"], b"", "standard input ended after 0 ms, and the first answer takes 115 ms of sound."),
        (["-"], bytes(2000), "standard input ended after 62 ms, and the first answer takes 115 ms of sound."),
        (["-"], b"RIFF" + bytes(2000), "Standard input is a sound file, and raw samples are wanted: name the file, or"),
        (["-", "--raw", "float32"], b"\xff" * 8000, "The samples pushed hold NaN or infinite ones"),
        (["-", "--fast"], b"", "--fast is for files"),
        (["--fast"], b"", "--fast is for files"),
        (["FILE", "--raw", "int16"], b"", "--raw is for standard input"),
        (["FILE", "--rate", "8000"], b"", "--rate is for standard input and microphones"),
        (["FILE", "--top", "0"], b"", "--top has to be at least 1, not 0."),
        (["FILE", "--hop", "0.015"], b"", "The hop has to be a whole number of frames of 10 ms, not 15 ms."),
        (["-", "--rate", "7"], b"", "The rate of a stream is a whole number from 1000 to 768000 Hz, not 7."),
        (["absent.wav"], b"", "There is no file absent.wav: check the path."),
        (["BAD"], b"", "is not audio that libsndfile"),
        (["FILE", "--hopp", "1"], b"", "python -m fftp.listen has no flag '--hopp': did you mean --hop or --top?"),
    ],
)
def test_refusals(command, file, tmp_path, monkeypatch, words, content, said):
    given(monkeypatch, content)
    (tmp_path / "bad.wav").write_bytes(b"no sound at all")
    named = {"FILE": file, "BAD": tmp_path / "bad.wav"}
    ended = command(*(named.get(word, word) for word in words))
    assert (ended.code, ended.out) == (2, "")
    *before, last = ended.err.splitlines()
    assert last.startswith("error: ")
    assert said in last
    assert len(before) <= 1  # what listens to what, where it had begun


def test_a_keyboard_is_no_sound(command, monkeypatch):
    given(monkeypatch, b"", terminal=True)
    assert "Standard input is the keyboard" in command("-").sentence


class Microphone:
    """sounddevice as it documents itself, over sound that is there: blocks of 800 samples at 8 kHz, one of them lost."""

    class PortAudioError(Exception):
        pass

    def __init__(self, samples=None, lost_before=None, clocked=True):
        self.samples, self.lost_before, self.clocked = samples, lost_before, clocked

    def query_devices(self, device, kind):
        if self.samples is None:
            raise self.PortAudioError("Error querying device -1")
        return {"default_samplerate": 8000.0}

    def check_input_settings(self, **settings):
        if settings["samplerate"] != 8000:
            raise self.PortAudioError("Invalid sample rate")

    def InputStream(self, *, samplerate, channels, dtype, callback):
        assert (samplerate, channels, dtype) == (8000, 1, "float32")
        microphone = self

        class Open:
            active = False

            def __enter__(self):
                for number, at in enumerate(range(0, len(microphone.samples), 800)):
                    block = microphone.samples[at : at + 800, None]
                    overflow = number == microphone.lost_before
                    late = 0.25 if microphone.lost_before is not None and number >= microphone.lost_before else 0.0
                    moment = types.SimpleNamespace(inputBufferAdcTime=7 + at / 8000 + late if microphone.clocked else 0)
                    callback(block, len(block), moment, types.SimpleNamespace(input_overflow=overflow))
                return self

            def __exit__(self, *raised):
                return None

        return Open()


def test_a_microphone(command, folders, monkeypatch):
    samples = (live.sound(0.75, 8000) / 32768).astype(np.float32)
    monkeypatch.setitem(sys.modules, "sounddevice", Microphone(samples))
    ended = command("--json")
    assert (ended.code, objects(ended)) == (0, expected(folders["carried"], samples, 8000))
    assert ended.err == (
        "the microphone (8000 Hz, resampled): an answer every 100 ms, from a state that is carried on.\n"
    )


@pytest.mark.parametrize(("clocked", "seconds"), [(True, 0.25), (False, 1 / 8000)])
def test_sound_that_a_microphone_lost(command, folders, monkeypatch, clocked, seconds):
    """The stream begins anew behind it, and its clock goes on; a device without a clock loses a sample at least."""
    samples = (live.sound(0.8, 8000) / 32768).astype(np.float32)
    monkeypatch.setitem(sys.modules, "sounddevice", Microphone(samples, 4, clocked))
    ended = command("--json")
    stream = fftp.stream(folders["carried"], rate=8000)
    parts = [*stream.push(samples[:3200]), *stream.gap(round(seconds * 8000))]
    parts += [*stream.push(samples[3200:]), *stream.finish()]
    assert [answer["time"] for answer in objects(ended)] == [round(answer.time, 3) for answer in parts]
    assert f"{seconds:.2f} s of sound were lost at 0.40 s: heard anew from there." in ended.err


def test_what_waits_for_a_slow_model_is_bounded(command, monkeypatch):
    """The fake microphone hands over all its sound before the model hears any of it."""
    monkeypatch.setattr(listen, "HELD", 0.3)
    samples = (live.sound(0.8, 8000) / 32768).astype(np.float32)
    monkeypatch.setitem(sys.modules, "sounddevice", Microphone(samples))
    assert [answer["time"] for answer in objects(command("--json"))][-1] == 0.4


@pytest.mark.parametrize(
    ("module", "flags", "said"),
    [
        (None, [], "A microphone needs the package sounddevice with PortAudio"),
        (Microphone(), [], "The microphone cannot be opened (Error querying device -1)"),
        (Microphone(np.zeros(8, np.float32)), ["--rate", "96000"], "cannot be opened (Invalid sample rate)"),
    ],
)
def test_no_microphone(command, monkeypatch, module, flags, said):
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    assert said in command(*flags).sentence


def test_a_model_slower_than_the_sound_is_said_once():
    watch = listen.Watch()
    assert [watch.slow(1.0, 0.9) for _ in range(3)] == [False] * 3
    assert [watch.slow(1.0, 1.1) for _ in range(6)] == [False, False, True, False, False, False]


def test_a_table_stays_in_its_place():
    rich = pytest.importorskip("rich.console", reason="the rich package, which draws the table, is not installed")
    shown = io.StringIO()
    console = rich.Console(file=shown, force_terminal=True, width=80)
    classifier, samples = live.classifier(live.MODELS["carried"]), live.sound(0.5)
    stream = fftp.stream(classifier)
    answers = stream.push(samples)
    with listen.Table(2, console) as table:
        table.say("[not markup]")
        for answer in answers:
            table.show(answer)
    text = shown.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "[not markup]" in plain
    last = plain[plain.rindex("0.50 s") :]
    for label, probability in answers[-1].top(2):
        assert re.search(rf"{label} +{100 * probability:.1f} %", last)
    assert last.count("█") == sum(round(listen.BAR * p) for _, p in answers[-1].top(2))
    assert text.count("\x1b[1A") >= 2 * (len(answers) - 1)  # each is drawn over the one before


def test_a_table_only_where_there_is_a_terminal(monkeypatch):
    pytest.importorskip("rich.live", reason="the rich package, which draws the table, is not installed")
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(isatty=lambda: True))
    assert isinstance(listen.screen_of(listen.Options()), listen.Table)
    assert isinstance(listen.screen_of(listen.Options(json=True)), listen.Lines)
    monkeypatch.setitem(sys.modules, "rich.live", None)
    assert isinstance(listen.screen_of(listen.Options()), listen.Lines)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert isinstance(listen.screen_of(listen.Options()), listen.Lines)


@pytest.fixture
def minute(tmp_path):
    soundfile.write(tmp_path / "long.wav", live.sound(60.0), RATE)
    return tmp_path / "long.wav"


def test_ctrl_c(folders, minute):
    """A minute of sound at its own speed, interrupted after the first answer."""
    process = runs.start(folders["carried"], minute, module="fftp.listen")
    assert " s " in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    ended = runs.end(process)
    assert (ended.code, "Traceback" in ended.err) == (130, False)


@pytest.mark.slow
def test_a_reader_that_goes_away(folders, minute):
    """As fast as can be, into `| head -1`."""
    with runs.start(folders["carried"], minute, "--fast", module="fftp.listen") as process:
        assert " s " in process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
        assert (process.wait(60), "Traceback" in error) == (0, False)
