"""python -m fftp.convert: files of AST's and AuM's own names become checkpoints that answer as the originals do."""

import json

import pytest
import torch
from oracles import part
from originals import grid, load, stored
from safetensors.torch import save_file

import fftp
from fftp import AST, ASTConfig, AuM, AuMConfig, FrontEndSettings, PatchGrid, checkpoint, convert, predict
from fftp.aum_model import SIZES
from fftp.patching import resize_kernel, resize_positions
from fftp.published import Hints, from_aum
from fftp.published import load as load_published
from kernels import FbankSettings
from tests import runs
from tests.made_data import make_files

CASES = stored("aum_none", "aum_v1", "aum_v2", "aum_v1_fftp", "ast_tiny", "ast_tiny_fftp")


def weights(name):
    return part(load((name, "small")), "weight.")


def write(path, state):
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def flags_for(name):
    """What a file does not say: AST's heads where they are not 64 wide, strides that are not the published ones."""
    if name.startswith("ast"):
        return ["--heads", 4] + (["--file-time-stride", 4, "--file-freq-stride", 128] if name.endswith("fftp") else [])
    return ["--file-time-stride", 4] if name.endswith("fftp") else []


def converted(capsys, source, out, *flags, warned=False):
    ended = runs.run(capsys, source, out, *flags, command=convert.main)
    assert ended.code == 0, ended.err
    assert ended.err.startswith("warning: patch kernels made for ") if warned else ended.err == ""
    return fftp.load(out), ended.out


@pytest.mark.parametrize("case", CASES)
def test_the_originals_logits(case, tmp_path, capsys):
    """From the stored weights to fftp.load; the bound of test_aum_model and test_ast_model in float64."""
    tensors = load(case)
    source = write(tmp_path / "theirs.safetensors", part(tensors, "weight."))
    classifier, said = converted(capsys, source, tmp_path / "out", *flags_for(case[0]))
    model = classifier.model
    assert model.config.grid == grid(case[0])  # 64 frames are a power of two
    assert getattr(model.config, "directions", "ast") == (case[0].split("_")[1] if "aum" in case[0] else "ast")
    logits = model.double()(tensors["input"].double())
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-10)
    assert "weights as they are; mean -4.2677, std 4.5690, 10 classes" in said
    assert classifier.labels == tuple("0123456789")
    front_end = classifier.config.front_end
    assert (front_end.T, front_end.F, front_end.clip_samples) == (64, 128, 400 + 63 * 160)


@pytest.mark.parametrize("wrapper", ["plain", "state_dict", "model", "module", "both"])
@pytest.mark.parametrize("kind", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["aum_v1", "ast_tiny"])
def test_wrappers(name, wrapper, kind, tmp_path, capsys):
    state = weights(name)
    prefixed = {f"module.{n}": t for n, t in state.items()}
    held = {
        "plain": state,
        "module": prefixed,
        "state_dict": {"epoch": 3, "state_dict": state},
        "model": {"model": state, "optimizer": {"lr": 0.1}},
        "both": {"model": {"state_dict": prefixed}},
    }[wrapper]
    if kind == ".safetensors" and wrapper not in ("plain", "module"):
        with pytest.raises(AttributeError):  # such a file holds tensors alone
            write(tmp_path / f"theirs{kind}", held)
        return
    source = write(tmp_path / f"theirs{kind}", held)
    model = converted(capsys, source, tmp_path / "out", *flags_for(name))[0].model
    wanted = (convert.from_ast if name == "ast_tiny" else convert.from_aum)(state)
    assert model.state_dict().keys() == wanted.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key


def test_number_of_tensors_of_the_published_files():
    """271 for base v1, 247 for none, 415 for v2 (PAPER_NOTES 4.6): ours are as many, name for name."""
    for directions, count in (("v1", 271), ("none", 247), ("v2", 415)):
        with torch.device("meta"):
            config = AuMConfig(grid=grid("aum_v1"), classes=527, directions=directions, **SIZES["base"])
            assert len(AuM(config).state_dict()) == count


def v2_weights():
    """The small v1 file with a backward branch: the same tensors, moved a little, under the names that v2 adds."""
    state = weights("aum_v1")
    for name in [n for n in state if ".mixer." in n]:
        for theirs, added in (("conv1d.", "conv1d_b."), ("x_proj.", "x_proj_b."), ("dt_proj.", "dt_proj_b.")):
            if theirs in name:
                state[name.replace(theirs, added)] = state[name] + 0.1
        if name.endswith(".D"):
            state[f"{name}_b"] = state[name] + 0.1
    return state


def test_directions_show_in_the_names(tmp_path, capsys):
    """Made v2 and none files, where the stored ones are absent: each tensor lands where its name says."""
    both = v2_weights()
    model = converted(capsys, write(tmp_path / "v2.pth", both), tmp_path / "v2")[0].model
    assert model.config.directions == "v2"
    ours = model.state_dict()
    for theirs, name in (
        ("conv1d_b.bias", "conv_bias"),
        ("x_proj_b.weight", "x_proj.weight"),
        ("dt_proj_b.bias", "dt_proj.bias"),
        ("D_b", "D"),
        ("A_b_log", "A_log"),
    ):
        wanted = both[f"layers.1.mixer.{theirs}"]
        assert torch.equal(ours[f"layers.1.mixer.backward_branch.{name}"], wanted), theirs
    assert torch.equal(ours["layers.1.mixer.forward_branch.A_log"], both["layers.1.mixer.A_log"])
    forward = {n: t for n, t in weights("aum_v1").items() if not n.endswith("A_b_log")}
    model = converted(capsys, write(tmp_path / "none.pth", forward), tmp_path / "none")[0].model
    assert model.config.directions == "none"


@pytest.mark.parametrize(
    ("name", "rows", "hints", "T", "n_f", "n_t"),
    [
        ("aum_v1", 513, {}, 1024, 8, 64),
        ("aum_v1", 65, {}, 128, 8, 8),
        ("ast_tiny", 1214, {}, 1024, 12, 101),
        ("ast_tiny", 146, {}, 128, 12, 12),
        ("ast_tiny", 514, {"time_stride": 16, "freq_stride": 16}, 1024, 8, 64),
        ("ast_tiny", 12 * 48 + 2, {}, 486, 12, 48),  # no power of two fits: the fewest frames that do
    ],
)
def test_grids_of_published_files(name, rows, hints, T, n_f, n_t, tmp_path):
    """The input's length comes from the number of positions (PAPER_NOTES 3.4, 4.6, 4.7)."""
    state = weights(name)
    key = "pos_embed.pos_embed" if name == "aum_v1" else "v.pos_embed"
    state[key] = torch.randn(1, rows, state[key].shape[2])
    heads = {"heads": 4} if name == "ast_tiny" else {}
    config, ours, _ = load_published(write(tmp_path / "theirs.pth", state), Hints(**hints, **heads))
    assert (config.grid.T, config.grid.n_f, config.grid.n_t) == (T, n_f, n_t)
    assert torch.equal(ours["embed.position"], state[key][0])


def test_one_class_token_and_half_precision(tmp_path):
    """AST without its distillation token; a file in half precision is read in float32."""
    state = {n: t.half() for n, t in weights("ast_tiny").items() if n != "v.dist_token"}
    state["v.pos_embed"] = state["v.pos_embed"][:, 1:]
    config, ours, _ = load_published(write(tmp_path / "theirs.pth", state), Hints(heads=4))
    assert (config.tokens, config.grid.N) == (1, 60)
    assert {t.dtype for t in ours.values()} == {torch.float32}
    model = AST(config)
    model.load_state_dict(ours)


def test_published_head_widths(tmp_path):
    """64 dimensions a head, as in all of AST's sizes, where nothing is said."""
    torch.manual_seed(0)
    model = AST(ASTConfig(grid=grid("ast_tiny"), classes=3, dim=128, depth=1, heads=2))
    state = {f"v.blocks.0.{n}": t for n, t in model.blocks[0].state_dict().items()}
    state = {n.replace("attention", "attn").replace(".fc", ".mlp.fc"): t for n, t in state.items()}
    state |= {f"v.norm.{n}": t for n, t in model.norm.state_dict().items()}
    state |= {
        f"mlp_head.{i}.{n}": t for i, m in enumerate((model.head_norm, model.head)) for n, t in m.state_dict().items()
    }
    state |= {"v.cls_token": model.embed.class_token[None, :1], "v.dist_token": model.embed.class_token[None, 1:]}
    state |= {"v.pos_embed": model.embed.position[None], "v.patch_embed.proj.bias": model.embed.bias}
    state["v.patch_embed.proj.weight"] = model.embed.weight.mT
    state = {n: t.detach().contiguous() for n, t in state.items()}
    config, ours, _ = load_published(write(tmp_path / "theirs.safetensors", state), Hints())
    assert config == model.config
    assert all(torch.equal(ours[n], t) for n, t in model.state_dict().items())


def test_without_positions(tmp_path, capsys):
    """AuM trained without a table: the clip's length has to be given."""
    state = {n: t for n, t in weights("aum_v1").items() if "pos_embed" not in n}
    source = write(tmp_path / "theirs.pth", state)
    said = runs.run(capsys, source, tmp_path / "out", command=convert.main).sentence
    assert "has no positions, so nothing says how long its clips are: give --frames" in said
    model = converted(capsys, source, tmp_path / "out", "--frames", 96)[0].model
    assert model.config.positions == "none"
    assert model(torch.zeros(1, 96, 128)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "flags", "wanted"),
    [
        ("aum_v1", ["--frames", 128], (128, 16, 16, 16, 16)),
        ("aum_v1", ["--patch", "fftp"], (64, 10, 128, 4, 128)),
        (
            "aum_v1",
            ["--patch", "fftp", "--patch-time", 25, "--time-stride", 5, "--frames", 200],
            (200, 25, 128, 5, 128),
        ),
        ("aum_v1", ["--patch", "square", "--patch-time", 8, "--patch-freq", 32], (64, 8, 32, 8, 32)),
        ("aum_v1", ["--time-stride", 8], (64, 16, 16, 8, 16)),
        ("ast_tiny", ["--heads", 4, "--patch", "square"], (64, 16, 16, 16, 16)),
        ("ast_tiny", ["--heads", 4, "--patch-freq", 128, "--resize", "bilinear"], (64, 16, 128, 10, 10)),
    ],
)
def test_another_geometry(name, flags, wanted, tmp_path, capsys):
    """Positions and kernel by the resizing rules, which test_patch_embed proves; every other tensor untouched."""
    state, old = weights(name), grid(name)
    source, warned = write(tmp_path / "theirs.pth", state), (wanted[1], wanted[2]) != (16, 16)
    model, said = converted(capsys, source, tmp_path / "out", *flags, warned=warned)
    model, new = model.model, model.model.config.grid
    assert (new.T, new.pt, new.pf, new.st, new.sf) == wanted
    before = (convert.from_ast if name == "ast_tiny" else convert.from_aum)(state)
    tokens = before["embed.class_token"].shape[0]
    method = "bilinear" if "bilinear" in flags else "pinv"
    before["embed.position"] = resize_positions(before["embed.position"], tokens, old, new)
    before["embed.weight"] = resize_kernel(before["embed.weight"], new.pt, new.pf, method)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert f"embedding resized from {old.N} patches of 16 frames x 16 bins to {new.N} patches" in said
    assert model(torch.zeros(2, new.T, new.F)).isfinite().all()


@pytest.mark.parametrize("place", ["head", "middle", "end"])
def test_place_of_the_class_token(place, tmp_path, capsys):
    """Position row 0 is the class token's wherever it stands; the place is no tensor, so it is said."""
    source = write(tmp_path / "theirs.pth", weights("aum_v1"))
    model = converted(capsys, source, tmp_path / "out", "--place", place)[0].model
    embedded = model.embed(torch.randn(1, 64, 128))
    row = model.embed.class_token[0] + model.embed.position[0]
    assert torch.equal(embedded[0, {"head": 0, "middle": 16, "end": 32}[place]], row)


def label_file(path, names):
    if path.suffix == ".csv":
        path.write_text("index,mid,display_name\n" + "".join(f'{i},/m/{i},"{n}"\n' for i, n in enumerate(names)))
    else:
        path.write_text("\n".join(names) + "\n\n")
    return path


@pytest.mark.parametrize("kind", [".txt", ".csv"])
def test_labels_from_a_file(kind, tmp_path, capsys):
    names = ["Speech", "Male speech, man speaking", *"cdefghij"]
    labels = label_file(tmp_path / f"labels{kind}", names)
    source = write(tmp_path / "theirs.pth", weights("aum_v1"))
    flags = ("--labels", labels, "--multi-label", "--mean", -6.8, "--std", 5.5)
    classifier, said = converted(capsys, source, tmp_path / "out", *flags)
    assert classifier.labels == tuple(names)
    assert classifier.multi_label
    assert (classifier.config.front_end.mean, classifier.config.front_end.std) == (-6.8, 5.5)
    assert "weights as they are" in said
    assert torch.equal(classifier.model.head.weight, weights("aum_v1")["head.weight"])


def test_another_number_of_classes_is_a_new_head(tmp_path, capsys):
    labels = label_file(tmp_path / "labels.txt", ["yes", "no", "maybe"])
    source = write(tmp_path / "theirs.pth", weights("aum_v1"))
    made = [
        converted(capsys, source, tmp_path / f"out{number}", "--labels", labels, "--seed", seed)
        for number, seed in enumerate((0, 0, 1))
    ]
    before = torch.random.get_rng_state()
    convert.convert(source, convert.Options(labels=str(labels)))
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's own draws are left alone
    heads = [classifier.model.head.weight for classifier, _ in made]
    assert heads[0].shape == (3, 64)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert not made[0][0].model.head.bias.any()
    assert "a new head of 3 classes in place of 10" in made[0][1]
    kept = from_aum(weights("aum_v1"))
    for key, tensor in made[0][0].model.state_dict().items():
        assert key.startswith("head.") or torch.equal(tensor, kept[key]), key


def test_the_checkpoint_predicts(tmp_path, capsys):
    out = tmp_path / "out"
    converted(capsys, write(tmp_path / "theirs.pth", weights("ast_tiny")), out, "--heads", 4)
    ended = runs.run(capsys, out, make_files(tmp_path / "sounds", 1)[0], "--json", "--top", 10, command=predict.main)
    assert ended.code == 0, ended.err
    assert sum(entry["probability"] for entry in json.loads(ended.out)["top"]) == pytest.approx(1, abs=1e-5)


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the command, which has to refuse and to leave nothing behind; returns the sentence."""

    def refuse(source, *flags):
        out = tmp_path / "refused"
        said = runs.run(capsys, source, out, *flags, command=convert.main).sentence
        assert not list(tmp_path.glob("refused*"))
        assert said.endswith((".", "?"))
        return said

    return refuse


class Sly:
    """Pickles as a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_needs_code_is_refused_and_not_run(refused, tmp_path):
    marker = tmp_path / "marker"
    for held in (Sly(marker), {"state_dict": weights("aum_v1"), "args": Sly(marker)}):
        torch.save(held, tmp_path / "theirs.pth")
        said = refused(tmp_path / "theirs.pth")
        assert "is no plain state dict" in said
        assert "would run code (" in said
        assert not marker.exists()


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "number", "list", "nothing", "inner", "cut"])
def test_files_that_are_none(kind, refused, tmp_path):
    path = tmp_path / ("theirs.safetensors" if kind == "cut" else "theirs.pth")
    held = {"number": 3, "list": [torch.zeros(2)], "nothing": {}, "inner": {"model": {"a": 1}}}
    if kind in held:
        torch.save(held[kind], path)
        wanted = "holds no state dict"
    else:
        write(path, weights("aum_v1"))
        content = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"These are words. " * 20}.get(kind, content[: len(content) // 2]))
        wanted = {"cut": "is truncated or not a safetensors file", "text": "is not a PyTorch file"}.get(
            kind, "is damaged"
        )
    said = refused(path)
    assert wanted in said
    assert str(path) in said


def test_a_checkpoint_of_this_library_is_none(refused, tmp_path):
    model = AST(ASTConfig(grid=PatchGrid(T=32, F=16, pt=8, pf=16, st=8, sf=16), classes=2, dim=16, depth=1, heads=1))
    front_end = FrontEndSettings(T=32, clip_samples=5000, mean=0.0, std=1.0, fbank=FbankSettings(n_mels=16))
    about = checkpoint.CheckpointConfig(
        model=model.config, front_end=front_end, labels=("a", "b"), multi_label=False, settings={}
    )
    (tmp_path / "ours").mkdir()
    checkpoint.save(tmp_path / "ours", model, about)
    for source in (tmp_path / "ours", tmp_path / "ours" / "model.safetensors"):
        assert "is a checkpoint of this library already" in refused(source)


def test_files_that_are_absent_or_there(refused, tmp_path, capsys):
    assert "There is no file" in refused(tmp_path / "absent.pth")
    assert "There is no file" in refused(tmp_path)
    source = write(tmp_path / "theirs.pth", weights("aum_v1"))
    (tmp_path / "out").mkdir()
    assert "is there already" in runs.run(capsys, source, tmp_path / "out", command=convert.main).sentence
    (tmp_path / "file").touch()
    assert "cannot be written" in runs.run(capsys, source, tmp_path / "file" / "out", command=convert.main).sentence


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("aum_v1", "cls_token"),
        ("aum_v1", "patch_embed.proj.weight"),
        ("aum_v1", "patch_embed.proj.bias"),
        ("aum_v1", "head.weight"),
        ("aum_v1", "norm_f.weight"),
        ("aum_v1", "layers.0.mixer.A_log"),
        ("aum_v1", "layers.0.mixer.conv1d.weight"),
        ("aum_v1", "layers.1.mixer.A_b_log"),
        ("aum_v1", "layers.1.mixer.dt_proj.bias"),
        ("aum_v1", "layers.0.norm.weight"),
        ("aum_v2", "layers.1.mixer.D_b"),
        ("ast_tiny", "v.cls_token"),
        ("ast_tiny", "v.pos_embed"),
        ("ast_tiny", "v.blocks.1.attn.qkv.bias"),
        ("ast_tiny", "mlp_head.0.weight"),
        ("ast_tiny", "mlp_head.1.weight"),
    ],
)
def test_a_missing_tensor_is_named_as_in_the_file(name, missing, refused, tmp_path):
    state = v2_weights() if name == "aum_v2" else weights(name)
    del state[missing]
    said = refused(write(tmp_path / "theirs.pth", state), *flags_for(name))
    assert missing in said
    assert "lacks" in said or "is missing" in said


@pytest.mark.parametrize(
    ("name", "changed", "wanted"),
    [
        ("aum_v1", {"layers.1.mixer.D": torch.zeros(64)}, "holds layers.1.mixer.D as (64,)"),
        (
            "aum_v1",
            {"layers.0.mixer.x_proj.weight": torch.zeros(30, 128)},
            "holds layers.0.mixer.x_proj.weight as (30, 128)",
        ),
        (
            "aum_v1",
            {"patch_embed.proj.weight": torch.zeros(64, 3, 16, 16)},
            "holds patch_embed.proj.weight as (64, 3, 16, 16)",
        ),
        ("aum_v1", {"patch_embed.proj.weight": torch.zeros(64, 256)}, "tensors of the wrong rank"),
        ("aum_v1", {"cls_token": torch.tensor(1.0)}, "tensors of the wrong rank"),
        ("aum_v1", {"head.weight": torch.tensor(1.0)}, "tensors of the wrong rank"),
        ("aum_v1", {"patch_embed.proj.weight": torch.zeros(64, 1, 1, 16, 16)}, "tensors of the wrong rank"),
        ("aum_v1", {"pos_embed.pos_embed": torch.zeros(33, 64)}, "tensors of the wrong rank"),
        ("aum_v1", {"layers.0.mixer.A_log": torch.zeros(16)}, "holds layers.0.mixer.A_log as (16,)"),
        ("aum_v1", {"layers.0.mixer.conv1d.weight": torch.zeros(128, 1, 3)}, "convolutions of 3 taps"),
        ("aum_v1", {"pos_embed.pos_embed": torch.zeros(1, 31, 64)}, "positions for 30 patches, which 8 bands"),
        ("aum_v1", {"pos_embed.pos_embed": torch.zeros(1, 1, 64)}, "positions for 0 patches"),
        ("aum_v1", {"patch_embed.proj.weight": torch.zeros(64, 1, 200, 16)}, "patches of 200 bins"),
        (
            "aum_v1",
            {"layers.0.mixer.novelty": torch.zeros(3)},
            "'layers.0.mixer.novelty' is not a tensor of this model",
        ),
        ("aum_v1", {"v.norm.weight": torch.zeros(3)}, "is not a tensor of this model"),
        ("ast_tiny", {"v.norm.weight": torch.zeros(3)}, "holds v.norm.weight as (3,)"),
        ("ast_tiny", {"v.pos_embed": torch.zeros(1, 64, 48)}, "positions for 62 patches, which 12 bands"),
    ],
)
def test_tensors_of_another_model(name, changed, wanted, refused, tmp_path):
    assert wanted in refused(write(tmp_path / "theirs.pth", weights(name) | changed), *flags_for(name))


def test_neither_model(refused, tmp_path):
    said = refused(write(tmp_path / "theirs.pth", {"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}))
    assert "neither AST's nor AuM's" in said
    assert "the first is 'conv1.weight'" in said


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--patch", "fftp", "--patch-freq", 16], "--patch fftp covers all 128 mel bins"),
        (["--patch-time", 65], "65 frames is wider than the clip of 64 frames"),
        (["--patch-freq", 129], "higher than the 128 bins"),
        (["--frames", -1], "--frames has to be 0 or more, not -1"),
        (["--file-time-stride", -2], "--file-time-stride has to be 0 or more, not -2"),
        (["--file-freq-stride", 100], "which 2 bands"),
        (["--std", 0], "--std is above 0"),
        (["--mean", "nan"], "--mean and --std are finite"),
        (["--std", "inf"], "--mean and --std are finite"),
        (["--labels", "absent.txt"], "--labels absent.txt cannot be read"),
        (["--patch", "round"], "cannot make sense of"),
        (["--bands", 3], "has no flag '--bands'"),
    ],
)
def test_flags_that_do_not_fit(flags, wanted, refused, tmp_path):
    # 35 patches do not come in two bands.
    state = weights("aum_v1")
    if "--file-freq-stride" in flags:
        state["pos_embed.pos_embed"] = torch.zeros(1, 36, 64)
    assert wanted in refused(write(tmp_path / "theirs.pth", state), *flags)


def test_heads_that_do_not_divide(refused, tmp_path):
    said = refused(write(tmp_path / "theirs.pth", weights("ast_tiny")), "--heads", 5)
    assert "48 dimensions wide, which 5 heads do not divide" in said


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("labels.txt", "a\nb\na\n", "one twice"),
        ("labels.txt", "\n\n", "has no names"),
        ("labels.csv", "a,b\n1,2\n", "has no column display_name"),
        ("labels.csv", "", "has no column display_name"),
        ("labels.csv", "index,display_name\n0,a\n1,\n", "an empty one"),
        ("labels.txt", b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_label_files_that_are_none(name, text, wanted, refused, tmp_path):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refused(write(tmp_path / "theirs.pth", weights("aum_v1")), "--labels", path)
    assert wanted in said
    assert str(path) in said


def test_a_grid_is_found_for_any_frames(tmp_path):
    """Whatever length the file was made for, the grid found has as many patches as the table has rows."""
    state = weights("aum_v1")
    for n_t in (1, 2, 4, 7, 61, 64, 100):
        state["pos_embed.pos_embed"] = torch.zeros(1, 1 + 8 * n_t, 64)
        config, *_ = load_published(write(tmp_path / "theirs.pth", state), Hints())
        assert (config.grid.n_f, config.grid.n_t) == (8, n_t)
        assert isinstance(config.grid, PatchGrid)
