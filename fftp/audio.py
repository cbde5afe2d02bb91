"""Reading sound files: any format that libsndfile, torchcodec or ffmpeg knows, to float32 waveforms.

soundfile and soxr are imported where they are used, so that everything which needs no files runs without them.
"""

import io
import os
import shutil
import struct
import subprocess
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from fftp.errors import UserError

if TYPE_CHECKING:
    import soxr

SUFFIXES = frozenset(
    (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aiff", ".aif", ".au", ".webm", ".mp4", ".mkv")
)
WINDOW = 400  # samples in one 25 ms analysis window at 16 kHz
SLACK = 0.5  # s by which a file may miss its segment: cutting tools end at a packet or a video frame

# Writers to a pipe cannot go back to fill the size in: they leave 0, all ones, or a number near 2 GiB or 4 GiB.
_UNKNOWN_SIZE_FROM = 0x7FFFF000
# WAV formats (PCM, float, A-law, u-law, extensible) whose block is one sample of every channel.
_BLOCK_IS_FRAME = frozenset((1, 3, 6, 7, 0xFFFE))
_OGG_PAGE = 27 + 255 + 255 * 255  # bytes in the longest
# libsndfile's codes for "not a container that I know" and "a container whose encoding I do not know".
_NOT_RECOGNISED, _NOT_SUPPORTED = 1, 4


class BadAudio(UserError):  # noqa: N818 - it speaks of the file, as UserError does of the user
    """A file that gives no usable waveform: `name` is the file, `reason` completes the sentence "<name> ..."."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name} {reason}: mend, replace or remove this file.")
        self.name = name
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.name, self.reason)  # the default hands the sentence to __init__, which wants two


def list_audio(path: Path | str) -> list[Path]:
    """The audio files below a folder (by suffix, hidden ones apart), sorted by path. UserError if it is no folder."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give the folder that holds the audio files.")
    found = []
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in files if is_audio(name)]
    return sorted(found)


def is_audio(name: str) -> bool:
    """Whether a file's name has an audio suffix and is not hidden (macOS leaves `._x.wav` beside `x.wav`)."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def load(
    source: Path | bytes,
    target_rate: int,
    min_samples: int = WINDOW,
    name: str | None = None,
    segment: tuple[float, float] | None = None,
) -> np.ndarray:
    """One clip as float32 (W,) at `target_rate` Hz, mono.

    `min_samples` is the shortest length accepted, in samples at `target_rate` (one analysis window); `segment` as for `read`.
    BadAudio when the source is empty, no audio, truncated, not finite or too short, or ends before its segment.
    """
    name = _name_of(source, name)
    samples, rate = read(source, name, segment)
    if len(samples) == 0:
        raise BadAudio(name, "holds no samples")
    if not np.isfinite(samples).all():
        raise BadAudio(name, "holds NaN or infinite samples")
    waveform = to_mono(samples, rate, target_rate)
    if not np.isfinite(waveform).all():  # samples near float32's limit overflow on the way
        raise BadAudio(name, "holds samples too large for 32 bits")
    if len(waveform) < min_samples:
        length, window = 1e3 * len(samples) / rate, 1e3 * min_samples / target_rate
        raise BadAudio(name, f"is {length:.3g} ms long, shorter than one {window:g} ms analysis window")
    return waveform


def read(
    source: Path | bytes, name: str | None = None, segment: tuple[float, float] | None = None
) -> tuple[np.ndarray, int]:
    """A sound file, or the bytes of one, as float32 (n, channels) and its rate in Hz.

    Integers are scaled to -1..1; float files keep what they hold, above full scale too. `name` is what errors call it.
    Of a file longer than its `segment` (start, end in seconds) only that is read: other files are that segment already.
    BadAudio when it is empty, truncated or nothing that a decoder here can read; other samples are not judged.
    """
    soundfile = _package("soundfile")
    name = _name_of(source, name)
    try:
        size = len(source) if isinstance(source, bytes) else os.stat(source).st_size
        if size == 0:
            raise BadAudio(name, "is empty (0 bytes)")
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            _refuse_truncated(file, size, name)
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as sound:
            declared, rate, is_mp3 = sound.frames, sound.samplerate, sound.format in ("MPEG", "MP3")
            # An MP3's header only estimates its length: it is cut when it has been read.
            part = None if is_mp3 else _part(declared, rate, segment, name)
            if part is not None:
                sound.seek(part.start)
                declared = part.stop - part.start
            samples = sound.read(-1 if part is None else declared, dtype="float32", always_2d=True)  # (n, channels)
    except OSError as error:
        raise BadAudio(name, f"cannot be opened ({error.strerror or error})") from error
    except soundfile.LibsndfileError as error:
        if error.code in (_NOT_RECOGNISED, _NOT_SUPPORTED):
            samples, rate = _read_elsewhere(source, name)
            return _cut(samples, rate, segment, name), rate
        said = error.error_string.removeprefix("Error : ").strip().rstrip(".")
        raise BadAudio(name, f"is damaged or cut short ({said})") from error
    if is_mp3:
        return _cut(samples, rate, segment, name), rate
    if len(samples) < declared:
        raise _truncated(name, declared, len(samples), "samples")
    return samples, rate


def _part(length: int, rate: int, segment: tuple[float, float] | None, name: str) -> slice | None:
    """Where a segment lies in a file of `length` samples; None where the file is no longer than the segment."""
    if segment is None or length <= (segment[1] - segment[0] + SLACK) * rate:
        return None
    start, end = segment
    if end * rate > length + SLACK * rate:
        raise BadAudio(name, f"is {length / rate:.4g} s long, and its segment is {start:g} to {end:g} s")
    return slice(round(start * rate), min(round(end * rate), length))


def _cut(samples: np.ndarray, rate: int, segment: tuple[float, float] | None, name: str) -> np.ndarray:
    part = _part(len(samples), rate, segment, name)
    return samples if part is None else samples[part]


def duration(source: Path | bytes, name: str | None = None) -> float:
    """Seconds of sound, from the header where libsndfile can read it. BadAudio where nothing can."""
    soundfile = _package("soundfile")
    try:
        return soundfile.info(io.BytesIO(source) if isinstance(source, bytes) else source).duration
    except (soundfile.LibsndfileError, OSError):
        samples, rate = read(source, name)
        return len(samples) / rate


def to_mono(samples: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """(n, channels) at `rate` Hz to float32 (W,) at `target_rate` Hz: the mean of the channels, resampled by soxr."""
    with np.errstate(over="ignore", invalid="ignore"):  # the caller judges what is not finite
        waveform = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)  # (n, channels) -> (n,)
    if rate != target_rate and len(waveform):
        waveform = _package("soxr").resample(waveform, rate, target_rate, quality="HQ")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def resampler(rate: int, target_rate: int) -> "soxr.ResampleStream":
    """soxr's resampler for mono float32 that comes in pieces: `resample_chunk(piece, last)`. Whatever the pieces are, its
    output is that of `to_mono` for all of them, some hundredths of a second later. Raises UserError."""
    return _package("soxr", "Sound of another rate needs").ResampleStream(
        rate, target_rate, 1, dtype="float32", quality="HQ"
    )


def other_decoders() -> tuple[str, ...]:
    """Which decoders this machine has for the containers that libsndfile does not know (M4A, AAC, WebM, MP4)."""
    found = ("torchcodec",) if find_spec("torchcodec") else ()
    return (*found, "ffmpeg") if shutil.which("ffmpeg") else found


def _package(name: str, what_needs: str = "Sound files need") -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{what_needs} the package {name}: install it with `pip install {name}`.") from error


def _name_of(source: Path | bytes, name: str | None) -> str:
    return name or ("the given audio" if isinstance(source, bytes) else str(source))


def _truncated(name: str, declared: int, held: int, unit: str) -> BadAudio:
    return BadAudio(name, f"is truncated: its header declares {declared} {unit}, the file holds {held}")


def _refuse_truncated(file: io.BufferedIOBase, size: int, name: str) -> None:
    """BadAudio when a WAV, AIFF or Ogg file says that it goes on; libsndfile quietly reads what is left of it."""
    head = file.read(12)
    if head[:4] in (b"RIFF", b"RIFX", b"FORM") and head[8:] in (b"WAVE", b"AIFF", b"AIFC"):
        _refuse_truncated_chunks(file, size, name, "<" if head[:4] == b"RIFF" else ">")
    elif head[:4] == b"OggS":
        file.seek(max(0, size - _OGG_PAGE))
        tail = file.read()
        page = tail[tail.rfind(b"OggS") :]
        # 27 bytes, the last of which counts the lengths that follow; then as many bytes as these add up to.
        if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            raise BadAudio(name, "is truncated: it ends within an Ogg page")


def _refuse_truncated_chunks(file: io.BufferedIOBase, size: int, name: str, order: str) -> None:
    block, block_is_frame = 0, False
    while len(chunk := file.read(8)) == 8:
        kind, length = struct.unpack(f"{order}4sI", chunk)
        if kind in (b"data", b"SSND"):
            held = size - file.tell()
            if 0 < length < _UNKNOWN_SIZE_FROM and length > held:
                unit = block if block_is_frame and block else 1
                raise _truncated(name, length // unit, held // unit, "samples" if unit == block else "bytes of samples")
            return
        body = file.read(min(length, 16)) if kind == b"fmt " else b""
        if len(body) == 16:
            tag, block = struct.unpack(f"{order}H10xH2x", body)
            block_is_frame = tag in _BLOCK_IS_FRAME
        file.seek(length - len(body) + length % 2, os.SEEK_CUR)  # chunks start at even bytes


def _read_elsewhere(source: Path | bytes, name: str) -> tuple[np.ndarray, int]:
    """What libsndfile does not know, through torchcodec, else ffmpeg: float32 (n, channels) and the rate in Hz."""
    decoders = other_decoders()
    if not decoders:
        raise BadAudio(
            name, "is not audio that libsndfile can read, and neither torchcodec nor ffmpeg is installed to try further"
        )
    for decoder in decoders:
        try:
            return {"torchcodec": _read_torchcodec, "ffmpeg": _read_ffmpeg}[decoder](source)
        # torchcodec raises RuntimeError or ValueError for what it cannot decode, and where its libraries are missing.
        except (RuntimeError, ValueError, ImportError, OSError, subprocess.CalledProcessError):
            continue
    raise BadAudio(name, f"is not audio that libsndfile or {' or '.join(decoders)} can read")


def _read_torchcodec(source: Path | bytes) -> tuple[np.ndarray, int]:
    from torchcodec.decoders import AudioDecoder

    decoded = AudioDecoder(source).get_all_samples()
    return decoded.data.numpy().T.astype(np.float32), int(decoded.sample_rate)  # (channels, n) -> (n, channels)


def _read_ffmpeg(source: Path | bytes) -> tuple[np.ndarray, int]:
    """Through a file, not a pipe: MP4's index may be at its end, and a WAV written to a pipe has no length."""
    soundfile = _package("soundfile")
    with tempfile.TemporaryDirectory(prefix="fftp-") as folder:
        path, wav = Path(folder, "source"), Path(folder, "decoded.wav")
        if isinstance(source, bytes):
            path.write_bytes(source)
        else:
            path = Path(source).absolute()  # so that a name starting with "-" is not taken for an option
        command = ["ffmpeg", "-nostdin", "-v", "error", "-i", str(path), "-vn", "-c:a", "pcm_f32le", str(wav)]
        subprocess.run(command, check=True, capture_output=True)
        return soundfile.read(wav, dtype="float32", always_2d=True)
