"""The captured step: its buffers make the steps that plain arguments make, and what a graph would bake in is found."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch

from bench import gpu as gpu_call
from fftp.errors import UserError
from kernels import ranges
from tests import runs
from tests.recorded import Recorded
from tests.tasks import task_of
from train import graph
from train.feed import Order
from train.step import Step

ALL = {
    "augment": "specmask",
    "mixup": 0.5,
    "roll": True,
    "noise": True,
    "gain_db": 6.0,
    "seed": 5,
    "average_decay": 0.3,
    "shift_ms": 80,
    "speed": 0.1,
    "background": 0.7,
    "keep_tokens": 2,
    "optimiser": "muon",
}


def trained(task, capture=None, steps=3):
    """(losses, weights) of two epochs of so many steps, eager or with what `capture` makes of them."""
    order = Order(task.train, task.settings.batch_size, task.settings.seed, balanced=False)
    plain = Step(task, order, total=12)
    step = plain if capture is None else graph.Graphed(plain, capture)
    losses = []
    for epoch in range(2):
        inputs = step.inputs(plain.divided(order.epoch(epoch)[:steps]), epoch)
        for i in range(steps):
            losses.append(float(step(epoch * steps + i, epoch, islice(inputs, plain.parts))))
    assert int(plain.broken_step) == -1
    weights = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    with plain.evaluated():
        return losses, weights | {f"average of {name}": t.clone() for name, t in task.model.state_dict().items()}


def assert_same(one, other):
    assert len(set(one[0])) == len(one[0])
    assert one[0] == other[0]
    assert all(torch.equal(tensor, other[1][name]) for name, tensor in one[1].items())


@pytest.mark.parametrize(("streamed", "accumulate"), [(False, 1), (True, 3)], ids=["resident", "streamed, in 3 parts"])
def test_buffers_make_the_steps_of_plain_arguments(streamed, accumulate):
    plain = trained(task_of(streamed=streamed, accumulate=accumulate, **ALL))
    assert_same(trained(task_of(streamed=streamed, accumulate=accumulate, **ALL), lambda body: body), plain)


def test_a_recording_finds_what_a_graph_would_bake_in():
    """The stand-in itself: buffers are read anew, numbers of Python are not, and a look at the device is refused."""
    factor, number = torch.ones(2), [1.0]
    out = torch.zeros(2)
    recorded = Recorded(lambda: out.copy_(factor * 3 + number[0]))
    for value in (1.0, 2.0, 3.0, 4.0):
        factor.fill_(value)
        number[0] = value
        recorded()
    assert out.tolist() == [14.0, 14.0]  # 4 * 3, and the 2 of the recorded call
    looking = Recorded(lambda: out.fill_(float(factor[0])))
    looking.calls = Recorded.warm_up
    with pytest.raises(AssertionError, match="looks at a number on the host"):
        looking()


def test_a_graph_that_is_asked_for(device, tmp_path, capsys):
    """On a GPU the losses are those without it; elsewhere a sentence says why it cannot be had."""
    if device == "cpu":
        flags = [*runs.TINY, "--fused", "--device", device]
        said = runs.run(capsys, *flags, "--graph", "on", "--out", tmp_path / "on").sentence
        assert said == "--graph on cannot be had here (CUDA graphs need a GPU): leave it out, or take --graph off."
        assert not (tmp_path / "on").exists()
        return
    losses = {}
    values = {"synth_train": 60, "synth_validation": 20, "synth_test": 20, "batch_size": 20, "depth": 1, "epochs": 3}
    values |= {"device": device, "precision": "float32", "fused": True, "log_every": 1, "mixup": 0.5}
    for name in ("on", "off"):
        given = json.dumps(values | {"graph": name})  # a machine with a GPU may lack what reads a command line
        ended = runs.end(runs.start(tmp_path / name, given, code=gpu_call.TRAIN), seconds=200)
        assert ended.code == 0, ended.err
        losses[name] = [loss for line in runs.history(tmp_path / name) for loss in line["losses"].values()]
        assert runs.result(tmp_path / name)["graph"] == (name == "on")
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-4)


def test_why_a_step_is_not_captured(monkeypatch):
    task = task_of(fused=True)
    assert graph.reason_against(task) == "CUDA graphs need a GPU"
    assert graph.reason_against(task_of(graph="off")) == "--graph off"
    with pytest.raises(UserError, match=r"--graph on cannot be had here \(CUDA graphs need a GPU\)"):
        graph.reason_against(task_of(graph="on"))
    gpu = _on_gpu(task)
    assert "fbank=reference" in graph.reason_against(gpu)
    assert "--fit resize" in graph.reason_against(_on_gpu(task_of(fit="resize")))
    monkeypatch.setenv("FFTP_BACKEND", "fbank=triton")
    assert graph.reason_against(gpu) is None
    monkeypatch.setattr(ranges, "watched", lambda: True)
    assert "NVTX" in graph.reason_against(gpu)
    monkeypatch.setattr("train.parallel.size", lambda: 2)
    assert "several processes" in graph.reason_against(gpu)


def _on_gpu(task):
    """The task as it would be where there is a GPU; nothing of it can run."""
    return replace(task, device=torch.device("cuda"))
