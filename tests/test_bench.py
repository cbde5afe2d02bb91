"""The benchmark: what a line says, what happens to a wrong row or a peer that cannot run, and the call for a GPU."""

import argparse
import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from bench import bench_input, gpu, measure, run
from bench.parts import PARTS
from kernels import dispatch
from tests import runs
from tests.made_data import make_files

# Candidates, by how their names begin, that need a package which may be absent.
NEEDS = {
    "kaldi-native-fbank": "kaldi_native_fbank",
    "mamba-ssm, two calls": "mamba_ssm",
    "transformers": "transformers",
    "not packed": "soundfile",
    "DataLoader": "soundfile",
}


def case_of(**changed):
    """A row that takes no time to speak of: twice as much work beside as in ours."""
    given = {
        "part": "made_up",
        "case": {"n": 3},
        "backend": "one",
        "ours": lambda sets: lambda i: torch.ones(20000).sum(),
        "peers": {"two": lambda sets: lambda i: [torch.ones(20000).sum() for _ in range(20)], "absent": absent},
        "correct": lambda: True,
    }
    return measure.Case(**given | changed)


def absent(sets):
    raise ModuleNotFoundError("No module named 'absent'\nand more")


def test_a_line_has_what_design_and_reader_need(tmp_path):
    line = measure.measure(case_of(), "cpu")
    measure.append(line, tmp_path)
    assert measure.lines("made_up", tmp_path) == [json.loads(json.dumps(line))]
    assert measure.lines("other", tmp_path) == []
    wanted = {"part", "case", "ours", "peers", "ratio", "correct", "ceiling", "machine", "software", "commit", "date"}
    assert wanted <= line.keys()
    assert line["ours"]["backend"] == "one"
    assert line["ours"]["ms"] > 0
    assert line["ratio"]["two"] > 1  # twenty times the work; the rest of the call is the same
    assert line["peers"]["two"] > line["ours"]["ms"]
    assert line["left_out"] == {"absent": "ModuleNotFoundError: No module named 'absent'"}
    assert {"copy_gbs", "matmul_tflops"} == line["ceiling"].keys()
    assert "two" in run.row_of(line)
    assert "absent left out: ModuleNotFoundError" in run.row_of(line)


def test_compiled_peers_are_compiled_in_every_case(monkeypatch):
    """However many cases share one function: torch.compile gives a function up after so many shapes."""
    translated = []

    def backend(graph, _):
        translated.append(graph)
        return graph

    monkeypatch.setattr(measure.torch, "compile", partial(torch.compile, backend=backend))

    def plain(x):
        return x.sin().sum()

    cases = torch._dynamo.config.recompile_limit + 2
    for n in range(cases):
        x, peer = torch.ones(10 + n), measure.compiled(plain)
        measure.measure(case_of(peers={"compiled": lambda sets, x=x, peer=peer: lambda i: peer(x)}, rounds=2), "cpu")
    assert len(translated) == cases


def test_clips_rounds_and_other_figures(monkeypatch):
    """Clips a second of all that were timed, over the case's own number of rounds."""
    calls = []
    monkeypatch.setattr(measure, "ROUND_MS", {"cpu": 0.0})
    one = case_of(ours=lambda sets: calls.append, peers={}, clips=10, rounds=2, figures={"more": 7.0})
    line = measure.measure(one, "cpu")
    assert len(calls) == 2 * measure.WARM + 3 + 2  # to warm up, to see how many calls a turn takes, and two turns
    assert line["more"] == 7.0
    assert line["clips_per_second"] == {"ours": pytest.approx(10_000 / line["ours"]["ms"])}
    assert f"ours {line['clips_per_second']['ours']:.0f} clips/s" in run.row_of(line)


def test_a_wrong_row_has_no_time(capsys, monkeypatch, tmp_path):
    module = importlib.import_module("bench.bench_spec_mask")
    monkeypatch.setattr(module, "cases", lambda device: [case_of(part="spec_mask", correct=lambda: False)])
    ended = runs.run(capsys, "--only", "spec_mask", "--device", "cpu", "--results", tmp_path, command=run.main)
    assert ended.code == 1
    assert "spec_mask n=3: WRONG, not timed" in ended.out
    (line,) = measure.lines("spec_mask", tmp_path)
    assert "ms" not in line["ours"]
    assert not {"peers", "ratio"} & line.keys()


def test_rows_that_are_there_are_not_measured_again(capsys, monkeypatch, tmp_path):
    module = importlib.import_module("bench.bench_spec_mask")
    rows = [case_of(part="spec_mask", case={"n": n}) for n in range(3)]
    monkeypatch.setattr(module, "cases", lambda device: rows)
    flags = ("--only", "spec_mask", "--device", "cpu", "--results", tmp_path, "--missing")
    assert runs.run(capsys, *flags, "--first", 2, command=run.main).code == 0
    assert [line["case"]["n"] for line in measure.lines("spec_mask", tmp_path)] == [0, 1]
    ended = runs.run(capsys, *flags, "--seconds", 0, command=run.main)
    assert "spec_mask: 1 rows not started in 0 s" in ended.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("0\n"))
    assert "1 rows not started in 0 s" in runs.run(capsys, *flags, "--told", command=run.main).out
    assert runs.run(capsys, *flags, command=run.main).code == 0
    assert [line["case"]["n"] for line in measure.lines("spec_mask", tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_has_rows_that_are_right(part, device):
    """The first row's own check, on this device; timing is for `make bench`."""
    row = next(iter(importlib.import_module(f"bench.bench_{part}").cases(device)))
    assert row.part == part
    torch.manual_seed(0)
    assert row.correct()
    if isinstance(row, measure.Figures):
        return
    for name, build in (("ours", row.ours), *row.peers.items()):
        needed = [package for who, package in NEEDS.items() if name.startswith(who)]
        # Importing torch's compiler warns, which is an error here, and its work takes minutes.
        if not name.startswith(("compiled", "associative_scan")) and all(
            importlib.util.find_spec(package) for package in needed
        ):
            build(1)(0)


@pytest.fixture(scope="module")
def words():
    pytest.importorskip("soundfile", reason="sound files need soundfile.")
    return bench_input.Words(None)


def feeds(words):
    """From the pack, and from files."""
    clips = words.pack.indices("train")
    sources = (bench_input.Resident(words.pack, torch.device("cpu")), bench_input.Files(words, torch.device("cpu")))
    return [bench_input.Feed(source, clips, bench_input.FrontEnd(bench_input.FRONT_END)) for source in sources]


def test_the_input_paths_give_the_same_batches(words):
    """Augmented: by every backend from the pack within rounding, and without a pack to the bit."""
    packed, unpacked = feeds(words)
    augment = bench_input.Augment(bench_input.AUGMENT, 0, 128, 128)
    steps = next(bench_input._turns(packed, 8))[:2]
    found = []
    for feed, fused in ((packed, True), (unpacked, True), (packed, False)):
        dispatch.use_fused(fused)
        found.append([(batch.log_mel, batch.targets) for batch in feed.training(steps, 0, augment)])
    for (fused, targets), (files, their_targets), (plain, _) in zip(*found, strict=True):
        assert torch.equal(fused, files)
        assert torch.equal(targets, their_targets)
        # Seen 1e-4 in nearly empty bins, of a log-mel over 11; times ten.
        torch.testing.assert_close(fused, plain, rtol=0, atol=1e-3)


def test_turns_go_through_the_epoch_and_begin_again(words):
    packed, _ = feeds(words)
    turns = bench_input._turns(packed, 40)  # ten steps: two turns of four, and two steps that no turn takes
    first, second, third = (np.concatenate([positions for positions, _ in next(turns)]) for _ in range(3))
    assert len(set(first) | set(second)) == 320
    assert (third == first).all()


def test_the_gate_of_the_input_path(words, monkeypatch):
    """It sees samples that are not the clip's, files in another order, and a loader that makes something else."""
    packed, unpacked = feeds(words)
    assert bench_input._correct(words, packed, unpacked)
    others = bench_input.Feed(unpacked.source, np.roll(unpacked.indices, 1), unpacked.front_end)
    assert not bench_input._correct(words, packed, others)
    with monkeypatch.context() as patch:
        patch.setattr(packed.source, "_samples", torch.from_numpy(np.roll(packed.pack.samples, 5)))
        assert not bench_input._correct(words, packed, packed)
    louder = replace(bench_input.FRONT_END, mean=bench_input.FRONT_END.mean + 0.2)
    monkeypatch.setattr(bench_input, "FRONT_END", louder)
    assert not bench_input._correct(words, packed, unpacked)


def test_a_loaders_clip_is_augmented(words):
    """Masks, noise and a roll: the cells of a clip drawn twice differ, and those masked hold 0 in log-mel units."""
    i = int(words.pack.indices("train")[0])
    files = [(str(words.clips.clips[i].source), words.pack.labels[i])]
    plain, labels = bench_input.ClipByClip(files, augmented=False)[0]
    assert plain.shape == (128, 128)
    assert (labels.numpy() == words.pack.labels[i]).all()
    torch.manual_seed(0)
    np.random.seed(0)
    drawn = [bench_input.ClipByClip(files)[0][0] for _ in range(8)]
    assert not torch.equal(drawn[0], drawn[1])
    front_end = bench_input.FRONT_END
    zero = -front_end.mean / (2 * front_end.std)
    masked = [(clip >= zero) & (clip <= zero + 0.1) for clip in drawn]
    assert max(float(m.all(0).sum()) for m in masked) > 1  # whole bins, beside the padding of every bin
    assert max(float(clip.max() - plain.max()) for clip in drawn) <= 0.1 + max(0.0, zero - float(plain.max()))


@pytest.mark.parametrize(
    ("root", "named"),
    [
        ("absent", "does not exist"),
        ("", "is empty"),
        ("words", "has no validation_list.txt and no testing_list.txt"),
        ("few", "has 4 training recordings: give at least 16"),
    ],
)
def test_a_folder_without_recordings_is_one_sentence(capsys, tmp_path, root, named):
    (tmp_path / "data" / "words").mkdir(parents=True)
    if root == "words":
        (tmp_path / "data" / "words" / "bed").mkdir()
    folder = tmp_path / "data" / (root or "words")
    flags = ("--only", "input", "--device", "cpu", "--results", tmp_path / "results", "--data-root", folder)
    if root == "few":
        make_files(folder / "a", 3)
        make_files(folder / "b", 3)
        (folder / "validation_list.txt").write_text("a/000.wav\n")
        (folder / "testing_list.txt").write_text("b/000.wav\n")
    assert named in runs.run(capsys, *flags, command=run.main).sentence
    assert not measure.lines("input", tmp_path / "results")


def test_the_front_end_at_80_mel_bins():
    """Where kaldi-native-fbank takes part: ours by the rule, and the rows of other peers as wide."""
    *_, long, short = importlib.import_module("bench.bench_fbank").cases("cpu")
    assert [row.case for row in (long, short)] == [{"B": 16, "seconds": s, "mels": 80} for s in (10.0, 1.0)]
    assert short.correct()
    for name in ("torchaudio, clip by clip", "torchaudio MelSpectrogram, batched", "transformers ASTFeatureExtractor"):
        made = short.peers[name](1)(0)
        made = made["input_values"] if "transformers" in name else made
        assert 80 in made[0].shape, name


def test_the_2x_rule():
    exact = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    plain, unit = (exact + 1e-3).float(), torch.finfo(torch.float32).eps * 3
    assert measure.holds([(exact + 1.9e-3).float()], [plain], [exact])
    assert not measure.holds([(exact + 2.1e-3).float()], [plain], [exact])
    assert measure.holds([(exact + 0.9 * unit).float()], [exact.float()], [exact])
    assert not measure.holds([torch.tensor([1.0, 2.0, float("nan")])], [plain], [exact])


def test_without_a_gpu_the_gpu_call_is_one_sentence(capsys):
    if torch.cuda.is_available():
        return
    assert "--rehearse" in runs.run(capsys, command=gpu.main).sentence
    assert "no GPU" in runs.run(capsys, "--device", "cuda", command=run.main).sentence


def test_wheels_beside_the_project_are_importable(tmp_path, monkeypatch):
    (tmp_path / ".wheels").mkdir()
    with zipfile.ZipFile(tmp_path / ".wheels" / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "answer = 42\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    environment = gpu.environment_with_wheels(tmp_path / "unpacked")
    command = [sys.executable, "-c", "import carried; print(carried.answer)"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "42\n"


def test_the_gpu_call_names_every_test_file_with_gpu_cases():
    """Those that ask for the device, those that run kernels in a process of their own, and the training run."""
    named = gpu.test_files()
    assert {"test_patch_embed.py", "test_triton_fbank.py", "test_triton_training.py", "test_feed.py"} <= set(named)
    asking = [path.name for path in (runs.ROOT / "tests").glob("test_triton_*.py")]
    assert set(asking) <= set(named)
    assert "test_documents.py" not in named


def test_files_that_passed_are_not_tested_again(tmp_path, monkeypatch, capsys):
    """One passes and has its line, one fails and has none; the second call takes up the one that is missing."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_good.py").write_text("def test_one():\n    pass\n")
    (tmp_path / "tests" / "test_bad.py").write_text("def test_one():\n    assert False, 'seen'\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "REHEARSED_TESTS", ("test_good.py", "test_bad.py"))
    monkeypatch.setattr(gpu, "_ahead", lambda rehearse: {})
    wanted = argparse.Namespace(rehearse=True, results=tmp_path / "results")
    assert gpu.test(dict(os.environ), wanted, 60) == ["tests test_bad.py"]
    assert "AssertionError: seen" in capsys.readouterr().out
    assert [line["case"]["file"] for line in measure.lines("gpu_tests", wanted.results)] == ["test_good.py"]
    (tmp_path / "tests" / "test_bad.py").write_text("def test_one():\n    pass\n")
    assert gpu.test(dict(os.environ), wanted, 60) == []
    assert "test_good" not in capsys.readouterr().out


def test_a_test_file_that_takes_too_long_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_long.py").write_text("import time\n\n\ndef test_one():\n    time.sleep(60)\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "REHEARSED_TESTS", ("test_long.py",))
    monkeypatch.setattr(gpu, "_ahead", lambda rehearse: {})
    wanted = argparse.Namespace(rehearse=True, results=tmp_path / "results")
    assert gpu.test(dict(os.environ), wanted, 2) == ["tests test_long.py"]
    assert "tests test_long.py: not finished in time" in capsys.readouterr().out
    assert measure.lines("gpu_tests", wanted.results) == []


BLOCKER = """
import sys
from importlib.machinery import PathFinder


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in {"tyro", "soundfile", "soxr", "nvtx"}
        return None if absent else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


@pytest.fixture
def few_packages(tmp_path, monkeypatch):
    """As on a machine whose Python has what DESIGN names and no more: processes that are started do not find these."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)


def test_the_training_run_of_the_gpu_call_needs_few_packages(tmp_path, few_packages, capfd):
    wanted = argparse.Namespace(rehearse=True, results=tmp_path / "results")
    environment = gpu.environment_with_wheels(tmp_path / "unpacked")
    for _ in range(2):  # the second time its line is there, and nothing runs
        assert gpu.train(environment, wanted, tmp_path / "run", time.monotonic() + 200) == []
    assert len(measure.lines("train", wanted.results)) == 1
    code = "import tyro"
    refused = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=runs.ROOT
    )
    assert "No module named 'tyro'" in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_rehearsal(capfd, tmp_path, few_packages):
    flags = ["--rehearse", "--minutes", "6", "--results", str(tmp_path / "results")]
    assert gpu.main(flags) == 0
    assert "0 of the stages had something wrong" in capfd.readouterr().out
    assert {path.stem for path in (tmp_path / "results").iterdir()} == {*PARTS, "train", "gpu_tests"}
    lines = sum(len(path.read_text().splitlines()) for path in (tmp_path / "results").iterdir())
    assert gpu.main(flags) == 0  # the second call finds everything there
    assert sum(len(path.read_text().splitlines()) for path in (tmp_path / "results").iterdir()) == lines
