"""--init: what a run begins from, how its weights are fitted, rates of head and body, exact resume, what is refused."""

import json
import shutil

import pytest
import torch

from fftp import checkpoint
from fftp.patching import resize_kernel, resize_positions
from tests import runs
from tests.tasks import task_of
from train import loop, start
from train.settings import Settings
from train.step import Step, optimiser_of

FINE = ("--body-lr-scale", "0.25", "--time-stride", "8", "--epochs", "2", "--seed", "5")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a checkpoint with weights that no run would draw."""
    task = task_of(seed=3)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("source")
    checkpoint.save(folder, task.model, task.config)
    return folder


@pytest.fixture
def relabelled(source, tmp_path):
    """The same for other classes."""
    folder = shutil.copytree(source, tmp_path / "relabelled")
    config = json.loads((folder / "config.json").read_text())
    config["labels"] = [f"other {i}" for i, _ in enumerate(config["labels"])]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights(folder):
    return checkpoint.load(folder)[0].state_dict()


def test_weights_as_they_are(source):
    task, held = task_of(init=str(source)), weights(source)
    assert all(torch.equal(tensor, held[name]) for name, tensor in task.model.state_dict().items())
    assert task.began_from["changes"] == []
    assert start.line(task.began_from) == f"begins from {source}: weights as they are"


def test_the_eps_of_the_norms_comes_along(source, tmp_path):
    """As a converted checkpoint of transformers has it; no flag names it."""
    folder = shutil.copytree(source, tmp_path / "eps")
    config = json.loads((folder / "config.json").read_text())
    config["architecture"]["eps"] = 1e-12
    (folder / "config.json").write_text(json.dumps(config))
    task = task_of(init=str(folder))
    assert (task.config.model.eps, task.model.blocks[0].norm1.eps, task.model.head_norm.eps) == (1e-12, 1e-12, 1e-12)
    assert task_of(init=str(source)).model.head_norm.eps == 1e-5


def test_other_classes_have_a_new_head(relabelled):
    """Drawn by the seed, as a run from nothing would draw it."""
    task, held, plain = task_of(init=str(relabelled)), weights(relabelled), task_of().model.state_dict()
    for name, tensor in task.model.state_dict().items():
        wanted = plain if name.startswith("head.") else held
        assert torch.equal(tensor, wanted[name]), name
    n = len(task.config.labels)
    assert task.began_from["changes"] == [f"a new head of {n} classes in place of {n}"]


@pytest.mark.parametrize(
    "changed", [{"frames": 48}, {"time_stride": 4}, {"patch_time": 5}, {"patch": "square", "patch_freq": 8}]
)
def test_another_grid_is_fitted_by_the_resizing_rules(source, changed):
    """Those of test_patch_embed and of fftp.convert; a new patch size says what it costs."""
    task, held = task_of(init=str(source), **changed), weights(source)
    old, new = checkpoint.load(source)[1].model.grid, task.config.model.grid
    assert new != old
    position, kernel = resize_positions(held["embed.position"], 2, old, new), held["embed.weight"]
    wanted = held | {"embed.position": position, "embed.weight": resize_kernel(kernel, new.pt, new.pf)}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in task.model.state_dict().items())
    assert "embedding resized" in start.line(task.began_from)
    assert ("warning: patch kernels" in start.line(task.began_from)) == ("patch_time" in changed or "patch" in changed)


@pytest.mark.parametrize("optimiser", ["adamw", "adam"])
def test_rates_of_head_and_body(optimiser):
    model = task_of().model
    optim = optimiser_of(model, Settings(optimiser=optimiser, lr=0.5, body_lr_scale=0.1, weight_decay=0.0))
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optim.param_groups for p in group["params"]}
    head = {"head.weight", "head.bias", "head_norm.weight", "head_norm.bias"}
    assert {name for name, rate in rates.items() if rate == 0.5} == head
    assert {rate for name, rate in rates.items() if name not in head} == {0.05}
    assert rates.keys() == set(names.values())


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_step_moves_the_body_by_its_share(scale):
    """Without decay an AdamW step is proportional to the rate: the body moves by its share, the head as ever."""

    def moved(scale):
        task = task_of(body_lr_scale=scale, weight_decay=0.0, warmup_epochs=0.0, lr=2.0**-6)
        before = {n: p.detach().clone() for n, p in task.model.named_parameters()}
        order = loop.Order(task.train, task.settings.batch_size, 0, False)
        step = Step(task, order, 4)
        step(0, 0, step.inputs(step.divided(order.epoch(0)[:1]), 0))
        return {n: p.detach() - before[n] for n, p in task.model.named_parameters()}

    whole, part = moved(1.0), moved(scale)
    assert whole["blocks.0.fc1.weight"].any()
    for name, change in whole.items():
        share = 1.0 if name.startswith("head") else scale
        torch.testing.assert_close(part[name], share * change, rtol=0, atol=2e-7, msg=name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(A run's folder, the folder of one that began from it); one epoch and two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.run.draw", lambda *_: None)
        first, second = tmp_path_factory.mktemp("a") / "first", tmp_path_factory.mktemp("b") / "second"
        from train.run import main

        assert main([*runs.TINY, "--epochs", "1", "--out", str(first)]) == 0
        assert main([*runs.TINY, *FINE, "--init", str(first), "--out", str(second)]) == 0
    return first, second


def test_settings_and_result_say_from_what_it_began(trained, capsys):
    first, second = trained
    begun = runs.result(second)["began_from"]
    assert begun["checkpoint"] == str(first)
    assert len(begun["changes"]) == 1
    assert json.loads((second / "settings.json").read_text())["resolved"]["init"] == begun
    assert checkpoint.load(second)[1].settings["init"] == str(first)
    assert "began_from" not in runs.result(first)


@pytest.mark.parametrize(
    ("stop", "gone"), [(2, False), (5, True)], ids=["first epoch", "second, and its source is gone"]
)
def test_exact_resume(trained, stop, gone, tmp_path, capsys, monkeypatch):
    """Stopped amid an epoch and taken up again: the bits of the run that never was. Its own weights need no source."""
    first, second = trained
    source = shutil.copytree(first, tmp_path / "source")
    out, real, count = tmp_path / "run", loop.Trainer._step, iter(range(100))

    def stopping(trainer, *arguments):
        if next(count) == stop - 1:
            raise KeyboardInterrupt
        return real(trainer, *arguments)

    monkeypatch.setattr(loop.Trainer, "_step", stopping)
    assert runs.run(capsys, *runs.TINY, *FINE, "--init", source, "--out", out).code == 130
    monkeypatch.setattr(loop.Trainer, "_step", real)
    if gone:
        shutil.rmtree(source)
    ended = runs.run(capsys, "--resume", "--out", out)
    assert ended.code == 0, ended.err
    assert f"begins from {source}: embedding resized" in ended.out
    for name in ("best", "last"):
        assert weights(out / name).keys() == weights(second / name).keys()
        content = [(folder / name / "model.safetensors").read_bytes() for folder in (out, second)]
        assert content[0] == content[1], name
    assert runs.result(out)["metrics"] == runs.result(second)["metrics"]


def test_a_source_that_changed_is_refused(trained, tmp_path, capsys, monkeypatch):
    source = shutil.copytree(trained[0], tmp_path / "source")
    monkeypatch.setattr(loop.Trainer, "epoch", lambda trainer: (_ for _ in ()).throw(KeyboardInterrupt))
    flags = (*runs.TINY, *FINE, "--init", source, "--out", tmp_path / "run")
    assert runs.run(capsys, *flags).code == 130
    path = source / "best" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    said = runs.run(capsys, "--resume", "--out", tmp_path / "run").sentence
    assert f"--init {source} holds other weights than when the run began" in said
    shutil.rmtree(source)
    assert "There is no checkpoint at" in runs.run(capsys, "--resume", "--out", tmp_path / "run").sentence
    said = runs.run(capsys, "--resume", "--out", tmp_path / "run", "--init", "other").sentence
    assert f"--init was {source} and is other" in said


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--model", "aum"), "holds an AST of 1 layers, 192 wide, positions learned, 3 heads, class tokens: 2, and this run "
                             "would train an AuM of 1 layers, 192 wide, positions learned, 16 states, directions v1, class "
                             "token middle: give --model ast --size tiny --depth 1 --tokens 2 --positions learned"),
        (("--size", "small"), "would train an AST of 1 layers, 384 wide, positions learned, 6 heads, class tokens: 2: "
                              "give --size tiny"),
        (("--depth", "0"), "would train an AST of 12 layers, 192 wide, positions learned, 3 heads, class tokens: 2: "
                           "give --depth 1"),
        (("--tokens", "1", "--positions", "none"), "give --tokens 2 --positions learned"),
    ],
)  # fmt: skip
def test_another_make_is_refused_before_any_data_is_read(source, flags, wanted, capsys, tmp_path):
    out = tmp_path / "run"
    flags = ("--data", "folder", "--data-root", tmp_path / "absent", "--depth", "1", *flags)
    said = runs.run(capsys, *flags, "--init", source, "--out", out).sentence
    assert f"--init {source} " in said
    assert wanted in said
    assert not out.exists()


def test_what_is_no_checkpoint_is_refused(source, capsys, tmp_path):
    assert "There is no checkpoint at" in runs.run(capsys, *runs.TINY, "--init", tmp_path / "absent").sentence
    assert "is not a checkpoint of this library" in runs.run(capsys, *runs.TINY, "--init", tmp_path).sentence
    damaged = shutil.copytree(source, tmp_path / "damaged")
    (damaged / "model.safetensors").unlink()
    flags = ("--depth", "1", "--init", damaged, "--out", tmp_path / "run")
    assert "model.safetensors is missing" in runs.run(capsys, *runs.TINY, *flags).sentence
    assert "--body-lr-scale has to be 0 or more" in runs.run(capsys, "--body-lr-scale", "-1").sentence
