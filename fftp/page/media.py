"""Pictures and sounds inside the page: data URIs that stay within a number of bytes."""

import base64
import io
import struct
import zlib

import numpy as np

COLUMNS, ROWS = 400, 128  # at most, of a spectrogram's picture
LEVELS = 48  # colours of a spectrogram: it is noisy, and more make it larger without looking better
# Dark to bright through violet, red and orange; evenly spaced, between them straight lines.
_STOPS = ("030312", "281054", "5e187c", "962a76", "cb425e", "f07048", "fcae62", "fcf6c4")
BITRATES = (64, 48, 40, 32, 24, 16)  # kbit/s of an MP3 at 16 kHz


def palette() -> np.ndarray:
    """uint8 `[LEVELS, 3]`."""
    stops = np.array([list(bytes.fromhex(stop)) for stop in _STOPS], float)
    at = np.linspace(0, len(_STOPS) - 1, LEVELS)
    return np.stack([np.interp(at, range(len(_STOPS)), stops[:, i]) for i in range(3)], 1).round().astype(np.uint8)


def levels(log_mel: np.ndarray) -> tuple[float, float]:
    """What the darkest and the brightest colour stand for."""
    low, high = np.percentile(log_mel, [2, 99.8])
    return float(low), float(max(high, low + 1e-6))


def colour(value: float, low: float, high: float) -> str:
    """The colour of one value, as CSS has it."""
    place = int(np.clip((value - low) / (high - low), 0, 1) * (LEVELS - 1) + 0.5)
    return "#{:02x}{:02x}{:02x}".format(*palette()[place])


def spectrogram(log_mel: np.ndarray, most: int) -> str | None:
    """A PNG of `[T, F]`, time to the right and low bins at the bottom, in at most `most` characters.

    It is made smaller until it fits. None where even the smallest one does not fit.
    """
    low, high = levels(log_mel)
    columns, rows = COLUMNS, ROWS
    while rows >= 16:
        shrunk = _means(_means(log_mel, columns).T, rows)[::-1]  # (F, T), upside up
        index = (np.clip((shrunk - low) / (high - low), 0, 1) * (LEVELS - 1) + 0.5).astype(np.uint8)
        uri = f"data:image/png;base64,{_base64(png(index, palette()))}"
        if len(uri) <= most:
            return uri
        columns, rows = columns * 3 // 4, rows * 3 // 4
    return None


def _means(values, most):
    """`[n, ...]` to at most `most` rows, each the mean of those it stands for."""
    if len(values) <= most:
        return values
    edges = np.linspace(0, len(values), most + 1).astype(int)
    return np.add.reduceat(values, edges[:-1], 0) / np.diff(edges)[:, None]


def png(index: np.ndarray, colours: np.ndarray) -> bytes:
    """A picture of palette indices, uint8 `[height, width]`, with its colours uint8 `[n, 3]` (PNG specification, 2003)."""
    height, width = index.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with its filter: none
    rows[:, 1:] = index
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", head),
        (b"PLTE", colours.tobytes()),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    packed = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def sound(samples: np.ndarray, rate: int, most: int) -> str | None:
    """An MP3 of float32 `[n]` in at most `most` characters, at the best bitrate that fits.

    None where none does, where soundfile is absent or writes no MP3, and for a rate that MP3 does not have.

    Every browser plays MP3, and its encoder writes the same bytes each time, where Ogg numbers its streams at random. Below
    40 kbit/s there is no room to say what is the encoder's own delay: those sounds begin 70 ms late.
    """
    try:
        import soundfile
    except ModuleNotFoundError:
        return None
    for kilobits in BITRATES:
        if kilobits * 125 * len(samples) / rate * 4 / 3 > most:
            continue
        written = io.BytesIO()
        # libsndfile counts the other way round: 0 is MPEG-2's 160 kbit/s, 1 its 8.
        quality = {"bitrate_mode": "CONSTANT", "compression_level": (160 - kilobits) / 152}
        try:
            soundfile.write(written, samples, rate, format="MP3", subtype="MPEG_LAYER_III", **quality)
        except (soundfile.LibsndfileError, ValueError):
            return None
        uri = f"data:audio/mpeg;base64,{_base64(written.getvalue())}"
        if len(uri) <= most:
            return uri
    return None


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
