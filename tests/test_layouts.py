"""Weights under transformers' and timm's names: answers as theirs, AST's rules for images, what is refused."""

import json

import numpy as np
import pytest
import torch
from oracles import needs_oracles, oracle
from recordings import RECORDINGS, needs_recordings
from safetensors.torch import load_file, save_file

import fftp
from fftp import audio, convert, hub
from tests import runs

FFTP = ("--patch", "fftp")


def converted(capsys, source, out, *flags, warned=False):
    ended = runs.run(capsys, source, out, *flags, command=convert.main)
    assert ended.code == 0, ended.err
    assert bool(ended.err) == warned
    return fftp.load(out, precision="float32"), ended


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(transformers' AST with random weights, its feature extractor, the folder that both wrote)."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, max_length=200, num_labels=7,
        frequency_stride=12, id2label=dict(enumerate("abcdefg")), problem_type="multi_label_classification",
    )  # fmt: skip
    model = transformers.ASTForAudioClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    extractor = transformers.ASTFeatureExtractor(max_length=200, mean=-5.0, std=3.5)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return model, extractor, folder


def largest(got, wanted):
    return float((got - wanted).abs().max())


def test_logits_of_transformers(theirs, tmp_path, capsys):
    """Geometry, heads, eps, labels and normalisation from its folder. The issue's bound is 1e-4; for the same log-mel, seen
    1e-6 with its own eps, while ours would be 4e-4 off for weights as small as these."""
    model, extractor, folder = theirs
    classifier, ended = converted(capsys, folder, tmp_path / "out")
    assert "weights as they are; mean -5.0000, std 3.5000, 7 classes" in ended.out
    config = classifier.model.config
    assert (config.heads, config.grid.T, config.grid.st, config.grid.sf, config.eps) == (4, 200, 10, 12, 1e-12)
    assert classifier.labels == tuple("abcdefg")
    assert classifier.multi_label
    log_mel = 0.5 * torch.randn(3, 200, 128)
    with torch.no_grad():
        wanted = model(log_mel).logits
        assert float(wanted.abs().max()) > 0.3
        assert largest(classifier.model(log_mel), wanted) < 1e-5
    rng = np.random.default_rng(0)
    wave = (0.1 * rng.normal(size=20_000)).astype(np.float32)
    with torch.no_grad():
        wanted = model(**extractor(wave, sampling_rate=16_000, return_tensors="pt")).logits
        assert largest(classifier.model(classifier.log_mel(wave)), wanted) < 1e-4


@needs_recordings
def test_logits_of_transformers_on_recordings(theirs, tmp_path, capsys):
    """20 real clips, each through its own front end and model."""
    model, extractor, folder = theirs
    classifier, _ = converted(capsys, folder, tmp_path / "out")
    files = sorted((RECORDINGS / "speech_commands_12").rglob("*.ogg"))[::600][:20]
    assert len(files) == 20
    with torch.no_grad():
        for file in files:
            wave = audio.load(file, 16_000, 400)
            wanted = model(**extractor(wave, sampling_rate=16_000, return_tensors="pt")).logits
            assert largest(classifier.model(classifier.log_mel(wave)), wanted) < 1e-4, file


def test_both_spellings_of_transformers(theirs, tmp_path, capsys):
    """Files have the names of releases before 5; a state dict out of memory has those of 5. A lone file says less."""
    model, _, folder = theirs
    written = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert any("encoder.layer.0.attention.attention.query" in name for name in written)
    assert any(".layers.0.attention.q_proj" in name for name in state)
    torch.save(state, tmp_path / "new.pth")
    flags = ("--heads", 4, "--file-freq-stride", 12, "--frames", 200)
    new, _ = converted(capsys, tmp_path / "new.pth", tmp_path / "a", *flags)
    old, _ = converted(capsys, folder / "model.safetensors", tmp_path / "b", *flags)
    assert new.model.config == old.model.config
    assert new.labels == tuple("0123456")
    for name, tensor in new.model.state_dict().items():
        assert torch.equal(tensor, old.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("audio_spectrogram_transformer.encoder.layer.1.attention.attention.key.weight", None),
        ("audio_spectrogram_transformer.encoder.layer.2.output.dense.bias", None),
        ("audio_spectrogram_transformer.embeddings.patch_embeddings.projection.bias", None),
        ("audio_spectrogram_transformer.layernorm.weight", None),
        ("classifier.dense.weight", None),
        ("classifier.layernorm.bias", torch.zeros(3)),
        ("audio_spectrogram_transformer.encoder.layer.0.novelty", torch.zeros(3)),
    ],
)
def test_a_tensor_of_transformers_is_named_as_in_the_file(name, changed, theirs, tmp_path, capsys):
    state = load_file(theirs[2] / "model.safetensors")
    if changed is None:
        del state[name]
    else:
        state[name] = changed
    save_file(state, tmp_path / "theirs.safetensors")
    flags = ("--heads", 4, "--file-freq-stride", 12)
    said = runs.run(capsys, tmp_path / "theirs.safetensors", tmp_path / "out", *flags, command=convert.main).sentence
    assert name in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "changed", "wanted"),
    [
        ("config.json", {"model_type": "wav2vec2"}, "holds wav2vec2: a folder of transformers' AST"),
        ("config.json", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("config.json", {"num_mel_bins": 64}, "num_mel_bins 64"),
        ("config.json", {"layer_norm_eps": "little"}, "damaged"),
        ("config.json", {"num_attention_heads": "many"}, "damaged"),
        ("config.json", "[1]", "holds no JSON object"),
        ("config.json", "{", "is damaged"),
        ("preprocessor_config.json", {"sampling_rate": 44100}, "at 44100 Hz"),
        ("model.safetensors", None, "holds no weights"),
    ],
)
def test_folders_that_are_none(file, changed, wanted, theirs, tmp_path, capsys):
    folder = tmp_path / "theirs"
    folder.mkdir()
    for path in theirs[2].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / file
    if changed is None:
        path.unlink()
    else:
        path.write_text(changed if isinstance(changed, str) else json.dumps(json.loads(path.read_text()) | changed))
    assert wanted in runs.run(capsys, folder, tmp_path / "out", command=convert.main).sentence


def image_state(D=12, depth=2, side=4, patch=16, tokens=2, channels=3, seed=0):
    """What timm's VisionTransformer of these sizes would hold, with random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return 0.2 * torch.randn(*shape, generator=generator)

    state = {"cls_token": drawn(1, 1, D), "pos_embed": drawn(1, tokens + side**2, D)}
    if tokens == 2:
        state["dist_token"] = drawn(1, 1, D)
    shapes = {"norm": (D,), "patch_embed.proj": (D, channels, patch, patch), "head": (1000, D)}
    if tokens == 2:
        shapes["head_dist"] = (1000, D)
    for i in range(depth):
        block = {"norm1": (D,), "norm2": (D,), "attn.qkv": (3 * D, D), "attn.proj": (D, D)}
        block |= {"mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        state |= {f"{name}.weight": drawn(*shape), f"{name}.bias": drawn(shape[0])}
    return state


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("yes\nno\nmaybe\n")
    return ("--labels", path)


@needs_oracles
@pytest.mark.parametrize(
    ("case", "flags"),
    [
        ("384_to_1024", ()),
        ("384_to_128", ("--frames", 128)),
        ("64_to_64", ("--frames", 64)),
        ("224_to_1024_s16", ("--patch", "square")),
    ],
)
def test_image_models_as_ast_adapts_them(case, flags, labels, tmp_path, capsys):
    """Kernels and positions of the original code's own adaptation, at the strides that its names speak of."""
    tensors = {n.removeprefix(f"ast.{case}."): t for n, t in oracle("resize").items() if n.startswith(f"ast.{case}.")}
    D, side = tensors["pos_in"].shape[2], round((tensors["pos_in"].shape[1] - 2) ** 0.5)
    state = image_state(D, side=side) | {"pos_embed": tensors["pos_in"]}
    state["patch_embed.proj.weight"] = tensors["kernel_in"]
    torch.save({"model": state}, tmp_path / "deit.pth")  # DeiT's own files are wrapped so
    classifier, ended = converted(capsys, tmp_path / "deit.pth", tmp_path / "out", *labels, *flags)
    model = classifier.model
    assert "a new head of 3 classes" in ended.out
    torch.testing.assert_close(model.embed.position[None], tensors["pos_out"], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.embed.weight.mT, tensors["kernel_out"], rtol=0, atol=1e-5)
    assert torch.equal(model.blocks[1].fc1.weight, state["blocks.1.mlp.fc1.weight"])
    assert torch.equal(model.norm.bias, state["norm.bias"])
    assert torch.equal(model.head_norm.weight, torch.ones(D))
    assert model(torch.zeros(1, model.config.grid.T, 128)).isfinite().all()


@pytest.mark.parametrize("channels", ["sum", "mean"])
def test_image_models_for_full_frequency_patches(channels, labels, tmp_path, capsys):
    """One class token; channels added up or averaged, then the kernel and the positions by the usual rules, with a warning."""
    state = image_state(tokens=1)
    save_file(state, tmp_path / "vit.safetensors")
    flags = (*labels, *FFTP, "--frames", 100, "--channels", channels)
    classifier, ended = converted(capsys, tmp_path / "vit.safetensors", tmp_path / "out", *flags, warned=True)
    wanted = (
        "warning: patch kernels made for 16 frames x 16 bins are stretched to 10 x 128 (160 of their 256 dimensions"
    )
    assert ended.err.startswith(wanted)
    kernel = getattr(state["patch_embed.proj.weight"], channels)(1, keepdim=True).mT
    embed, config = classifier.model.embed, classifier.model.config
    assert (config.tokens, config.grid.N, classifier.labels) == (1, 23, ("yes", "no", "maybe"))
    torch.testing.assert_close(embed.weight, fftp.patching.resize_kernel(kernel, 10, 128), rtol=0, atol=1e-6)
    old = fftp.PatchGrid(T=64, F=64, pt=16, pf=16, st=16, sf=16)
    assert torch.equal(embed.position, fftp.patching.resize_positions(state["pos_embed"][0], 1, old, config.grid))


def test_image_models_of_timm(labels, tmp_path, capsys):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False, depth=2)
    torch.save(model.state_dict(), tmp_path / "deit.pth")
    classifier, _ = converted(capsys, tmp_path / "deit.pth", tmp_path / "out", *labels)
    assert (classifier.model.config.heads, classifier.model.config.grid.N) == (3, 1212)
    ours = convert.from_ast({f"v.{n}": t for n, t in model.state_dict().items()})
    tokens = torch.randn(2, 5, 192)
    with torch.no_grad():
        wanted = model.norm(model.blocks(tokens))
        got = tokens
        for block in classifier.model.blocks:
            got = block(got)
        assert largest(classifier.model.norm(got), wanted) < 1e-5
    assert torch.equal(ours["blocks.0.fc1.weight"], classifier.model.blocks[0].fc1.weight)


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"patch_embed.proj.weight": torch.zeros(12, 4, 16, 16)}, "'patch_embed.proj.weight' is (D, 3, height, width)"),
        ({"patch_embed.proj.weight": torch.zeros(12, 3, 8, 16)}, "a model of square images and patches is wanted"),
        ({"pos_embed": torch.zeros(1, 17, 12)}, "has 15 positions"),
        ({"blocks.0.ls1.gamma": torch.zeros(12)}, "'v.blocks.0.ls1.gamma' is not a tensor of this model"),
        ({"blocks.1.attn.proj.bias": None}, "lacks blocks.1.attn.proj.bias"),
        ({"no labels": None}, "is an image model, whose head knows no sounds: name your classes by --labels FILE"),
        ({"five heads": None}, "12 dimensions wide, which 5 heads do not divide"),
    ],
)
def test_image_models_that_are_none(changed, wanted, labels, tmp_path, capsys):
    state = {n: t for n, t in (image_state() | changed).items() if t is not None}
    torch.save(state, tmp_path / "vit.pth")
    flags = () if "no labels" in changed else (*labels, *(("--heads", 5) if "five heads" in changed else ()))
    assert wanted in runs.run(capsys, tmp_path / "vit.pth", tmp_path / "out", *flags, command=convert.main).sentence


def test_a_model_of_the_hub(theirs, tmp_path, capsys, monkeypatch):
    """A name that is no path is fetched: the three files alone, and what cannot be fetched is one sentence."""
    package = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    asked = []

    def fetch(name, revision, allow_patterns):
        asked.append((name, revision, set(allow_patterns)))
        if name.startswith("absent"):
            raise package.errors.LocalEntryNotFoundError("no such model")
        return str(theirs[2])

    monkeypatch.setattr(package, "snapshot_download", fetch)
    classifier, _ = converted(capsys, "MIT/ast-finetuned-audioset-10-10-0.4593", tmp_path / "out")
    assert classifier.labels == tuple("abcdefg")
    assert asked == [("MIT/ast-finetuned-audioset-10-10-0.4593", None, set(hub.TRANSFORMERS_FILES))]
    said = runs.run(capsys, "absent/model", tmp_path / "other", command=convert.main).sentence
    assert "absent/model is no folder here and could not be fetched from the hub (no such model)" in said
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    said = runs.run(capsys, "MIT/ast", tmp_path / "other", command=convert.main).sentence
    assert "The huggingface_hub package is not installed" in said
