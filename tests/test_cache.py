"""The cache of packs: found again, never half-written, whoever is killed and however many write at once."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from made_data import RATE, clip, data_set, make_files, packed

from fftp import audio
from fftp.errors import UserError
from train.data import cache
from train.data.pack import pack

soundfile = pytest.importorskip("soundfile", reason="sound files need soundfile.")
pytest.importorskip("soxr", reason="resampling needs soxr.")

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FFTP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def leftovers(cache_folder: Path) -> list[str]:
    return [path.name for path in cache_folder.rglob("*") if "unfinished" in path.name]


def refuse_to_decode(*_):
    raise AssertionError("a clip was decoded again")


def test_second_start_reads_no_file(tmp_path, monkeypatch):
    files = make_files(tmp_path / "files", 3)
    first = packed(files)
    monkeypatch.setattr(audio, "load", refuse_to_decode)
    monkeypatch.setattr(cache, "_digest", refuse_to_decode)
    second = packed(files)
    assert np.array_equal(first.samples, second.samples)
    assert first.names == second.names


def test_moved_data_keep_their_pack(tmp_path, monkeypatch):
    files = make_files(tmp_path / "files", 3)
    packed(files)
    shutil.move(tmp_path / "files", tmp_path / "moved")
    monkeypatch.setattr(audio, "load", refuse_to_decode)
    assert packed([tmp_path / "moved" / path.name for path in files]).length.tolist() == [1000, 2000, 3000]


def test_changed_file_and_parameters_make_another_pack(tmp_path, cache_folder):
    files = make_files(tmp_path / "files", 3)
    packed(files)
    # Of the same length, and changed in one sample only.
    samples, _ = soundfile.read(files[1], dtype="int16")
    samples[7] += 1
    soundfile.write(files[1], samples, RATE)
    os.utime(files[1], ns=(1, 1))
    assert np.array_equal(clip(packed(files), 1), samples)
    assert pack(data_set(files), 8000, progress=False).length.tolist() == [500, 1000, 1500]
    assert len(list((cache_folder / "packs").iterdir())) == 3


def test_damaged_pack_is_made_anew(tmp_path, cache_folder):
    files = make_files(tmp_path / "files", 3)
    whole = np.array(packed(files).samples)
    (samples,) = cache_folder.rglob("samples.int16")
    for damage in (lambda: os.truncate(samples, 10), lambda: samples.with_name("index.json").write_text("{")):
        damage()
        assert np.array_equal(packed(files).samples, whole)
    (cache_folder / "digests" / next(os.walk(cache_folder / "digests"))[2][0]).write_text("[1, 2]")
    assert np.array_equal(packed(files).samples, whole)


def raise_on_write(monkeypatch, number: int) -> None:
    def full(beside, *_):
        (beside / "samples.int16").write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache, "write", full)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_full_or_closed_cache(tmp_path, cache_folder, monkeypatch, number):
    files = make_files(tmp_path / "files", 3)
    raise_on_write(monkeypatch, number)
    with pytest.raises(UserError, match=r"cache folder .*cache .*FFTP_CACHE"):
        packed(files)
    assert not any((cache_folder / "packs").iterdir())


def test_cache_that_is_a_file(tmp_path, cache_folder):
    files = make_files(tmp_path / "files", 3)
    cache_folder.write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(.*\): set FFTP_CACHE"):
        packed(files)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, a disk that is always full, is Linux's.")
def test_disk_that_is_really_full(tmp_path, cache_folder, monkeypatch):
    files = make_files(tmp_path / "files", 3)
    unfinished = cache.unfinished

    @contextlib.contextmanager
    def on_a_full_disk(path):
        with unfinished(path) as beside:
            (beside / "samples.int16").symlink_to("/dev/full")
            yield beside

    monkeypatch.setattr(cache, "unfinished", on_a_full_disk)
    with pytest.raises(UserError, match=r"The disk with the cache folder .* is full"):
        packed(files)
    assert not any((cache_folder / "packs").iterdir())


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("FFTP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "fftp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "fftp"


def test_nothing_is_written_beside_the_data(tmp_path):
    files = make_files(tmp_path / "files", 3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "files", *files)}
    packed(files)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "files", *files)} == before
    assert sorted((tmp_path / "files").iterdir()) == files


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root.")
def test_read_only_data_and_read_only_cache_with_the_pack(tmp_path, cache_folder):
    files = make_files(tmp_path / "files", 3)
    (tmp_path / "files").chmod(0o555)
    whole = np.array(packed(files).samples)
    for folder in (cache_folder, cache_folder / "packs", cache_folder / "digests"):
        folder.chmod(0o555)
    os.utime(files[0])  # its digest cannot be remembered
    assert np.array_equal(packed(files).samples, whole)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
        pack(data_set(files), 8000, progress=False)


# Packs a folder, 20 ms a file; "ready" is printed at the third, so that the test acts in the midst of it.
SLOW = """
import signal, sys, time
from pathlib import Path
from fftp import audio
from train.data.clips import Clip, DataSet
from train.data import cache
from train.data.pack import pack

cache._COMMIT_BYTES = int(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have handed down that it is to be ignored
quick, seen = audio.load, []
def slow(*args):
    seen.append(0)
    if len(seen) == 3:
        print("ready", flush=True)
    time.sleep(0.02)
    return quick(*args)
audio.load = slow
clips = tuple(Clip(path, (0,), "train", path.name) for path in audio.list_audio(sys.argv[1]))
print(int(pack(DataSet("made", ("a",), clips, False, 1.0), 16000, progress=False, workers=1).samples.sum()), flush=True)
"""


def start(folder: Path, commit: int = cache._COMMIT_BYTES) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(folder), str(commit)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=lambda kill: kill.name)
def test_interrupted_and_done_again(tmp_path, cache_folder, kill):
    files = make_files(tmp_path / "files", 40)
    with start(tmp_path / "files") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(kill)
        process.communicate(timeout=30)
    assert process.returncode != 0
    assert bool(leftovers(cache_folder)) == (kill == signal.SIGKILL)
    assert not list(cache_folder.rglob("index.json"))

    result = packed(files)
    assert all(np.array_equal(clip(result, i), soundfile.read(path, dtype="int16")[0]) for i, path in enumerate(files))


def count_decoded(monkeypatch) -> list[str]:
    decoded, load = [], audio.load
    monkeypatch.setattr(audio, "load", lambda *how: decoded.append(how[3]) or load(*how))
    return decoded


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=lambda kill: kill.name)
def test_interrupted_and_taken_up_again(tmp_path, cache_folder, monkeypatch, kill):
    """Clips that are listed as finished are not decoded again; a line cut off in the middle of writing does not count."""
    files = make_files(tmp_path / "files", 40)
    with start(tmp_path / "files", commit=1) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(kill)
        process.communicate(timeout=30)
    assert process.returncode != 0
    (left,) = (cache_folder / "packs").iterdir()
    done = cache.finished(left)
    assert done[:2] == [1000, 2000]
    with (left / "clips.jsonl").open("a") as listing:
        listing.write("[3000")
    decoded = count_decoded(monkeypatch)
    result = pack(data_set(files, ("train",)), RATE, progress=False)  # as the process: labels are no part of a pack
    assert decoded == [path.name for path in files[len(done) :]]
    assert all(np.array_equal(clip(result, i), soundfile.read(path, dtype="int16")[0]) for i, path in enumerate(files))
    (pack_folder,) = (cache_folder / "packs").iterdir()
    assert sorted(path.name for path in pack_folder.iterdir()) == ["index.json", "samples.int16"]


@pytest.mark.parametrize("damage", ["no list", "no list of lists", "other decoders", "samples lost"])
def test_what_cannot_be_taken_up_is_begun_again(tmp_path, cache_folder, monkeypatch, damage):
    files = make_files(tmp_path / "files", 9)
    files[1].write_bytes(b"")
    monkeypatch.setattr(cache, "_COMMIT_BYTES", 1)
    with pytest.raises(UserError, match="1 file is unusable"):
        packed(files)
    (left,) = (cache_folder / "packs").iterdir()
    assert len(cache.finished(left)) == len(files)
    if damage == "no list":
        (left / "clips.jsonl").write_text("")
    elif damage == "no list of lists":
        (left / "clips.jsonl").write_text("[]\n5\n")
    elif damage == "samples lost":
        os.truncate(left / "samples.int16", 10)
    else:
        monkeypatch.setattr(audio, "other_decoders", lambda: ("another",))
    decoded = count_decoded(monkeypatch)
    result = packed(files, skip_bad_files=True)
    assert len(decoded) == len(files)
    assert [len(clip(result, i)) for i in range(8)] == [1000, *range(3000, 9001, 1000)]
    assert np.array_equal(clip(result, 7), soundfile.read(files[8], dtype="int16")[0])


def test_bad_files_cost_no_second_decoding(tmp_path, monkeypatch):
    """A large set that was refused for a bad file is whole when it is asked for again without it."""
    files = make_files(tmp_path / "files", 9)
    files[1].write_bytes(b"")
    monkeypatch.setattr(cache, "_COMMIT_BYTES", 1)
    with pytest.raises(UserError, match="1 file is unusable"):
        packed(files)
    decoded = count_decoded(monkeypatch)
    assert len(packed(files, skip_bad_files=True).names) == 8
    assert decoded == []


def test_unfinished_pack_of_a_live_process_is_left_alone(tmp_path, cache_folder, monkeypatch):
    files = make_files(tmp_path / "files", 40)
    with start(tmp_path / "files", commit=1) as process:
        assert process.stdout.readline() == "ready\n"
        decoded = count_decoded(monkeypatch)
        pack(data_set(files, ("train",)), RATE, progress=False)
        assert len(decoded) == 40
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert not leftovers(cache_folder)


def test_what_a_killed_run_left_is_removed_when_old(tmp_path, cache_folder):
    files = make_files(tmp_path / "files", 3)
    hour, month = 2 * cache._STALE_SECONDS, 2 * cache._KEPT_SECONDS
    for name, age, listing in (("new", 0, 0), ("old", hour, 0), ("listed", hour, 1), ("ancient", month, 1)):
        folder = cache_folder / "packs" / f"{name}.unfinished-x"
        folder.mkdir(parents=True)
        (folder / "samples.int16").write_bytes(b"half")
        if listing:
            (folder / "clips.jsonl").touch()
        for path in (*folder.iterdir(), folder):
            os.utime(path, (time.time() - age,) * 2)
    packed(files)
    assert sorted(leftovers(cache_folder)) == ["listed.unfinished-x", "new.unfinished-x"]


def test_two_at_once(tmp_path, cache_folder):
    make_files(tmp_path / "files", 40)
    with start(tmp_path / "files") as one, start(tmp_path / "files") as other:
        outcomes = [process.communicate(timeout=60) for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), outcomes
    # Both were packing, neither waited for the other's pack: "ready" and the sum of the samples.
    assert outcomes[0][0].split()[0] == outcomes[1][0].split()[0] == "ready"
    assert outcomes[0] == outcomes[1]
    assert not leftovers(cache_folder)
    assert len(list((cache_folder / "packs").iterdir())) == 1


def test_the_processes_end_with_a_killed_parent():
    script = (
        "import os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from train.data.decode import stay_with_parent\n"
        "with ProcessPoolExecutor(1, get_context('spawn'), stay_with_parent) as pool:\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _alive(worker):
        time.sleep(0.05)
    assert not _alive(worker)


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # a zombie whose new parent has not looked yet
