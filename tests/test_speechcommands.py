"""Speech Commands: its layout, its lists, and the download."""

import hashlib
import http.server
import io
import tarfile
import threading
from pathlib import Path

import pytest
from made_data import labels, make_tree, settings, splits
from recordings import RECORDINGS, needs_recordings

from fftp.errors import UserError
from train import data
from train.data import speechcommands


def speech_tree(root: Path) -> Path:
    make_tree(root, "yes/a_nohash_0.ogg", "yes/b_nohash_0.ogg", "yes/c_nohash_0.ogg", "no/a_nohash_0.ogg")
    make_tree(root, "no/b_nohash_0.flac", "up/a_nohash_0.wav", "_background_noise_/rain.wav", "README.md")
    # The official lists say .wav, whatever the copy holds, and name files that a part of it lacks.
    (root / "validation_list.txt").write_text("yes/b_nohash_0.wav\nno/b_nohash_0.wav\ncat/b_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("yes/c_nohash_0.wav\n\n")
    return root


def test_speech_commands_layout(tmp_path):
    dataset = data.load(settings(data="speechcommands", data_root=speech_tree(tmp_path)))
    assert dataset.classes == ("no", "up", "yes")
    assert splits(dataset) == {
        "no/a_nohash_0.ogg": "train",
        "no/b_nohash_0.flac": "validation",
        "up/a_nohash_0.wav": "train",
        "yes/a_nohash_0.ogg": "train",
        "yes/b_nohash_0.ogg": "validation",
        "yes/c_nohash_0.ogg": "test",
    }
    assert labels(dataset)["yes/c_nohash_0.ogg"] == ("yes",)


def test_speech_commands_words(tmp_path):
    root = speech_tree(tmp_path)
    assert data.load(settings(data="speechcommands", data_root=root, words="yes, up")).classes == ("up", "yes")
    with pytest.raises(UserError, match=r"no recordings of the word 'yeah'; did you mean yes\?"):
        data.load(settings(data="speechcommands", data_root=root, words="up,yeah"))
    with pytest.raises(UserError, match="two or more"):
        data.load(settings(data="speechcommands", data_root=root, words="up"))


def test_speech_commands_all_official_words_stand_in_the_order_of_published_checkpoints(tmp_path):
    words = speechcommands.OFFICIAL_WORDS
    assert (len(set(words)), words[0], words[-1]) == (35, "backward", "one")
    make_tree(tmp_path, "validation_list.txt", "testing_list.txt", *(f"{word}/a.wav" for word in words))
    assert data.load(settings(data="speechcommands", data_root=tmp_path)).classes == words
    (tmp_path / "one" / "a.wav").unlink()
    assert data.load(settings(data="speechcommands", data_root=tmp_path)).classes == tuple(sorted(set(words) - {"one"}))


def test_speech_commands_without_lists(tmp_path):
    root = speech_tree(tmp_path)
    (root / "testing_list.txt").unlink()
    with pytest.raises(UserError, match=r"has no testing_list\.txt: .* or pass --download"):
        data.load(settings(data="speechcommands", data_root=root))


@needs_recordings
def test_speech_commands_real():
    dataset = data.load(settings(data="speechcommands", data_root=RECORDINGS / "speech_commands_12"))
    assert len(dataset.classes) == 12
    assert dataset.counts() == {"train": 10_190, "validation": 1164, "test": 1525}
    speakers = {split: set() for split in data.SPLITS}
    for clip in dataset.clips:
        speakers[clip.split].add(clip.name.split("/")[1].split("_")[0])
    assert {split: len(found) for split, found in speakers.items()} == {"train": 1129, "validation": 185, "test": 274}


def archive_of(tree: Path, file: Path) -> str:
    """The tree as a .tar.gz, entries beginning with ./ as in the official archive; its SHA-256."""
    with tarfile.open(file, "w:gz") as tar:
        tar.add(tree, arcname=".")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def archive(tmp_path):
    file = tmp_path / "commands.tar.gz"
    return file, archive_of(speech_tree(tmp_path / "tree"), file)


def test_download_unpacks_a_whole_set(tmp_path, archive):
    file, sha256 = archive
    root = tmp_path / "new" / "root"
    for _ in range(2):  # the second finds the lists and fetches nothing
        speechcommands.download(root, url=file.as_uri(), sha256=sha256, progress=False)
        assert len(splits(data.load(settings(data="speechcommands", data_root=root, download=True)))) == 6
        assert not [path.name for path in root.iterdir() if path.name.startswith((".", "commands"))]
        file.unlink(missing_ok=True)


def test_download_after_a_run_that_was_cut_off_while_unpacking(tmp_path, archive):
    file, sha256 = archive
    make_tree(tmp_path / "root", ".unpacking/yes/half.ogg", "yes/a_nohash_0.ogg")
    speechcommands.download(tmp_path / "root", url=file.as_uri(), sha256=sha256, progress=False)
    assert len(list((tmp_path / "root").rglob("*.*g"))) == 4


def test_download_of_something_else(tmp_path, archive):
    root = tmp_path / "root"
    with pytest.raises(UserError, match=r"has SHA-256 .* is right"):
        speechcommands.download(root, url=archive[0].as_uri(), sha256="0" * 64, progress=False)
    assert not list(root.iterdir())


def test_download_refuses_entries_that_leave_the_folder(tmp_path):
    file = tmp_path / "evil.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../outside.txt"), io.BytesIO())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=r"cannot be unpacked \('\.\./outside\.txt'"):
        speechcommands.download(tmp_path / "root", url=file.as_uri(), sha256=sha256, progress=False)
    assert not (tmp_path / "outside.txt").exists()


def test_download_without_network(tmp_path):
    def fetch(url, part, progress):
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(UserError, match=r"failed .Connection reset by peer.*it goes on where it stopped"):
        speechcommands.download(tmp_path, fetch)


class CutOff(http.server.BaseHTTPRequestHandler):
    """Serves one file, the first time only half of it; knows `Range: bytes=N-`."""

    content = b""
    ranges: list[str | None]

    def do_GET(self):
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.ranges.append(wanted)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:] if wanted else self.content[: len(self.content) // 2])

    def log_message(self, *_):
        pass


def test_download_goes_on_where_it_was_cut(tmp_path, archive):
    file, sha256 = archive
    handler = type("Handler", (CutOff,), {"content": file.read_bytes(), "ranges": []})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/commands.tar.gz"
        with pytest.raises(UserError, match="the connection was cut"):
            speechcommands.download(tmp_path / "root", url=url, sha256=sha256, progress=False)
        speechcommands.download(tmp_path / "root", url=url, sha256=sha256, progress=False)
        server.shutdown()
        thread.join()
    assert handler.ranges == [None, f"bytes={len(handler.content) // 2}-"]
    assert (tmp_path / "root" / "validation_list.txt").is_file()
