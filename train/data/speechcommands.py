"""Speech Commands: a folder for each word, `validation_list.txt` and `testing_list.txt`; training is all the rest."""

import hashlib
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fftp import audio
from fftp.errors import UserError
from train.data.clips import Clip, DataSet, data_folder, nearest

LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
ARCHIVE_URL = "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
ARCHIVE_SHA256 = "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"
_BLOCK = 1 << 20  # bytes read at a time

# The order of the label file that comes with AST: published checkpoints need it.
# fmt: off
OFFICIAL_WORDS = (
    "backward", "follow", "five", "bed", "zero", "on", "learn", "two", "house", "tree", "dog", "stop", "seven",
    "eight", "down", "six", "forward", "cat", "right", "visual", "four", "wow", "no", "nine", "off", "three",
    "left", "marvin", "yes", "up", "sheila", "happy", "bird", "go", "one",
)
# fmt: on

Fetch = Callable[[str, Path, bool], None]


def load(settings: Any) -> DataSet:
    """The words that `settings.words` names (comma-separated; all when ''), from `settings.data_root`.

    Classes stand in AST's order when they are the official 35, else by the alphabet. With `settings.download` the
    official archive is fetched first where the lists are not there. UserError for an unknown word or missing lists.
    """
    if settings.download:
        if not settings.data_root:
            raise UserError("--download needs a folder to put Speech Commands in: name it with --data-root.")
        download(Path(settings.data_root).expanduser())
    root = data_folder(settings.data_root, "speechcommands")
    missing = [name for name in LISTS.values() if not (root / name).is_file()]
    if missing:
        raise UserError(
            f"{root} has no {' and no '.join(missing)}: give the folder of Speech Commands that holds the lists, "
            "or pass --download."
        )
    words = _chosen_words(root, settings.words)
    split_of = {stem: split for split, name in LISTS.items() for stem in _stems(root / name)}
    clips = []
    for number, word in enumerate(words):
        for path in audio.list_audio(root / word):
            name = path.relative_to(root).as_posix()
            clips.append(Clip(path, (number,), split_of.get(name.rpartition(".")[0], "train"), name))
    return DataSet("speechcommands", words, tuple(clips), multi_label=False, clip_seconds=1.0)


def _chosen_words(root: Path, words: str) -> tuple[str, ...]:
    """The words asked for, in the order of the labels."""
    # Folders that begin with "_" hold no words (`_background_noise_`).
    present = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and folder.name[0] not in "._")
    present = [word for word in present if any(audio.is_audio(name) for name in os.listdir(root / word))]
    asked = sorted({word.strip() for word in words.split(",") if word.strip()}) or present
    for word in asked:
        if word not in present:
            raise UserError(f"{root} has no recordings of the word '{word}'{nearest(word, present)}")
    if len(asked) < 2:
        raise UserError(f"Words to tell apart in {root}: {len(asked)}; give a folder or --words with two or more.")
    return OFFICIAL_WORDS if set(asked) == set(OFFICIAL_WORDS) else tuple(asked)


def _stems(path: Path) -> list[str]:
    """A list's entries without suffix: copies of the data set come as WAV, FLAC or Ogg under the same lists."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip().rpartition(".")[0] for line in lines if line.strip()]


def download(
    root: Path, fetch: Fetch | None = None, url: str = ARCHIVE_URL, sha256: str = ARCHIVE_SHA256, progress: bool = True
) -> None:
    """Fetch, check and unpack the official archive (2.4 GB) into `root`, unless the lists are there already.

    `fetch(url, file, progress)` goes on with what `file` holds. Every stage can be cut off and done again: the archive
    gets its name only with the right SHA-256, and the lists, which mark a whole set, are moved into place last.
    UserError when the network, the disk or the checksum fails.
    """
    if all((root / name).is_file() for name in LISTS.values()):
        return
    archive, unpacking = root / url.rpartition("/")[2], root / ".unpacking"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not archive.is_file():
            part = archive.with_name(archive.name + ".part")
            if not (part.is_file() and _sha256(part) == sha256):
                (fetch or fetch_url)(url, part, progress)
                _check(part, sha256, url)
            os.rename(part, archive)
        shutil.rmtree(unpacking, ignore_errors=True)
        _unpack(archive, unpacking, progress)
        for entry in sorted(os.listdir(unpacking), key=lambda name: (name in LISTS.values(), name)):
            if (root / entry).is_dir():
                shutil.rmtree(root / entry)  # moved by a run that was cut off before the lists
            os.rename(unpacking / entry, root / entry)
        os.rmdir(unpacking)
        archive.unlink()
    except tarfile.TarError as error:
        raise UserError(f"{archive} cannot be unpacked ({error}): remove it and download again.") from error
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Downloading {url} to {root} failed ({reason}): check network and disk, then run the same command again; "
            "it goes on where it stopped."
        ) from error


def _check(part: Path, sha256: str, url: str) -> None:
    found = _sha256(part)
    if found != sha256:
        part.unlink()  # or the next attempt would go on from a wrong file
        raise UserError(
            f"What came from {url} has SHA-256 {found[:16]}... where {sha256[:16]}... is right: try again, or get the "
            "archive elsewhere and unpack it into the data root."
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(archive: Path, target: Path, progress: bool) -> None:
    quiet = None if progress else True  # None: a bar on a terminal, nothing elsewhere
    with tarfile.open(archive) as tar, tqdm(tar, desc="unpacking", unit=" files", disable=quiet) as members:
        for member in members:
            tar.extract(member, target, filter="data")  # refuses absolute paths, links and "..", that leave the folder


def fetch_url(url: str, part: Path, progress: bool) -> None:
    """Append what is missing of `url` to `part`; from the start where the server cannot go on. OSError when cut off."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        if getattr(response, "status", None) != 206:  # 206: the part that was asked for
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(
            desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None if progress else True
        )
        with open(part, "ab" if have else "wb") as file, bar:
            while block := response.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError("the connection was cut")
