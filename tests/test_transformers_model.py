"""transformers' pipeline on a folder of ours: it says what fftp.predict says, at any length, and runs no code of the folder."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

import fftp
from fftp import AST, AuM, AuMConfig, checkpoint
from tests.tasks import task_of

pytest.importorskip("transformers", reason="transformers is not installed")
RATE = 16_000


@pytest.fixture(scope="module", params=["ast", "aum", "several labels"])
def folder(request, tmp_path_factory):
    """A folder as save_pretrained writes it, of weights that set the classes apart."""
    config = replace(task_of().config, multi_label=request.param == "several labels")
    config = replace(config, front_end=replace(config.front_end, clip_samples=4000))
    if request.param == "aum":
        config = replace(config, model=AuMConfig(grid=config.model.grid, classes=len(config.labels), depth=2, dim=32))
    torch.manual_seed(0)
    model = config.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    out = tmp_path_factory.mktemp("folder") / "model"
    model.save_pretrained(out, config=config)
    return out


@pytest.fixture
def pipe(folder, monkeypatch):
    import transformers

    import fftp.transformers_model  # noqa: F401, registers our classes

    def refuse(*_, **__):
        raise AssertionError("code of the folder was asked for")

    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_from_dynamic_module", refuse)
    return transformers.pipeline("audio-classification", model=str(folder), trust_remote_code=False)


def sound(samples, seed=0):
    return (0.1 * np.random.default_rng(seed).normal(size=samples)).astype(np.float32)


@pytest.mark.parametrize("samples", [1000, 4000, 11_000], ids=["short", "one window", "three windows"])
def test_the_pipeline_says_what_predict_says(pipe, folder, samples):
    classifier = fftp.load(folder, precision="float32")
    wanted = classifier.predict(sound(samples), RATE)
    got = pipe(sound(samples), top_k=None)
    assert [entry["label"] for entry in got] == [label for label, _ in wanted.top(len(classifier.labels))]
    probabilities = dict(wanted.top(len(classifier.labels)))
    assert max(probabilities.values()) - min(probabilities.values()) > 0.05
    for entry in got:
        assert entry["score"] == pytest.approx(probabilities[entry["label"]], abs=1e-6)


def test_what_transformers_saves_is_a_checkpoint_of_ours(pipe, folder, tmp_path):
    """Names of tensors and config.json are ours, so that a model fine-tuned there comes back."""
    pipe.model.save_pretrained(tmp_path)
    pipe.feature_extractor.save_pretrained(tmp_path)
    model, config = checkpoint.load(tmp_path)
    kind = AuM if config.to_json()["model"] == "aum" else AST
    wanted = kind.from_pretrained(folder)
    assert config == replace(wanted.about, metrics={})
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_gradients_reach_the_weights(pipe):
    model = pipe.model
    several = model.config.problem_type == "multi_label_classification"
    log_mel = torch.randn(2, model.network.config.grid.T, model.network.config.grid.F)
    labels = torch.eye(model.config.num_labels)[:2] if several else torch.tensor([1, 0])
    out = model(log_mel, labels=labels)
    out.loss.backward()
    assert model.network.head.weight.grad.any()
    assert torch.equal(model(log_mel, return_dict=False)[0], model.network(log_mel))
    model.zero_grad()


def test_refused(pipe):
    with pytest.raises(ValueError, match="takes sounds at 16000 Hz, got 8000 Hz"):
        pipe.feature_extractor(sound(1000), sampling_rate=8000)
    with pytest.raises(ValueError, match="equally many windows"):
        pipe.feature_extractor([sound(1000), sound(11_000)])
    two = pipe.feature_extractor([sound(1000), sound(2000)], return_tensors="pt")["input_values"]
    assert two.shape[:2] == (2, 1)


def test_no_code_is_named_in_the_folder(folder):
    for name in ("config.json", "preprocessor_config.json"):
        assert "auto_map" not in json.loads((folder / name).read_text())
    assert not [name for name in os.listdir(folder) if name.endswith(".py")]
