"""The training loop: its schedule, its losses, what a run leaves behind, and that nothing in it is left to chance."""

import json
import math
import os
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from fftp import aum_model, checkpoint
from fftp.errors import UserError
from fftp.frontend import FrontEndSettings
from fftp.patching import PatchGrid
from kernels import FbankSettings, dispatch, ranges
from tests import runs
from tests.made_data import make_files
from tests.tasks import task_of
from train import loop
from train.first_lines import length_line
from train.run import check_backends, seconds_to
from train.settings import Settings
from train.step import learning_rate, loss_of, optimiser_of

GRID = PatchGrid(T=32, F=32, pt=8, pf=32, st=8, sf=32)


def test_learning_rate_rises_in_a_line_and_falls_as_a_cosine():
    settings = Settings(lr=2.0, lr_end=0.1, warmup_epochs=2.0, epochs=10)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    np.testing.assert_allclose(rates[:20], 2.0 * np.arange(1, 21) / 20)
    expected = [2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 80))) for k in range(80)]
    np.testing.assert_allclose(rates[20:], expected)
    assert rates[-1] > 0.2 > 0.99 * rates[-1]  # ends near lr_end of the peak


@pytest.mark.parametrize("changed", [{"warmup_epochs": 0.0}, {"warmup_epochs": 5.0, "epochs": 2}, {"lr_end": 1.0}])
@pytest.mark.parametrize("total", [1, 2, 37])
def test_learning_rate_is_above_zero_and_reaches_its_peak_whatever_is_asked(changed, total):
    settings = Settings(lr=0.5, **changed)
    rates = [learning_rate(settings, step, total) for step in range(total)]
    assert min(rates) > 0
    assert max(rates) == pytest.approx(0.5)


def test_cross_entropy_with_soft_targets():
    generator = torch.Generator().manual_seed(0)
    logits, soft = torch.randn(7, 5, generator=generator), torch.rand(7, 5, generator=generator)
    hard = torch.eye(5)[[0, 1, 2, 3, 4, 0, 0]]
    got = loss_of(logits, hard, Settings(), multi_label=False)
    assert torch.equal(got, nnf.cross_entropy(logits, hard.argmax(1)))
    share = soft / soft.sum(1, keepdim=True)
    by_hand = -(share.double() * logits.double().log_softmax(1)).sum(1).mean()
    # float32 against float64: seen 2e-7 of 2, times five.
    assert float(loss_of(logits, soft, Settings(), False)) == pytest.approx(float(by_hand), abs=1e-6)
    smoothed = 0.9 * share + 0.1 / 5
    by_hand = -(smoothed.double() * logits.double().log_softmax(1)).sum(1).mean()
    got = loss_of(logits, soft, Settings(label_smoothing=0.1), False)
    assert float(got) == pytest.approx(float(by_hand), abs=1e-6)


def test_binary_cross_entropy_is_the_mean_over_clips_and_classes():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(7, 5, generator=generator), torch.rand(7, 5, generator=generator)
    p = logits.double().sigmoid()
    by_hand = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    for settings, multi_label in ((Settings(), True), (Settings(loss="bce"), False), (Settings(loss="bce"), True)):
        assert float(loss_of(logits, targets, settings, multi_label)) == pytest.approx(float(by_hand), abs=1e-6)
    low = loss_of(logits.bfloat16(), targets, Settings(), True)
    assert low.dtype == torch.float32


@pytest.mark.parametrize("directions", ["v1", "v2"])
def test_weight_decay_spares_vectors_tokens_positions_and_scan_decays(directions):
    model = aum_model.AuM(aum_model.AuMConfig(grid=GRID, classes=4, dim=32, depth=1, directions=directions))
    optimiser = optimiser_of(model, Settings(weight_decay=0.05, beta1=0.95))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in optimiser.param_groups)
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0.05, 0.0]
    assert optimiser.param_groups[0]["betas"] == (0.95, 0.999)
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    assert {"embed.weight", "head.weight", "layers.0.mixer.in_proj.weight"} <= decayed
    spared = {"embed.bias", "embed.class_token", "embed.position", "head.bias", "layers.0.norm.weight"}
    assert spared | {"layers.0.mixer.forward_branch.A_log", "layers.0.mixer.forward_branch.D"} <= kept
    assert all(name in kept for name in names.values() if "A_" in name)
    assert not any("proj.weight" in name for name in kept)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def same_run(a, b):
    """Whether two out folders hold the same figures and weights, bit for bit."""
    figures = runs.history(a, loop.TIME_FIELDS) == runs.history(b, loop.TIME_FIELDS)
    return figures and all(weights(a / name) == weights(b / name) for name in ("best", "last"))


def test_out_folder_and_result(tmp_path, capsys):
    result = runs.train(capsys, tmp_path / "run")
    out = tmp_path / "run"
    expected = {"settings.json", "metrics.jsonl", "result.json", "best", "last", "curves.png", "confusion.png"}
    assert {path.name for path in out.iterdir()} == expected | {"tensorboard", "scores_test.npz"}
    assert list((out / "tensorboard").glob("events*"))
    assert runs.drawn(out / "curves.png")
    assert runs.drawn(out / "confusion.png")
    assert set(result["metrics"]) >= {"accuracy", "balanced_accuracy"}
    assert 0 <= result["metrics"]["accuracy"] <= 1
    assert set(result["validation"]) == set(result["metrics"])
    front = {"philox", "waveforms", "fbank", "apply_spec_mask", "normalise", "patch_embed"}
    assert set(result["backends"]) == front | {
        "layer_norm",
        "gelu",
    }  # the one block has its class tokens to ask for alone
    assert set(result["backends"].values()) == {"reference"}
    assert result["parameters"] == sum(p.numel() for p in checkpoint.load(out)[0].parameters())
    assert result["macs"]["all"] > result["macs"]["paper"] > 1e6
    assert result["skipped_files"] == []
    assert result["settings"]["depth"] == 1
    assert result["clips"] == {"train": 60, "validation": 20, "test": 20}
    assert min(result["seconds"], result["samples_per_second"], result["step_ms"]) > 0
    assert isinstance(result["seconds_to"], dict)
    lines = runs.history(out)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["step"] for line in lines] == [3, 6]
    assert all(
        {"train_loss", "validation_loss", "validation_accuracy", *loop.TIME_FIELDS} <= set(line) for line in lines
    )
    best = max(range(2), key=lambda i: (lines[i]["validation_accuracy"], -i))
    assert result["reported_epoch"] == best + 1
    settings = json.loads((out / "settings.json").read_text())
    assert settings["settings"] == result["settings"]
    assert {"versions", "commit", "machine", "backends", "resolved"} <= set(settings)
    assert settings["backends"] == result["backends"]
    assert {name for name, value in settings["defaults"].items() if settings["settings"][name] != value} >= {
        "depth",
        "out",
    }
    assert settings["resolved"]["classes"] == list(checkpoint.load(out)[1].labels)


def test_time_to_each_mark_is_when_it_was_first_reached():
    history = [{"seconds": s, "validation_accuracy": a} for s, a in ((1.0, 0.55), (2.0, 0.86), (3.0, 0.84), (4.0, 0.9))]
    expected = {"0.5": 1.0, "0.6": 2.0, "0.7": 2.0, "0.8": 2.0, "0.85": 2.0, "0.9": 4.0}
    assert seconds_to(history, "validation_accuracy") == expected


def test_a_short_run_learns(tmp_path, capsys):
    flags = ("--synth-train", 1000, "--synth-validation", 100, "--synth-test", 200, "--epochs", 7, "--batch-size", 16)
    result = runs.train(capsys, tmp_path, *flags, "--time-stride", 8, "--lr", 5e-4, "--augment", "none", "--fused")
    lines = runs.history(tmp_path)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] - 0.5
    # Chance is 0.1, its standard deviation 0.02 on 200 clips. Three seeds reached 0.54 to 0.70.
    assert result["metrics"]["accuracy"] > 0.4


def test_same_seed_same_bits_and_another_seed_another_run(tmp_path, capsys):
    everything = ("--mixup", 0.5, "--noise", "--roll", "--gain-db", 3, "--average-last", 2)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        runs.train(capsys, tmp_path / name, *everything, "--seed", seed)
    assert same_run(tmp_path / "a", tmp_path / "b")
    assert weights(tmp_path / "a" / "average") == weights(tmp_path / "b" / "average")
    assert weights(tmp_path / "a" / "last") != weights(tmp_path / "c" / "last")
    assert runs.result(tmp_path / "a")["metrics"] == runs.result(tmp_path / "b")["metrics"]


def test_deterministic_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen, step = [], loop.Trainer._step

    def watched(trainer, *arguments):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return step(trainer, *arguments)

    monkeypatch.setattr(loop.Trainer, "_step", watched)
    flags = ("--mixup", 0.5, "--noise", "--roll", "--gain-db", 3, "--fused", "--model", "aum", "--max-steps", 2)
    for name in ("a", "b"):
        runs.train(capsys, tmp_path / name, *flags, "--deterministic")
    assert same_run(tmp_path / "a", tmp_path / "b")
    assert seen == [(True, ":4096:8")] * 4
    monkeypatch.undo()
    runs.train(capsys, tmp_path / "without", *flags)
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_on_a_gpu_needs_the_fused_wave_stage(monkeypatch):
    task = replace(task_of(deterministic=True), device=torch.device("cuda"))
    with pytest.raises(UserError, match="--deterministic on a GPU needs --fused: waveforms=reference"):
        check_backends(task)


def test_average_of_the_last_epochs(tmp_path, capsys, monkeypatch):
    seen, keep = [], loop.Trainer._keep

    def kept(trainer, line):
        seen.append({name: tensor.double().clone() for name, tensor in trainer.task.model.state_dict().items()})
        keep(trainer, line)

    monkeypatch.setattr(loop.Trainer, "_keep", kept)
    result = runs.train(capsys, tmp_path, "--epochs", 3, "--average-last", 2)
    assert result["averaged"]["epochs"] == 2
    assert set(result["averaged"]["metrics"]) == set(result["metrics"])
    mean = checkpoint.load(tmp_path / "average")[0].state_dict()
    for name, tensor in mean.items():
        assert torch.equal(tensor, ((seen[1][name] + seen[2][name]) / 2).float())


def losses(tmp_path, capsys, monkeypatch, *flags):
    """The loss of every step of a run."""
    seen, step = [], loop.Trainer._step

    def recorded(trainer, *arguments):
        seen.append(float(step(trainer, *arguments)))
        return torch.tensor(seen[-1])

    monkeypatch.setattr(loop.Trainer, "_step", recorded)
    runs.train(capsys, tmp_path, *flags)
    monkeypatch.undo()
    return np.array(seen)


def test_fused_and_reference_give_the_same_loss_curve(tmp_path, capsys, monkeypatch):
    """AuM, whose scan has a fused form on a CPU too; for AST's see test_triton_training.py."""
    flags = ("--model", "aum", "--epochs", 2, "--batch-size", 8, "--time-stride", 16)
    flags += ("--synth-train", 200, "--synth-validation", 10, "--synth-test", 10)
    plain = losses(tmp_path / "plain", capsys, monkeypatch, *flags)
    fused = losses(tmp_path / "fused", capsys, monkeypatch, *flags, "--fused")
    changed = runs.result(tmp_path / "fused")["backends"]
    assert changed != runs.result(tmp_path / "plain")["backends"]  # or nothing was compared
    assert {"rms_norm", "selective_scan", "causal_conv"} < changed.keys()
    # What ran is what the first line and settings.json had said.
    assert changed == json.loads((tmp_path / "fused" / "settings.json").read_text())["backends"]
    difference = np.abs(fused - plain) / plain
    assert len(difference) == 50
    # The other order of sums in the fused backends, carried on by fifty steps: seen 9e-8 at the first step and 4e-7
    # after, with much room. The project's own marks are 1e-5 and 1e-3.
    assert difference[0] <= 1e-6
    assert difference.max() <= 2e-4


def test_float32_and_bfloat16_both_run(tmp_path, capsys):
    for precision in ("float32", "bfloat16"):
        result = runs.train(capsys, tmp_path / precision, "--precision", precision)
        assert result["precision"] == precision
        assert np.isfinite(result["train_loss"])
    assert weights(tmp_path / "float32" / "last") != weights(tmp_path / "bfloat16" / "last")


@pytest.mark.parametrize("model", ["ast", "aum"])
def test_the_run_file_names_all_backends_that_run(tmp_path, capsys, model):
    runs.train(capsys, tmp_path, "--fused", "--precision", "bfloat16", "--model", model, "--depth", 2, "--max-steps", 1)
    named = json.loads((tmp_path / "settings.json").read_text())["backends"]
    found = dispatch.in_use()
    assert {"patch_embed", "linear"} < set(found)
    assert {name: named.get(name) for name in found} == found


@pytest.mark.parametrize("model", ["ast", "aum"])
def test_every_part_of_a_step_has_its_range(tmp_path, capsys, monkeypatch, model):
    seen, inside = [], []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            seen.append((*inside, self.name))
            inside.append(self.name)

        def __exit__(self, *raised):
            inside.pop()

    monkeypatch.setattr(ranges, "range", Recorded)
    runs.train(capsys, tmp_path, "--model", model, "--max-steps", 1)
    step = ["load", "front end", "mask", "embed", "encoder", "head", "backward", "optimiser"]
    assert seen[: len(step)] == [(name,) for name in step]  # in order, none in another
    assert inside == []


def make_multi_label(folder):
    """Thirty recordings of noise with two labels a clip, in a CSV with folds."""
    files = make_files(folder / "audio", 30)
    rows = ["file,label,split"]
    for i, file in enumerate(files):
        rows.append(f"{file.name},{'abc'[i % 3]};{'de'[i % 2]},{i % 5}")
    (folder / "clips.csv").write_text("\n".join(rows))
    return folder


def test_several_labels_a_clip(tmp_path, capsys):
    folder = make_multi_label(tmp_path / "data")
    flags = ("--data", "folder", "--data-root", folder, "--csv", "clips.csv", "--test-fold", 0, "--validation-fold", 1)
    result = runs.train(
        capsys, tmp_path / "run", *flags, "--multi-label", "--balanced", "--mixup", 0.5, "--batch-size", 6
    )
    assert {"map", "auc", "d_prime"} <= set(result["metrics"])
    assert 0 < result["metrics"]["map"] <= 1
    assert result["metrics"]["classes_scored"] == 5
    assert runs.drawn(tmp_path / "run" / "average_precision.png")
    assert not (tmp_path / "run" / "confusion.png").exists()
    config = checkpoint.load(tmp_path / "run")[1]
    assert config.multi_label
    assert config.labels == ("a", "b", "c", "d", "e")
    assert "validation_map" in runs.history(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("seconds", "frames", "said"),
    [
        ((1.0,), 98, None),
        (
            (1.0, 3.0),
            98,
            "clips are 1.0 to 3.0 s long: 50 % of them are cut to the 1.0 s that the model hears (--frames 298",
        ),
        (
            (0.5, 0.6),
            200,
            "clips are 0.5 to 0.6 s long: more than half of the 200 frames is padding (--frames 58 costs less)",
        ),
    ],
    ids=["as long", "cut", "padded"],
)
def test_what_becomes_of_long_and_short_clips(seconds, frames, said):
    length = np.array([round(16_000 * s) for s in seconds for _ in range(20)])
    packed = types.SimpleNamespace(length=length, sample_rate=16_000)
    longest = FbankSettings().samples(frames)
    front_end = FrontEndSettings(T=frames, clip_samples=min(longest, length.max()), mean=0.0, std=0.5)
    line = length_line(packed, front_end)
    assert line.startswith(said) if said else line == ""


def test_first_lines_name_classes_and_settings(tmp_path, capsys):
    ended = runs.run(capsys, *runs.TINY, "--out", tmp_path / "run", "--mixup", 0.5, "--max-steps", 1)
    assert "synth: 10 classes (" in ended.out
    assert "recipe synth/default: 2 epochs, batches of 20, adamw at 0.001, cosine, mixup 0.5" in ended.out


def test_step_count_wins_over_epochs_and_the_largest_seed_is_one(tmp_path, capsys):
    result = runs.train(capsys, tmp_path, "--epochs", 5, "--max-steps", 4, "--seed", 2**64 - 1, "--roll", "--noise")
    assert [line["step"] for line in runs.history(tmp_path)] == [3, 4]
    assert result["epochs"] == 2


@pytest.mark.parametrize("bad_step", [0, 4])
def test_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch, bad_step):
    models, real = [], loss_of
    build = checkpoint.CheckpointConfig.build
    monkeypatch.setattr(checkpoint.CheckpointConfig, "build", lambda config: models.append(build(config)) or models[0])
    before = {}
    count = iter(range(100))

    def broken(logits, targets, settings, multi_label):
        loss = real(logits, targets, settings, multi_label)
        if not logits.requires_grad or next(count) != bad_step:  # evaluation is left alone
            return loss
        before.update({name: tensor.clone() for name, tensor in models[0].state_dict().items()})
        return loss * float("nan")

    monkeypatch.setattr("train.step.loss_of", broken)
    said = runs.run(capsys, *runs.TINY, "--out", tmp_path / "run").sentence
    assert f"step {bad_step + 1} (epoch {1 + bad_step // 3}, batch {bad_step % 3 + 1}, clips train/" in said
    assert "--lr" in said
    after = models[0].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    if bad_step < 3:
        assert "nothing was saved yet" in said
        assert not (tmp_path / "run" / "last").exists()
    else:
        assert f"the last good checkpoint is {tmp_path / 'run' / 'last'}" in said
        assert checkpoint.load(tmp_path / "run" / "last")[0]
    assert not (tmp_path / "run" / "result.json").exists()


def test_learning_rate_beyond_reason_stops_the_run(tmp_path, capsys):
    ended = runs.run(capsys, *runs.TINY, "--out", tmp_path, "--lr", 1e30, "--clip-norm", 0)
    assert "no longer finite at step 2 " in ended.sentence
