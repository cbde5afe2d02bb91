"""The cache of packs under `$FFTP_CACHE`.

A pack is a folder `packs/<key>/` with `samples.int16` and `index.json`. The key is a digest of what is in the files and
of the parameters, so a pack never goes stale and data sets that move keep theirs. It is written in a folder beside
and renamed when whole: whoever is killed leaves nothing behind that could be taken for a pack, and of two at once one
wins. Beside the samples, `clips.jsonl` lists the clips that are safely on the disk: the next run goes on behind them.
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
from typing import IO

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from fftp import audio
from fftp.errors import UserError
from train.data import shards
from train.data.clips import Clip, Row, listed
from train.data.decode import Decoded

VERSION = 1  # of the format and of the decoding: another number means other packs
_STALE_SECONDS = 3600  # after this long without a write, an unfinished pack has no writer any more
_KEPT_SECONDS = 14 * 86400  # and with finished clips in it, it waits this long to be taken up again
_COMMIT_BYTES = 16 << 20  # of samples written between two entries of the list of finished clips: some 50 of ten seconds
_CACHE_FULL = {errno.ENOSPC, errno.EDQUOT}
_CACHE_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_CLIPS, _LOCK = "clips.jsonl", "lock"  # in an unfinished pack
_ROW = "\0"  # between a shard's path and the row's number in the memory of digests: in no file's name
_blake2b = partial(hashlib.blake2b, digest_size=20)


def folder() -> Path:
    """`$FFTP_CACHE`, else the folder `fftp` in the user's cache folder."""
    if chosen := os.environ.get("FFTP_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fftp"


def identify(
    clips: tuple[Clip, ...], cache: Path, progress: bool, skip_bad_files: bool = False
) -> tuple[list[int], list[str]]:
    """Size in bytes and digest of every clip's file; digests are remembered by path, size and time of change.

    So the second start looks at every file but reads none. UserError for a shard that was there the last time and is gone.
    """
    # One memory for each data folder, so that none grows with all the data that ever was.
    common = os.path.commonpath([clip.file.absolute() for clip in clips if clip.file is not None] or ["/"])
    memory = cache / "digests" / f"{_blake2b(common.encode()).hexdigest()}.json"
    try:
        known = dict(json.loads(memory.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    stored, known = known, _without_lost_shards(known, clips, skip_bad_files)
    reader = shards.Reader()

    def one(clip: Clip) -> tuple[int, str, str, list]:
        if isinstance(clip.source, bytes):
            return len(clip.source), _blake2b(clip.source).hexdigest(), "", []
        try:
            status, path = os.stat(clip.file), str(clip.file.absolute())
            mark = [status.st_size, status.st_mtime_ns]
            if isinstance(clip.source, Row):
                path += f"{_ROW}{clip.source.number}"
                entry = known.get(path, ())
                if entry[:2] != mark:
                    content = reader.read(clip.source)
                    entry = [*mark, _blake2b(content).hexdigest(), len(content)]
                return entry[3], entry[2], path, entry
            seen = known.get(path, ())
            digest = seen[2] if seen[:2] == mark else _digest(clip.source)
        except OSError:
            return 0, "unreadable", "", []  # decoding says why
        return status.st_size, digest, path, [*mark, digest]

    # Rows are read one after the other; whole files are read by several threads.
    one_thread = any(isinstance(clip.source, Row) for clip in clips)
    with contextlib.closing(reader), ThreadPoolExecutor(1 if one_thread else None) as threads:
        found = list(tqdm(threads.map(one, clips), "checking", len(clips), False, disable=None if progress else True))
    remembered = known | {path: entry for _, _, path, entry in found if path}
    if remembered != stored:
        # Only a saving of time: a cache that is closed but has the pack is good enough.
        with contextlib.suppress(OSError):
            _replace(memory, json.dumps(remembered))
    return [size for size, *_ in found], [digest for _, digest, *_ in found]


def _without_lost_shards(known: dict[str, list], clips: tuple[Clip, ...], skip_bad_files: bool) -> dict[str, list]:
    """What is known, without the rows of shards that are gone from the folders of these clips' shards.

    UserError for those, unless they may be skipped.
    """
    folders = {str(clip.file.absolute().parent) for clip in clips if isinstance(clip.source, Row)}
    remembered = {path.partition(_ROW)[0] for path in known if _ROW in path}
    lost = sorted(shard for shard in remembered if os.path.dirname(shard) in folders and not os.path.exists(shard))
    if lost and not skip_bad_files:
        raise UserError(
            f"Shards of this data set that an earlier run read are gone ({len(lost)}: {listed(lost)}): put them back, or "
            "pass --skip-bad-files to go on without."
        )
    return {path: entry for path, entry in known.items() if path.partition(_ROW)[0] not in lost}


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, _blake2b).hexdigest()


def key(clips: tuple[Clip, ...], digests: list[str], sample_rate: int, min_samples: int) -> str:
    """The name of the pack that these clips make, in this order."""
    content = _blake2b()
    content.update(json.dumps([VERSION, sample_rate, min_samples]).encode())
    for clip, digest in zip(clips, digests, strict=True):
        content.update(json.dumps([clip.name, digest, *(clip.segment or ())]).encode())
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
    """A folder beside `pack` to write it in: one that was left off and that nobody writes in, or a new one.

    At the end it is gone, or has taken the pack's name, or holds finished clips for the next run.
    """
    pack.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(pack.parent)
    left = (folder for folder in sorted(pack.parent.glob(f"{pack.name}.unfinished-*")) if (folder / _CLIPS).exists())
    with contextlib.ExitStack() as stack:
        beside = next((folder for folder in left if _own(folder, stack)), None)
        if beside is None:
            beside = Path(tempfile.mkdtemp(prefix=f"{pack.name}.unfinished-", dir=pack.parent))
            _own(beside, stack)
        try:
            yield beside
        finally:
            if not (beside / _CLIPS).exists():
                shutil.rmtree(beside, ignore_errors=True)


def _own(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Whether this process is the one that may write in an unfinished pack from here on; a killed one no longer is."""
    if fcntl is None:  # no such locks: what is there may be another's
        return not (folder / _CLIPS).exists()
    try:
        file = stack.enter_context((folder / _LOCK).open("a"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(folder / _LOCK))  # else it was finished just now
    except OSError:
        return False


def finished(beside: Path) -> list[int | str]:
    """The length, or why it was skipped, of each clip that an unfinished pack holds; anew where that is of no use."""
    try:
        *lines, _ = (beside / _CLIPS).read_text().split("\n")  # what follows the last line end was cut off
        decoders, clips = json.loads(lines[0]), [clip for line in lines[1:] for clip in json.loads(line)]
        held = (beside / "samples.int16").stat().st_size // 2
    except (OSError, ValueError, IndexError, TypeError):
        return []
    # A decoder that was installed since may read what was skipped.
    good = decoders == list(audio.other_decoders()) or not any(isinstance(clip, str) for clip in clips)
    return clips if good and held >= sum(clip for clip in clips if isinstance(clip, int)) else []


def write(beside: Path, done: list[int | str], decoded: Iterator[Decoded], count: int, progress: bool) -> dict:
    """Stream `count` clips into `beside` behind those that are `done`, then their index, which is also returned.

    Whatever ends it early, what a list of finished clips names stays on the disk.
    """
    clips, decoders = list(done), list(audio.other_decoders())
    if not clips:
        (beside / _CLIPS).unlink(missing_ok=True)
    else:
        _replace(beside / _CLIPS, f"{json.dumps(decoders)}\n{json.dumps(clips)}\n")
        os.truncate(beside / "samples.int16", 2 * sum(clip for clip in clips if isinstance(clip, int)))
    committed, written = len(clips), 0
    quiet = None if progress else True
    with contextlib.closing(decoded), open(beside / "samples.int16", "ab" if clips else "wb") as file:
        try:
            for clip in tqdm(decoded, "packing", count, initial=len(clips), disable=quiet, unit=" clips"):
                if isinstance(clip, str):
                    clips.append(clip)
                else:
                    file.write(clip.data)
                    clips.append(len(clip))
                    written += clip.nbytes
                if written >= _COMMIT_BYTES:
                    # Counted first: what is interrupted in between may be listed not at all, but never twice.
                    since, committed, written = committed, len(clips), 0
                    _commit(file, beside, decoders, clips, since)
        finally:
            if 0 < committed < len(clips):
                _commit(file, beside, decoders, clips, committed)
        file.flush()
        os.fsync(file.fileno())  # a power cut after the rename must not leave a pack of zeros
    skipped = {number: clip for number, clip in enumerate(clips) if isinstance(clip, str)}
    index = {"length": [0 if isinstance(c, str) else c for c in clips], "skipped": skipped, "decoders": decoders}
    (beside / "index.json").write_text(json.dumps(index))
    return index


def _commit(file: IO[bytes], beside: Path, decoders: list[str], clips: list[int | str], committed: int) -> None:
    """List what was written since the first `committed` clips, once it is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    with open(beside / _CLIPS, "a") as listing:
        listing.write("" if committed else f"{json.dumps(decoders)}\n")
        listing.write(f"{json.dumps(clips[committed:])}\n")


def take_name(beside: Path, folder: Path) -> None:
    """Rename a finished pack; where another process has finished the same one before, that one stays."""
    if folder.exists() and read_index(folder) is None:
        shutil.rmtree(folder)
    try:
        os.rename(beside, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        folder = beside
    for name in (_CLIPS, _LOCK):  # the list last of all: whoever is killed before has lost nothing
        (folder / name).unlink(missing_ok=True)


def _remove_stale(packs: Path) -> None:
    """Remove what killed runs left, once it is old enough that no live one can be writing it or will take it up."""
    for folder in packs.glob("*.unfinished-*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest > (_KEPT_SECONDS if (folder / _CLIPS).exists() else _STALE_SECONDS):
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
