"""The cache of packs under `$FFTP_CACHE`.

A pack is a folder `packs/<key>/` with `samples.int16` and `index.json`. The key is a digest of what is in the files and
of the parameters, so a pack never goes stale and data sets that move keep theirs. It is written in a folder beside
and renamed when whole: whoever is killed leaves nothing behind that could be read, and of two at once one wins.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from fftp import audio
from fftp.errors import UserError
from train.data.clips import Clip
from train.data.decode import Decoded

VERSION = 1  # of the format and of the decoding: another number means other packs
_STALE_SECONDS = 3600  # after this long without a write, an unfinished pack has no writer any more
_CACHE_FULL = {errno.ENOSPC, errno.EDQUOT}
_CACHE_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_blake2b = partial(hashlib.blake2b, digest_size=20)


def folder() -> Path:
    """`$FFTP_CACHE`, else the folder `fftp` in the user's cache folder."""
    if chosen := os.environ.get("FFTP_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fftp"


def identify(clips: tuple[Clip, ...], cache: Path, progress: bool) -> tuple[list[int], list[str]]:
    """Size in bytes and digest of every clip's file; digests are remembered by path, size and time of change.

    So the second start looks at every file but reads none.
    """
    # One memory for each data folder, so that none grows with all the data that ever was.
    common = os.path.commonpath([clip.source.absolute() for clip in clips if isinstance(clip.source, Path)] or ["/"])
    memory = cache / "digests" / f"{_blake2b(common.encode()).hexdigest()}.json"
    try:
        known = dict(json.loads(memory.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}

    def one(clip: Clip) -> tuple[int, str, str, list]:
        if isinstance(clip.source, bytes):
            return len(clip.source), _blake2b(clip.source).hexdigest(), "", []
        try:
            status, path = os.stat(clip.source), str(clip.source.absolute())
            mark = [status.st_size, status.st_mtime_ns]
            seen = known.get(path, ())
            digest = seen[2] if seen[:2] == mark else _digest(clip.source)
        except OSError:
            return 0, "unreadable", "", []  # decoding says why
        return status.st_size, digest, path, [*mark, digest]

    with ThreadPoolExecutor() as threads:
        found = list(tqdm(threads.map(one, clips), "checking", len(clips), False, disable=None if progress else True))
    remembered = known | {path: entry for _, _, path, entry in found if path}
    if remembered != known:
        # Only a saving of time: a cache that is closed but has the pack is good enough.
        with contextlib.suppress(OSError):
            _replace(memory, json.dumps(remembered))
    return [size for size, *_ in found], [digest for _, digest, *_ in found]


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, _blake2b).hexdigest()


def key(clips: tuple[Clip, ...], digests: list[str], sample_rate: int, min_samples: int) -> str:
    """The name of the pack that these clips make, in this order."""
    content = _blake2b()
    content.update(json.dumps([VERSION, sample_rate, min_samples]).encode())
    for clip, digest in zip(clips, digests, strict=True):
        content.update(json.dumps([clip.name, digest]).encode())
    return content.hexdigest()


def _replace(path: Path, text: str) -> None:
    """A file that is there with all of `text` or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with open(handle, "w") as file:
            file.write(text)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def read_index(folder: Path) -> dict | None:
    """A pack's index, or None where there is no whole pack or one that is to be made anew."""
    try:
        index = json.loads((folder / "index.json").read_text())
        whole = (folder / "samples.int16").stat().st_size == 2 * sum(index["length"])
    except (OSError, ValueError, KeyError):
        return None
    # A decoder that was installed since may read what was skipped.
    return index if whole and (not index["skipped"] or index["decoders"] == list(audio.other_decoders())) else None


def reasons(index: dict) -> dict[int, str]:
    """Why clips of a pack were skipped, by their number in the data set."""
    return {int(number): reason for number, reason in index["skipped"].items()}


@contextlib.contextmanager
def unfinished(pack: Path) -> Iterator[Path]:
    """A folder beside `pack` to write it in, gone at the end unless it has taken the pack's name."""
    pack.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(pack.parent)
    beside = Path(tempfile.mkdtemp(prefix=f"{pack.name}.unfinished-", dir=pack.parent))
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write(beside: Path, decoded: Iterator[Decoded], count: int, progress: bool) -> dict:
    """Stream `count` clips into `beside` as they come, then their index, which is also returned."""
    lengths, skipped = [], {}
    with contextlib.closing(decoded), open(beside / "samples.int16", "wb") as file:
        for clip in tqdm(decoded, "packing", count, disable=None if progress else True, unit=" clips"):
            if isinstance(clip, str):
                skipped[len(lengths)] = clip
                lengths.append(0)
            else:
                file.write(clip.data)
                lengths.append(len(clip))
        file.flush()
        os.fsync(file.fileno())  # a power cut after the rename must not leave a pack of zeros
    index = {"length": lengths, "skipped": skipped, "decoders": list(audio.other_decoders())}
    (beside / "index.json").write_text(json.dumps(index))
    return index


def take_name(beside: Path, folder: Path) -> None:
    """Rename a finished pack; where another process has finished the same one before, that one stays."""
    if folder.exists() and read_index(folder) is None:
        shutil.rmtree(folder)
    try:
        os.rename(beside, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _remove_stale(packs: Path) -> None:
    """Remove what killed runs left, once it is old enough that no live one can be writing it."""
    for folder in packs.glob("*.unfinished-*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest > _STALE_SECONDS:
                shutil.rmtree(folder)


@contextlib.contextmanager
def explained(cache: Path) -> Iterator[None]:
    """Turns the errors of a cache folder that is full or closed into a UserError; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _CACHE_FULL:
            raise UserError(
                f"The disk with the cache folder {cache} is full: free some space, or set FFTP_CACHE to another folder."
            ) from error
        if error.errno in _CACHE_CLOSED:
            raise UserError(
                f"The cache folder {cache} cannot be written ({error.strerror}): set FFTP_CACHE to one that can."
            ) from error
        raise
