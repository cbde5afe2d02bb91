"""The benchmark's larger rows: Table III, a step by parts, growing work, the encoder, memory, and the profiler."""

import gzip
import json
from dataclasses import replace

import pytest
import torch

from bench import (
    bench_encoder,
    bench_scale,
    bench_step_parts,
    bench_table3,
    eager_ast,
    memory,
    profile,
    systems,
    training,
)
from bench.bench_patch_embed import GRIDS, LAPTOP
from kernels import ranges
from tests import runs

SMALLEST = "(128, 50)/10"  # 96 patches


@pytest.fixture
def small(monkeypatch):
    """One layer, one clip, one step."""
    monkeypatch.setitem(systems.MODELS["ast"][1], "tiny", {"dim": 192, "depth": 1, "heads": 3})
    monkeypatch.setitem(systems.MODELS["aum"][1], "tiny", {"dim": 192, "depth": 1})
    for module, name in ((training, "BATCH"), (training, "STEPS"), (bench_table3, "CLIPS")):
        monkeypatch.setitem(getattr(module, name), "cpu", 2)
    for module in (bench_table3, bench_scale):
        monkeypatch.setitem(module.SECONDS, "cpu", 0.0)


def test_the_papers_column_is_the_count_without_attention():
    """To 0.01 in five rows; the sixth prints 4.15 for 8.80 (PAPER_NOTES 1.5)."""
    for name, published in systems.TABLE_III.items():
        macs = systems.config("ast", "base", GRIDS[name]).macs()
        if name == SMALLEST:
            assert (published.gflops, round(macs.paper / 1e9, 2)) == (4.15, 8.80)
        else:
            assert abs(macs.paper / 1e9 - published.gflops) < 0.011
        assert macs.all > macs.paper


@pytest.mark.parametrize("model", systems.MODELS)
def test_a_row_of_table_iii(small, model):
    figures = bench_table3.figures(model, "tiny", SMALLEST, "cpu")
    assert set(figures["latency_ms"]) == set(figures["clips_per_second"]) == {"float32", "bfloat16"}
    assert min(figures["latency_ms"].values()) > 0
    step = figures["step"]
    assert (step["batch"], step["steps"]) == (2, 2)
    # 14,600 steps of 32 clips are sixteen times as many of two.
    assert figures["train_hours"] == pytest.approx(14600 * 16 * step["step_ms"] / 1000 / 3600)
    parameters = 4 * sum(p.numel() for p in systems.build(model, "tiny", GRIDS[SMALLEST], "cpu").parameters())
    assert step["peak_bytes"] > 3 * parameters  # weights, gradients, and AdamW's means
    assert figures["peak_bytes"] > parameters
    assert json.loads(json.dumps(figures)) == figures


def test_the_training_that_is_timed_is_the_papers(small):
    """Ten-second clips of AudioSet's 527 classes with mixup, SpecMask's sizes for slices, SpecAugment's for squares."""
    for name, augment in ((SMALLEST, "specmask"), ("(16, 16)/10", "specaugment")):
        with training.trainer("ast", "tiny", GRIDS[name], "cpu") as made:
            s, config = made.task.settings, made.task.config
            assert config.model.grid == GRIDS[name]
            assert (s.augment, s.mixup, s.mask_area if augment == "specmask" else s.mask_max_time) == (
                (augment, 0.5, 25600) if augment == "specmask" else (augment, 0.5, 192)
            )
            assert config.multi_label
            assert len(config.labels) == 527
            assert made.task.train.W == 160000
            losses = [made.epoch()["train_loss"] for _ in range(2)]
    assert losses[1] < losses[0]
    assert not made.task.out.exists()  # nothing was saved, and the folder is gone


def test_a_step_by_parts(small):
    for model in systems.MODELS:
        figures = bench_step_parts.figures(model, "tiny", SMALLEST, "cpu")
        assert tuple(figures["parts_ms"]) == ranges.PARTS
        assert min(figures["parts_ms"].values()) > 0
        total = sum(figures["parts_ms"].values())
        assert 0.5 * figures["step_ms"] < total <= figures["step_ms"]  # no part counted twice, and most of it seen


def test_growing_work(small):
    short, long = (
        bench_scale.figures("tiny", systems.lengthened(GRIDS["(128, 10)/4"], s), 1, torch.float32, "cpu")
        for s in (1, 10)
    )
    assert (short["patches"], long["patches"]) == (23, 248)
    assert all(long["ms"][model] > short["ms"][model] for model in ("ast", "aum"))


@pytest.mark.parametrize("model", systems.MODELS)
def test_the_encoders_gate(monkeypatch, model):
    """It passes what is right, and sees a scan or an attention that is off by a thousandth."""
    grid, size = LAPTOP["(128, 10)/4"], "tiny"
    L = grid.N + 1
    assert bench_encoder._correct(model, size, grid, L, torch.float32, "cpu", True)
    run = bench_encoder._run
    monkeypatch.setattr(
        bench_encoder, "_run", lambda blocks, x, dtype: run(blocks, x, dtype) * (1 + 1e-3 * (next(calls) == 0))
    )
    calls = iter(range(9))
    assert not bench_encoder._correct(model, size, grid, L, torch.float32, "cpu", True)


def test_the_literal_block_is_the_block():
    """In float64, to rounding: what the gate compares with computes what the model does."""
    block = systems.build("ast", "tiny", LAPTOP["(128, 10)/4"], "cpu", 1).blocks[0].double()
    x = torch.randn(2, 7, 192, dtype=torch.float64)
    torch.testing.assert_close(bench_encoder._literal(block)(x), sum(block(x)[:2]), rtol=0, atol=1e-13)


def test_the_gate_of_the_models_sees_a_wrong_backend(monkeypatch):
    grid = replace(GRIDS[SMALLEST], T=200)
    assert systems.agrees("aum", "tiny", grid, torch.float32, "cpu")
    forward = systems.forward
    wrong = iter(range(9))
    monkeypatch.setattr(systems, "forward", lambda *given: forward(*given) * (1 + 1e-3 * (next(wrong) == 0)))
    assert not systems.agrees("aum", "tiny", grid, torch.float32, "cpu")


def test_peak_memory():
    """What a call takes and gives back counts; what is held before it does not."""
    kept = torch.ones(8 << 20)

    def call():
        taken = torch.ones(16 << 20)  # 64 MiB
        return taken.sum() + kept[0]

    found = memory.peak(call, "cpu")
    if found is None:
        pytest.skip("this system does not tell a process's peak")
    assert 60 << 20 <= found < 80 << 20  # the system counts pages in batches
    assert memory.peak(lambda: None, "cpu") < 8 << 20


def test_peak_memory_is_not_made_up_where_the_system_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROCESS", tmp_path)
    called = []
    assert memory.peak(lambda: called.append(1), "cpu") is None
    assert called == [1]


def test_profile(small, capsys, tmp_path, monkeypatch):
    flags = ("--grid", SMALLEST, "--device", "cpu", "--out", tmp_path)
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    ended = runs.run(capsys, *flags, command=profile.main)
    assert ended.code == 0
    for name in (*ranges.PARTS, "between them", "step", "without ranges"):
        assert f"\n{name}" in ended.out
    assert "docs/INTERNALS.md has its commands" in ended.out
    events = json.loads(gzip.decompress((tmp_path / "step.json.gz").read_bytes()))["traceEvents"]
    assert set(ranges.PARTS) <= {event.get("name") for event in events}
    assert "no GPU" in runs.run(capsys, "--device", "cuda", command=profile.main).sentence or torch.cuda.is_available()


def test_nsights_commands_take_the_steps_alone(small, capsys, tmp_path):
    text = profile.nsight("aum", "tiny", SMALLEST, tmp_path)
    assert text.count("-m bench.profile") == text.count("--nvtx\n") + text.endswith("--nvtx") == 2
    ended = runs.run(capsys, "--grid", SMALLEST, "--device", "cpu", "--out", tmp_path, "--nvtx", command=profile.main)
    assert (ended.code, ended.out) == (0, "")
    assert not list(tmp_path.iterdir())


def test_the_eager_peer_is_the_model():
    """In float64, to rounding: logits and every gradient."""
    network = systems.build("ast", "tiny", LAPTOP["(128, 10)/4"], "cpu", 2).double()
    log_mel = torch.randn(2, network.config.grid.T, 128, dtype=torch.float64)
    found = []
    for kind in (type(network), eager_ast.EagerAST):
        network.__class__ = kind
        logits = network(log_mel)
        found.append([logits, *torch.autograd.grad(logits.square().sum(), list(network.parameters()))])
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=1e-11)
