"""from_pretrained, save_pretrained and push_to_hub: our own checkpoint format, a model card, nothing of the user's folders."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fftp
from fftp import AST, AuM, AuMConfig, checkpoint, hub, predict
from fftp.errors import UserError
from tests import runs
from tests.made_data import make_files
from tests.tasks import task_of

METRICS = {"accuracy": 0.75, "balanced_accuracy": 0.5}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The out folder of a run: best/ and result.json."""
    task, out = task_of(data_root="/home/somebody/sounds", out="/home/somebody/run"), tmp_path_factory.mktemp("run")
    (out / "best").mkdir()
    checkpoint.save(out / "best", task.model, task.config)
    (out / "result.json").write_text(json.dumps({"metrics": METRICS}))
    return out


def same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("below", ["", "best"])
def test_there_and_back(run_folder, below, tmp_path, capsys):
    """The same bits as train.run's best/, read by everything that reads a checkpoint, with the run's metrics."""
    model = AST.from_pretrained(run_folder / below)
    assert not model.training
    model.save_pretrained(tmp_path / "out")
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", run_folder / "best")]
    assert weights[0] == weights[1]
    again = AST.from_pretrained(str(tmp_path / "out"))
    assert same(again, model)
    assert again.about.metrics == METRICS
    assert again.about == model.about.__class__(**vars(model.about) | {"settings": again.about.settings})
    assert fftp.load(tmp_path / "out").labels == model.about.labels
    ended = runs.run(capsys, tmp_path / "out", make_files(tmp_path / "sounds", 1)[0], "--json", command=predict.main)
    assert ended.code == 0, ended.err


def test_nothing_of_the_users_folders_goes_out(run_folder, tmp_path):
    AST.from_pretrained(run_folder).save_pretrained(tmp_path / "out")
    for name in ("config.json", "README.md", "preprocessor_config.json"):
        assert "somebody" not in (tmp_path / "out" / name).read_text(), name
    assert "somebody" in (run_folder / "best" / "config.json").read_text()


def test_the_model_card(run_folder, tmp_path):
    package = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    model = AST.from_pretrained(run_folder)
    model.save_pretrained(tmp_path / "out", model_card_kwargs={"license": "cc-by-4.0"})
    card = package.ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "cc-by-4.0",
        "fftp",
        "audio-classification",
    )
    (accuracy,) = (r for r in card.data.eval_results if r.metric_type == "accuracy")
    assert (accuracy.metric_value, accuracy.dataset_name) == (0.75, "synth")
    for wanted in ("Trained on `synth`", "| accuracy | 0.7500 |", "cc-by-4.0. The code", ", ".join(model.about.labels)):
        assert wanted in card.content
    (tmp_path / "out" / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "my own words"


def test_what_is_not_known_is_said(run_folder, tmp_path):
    alone = shutil.copytree(run_folder / "best", tmp_path / "alone" / "model")
    AST.from_pretrained(alone).save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Not measured." in text
    assert 'license: "unknown"' in text
    assert "has stated none" in text


@pytest.mark.parametrize("kind", ["ast", "aum"])
def test_both_models(kind, run_folder, tmp_path):
    config = checkpoint.read_config(run_folder / "best")
    if kind == "aum":
        made = AuMConfig(grid=config.model.grid, classes=len(config.labels), depth=1, dim=32)
        config = replace(config, model=made)
    model, other = config.build(), {"ast": AuM, "aum": AST}[kind]
    with pytest.raises(UserError, match="made by hand, so nothing says its labels"):
        model.save_pretrained(tmp_path / "out")
    wrong = replace(config, model=replace(config.model, classes=99))
    with pytest.raises(UserError, match="is of another model"):
        model.save_pretrained(tmp_path / "out", config=wrong)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", config=config)
    assert same(type(model).from_pretrained(tmp_path / "out"), model)
    with pytest.raises(
        UserError, match=f"holds an {type(model).__name__}, no {other.__name__}: fftp.{type(model).__name__}"
    ):
        other.from_pretrained(tmp_path / "out")


def test_push_and_pull(run_folder, tmp_path, monkeypatch):
    """By huggingface_hub's mixin, onto a hub that is a folder: one commit of the whole folder, which is fetched again."""
    package = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    seen = {}

    class Hub:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            seen["repo"] = (repo_id, private)
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message, **_):
            shutil.copytree(folder_path, tmp_path / repo_id)
            seen["commit"] = (revision, commit_message)
            return "an address"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    model = AST.from_pretrained(run_folder)
    how = {"private": True, "token": "t", "branch": "b", "commit_message": "m", "model_card_kwargs": {"license": "mit"}}
    assert model.push_to_hub("somebody/sounds", **how) == "an address"
    assert seen == {"token": "t", "repo": ("somebody/sounds", True), "commit": ("b", "m")}
    assert 'license: "mit"' in (tmp_path / "somebody/sounds/README.md").read_text()

    def fetch(name, revision, token, allow_patterns):
        seen["fetched"] = (name, revision, token, allow_patterns)
        return str(tmp_path / name)

    monkeypatch.setattr(package, "snapshot_download", fetch)
    again = AST.from_pretrained("somebody/sounds", revision="b", token="t")
    assert same(again, model)
    assert seen["fetched"] == ("somebody/sounds", "b", "t", ["config.json", "model.safetensors"])


def test_without_the_package(run_folder, monkeypatch):
    """Folders need nothing of it; the hub does, and says so."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = AST.from_pretrained(run_folder)
    for call in (lambda: model.push_to_hub("somebody/sounds"), lambda: AST.from_pretrained("somebody/sounds")):
        with pytest.raises(UserError, match="huggingface_hub package is not installed"):
            call()


def test_what_is_no_folder(tmp_path):
    with pytest.raises(UserError, match="There is no checkpoint at"):
        AST.from_pretrained(tmp_path / "absent")
    with pytest.raises(UserError, match="is not a checkpoint of this library"):
        AST.from_pretrained(tmp_path)
    (tmp_path / "file").touch()
    assert hub.is_id("somebody/model-1.0")
    assert not any(map(hub.is_id, (str(tmp_path), "model", "a/b/c", "folder/model.pth", "./model")))


def test_a_folder_that_cannot_be_written(run_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        AST.from_pretrained(run_folder).save_pretrained(Path(tmp_path / "file" / "out"))
