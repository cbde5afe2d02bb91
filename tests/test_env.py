"""What a machine is told about itself; what an import costs; the constants of a data set."""

import tomllib
import types

import numpy as np
import pytest
import torch

from fftp import env
from fftp.errors import UserError
from fftp.frontend import FrontEnd, FrontEndSettings
from kernels import dispatch
from tests import runs
from train import run, statistics
from train.data import synth
from train.settings import Settings, from_flags


def test_every_operation_and_backend_is_listed(capsys):
    ended = runs.run(capsys, command=env.main)
    assert (ended.code, ended.err) == (0, "")
    rows = [line.split() for line in ended.out.splitlines() if line]
    for operation, backends in dispatch.TABLE.items():
        for backend in backends:
            states = [row[2:] for row in rows if row[:2] == [operation, backend.name]]
            assert states, (operation, backend.name)
            assert all(state[0] in ("runs", "cannot") or "preferred" in state for state in states)
    assert ["torch", torch.__version__] in rows
    assert any(row[0] == "device" for row in rows)


def test_check_compares_each_fused_backend_with_its_reference(capsys):
    ended = runs.run(capsys, "--check", command=env.main)
    assert ended.code == 0
    checked = {tuple(line.split()[:2]) for line in ended.out.splitlines() if line.endswith(": ok")}
    here = {("selective_scan", "blocked"), ("attention", "products")}  # the second has only bfloat16
    assert here <= checked or torch.cuda.is_available()
    assert "WRONG" not in ended.out


def test_check_finds_a_backend_that_computes_something_else(capsys, monkeypatch):
    dispatch._load.cache_clear()
    real = dispatch._load

    def wrong(path):
        function = real(path)
        return (
            (lambda *given, **named: function(*given, **named) * 1.001)
            if path.endswith("blocked:selective_scan")
            else function
        )

    monkeypatch.setattr(dispatch, "_load", wrong)
    ended = runs.run(capsys, "--check", command=env.main)
    if not torch.cuda.is_available():
        assert ended.code == 1
        assert [line.split()[:2] for line in ended.out.splitlines() if "WRONG" in line] == [
            ["selective_scan", "blocked"]
        ]


def test_a_wrong_backend_stops_a_run_before_it_starts(monkeypatch):
    """On a GPU, that is; here the run is made to believe that it has one."""
    wrong = env.Checked("patch_embed", "triton", 3.0, 1e-6, False)
    monkeypatch.setattr(run.env, "check", lambda device, backends: [wrong] if backends["patch_embed"] == "t" else [])
    monkeypatch.setattr(run, "planned", lambda task: {"patch_embed": "t"})
    task = types.SimpleNamespace(device=torch.device("cuda"), settings=Settings())
    with pytest.raises(UserError, match=r"patch_embed=triton computes something else .*FFTP_BACKEND=patch_embed=refer"):
        run.check_backends(task)
    task.device = torch.device("cpu")
    run.check_backends(task)


def test_wrong_words_and_backends(capsys, monkeypatch):
    assert "takes --check or nothing" in runs.run(capsys, "--chekc", command=env.main).sentence
    monkeypatch.setenv("FFTP_BACKEND", "fbank=none")
    assert "fbank has no backend 'none'" in runs.run(capsys, command=env.main).sentence


def test_other_package_called_kernels(tmp_path, capsys, monkeypatch):
    assert env.other_kernels_package() is None
    (tmp_path / "kernels").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert env.other_kernels_package() is None  # a folder alone is no package
    (tmp_path / "kernels" / "__init__.py").touch()
    assert env.other_kernels_package() == str(tmp_path / "kernels")
    assert f"warning: another package called `kernels` lies at {tmp_path / 'kernels'}" in runs.run(
        capsys, command=env.main
    ).out  # fmt: skip


IMPORT = """
import sys, time
started = time.perf_counter()
import fftp
print(time.perf_counter() - started)
print(*(name for name in ("torch", "numpy", "matplotlib", "soundfile", "tyro") if name in sys.modules))
fftp.PatchGrid
print("torch" in sys.modules, sorted(set(fftp.__all__) - set(dir(fftp))))
for name in fftp.__all__:
    getattr(fftp, name)
"""


def test_import_is_quick_and_brings_nothing_along():
    ended = runs.end(runs.start(code=IMPORT))
    assert ended.code == 0, ended.err
    seconds, brought, rest = ended.out.splitlines()
    assert float(seconds) < 2
    assert brought == ""
    assert rest == "True []"


def test_names_that_are_not_there():
    import fftp

    with pytest.raises(AttributeError, match="'fftp' has no attribute 'nothing'"):
        _ = fftp.nothing


def test_statistics_are_recipe_lines(capsys):
    flags = ("--data", "synth", "--synth-train", 100, "--synth-validation", 10, "--synth-test", 10)
    ended = runs.run(capsys, *flags, command=statistics.main)
    assert (ended.code, ended.err) == (0, "")
    recipe = tomllib.loads(ended.out)  # what is no constant is a comment
    settings, _ = from_flags([str(flag) for flag in flags])
    front_end = FrontEnd(FrontEndSettings(T=settings.frames, clip_samples=synth.LENGTH, mean=0.0, std=0.5))
    cells = []
    for number in range(100):
        wave = torch.from_numpy(synth.make(0, "train", number)).float()[None] / 32768
        cells.append(front_end.log_mel(wave, torch.tensor([synth.LENGTH])).double().numpy())
    # Four digits are printed.
    assert recipe == {"mean": pytest.approx(np.mean(cells), abs=6e-5), "std": pytest.approx(np.std(cells), abs=6e-5)}
    # The recipe's are of all 6,000. A hundred clips of such various levels are off by 0.31 and 0.13 at most with four
    # seeds; times three.
    assert recipe["mean"] == pytest.approx(settings.mean, abs=0.9)
    assert recipe["std"] == pytest.approx(settings.std, abs=0.4)
    assert f"# the recipe has mean {settings.mean:.4f}" in ended.out
    rows = [line.split() for line in ended.out.splitlines() if line.startswith("# ")]
    for name in synth.CLASSES:
        assert ["#", name, "10", "1", "1"] in rows


def test_statistics_refuse_in_a_sentence(capsys, tmp_path):
    flags = ("--data", "folder", "--data-root", tmp_path / "absent")
    assert "does not exist" in runs.run(capsys, *flags, command=statistics.main).sentence
