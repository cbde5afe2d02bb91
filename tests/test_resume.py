"""A run that was killed and taken up again equals one that never was: weights and figures, bit for bit."""

import json
import random
import re
import shutil
import signal
import time

import pytest
import torch

from fftp import checkpoint
from tests import runs
from tests.made_data import make_files
from train import data, loop

# Three epochs of three steps, with everything that a run may carry from epoch to epoch.
FLAGS = [*runs.TINY, "--epochs", "3", "--mixup", "0.5", "--noise", "--average-last", "2", "--seed", "7"]
FLAGS += ["--average-decay", "0.9", "--optimiser", "muon"]
KEPT = ("best/model", "last/model", "last/state", "average/model")
# Runs the flags, and kills itself with signal 9 on the n-th call of a function.
KILLED = """
import importlib, os, signal, sys
from train import run
module, name, number, *flags = sys.argv[1:]
owner, attribute = importlib.import_module(module), name.split(".")
for part in attribute[:-1]:
    owner = getattr(owner, part)
real, count = getattr(owner, attribute[-1]), 0
def killing(*arguments, **named):
    global count
    count += 1
    if count == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)
setattr(owner, attribute[-1], killing)
sys.exit(run.main(flags))
"""


@pytest.fixture(autouse=True)
def threads_as_found():
    """A run taken up again sets the thread count that it began with."""
    found = torch.get_num_threads()
    yield
    torch.set_num_threads(found)


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    """The out folder of the run that nothing happened to."""
    out = tmp_path_factory.mktemp("unkilled")
    ended = runs.end(runs.start(*FLAGS, "--out", out))
    assert ended.code == 0, ended.err
    return out


def same(a, b):
    assert runs.history(a, loop.TIME_FIELDS) == runs.history(b, loop.TIME_FIELDS)
    for name in KEPT:
        found, expected = ((folder / f"{name}.safetensors").read_bytes() for folder in (a, b))
        assert found == expected, name
    assert runs.result(a)["metrics"] == runs.result(b)["metrics"]
    assert runs.result(a)["averaged"] == runs.result(b)["averaged"]
    left = [name for name in runs.files(a) if name.endswith((".new", ".old"))]
    assert left == []


def copy(folder, tmp_path):
    """A copy of a run that may be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


def unfinished(folder, tmp_path):
    """A copy of a run as it was before its last figures were written."""
    out = copy(folder, tmp_path)
    (out / "result.json").unlink()
    return out


@pytest.mark.parametrize(
    ("where", "epochs_done"),
    [
        ("train.loop Trainer._step 2", 0),  # amid the first epoch
        ("train.state save 2", 1),  # between best/ and last/ of the second
        ("pathlib Path.rename 4", 1),  # last/ has become last.old, and last.new is not last/ yet
        ("train.loop Trainer._step 9", 2),  # amid the last epoch
        ("train.run draw 1", 3),  # trained, not reported
    ],
    ids=["first epoch", "between", "amid a replacement", "last epoch", "report"],
)
def test_kill_and_resume(unkilled, tmp_path, capsys, where, epochs_done):
    out = tmp_path / "run"
    ended = runs.end(runs.start(*where.split(), *FLAGS, "--out", out, code=KILLED))
    assert ended.code == -signal.SIGKILL, ended.err
    assert not (out / "result.json").exists()
    torch.set_num_threads(2)  # the run began with one thread, and goes on with one
    again = runs.run(capsys, "--resume", "--out", out)
    assert again.code == 0, again.err
    expected = f"going on after epoch {epochs_done}" if epochs_done else "no epoch was finished: from the start"
    assert expected in again.out
    same(out, unkilled)
    assert torch.get_num_threads() == 1


def test_kill_amid_a_replacement_leaves_a_whole_checkpoint(unkilled, tmp_path):
    out = copy(unkilled, tmp_path)
    (out / "best").rename(out / "best.old")
    (out / "best.new").mkdir()  # begun and not finished
    assert checkpoint.load(out)[0]
    assert (out / "best").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_at_random_moments(unkilled, tmp_path):
    chance = random.Random(0)
    started = time.perf_counter()
    assert runs.end(runs.start(*FLAGS, "--out", tmp_path / "timed")).code == 0
    whole = time.perf_counter() - started
    for number in range(10):
        out, kills = tmp_path / str(number), 0
        while not (out / "result.json").exists():
            begun = (out / "settings.json").exists()
            process = runs.start(*FLAGS, *(["--resume"] if begun else []), "--out", out)
            if kills < 2:  # twice, so that a run taken up again is killed as well
                time.sleep(chance.uniform(0.3, 1.0) * whole)
                process.send_signal(signal.SIGKILL)
                kills += 1
            ended = runs.end(process)
            assert ended.code in (0, -signal.SIGKILL), ended.err
        same(out, unkilled)


def test_ctrl_c_says_how_to_go_on(unkilled, tmp_path):
    out = tmp_path / "run"
    process = runs.start(*FLAGS, "--out", out)
    while not (out / "last").exists():  # the first epoch is over, two are not
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    ended = runs.end(process)
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    command = re.fullmatch(r"\s*interrupted: go on with `python -m (train.run .*)`\.\s*", ended.err).group(1)
    assert command == f"train.run --resume --out {out}"
    assert runs.end(runs.start(*command.split()[1:])).code == 0
    same(out, unkilled)


def test_ctrl_c_before_anything_was_written(tmp_path, capsys, monkeypatch):
    def pressed(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", pressed)
    ended = runs.run(capsys, *FLAGS, "--out", tmp_path / "run")
    assert (ended.code, ended.out) == (130, "")
    assert ended.err == "\ninterrupted: nothing had been written yet.\n"
    assert not (tmp_path / "run").exists()


def test_finished_run_is_left_alone(unkilled, capsys):
    before = {name: (unkilled / name).stat().st_mtime_ns for name in runs.files(unkilled)}
    ended = runs.run(capsys, "--resume", "--out", unkilled)
    assert (ended.code, ended.err) == (0, "")
    assert f"The run in {unkilled} is finished" in ended.out
    assert before == {name: (unkilled / name).stat().st_mtime_ns for name in runs.files(unkilled)}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--epochs", "5"], "--epochs was 3 and is 5"),
        (["--lr", "0.5", "--model", "aum"], "--lr was 0.001 and is 0.5; --model was ast and is aum"),
        (["--no-noise"], "--noise was True and is False"),
        (["--seed", "8"], "--seed was 7 and is 8"),
        (["--fused"], "--fused was False and is True"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_settings_are_named(unkilled, capsys, flags, named):
    before = runs.files(unkilled)
    ended = runs.run(capsys, "--resume", "--out", unkilled, *flags)
    assert named in ended.sentence
    assert before == runs.files(unkilled)


def test_settings_given_again_and_those_that_may_differ(unkilled, tmp_path, capsys):
    moved = unfinished(unkilled, tmp_path)  # the out path differs
    ended = runs.run(capsys, "--resume", *FLAGS, "--out", moved, "--device", "auto", "--workers", 3)
    assert ended.code == 0, ended.err
    same(moved, unkilled)
    assert runs.result(moved)["settings"]["out"] == str(moved)


def test_resume_needs_a_run(tmp_path, capsys):
    assert "--resume needs the run's folder" in runs.run(capsys, "--resume").sentence
    for folder in (tmp_path, tmp_path / "absent"):
        assert f"{folder} holds no run" in runs.run(capsys, "--resume", "--out", folder).sentence
    assert runs.files(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("settings.json", b"{"),
        ("settings.json", b"[]"),
        ("settings.json", b'{"settings": {}}'),
        ("settings.json", b"\xff\xfe"),
        ("last/state.json", b""),
        ("last/state.json", b"{}"),
        ("last/state.json", None),
        ("last/state.safetensors", b"\x10\0\0"),
        ("last/state.safetensors", None),
        ("last/model.safetensors", "half"),
    ],
)
def test_damaged_runs_are_refused(unkilled, tmp_path, capsys, file, content):
    out = unfinished(unkilled, tmp_path)
    if content is None:
        (out / file).unlink()
    else:
        whole = (out / file).read_bytes()
        (out / file).write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    before = runs.files(out)
    assert file in runs.run(capsys, "--resume", "--out", out).sentence
    assert runs.files(out) == before


def folder_run(tmp_path, capsys):
    """(data root, out folder) of an unfinished run on noise in two class folders."""
    for name in ("a", "b"):
        make_files(tmp_path / "data" / name, 8)
    flags = ("--data", "folder", "--data-root", tmp_path / "data", "--batch-size", 4, "--frames", 64)
    runs.train(capsys, tmp_path / "run", *flags)
    (tmp_path / "run" / "result.json").unlink()
    return tmp_path / "data", tmp_path / "run"


def test_other_data_is_refused(tmp_path, capsys):
    data, out = folder_run(tmp_path, capsys)
    moved = shutil.move(data, tmp_path / "elsewhere")
    assert runs.run(capsys, "--resume", "--out", out, "--data-root", moved).code == 0  # the data may move
    (out / "result.json").unlink()
    (moved / "a" / "000.wav").unlink()
    ended = runs.run(capsys, "--resume", "--out", out, "--data-root", moved)
    assert "holds other clips than when the run began" in ended.sentence
    make_files(moved / "c", 8)
    said = runs.run(capsys, "--resume", "--out", out, "--data-root", moved).sentence
    assert "the data has c besides" in said


def test_kill_before_the_settings_leaves_a_folder_that_can_be_used(tmp_path, capsys):
    (tmp_path / "settings.json.new").write_text("{")
    runs.train(capsys, tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())
    assert not (tmp_path / "settings.json.new").exists()
