"""One run over several processes, or in micro-batches, is the run of one process: losses, figures, weights, sentences."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fftp import checkpoint
from fftp.errors import UserError
from tests import runs
from tests.test_resume import KILLED
from train import loop, parallel, run

# Three steps of 21 clips an epoch: no even number of processes shares them equally, nor do two, four or five parts.
FLAGS = [
    *runs.TINY, "--synth-train", "63", "--synth-validation", "21", "--synth-test", "19", "--batch-size", "21",
    *("--mixup", "0.5", "--noise", "--roll", "--balanced", "--average-last", "2", "--log-every", "1", "--seed", "3"),
    *("--average-decay", "0.9", "--shift-ms", "100", "--speed", "0.1", "--background", "0.7", "--keep-tokens", "24"),
]  # fmt: skip
# Kills the process of rank 1 with signal 9 in the n-th call of a function, see test_resume; any other is left alone.
KILLED_SECOND = KILLED.replace("if count == int(number)", "if os.environ['RANK'] == '1' and count == int(number)")
# The data set is refused by the process of rank 1 alone.
REFUSED_BY_SECOND = """
import os, sys
from fftp import checkpoint
from fftp.errors import UserError
from train import data, run
def load(settings, real=data.load):
    if os.environ["RANK"] == "1":
        raise UserError("only the second process sees this")
    return real(settings)
data.load = load
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process with whole batches."""
    out = tmp_path_factory.mktemp("one")
    assert run.main([*FLAGS, "--out", str(out)]) == 0
    return out


def torchrun(processes, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "train.run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, flags)], cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def assert_same_run(out, expected):
    """Losses, figures and weights agree but for the order of float32 sums.

    Seen: losses apart by 1.3e-7 of themselves, all weights together by 1.3e-6 of how far training moved them. Not weight by
    weight: the gradient of a key's bias is nothing but rounding, which AdamW divides by its own size.
    """
    lines, wanted = runs.history(out, loop.TIME_FIELDS), runs.history(expected, loop.TIME_FIELDS)
    assert len(lines) == len(wanted)
    for line, other in zip(lines, wanted, strict=True):
        assert line["losses"] == pytest.approx(other["losses"], rel=2e-6)
        assert line.keys() == other.keys()
        for name in line.keys() - {"losses"}:
            assert line[name] == pytest.approx(other[name], rel=2e-6), name
    result, other = runs.result(out), runs.result(expected)
    assert result["metrics"] == pytest.approx(other["metrics"], rel=2e-6)
    assert result["averaged"]["metrics"] == pytest.approx(other["averaged"]["metrics"], rel=2e-6)
    torch.manual_seed(3)
    start = flat(checkpoint.load(expected)[1].build().state_dict())
    ends = [flat(load_file(folder / "last" / "model.safetensors")) for folder in (out, expected)]
    assert (ends[0] - ends[1]).norm() <= 1e-5 * (ends[1] - start).norm()


def flat(tensors):
    """All tensors, by name, as one vector."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_two_processes_of_torchrun_make_the_run_of_one(one, tmp_path):
    out = tmp_path / "run"
    ended = torchrun(2, *FLAGS, "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert_same_run(out, one)
    assert ended.stdout.count("test (19 clips") == 1  # one process speaks
    assert "a step: 21 clips over 2 processes" in ended.stdout
    assert runs.result(out)["processes"] == 2
    assert runs.result(one)["processes"] == 1
    assert json.loads((out / "settings.json").read_text())["resolved"]["processes"] == 2
    assert runs.files(out / "last") == runs.files(one / "last")


@pytest.mark.parametrize("parts", [4, pytest.param(21, marks=pytest.mark.slow)])
def test_micro_batches_add_up_to_the_batch(one, tmp_path, capsys, parts):
    ended = runs.run(capsys, *FLAGS, "--accumulate", parts, "--out", tmp_path)
    assert ended.code == 0, ended.err
    assert f"a step: 21 clips in {parts} micro-batches" in ended.out
    assert_same_run(tmp_path, one)


def test_more_micro_batches_than_clips_are_refused(tmp_path, capsys):
    said = runs.run(capsys, *FLAGS, "--accumulate", 22, "--out", tmp_path / "run").sentence
    assert "a step has 21 clips, too few for one in each part: take --accumulate 21 or less" in said
    assert not (tmp_path / "run").exists()  # a run that cannot begin leaves nothing that would be in the way
    assert "--accumulate has to be at least 1" in runs.run(capsys, "--accumulate", 0).sentence


@pytest.mark.timeout(200)
def test_when_one_is_killed_the_other_says_so_and_the_run_goes_on_with_one(one, tmp_path, capsys):
    out = tmp_path / "run"
    where = ("train.loop", "Trainer._step", 5, *FLAGS)  # amid the second epoch
    first, second = map(runs.end, runs.start_several(2, *where, "--accumulate", 2, "--out", out, code=KILLED_SECOND))
    assert (second.code, second.err) == (-signal.SIGKILL, "")
    assert first.code == 1, first.err
    command = f"torchrun --nproc-per-node 2 -m train.run --resume --out {out}"
    said = r"error: another process of this run ended or cannot be reached \(.+\), so this one ends too: "
    said += rf"go on with `{command}`\."
    assert re.fullmatch(said, first.err.strip()), first.err
    assert not (out / "result.json").exists()
    found = torch.get_num_threads()
    ended = runs.run(capsys, "--resume", "--out", out, "--accumulate", 1)
    assert ended.code == 0, ended.err
    assert "going on after epoch 1" in ended.out
    assert torch.get_num_threads() == found  # the threads of one of two processes say nothing about one alone
    assert runs.result(out)["processes"] == 1
    assert_same_run(out, one)


@pytest.mark.slow
def test_what_one_process_cannot_do_ends_all_with_one_sentence(tmp_path):
    processes = runs.start_several(2, *FLAGS, "--out", tmp_path / "run", code=REFUSED_BY_SECOND)
    first, second = map(runs.end, processes)
    assert first.sentence == "only the second process sees this"
    assert (second.code, second.out, second.err) == (2, "", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_under_torchrun_and_going_on_with_three_then_two(one, tmp_path):
    """The first process dies in the first epoch, by a signal from outside; then one of three, in the second."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "train.run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    whole = subprocess.Popen([*command, *FLAGS, "--out", str(out)], cwd=runs.ROOT, **pipes)
    while not (out / "settings.json").exists():
        assert whole.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{whole.pid}/task/{whole.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    ended = runs.end(whole)
    assert ended.code == 1
    assert f"go on with `torchrun --nproc-per-node 2 -m train.run --resume --out {out}`." in ended.err
    where = ("train.loop", "Trainer._step", 5, "--resume", "--out", out)
    three = list(map(runs.end, runs.start_several(3, *where, code=KILLED_SECOND)))
    assert [process.code for process in three] == [1, -signal.SIGKILL, 1]
    assert runs.history(out)[-1]["epoch"] == 1
    two = torchrun(2, "--resume", "--out", out, "--accumulate", 3)
    assert two.returncode == 0, two.stderr
    assert "going on after epoch 1" in two.stdout
    assert_same_run(out, one)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "flags", [("--model", "aum"), ("--precision", "bfloat16"), ("--fused", "--optimiser", "muon")], ids=" ".join
)
def test_other_models_and_precisions(flags, tmp_path):
    """AuM, the fused backends, and bfloat16, whose losses agree to what its products round."""
    for name, processes in (("one", 1), ("three", 3)):
        ended = torchrun(processes, *FLAGS, *flags, "--out", tmp_path / name)
        assert ended.returncode == 0, ended.stderr
    losses = [
        [loss for line in runs.history(tmp_path / name) for loss in line["losses"].values()]
        for name in ("one", "three")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if "bfloat16" in flags else 1e-5)


def test_a_killed_run_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    real, before = loop.Trainer._step, signal.getsignal(signal.SIGTERM)

    def terminated(trainer, number, *arguments):
        if number == 4:  # amid the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer, number, *arguments)

    monkeypatch.setattr(loop.Trainer, "_step", terminated)
    out = tmp_path / "run"
    ended = runs.run(capsys, *runs.TINY, "--out", out)
    assert ended.code == 143
    assert ended.err == f"\nterminated (SIGTERM): go on with `python -m train.run --resume --out {out}`.\n"
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    assert "going on after epoch 1" in runs.run(capsys, "--resume", "--out", out).out


WAITING = """
import ctypes, sys
from pathlib import Path
from train import ending
ending.GRACE = 0.1
with ending.terminable(lambda: Path(sys.argv[1])):
    # As a wait for a GPU or in a collective: no signal reaches Python meanwhile.
    ctypes.CDLL(None).system(b"echo waiting; exec sleep 30 >/dev/null 2>&1")
"""


@pytest.mark.slow
def test_a_process_that_waits_for_others_hears_sigterm_too(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    process = runs.start(tmp_path, code=WAITING)
    assert process.stdout.readline() == "waiting\n"
    process.terminate()
    ended = runs.end(process)
    assert ended.code == 143, ended.err
    assert ended.err == f"\nterminated (SIGTERM): go on with `python -m train.run --resume --out {tmp_path}`.\n"


@pytest.mark.parametrize(("n", "count"), [(21, 2), (5, 5), (3, 4), (0, 3), (1000, 7)])
def test_pieces_cover_everything_once_and_differ_by_one(n, count):
    spans = parallel.pieces(n, count)
    assert np.concatenate([np.arange(n)[span] for span in spans]).tolist() == list(range(n))
    sizes = [span.stop - span.start for span in spans]
    assert len(sizes) == count
    assert max(sizes) - min(sizes) <= 1


def test_a_step_smaller_than_the_number_of_processes(monkeypatch):
    from train.step import check_parts

    monkeypatch.setattr(parallel, "size", lambda: 4)
    with pytest.raises(UserError, match=r"3 clips for 4 processes, too few .* take fewer processes, or a larger"):
        check_parts(3, 1)
    with pytest.raises(UserError, match="take --accumulate 2 or less"):
        check_parts(11, 3)
    check_parts(11, 2)


def test_processes_that_do_not_meet_say_so(capsys, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    said = runs.run(capsys, *FLAGS).sentence
    assert re.search("The 2 processes that WORLD_SIZE speaks of did not find each other .* or unset WORLD_SIZE", said)
