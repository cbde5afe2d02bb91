"""Models as one file: the same answers for any number of clips of any length, both models, both formats, what is refused."""

import importlib.util
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fftp import AuMConfig, RealFrontEnd, checkpoint, export, frontend
from fftp.errors import UserError
from fftp.predict import Classifier
from kernels import dispatch
from tests import runs
from tests.tasks import task_of

WINDOW = 4000  # samples
ONNX = ("onnx", "onnxscript", "onnxruntime")


def made(model="ast", fit="pad", multi_label=False, directions="v1"):
    """(A small model of weights that set the classes apart, its configuration)."""
    config = replace(task_of().config, multi_label=multi_label)
    config = replace(config, front_end=replace(config.front_end, clip_samples=WINDOW, fit=fit))
    if model == "aum":
        shape = {"grid": config.model.grid, "classes": len(config.labels), "depth": 1, "dim": 32}
        config = replace(config, model=AuMConfig(**shape, directions=directions))
    torch.manual_seed(0)
    network = config.build().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network, config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(out, *made())
    return out


def waves(B, samples, seed=0):
    return (0.1 * np.random.default_rng(seed).normal(size=(B, samples))).astype(np.float32)


SIZES = [(1, 401), (3, 2500), (2, WINDOW), (1, WINDOW + 1), (2, 3 * WINDOW - 7)]


def check(run, network, config):
    """The same probabilities as `Classifier.predict_many`. Seen 1e-6; 1e-4 is the issue's."""
    classifier = Classifier(network, config, precision="float32")
    for B, samples in SIZES:
        ours = np.stack([p.probabilities for p in classifier.predict_many(list(waves(B, samples)))])
        assert ours.max() - ours.min() > 0.02
        np.testing.assert_allclose(run(waves(B, samples)), ours, rtol=0, atol=1e-5, err_msg=f"{B} x {samples}")


@pytest.mark.parametrize(
    "how",
    [{}, {"fit": "resize"}, {"multi_label": True}, *({"model": "aum", "directions": d} for d in ("none", "v1", "v2"))],
    ids=lambda how: "-".join(map(str, how.values())) or "ast",
)
def test_what_is_written_down_says_what_predict_says(how):
    """`Deployed` itself, before any exporter."""
    network, config = made(**how)
    deployed = export.Deployed(network, config).eval()
    with torch.no_grad():
        check(lambda wave: deployed(torch.from_numpy(wave)).numpy(), network, config)


@pytest.mark.parametrize("model", ["ast", pytest.param("aum", marks=pytest.mark.slow)])
def test_torch_export(model, tmp_path):
    """Through a file, with any number of clips and samples; AuM's scan is one loop in the graph, not L steps."""
    network, config = made(model)
    said = export.write(network, config, tmp_path / "model.pt2", export.Options(format="pt2"))
    assert said.startswith("checked: probabilities within ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    program = torch.export.load(tmp_path / "model.pt2")
    module = program.module()
    check(lambda wave: module(torch.from_numpy(wave)).detach().numpy(), network, config)
    assert len(program.graph.nodes) < 400
    # No operator of ours: whoever has torch can run the file.
    assert not [node for node in program.graph.nodes if "kernels" in str(node.target) or "fftp" in str(node.target)]


def onnx_file(folder, path, capsys, *flags):
    for name in ONNX:
        pytest.importorskip(name, reason=f"{name} is not installed")
    ended = runs.run(capsys, folder, path, *flags, command=export.main)
    assert ended.code == 0, ended.err
    assert "\nchecked: probabilities within " in ended.out
    return ended


@pytest.mark.parametrize(
    "how", [{}, {"model": "aum"}, {"multi_label": True, "fit": "resize"}], ids=["ast", "aum", "other"]
)
def test_onnx(how, tmp_path, capsys):
    """By onnxruntime, with names, labels and rate in the file."""
    network, config = made(**how)
    checkpoint.save(tmp_path, network, config)
    onnx_file(tmp_path, tmp_path / "model.onnx", capsys)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [(i.name, len(i.shape)) for i in session.get_inputs()] == [("waveform", 2)]
    check(lambda wave: session.run(["probabilities"], {"waveform": wave})[0], network, config)
    held = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert held["labels"] == list(config.labels)
    assert (held["sample_rate"], held["window_samples"], held["shortest_samples"]) == (16_000, WINDOW, 400)
    assert held["multi_label"] == config.multi_label


def test_the_oldest_opset(folder, tmp_path, capsys):
    onnx_file(folder, tmp_path / "model.onnx", capsys, "--opset", 18)
    import onnx

    assert next(o.version for o in onnx.load(tmp_path / "model.onnx").opset_import if not o.domain) == 18
    for opset in (17, 99):
        said = runs.run(capsys, folder, tmp_path / "other.onnx", "--opset", opset, command=export.main).sentence
        assert f"--opset has to be from 18 to " in said  # noqa: F541
        assert f"not {opset}" in said


def test_without_onnxruntime_it_says_that_nothing_was_checked(folder, tmp_path, capsys, monkeypatch):
    for name in ONNX[:2]:
        pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    ended = runs.run(capsys, folder, tmp_path / "model.onnx", command=export.main)
    assert ended.code == 0, ended.err
    assert "not checked against ours: onnxruntime is not installed" in ended.out


def test_without_onnx_it_is_refused(folder, tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ONNX else real(name))
    said = runs.run(capsys, folder, tmp_path / "model.onnx", command=export.main).sentence
    assert "--format onnx needs onnx and onnxscript: pip install onnx onnxscript onnxruntime" in said


def test_a_file_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch):
    network, config = made()
    classes = len(config.labels)
    monkeypatch.setattr(
        export, "_runner", lambda path, onnx: lambda wave: np.full((len(wave), classes), 0.5, np.float32)
    )
    monkeypatch.setattr(export, "exported", lambda *_: None)
    monkeypatch.setattr(torch.export, "save", lambda program, path: path.touch())
    with pytest.raises(UserError, match="The file's probabilities differ from ours by"):
        export.write(network, config, tmp_path / "m.pt2", export.Options(format="pt2"))
    assert list(tmp_path.iterdir()) == []


def test_refused(folder, tmp_path, capsys):
    (tmp_path / "there.onnx").touch()
    for words, wanted in (
        ((folder, tmp_path / "there.onnx"), "is there already: give a new file"),
        ((folder, tmp_path / "model.pt2"), "is to be of --format onnx, and ends in .pt2"),
        ((tmp_path / "absent", tmp_path / "model.onnx"), "There is no checkpoint at"),
        ((tmp_path, tmp_path / "model.onnx"), "is not a checkpoint of this library"),
        ((folder, tmp_path / "model.onnx", "--format", "tflite"), "cannot make sense of"),
        ((folder, tmp_path / "model.onnx", "--opsett", "18"), "did you mean --opset"),
    ):
        assert wanted in runs.run(capsys, *words, command=export.main).sentence


def test_only_the_first_samples_are_sound():
    """RealFrontEnd with `samples`: what FrontEnd makes of clips of that length, cut, padded or stretched."""
    for fit, T in (("pad", 30), ("pad", 10), ("resize", 30)):
        settings = frontend.FrontEndSettings(T=T, clip_samples=WINDOW, mean=-4.0, std=3.0, fit=fit)
        wave = torch.from_numpy(waves(2, WINDOW))
        for samples in (400, 1234, WINDOW):
            padded = torch.where(torch.arange(WINDOW) < samples, wave, 0.0)
            wanted = frontend.FrontEnd(settings)(padded, torch.tensor([samples, samples]))
            # Noise has no quiet bands; the front end's own rule is in test_real_front_end. Seen 5e-6.
            torch.testing.assert_close(RealFrontEnd(settings)(padded, samples), wanted, rtol=0, atol=5e-5)


def test_plain_dispatch_holds_in_its_block_alone(monkeypatch):
    """References and the loop, whatever the environment asks for."""
    monkeypatch.setenv("FFTP_BACKEND", "attention=products")
    dispatch.use_fused(True)
    with dispatch.plain(selective_scan="loop"):
        assert dispatch.select("attention", "cpu", "bfloat16").name == "reference"
        assert dispatch.select("fbank", "cpu", "float32").name == "reference"
        assert dispatch.select("selective_scan", "cpu", "float32").name == "loop"
    assert dispatch.select("attention", "cpu", "bfloat16").name == "products"


@pytest.mark.parametrize("reverse", [False, True])
def test_the_loop_is_the_reference(reverse):
    from kernels.selective_scan import loop, reference

    torch.manual_seed(0)
    B, L, E, S = 2, 7, 5, 3
    u, delta, z = (torch.randn(B, L, E, dtype=torch.float64) for _ in range(3))
    b, c = (torch.randn(B, L, S, dtype=torch.float64) for _ in range(2))
    A, back = (-torch.rand(E, S, dtype=torch.float64) - 0.1 for _ in range(2))
    D, bias = (torch.randn(E, dtype=torch.float64) for _ in range(2))
    for other in (None, back):
        given = (u, delta, A, b, c, D, z, bias, other, reverse)
        torch.testing.assert_close(loop.selective_scan(*given), reference.selective_scan(*given), rtol=0, atol=1e-12)
