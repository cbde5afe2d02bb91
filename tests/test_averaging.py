"""The moving average of the weights is what the formula says, and what is validated, kept and tested."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from fftp import checkpoint
from tests import runs
from tests.tasks import task_of
from train import averaging, loop, run
from train.feed import Order
from train.step import Step

DECAY = 0.3  # more than (1 + n) / (10 + n) for the first three steps


def test_the_average_follows_the_weights_step_by_step():
    task = task_of(average_decay=DECAY)
    order = Order(task.train, task.settings.batch_size, 0, balanced=False)
    step = Step(task, order, total=12)
    model = task.model
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    number = 0
    for epoch in range(2):
        inputs = step.inputs(step.divided(order.epoch(epoch)), epoch)
        for _ in range(order.steps):
            step(number, epoch, islice(inputs, 1))
            d = min(DECAY, (1 + number) / (10 + number))
            expected = {n: d * expected[n] + (1 - d) * t.double() for n, t in model.state_dict().items()}
            number += 1
    assert number == 6
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with step.evaluated():
        for name, tensor in model.state_dict().items():
            # Float32 sums of weights up to 1, three roundings a step: seen 8e-8, times three.
            torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=2.5e-7)
            assert not torch.equal(tensor, own[name])
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_after_a_broken_step_nothing_changes():
    model = torch.nn.Linear(3, 2)
    average = averaging.MovingAverage(model, 0.9)
    before = [value.clone() for value in average.values]
    torch.nn.init.ones_(model.weight)
    average.update(torch.tensor(4), torch.tensor(1.0))
    assert all(torch.equal(value, old) for value, old in zip(average.values, before, strict=True))
    average.update(torch.tensor(4), torch.tensor(0.0))
    assert not torch.equal(average.values[0], before[0])


def test_a_block_that_fails_leaves_the_weights():
    model = torch.nn.Linear(3, 2)
    average = averaging.MovingAverage(model, 0.9)
    torch.nn.init.ones_(model.weight)

    def fails():
        with average.in_place():
            assert (model.weight != 1).all()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert (model.weight == 1).all()


@pytest.mark.parametrize("validated", [True, False], ids=["best", "last"])
def test_what_is_kept_is_what_was_evaluated(tmp_path, capsys, monkeypatch, validated):
    """The figures of result.json are those of the checkpoint that the run's folder stands for."""
    seen, evaluate = [], loop.evaluate

    def watched(task, feed):
        seen.append({name: tensor.clone() for name, tensor in task.model.state_dict().items()})
        return evaluate(task, feed)

    monkeypatch.setattr(loop, "evaluate", watched)
    if not validated:
        build = run.build
        monkeypatch.setattr(run, "build", lambda *given: replace(build(*given), validation=None))
    runs.train(capsys, tmp_path, "--average-decay", 0.9, "--epochs", 2)
    kept = checkpoint.load(tmp_path)[0].state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in seen[-1].items())
    last = checkpoint.read_tensors(tmp_path / "last" / "state.safetensors")
    assert not torch.equal(last["weights.head.weight"], kept["head.weight"])
