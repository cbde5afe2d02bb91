"""Attention rollout against its definition, and the three figures: written, and with something on them."""

import numpy as np
import pytest
import torch

from fftp import checkpoint, explain, mixture
from fftp.ast_model import AST, ASTConfig
from fftp.aum_model import AuM, AuMConfig
from fftp.errors import UserError
from fftp.explain import attention_rollout
from fftp.frontend import FrontEndSettings
from fftp.patching import PatchGrid
from kernels import FbankSettings
from tests import runs
from tests.made_data import RATE

T, F = 30, 16
GRIDS = {
    "full-frequency": PatchGrid(T=T, F=F, pt=5, pf=F, st=3, sf=F),
    "square": PatchGrid(T=T, F=F, pt=8, pf=8, st=8, sf=8),  # frames 24 to 29 lie under no patch
    "overlapping": PatchGrid(T=T, F=F, pt=6, pf=8, st=4, sf=4),
}


def model_of(grid, depth=3, tokens=2):
    torch.manual_seed(0)
    model = AST(ASTConfig(grid=grid, classes=4, dim=24, depth=depth, heads=3, tokens=tokens)).eval()
    for block in model.blocks:  # from scratch attention is nearly even: sharpen it
        torch.nn.init.normal_(block.attention.qkv.weight, std=0.5)
    return model


def sound(grid, B=2):
    return torch.randn(B, grid.T, grid.F, generator=torch.Generator().manual_seed(1))


def rollout_by_definition(model, log_mel):
    """Abnar and Zuidema's rollout of one clip in float64, cell by cell: `[T, F]`."""
    grid, tokens = model.config.grid, model.config.tokens
    with torch.inference_mode():
        layers = [attention[0].double().numpy() for attention in model.attentions(log_mel[None])]
    joint = np.eye(layers[0].shape[-1])
    for attention in layers:
        mixed = attention.mean(0) / 2 + np.eye(len(joint)) / 2
        joint = mixed / mixed.sum(1, keepdims=True) @ joint
    cells, covers = np.zeros((grid.T, grid.F)), np.zeros((grid.T, grid.F))
    n = 0
    for f in range(0, grid.F - grid.pf + 1, grid.sf):  # frequency first, as the tokens are counted
        for t in range(0, grid.T - grid.pt + 1, grid.st):
            cells[t : t + grid.pt, f : f + grid.pf] += joint[:tokens, tokens + n].mean()
            covers[t : t + grid.pt, f : f + grid.pf] += 1
            n += 1
    cells = cells / np.maximum(covers, 1)
    return cells / cells.mean()


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_rollout_is_its_definition(grid, tokens):
    model, log_mel = model_of(grid, tokens=tokens), sound(grid)
    got = attention_rollout(model, log_mel)
    assert got.shape == (2, T, F)
    for row, clip in zip(got.numpy(), log_mel, strict=True):
        # float32 against float64: seen 7e-7 of 3, times ten.
        np.testing.assert_allclose(row, rollout_by_definition(model, clip), atol=7e-6)
        assert row.mean() == pytest.approx(1, abs=1e-5)
        assert row.min() >= 0
    assert got.std() > 0.05  # or even attention would pass


def test_full_frequency_patches_give_one_value_a_frame():
    got = attention_rollout(model_of(GRIDS["full-frequency"]), sound(GRIDS["full-frequency"]))
    assert torch.equal(got, got[:, :, :1].expand_as(got))
    assert not torch.equal(got[:, :1], got[:, 10:11])
    square = attention_rollout(model_of(GRIDS["square"]), sound(GRIDS["square"]))
    assert not torch.equal(square, square[:, :, :1].expand_as(square))
    assert (square[:, 24:] == 0).all()  # no patch looks there


def test_one_block_by_hand(monkeypatch):
    grid = PatchGrid(T=4, F=F, pt=2, pf=F, st=2, sf=F)  # one class token and two patches
    model = model_of(grid, depth=1, tokens=1)
    attention = torch.tensor([[0.2, 0.6, 0.2], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    monkeypatch.setattr(model, "attentions", lambda log_mel: [attention[None, None].expand(1, 3, 3, 3)])
    # The class token's row of (A + 1) / 2 is (0.6, 0.3, 0.1): the patches have 0.3 and 0.1, a mean of 0.2.
    expected = torch.tensor([1.5, 1.5, 0.5, 0.5])[None, :, None].expand(1, 4, F)
    torch.testing.assert_close(attention_rollout(model, sound(grid, 1)), expected)


def test_aum_has_no_attention():
    model = AuM(AuMConfig(grid=GRIDS["full-frequency"], classes=4, dim=16, depth=1))
    with pytest.raises(UserError, match="AuM has none, take an AST checkpoint"):
        attention_rollout(model, sound(GRIDS["full-frequency"]))


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A second and a half of a rising tone in noise."""
    import soundfile

    path = tmp_path_factory.mktemp("sound") / "rising.wav"
    t = np.arange(24_000) / RATE
    wave = 0.3 * np.sin(2 * np.pi * (300 * t + 900 * t**2)) + 0.01 * np.random.default_rng(0).normal(size=len(t))
    soundfile.write(path, wave, RATE)
    return path


def make_checkpoint(folder, kind="ast", patch=10):
    """A fresh model of one second of sound."""
    grid = PatchGrid(
        T=100, F=128, pt=patch, pf=128 if patch == 10 else patch, st=patch, sf=128 if patch == 10 else patch
    )
    if kind == "ast":
        model = ASTConfig(grid=grid, classes=3, dim=24, depth=2, heads=3)
    else:
        model = AuMConfig(grid=grid, classes=3, dim=16, depth=1)
    front_end = FrontEndSettings(T=100, clip_samples=16_000, mean=-6.0, std=4.0, fbank=FbankSettings())
    named = {"labels": ("a", "b", "c"), "multi_label": False, "settings": {}}
    config = checkpoint.CheckpointConfig(model=model, front_end=front_end, **named)
    folder.mkdir()
    checkpoint.save(folder, config.build(), config)
    return folder


def pixels(path):
    """RGB `[height, width, 3]` in 0..1."""
    from matplotlib.image import imread

    assert path.stat().st_size > 10_000
    return imread(path)[..., :3]


def near(picture, colour, within=0.02):
    """Share of the pixels that have this colour."""
    from matplotlib.colors import to_rgb

    return float((np.abs(picture - to_rgb(colour)).max(-1) < within).mean())


def test_figure1(recording, tmp_path, capsys):
    ended = runs.run(capsys, "figure1", "--file", recording, "--out", tmp_path / "one.png", command=explain.main)
    assert (ended.code, ended.err, ended.out.strip()) == (0, "", str(tmp_path / "one.png"))
    picture = pixels(tmp_path / "one.png")
    upper = picture[: len(picture) // 2]
    assert near(upper, "white") < 0.5  # spectrograms fill most of it
    assert len(np.unique(upper.reshape(-1, 3), axis=0)) > 50


def test_figure2_shows_masks_in_both_panels(recording, tmp_path, capsys):
    flags = ("--file", recording, "--out", tmp_path / "two.png")
    assert runs.run(capsys, "figure2", *flags, command=explain.main).code == 0
    picture = pixels(tmp_path / "two.png")
    width = picture.shape[1] // 3
    plain, augmented, masked = (picture[:, i * width : (i + 1) * width] for i in range(3))
    # 20 % of the panel, which takes three quarters of its third, is hidden by SpecMask; SpecAugment draws its own share.
    # The picture has 200 colours: the mask's lies within 0.05.
    assert near(plain, explain.MASK_COLOUR, 0.05) == 0
    assert near(augmented, explain.MASK_COLOUR, 0.05) > 0.01
    assert 0.08 < near(masked, explain.MASK_COLOUR, 0.05) < 0.3
    other = runs.run(capsys, "figure2", *flags, "--seed", 3, command=explain.main)
    assert other.code == 0
    assert not np.array_equal(pixels(tmp_path / "two.png"), picture)


def test_figure3_of_two_checkpoints(recording, tmp_path, capsys):
    folders = [make_checkpoint(tmp_path / "full"), make_checkpoint(tmp_path / "square", patch=16)]
    flags = ("--file", recording, "--checkpoint", *folders, "--out", tmp_path / "three.png")
    ended = runs.run(capsys, "figure3", *flags, command=explain.main)
    assert ended.code == 0, ended.err
    assert near(pixels(tmp_path / "three.png"), "white") < 0.6


def test_figure3_of_a_mixture(recording, tmp_path, capsys):
    of = ("--checkpoint", make_checkpoint(tmp_path / "full"), "--out")
    two = ("--file", recording, recording, "--names", "one", "two")
    ended = runs.run(capsys, "figure3", *two, *of, tmp_path / "two.png", command=explain.main)
    assert ended.code == 0, ended.err
    runs.run(capsys, "figure3", *two[:2], *of, tmp_path / "one.png", command=explain.main)
    assert not np.array_equal(pixels(tmp_path / "two.png"), pixels(tmp_path / "one.png"))


def test_a_mixture_is_of_the_loudest_stretches():
    rng = np.random.default_rng(1)
    first, second = 0.001 * rng.standard_normal(RATE), 0.001 * rng.standard_normal(RATE)
    first[4000:9000] *= 300
    second[:100] = 0.5
    mixed, sounds = mixture.mixture([first, second[:1000]], ["a", "b"], 2 * RATE, RATE)
    a, b = sounds
    assert (a.name, b.name, len(mixed), mixed.dtype) == ("a", "b", 2 * RATE, np.float32)
    assert (a.start, a.stop, b.start, b.stop) == (3200, 12_800, 23_500, 24_500)
    for sound in sounds:
        level = np.sqrt(np.mean(np.square(mixed[sound.start : sound.stop], dtype=np.float64)))
        assert level == pytest.approx(mixture.LOUDNESS, rel=0.02)
    assert np.abs(mixed[:3200]).max() < 0.1 * mixture.LOUDNESS
    # 9600 of the clip's samples hold the 5000 loud ones, wherever they begin.
    assert np.sum(np.abs(mixed[a.start : a.stop]) > 5e-3) > 4000
    with pytest.raises(UserError, match=r"9 recordings do not fit into .*: give 6 or fewer"):
        mixture.mixture([first] * 9, list("abcdefghi"), 2 * RATE, RATE)


def test_the_mean_over_sounds():
    heat = np.ones((100, 4))
    heat[10:20] = 11  # frames 10 to 19: 0.1 s to 0.2 s
    sound = mixture.Sound(name="a", start=1600, stop=3200)
    assert mixture.mean_over([sound], heat, RATE) == pytest.approx(11 / 2)


def test_requests_that_cannot_be_met(recording, tmp_path, capsys):
    aum = make_checkpoint(tmp_path / "aum", kind="aum")
    out = ("--out", tmp_path / "x.png")
    for flags, named in (
        ((), "Say which figure to draw"),
        (("figure4", "--file", recording), "Say which figure to draw"),
        (("figure1", "--file", tmp_path / "absent.wav", *out), "absent.wav"),
        (("figure2", "--file", recording, "--out", tmp_path / "no" / "x.png"), "cannot be written"),
        (("figure3", "--file", recording, *out), "add --checkpoint"),
        (("figure1", "--file", recording, recording, *out), "figure1 shows one recording"),
        (
            ("figure3", "--file", recording, recording, "--names", "a", "--checkpoint", aum, *out),
            "1 names for 2 recordings",
        ),
        (("figure3", "--file", recording, "--checkpoint", tmp_path / "none", *out), "There is no checkpoint at"),
        (("figure3", "--file", recording, "--checkpoint", aum, *out), "AuM has none"),
    ):
        assert named in runs.run(capsys, *flags, command=explain.main).sentence
    assert not (tmp_path / "x.png").exists()
