"""The benchmark: what a line says, what happens to a wrong row or a peer that cannot run, and the call for a GPU."""

import importlib
import importlib.util
import json
import subprocess
import sys
import zipfile

import pytest
import torch

from bench import gpu, measure, run
from tests import runs


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
    assert runs.run(capsys, *flags, command=run.main).code == 0
    assert [line["case"]["n"] for line in measure.lines("spec_mask", tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("part", run.PARTS)
def test_a_part_has_rows_that_are_right(part, device):
    """The first row's own check, on this device; timing is for `make bench`."""
    row = next(importlib.import_module(f"bench.bench_{part}").cases(device))
    assert row.part == part
    torch.manual_seed(0)
    assert row.correct()
    for name, build in (("ours", row.ours), *row.peers.items()):
        if name.startswith("compiled") and device == "cpu":
            continue  # importing torch's compiler warns, which is an error here, and its work takes minutes
        if name != "kaldi-native-fbank" or importlib.util.find_spec("kaldi_native_fbank"):
            build(1)(0)


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


@pytest.mark.slow
def test_the_rehearsal(capfd, tmp_path):
    assert gpu.main(["--rehearse", "--minutes", "4", "--results", str(tmp_path)]) == 0
    assert "0 of the stages had something wrong" in capfd.readouterr().out
    assert {path.stem for path in tmp_path.iterdir()} == {*run.PARTS, "train"}
