"""Flags over recipe over defaults; every recipe builds what it says; what is wrong is refused in a sentence."""

import re
from dataclasses import fields, replace

import pytest
import torch

from fftp import ast_model, aum_model
from fftp.checkpoint import CheckpointConfig
from fftp.errors import UserError
from fftp.frontend import PRESETS, FrontEndSettings
from fftp.patching import PatchGrid
from fftp.streaming import why_window
from kernels import FbankSettings
from train import settings
from train.run import check_geometry, main, model_of
from train.settings import Settings, from_flags, read_recipe, recipe_names
from train.step import learning_rate, optimiser_of

# Patches of the six systems, the rows of Tables II and III, and the published baselines: the paper's and AuM's counts.
PATCHES = {
    "speechcommands/ast_square": 144,
    "speechcommands/ast_fftp": 119,
    "speechcommands/ast_fftp_specmask": 119,
    "speechcommands/aum_square": 64,
    "speechcommands/aum_fftp": 119,
    "speechcommands/aum_fftp_specmask": 119,
    "speechcommands/ast_square_published": 64,
    "speechcommands/aum_square_published": 64,
    "audioset/ast_square": 1212,
    "audioset/ast_square_1000": 1188,
    "audioset/ast_fftp": 991,
    "audioset/ast_fftp_specmask": 991,
    "audioset/aum_square": 512,
    "audioset/aum_fftp": 991,
    "audioset/aum_fftp_specmask": 991,
    "audioset/ast_fftp_specmask_96": 96,
    "audioset/ast_fftp_specmask_196": 196,
    "audioset/ast_fftp_specmask_248": 248,
    "audioset/ast_fftp_specmask_496": 496,
    "audioset/ast_square_published": 512,
    "audioset/aum_square_published": 512,
}


def made(*flags):
    return from_flags(list(flags))[0]


def refused(*flags):
    with pytest.raises(UserError) as error:
        from_flags(list(flags))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults():
    recipe = read_recipe("", "synth")
    assert recipe["depth"] != Settings.depth  # or this shows nothing
    assert made().depth == recipe["depth"]
    assert made().tokens == Settings.tokens  # no line of the recipe
    chosen, given = from_flags(["--depth", "3", "--lr=2e-4", "--no-roll"])
    assert (chosen.depth, chosen.lr, chosen.roll) == (3, 2e-4, False)
    assert recipe["roll"] is True
    assert given == {"depth", "lr", "roll"}


def test_data_set_brings_its_own_recipe():
    assert made("--data", "speechcommands").mean == read_recipe("", "speechcommands")["mean"]
    named = made("--data", "speechcommands", "--recipe", "ast_square")
    assert named == made("--recipe", "speechcommands/ast_square", "--data", "speechcommands", "--recipe", "ast_square")


def test_flag_that_only_fits_the_recipe_is_taken():
    # On its own --freq-stride contradicts the default fftp patches, and --mean wants --std beside it.
    chosen = made("--recipe", "speechcommands/ast_square", "--freq-stride", "8", "--mean", "-4")
    assert (chosen.patch, chosen.freq_stride, chosen.mean) == ("square", 8, -4.0)


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_builds_its_model_and_schedule(name):
    chosen = made("--recipe", name)
    assert chosen.data == name.split("/")[0]
    grid = check_geometry(chosen)
    assert (chosen.frames, chosen.mels) == (grid.T, grid.F)
    assert chosen.mask_width <= chosen.frames
    total = 10 * chosen.epochs
    rates = [learning_rate(chosen, step, total) for step in range(total)]
    assert max(rates) == pytest.approx(chosen.lr)
    assert chosen.augment == "none" or chosen.mask_area < 0.25 * grid.T * grid.F
    with torch.device("meta"):
        model = network(chosen)
    assert model.config.grid == grid
    assert type(optimiser_of(model, chosen)).__name__.lower() == chosen.optimiser
    assert sum(p.numel() for p in model.parameters()) > 1e5


@pytest.mark.parametrize("name", PATCHES)
def test_recipes_of_the_paper_have_the_published_front_end(name):
    chosen = made("--recipe", name)
    on_audioset = "ast-audioset" if chosen.frames == 1024 else "fftp-audioset"
    expected = PRESETS["fftp-speechcommands" if name.startswith("speechcommands") else on_audioset]  # AuM's are AST's
    assert (chosen.frames, chosen.mels, chosen.mean, chosen.std, chosen.fit) == (
        expected.T, expected.F, expected.mean, expected.std, expected.fit,
    )  # fmt: skip


def network(chosen):
    model = model_of(chosen, 10)
    return (ast_model.AST if chosen.model == "ast" else aum_model.AuM)(model)


@pytest.mark.parametrize(("name", "patches"), PATCHES.items())
def test_recipes_have_the_papers_patch_counts(name, patches):
    chosen = made("--recipe", name)
    assert patches == check_geometry(chosen).N
    assert chosen.patch in name
    assert chosen.model in name
    assert (chosen.augment == "specmask") == ("specmask" in name)


def test_every_recipe_of_the_paper_is_counted():
    assert set(PATCHES) == {name for name in recipe_names() if not re.search("default|laptop|best|streaming", name)}


def test_the_streaming_recipe_makes_a_model_that_carries_its_state_on():
    chosen = made("--recipe", "speechcommands/aum_streaming")
    grid = check_geometry(chosen)
    assert grid.N == 23
    assert (
        (grid.N - 1) * grid.st + grid.pt == grid.T == FbankSettings().frames(16_000)
    )  # all of a second, and no padding
    front_end = FrontEndSettings(T=chosen.frames, clip_samples=16_000, mean=0.0, std=1.0, fit=chosen.fit)
    about = CheckpointConfig(
        model=network(chosen).config, front_end=front_end, labels=(), multi_label=False, settings={}
    )
    assert why_window(about) is None


@pytest.mark.parametrize("name", ["audioset/ast_square_published", "speechcommands/aum_square_published"])
def test_published_schedule_is_pytorchs(name):
    """AST's loop: Adam with L2 on everything, MultiStepLR stepped at the end of each epoch; here the warm-up left out."""
    chosen = replace(made("--recipe", name), warmup_epochs=0)
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(model.parameters(), chosen.lr, weight_decay=5e-7, betas=(0.95, 0.999))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(
        optimiser, list(range(chosen.step_from, 1000, chosen.step_every)), chosen.step_factor
    )
    ours = optimiser_of(model, chosen)
    assert [(g["weight_decay"], g["betas"]) for g in ours.param_groups] == [(5e-7, (0.95, 0.999))]
    for epoch in range(chosen.epochs):
        for step in range(7):
            rate = learning_rate(chosen, 7 * epoch + step, 7 * chosen.epochs)
            assert rate == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12)
        optimiser.step()
        scheduler.step()
    assert rate < 0.2 * chosen.lr  # it did come down


def test_l2_is_in_the_gradient_and_decay_is_not():
    """One step from a zero gradient: Adam moves every weight by the rate, AdamW by the rate times the decay."""
    weights = {}
    for optimiser in ("adam", "adamw"):
        model = network(made("--depth", "1"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
                parameter.grad = torch.zeros_like(parameter)
        chosen = made("--depth", "1", "--optimiser", optimiser, "--lr", "0.25", "--weight-decay", "0.5")
        optimiser_of(model, chosen).step()
        weights[optimiser] = {name: float(p.detach().flatten()[0]) for name, p in model.named_parameters()}
    kept = network(made("--depth", "1")).undecayed()
    assert 0 < len(kept) < len(weights["adam"])
    for name in weights["adam"]:
        assert weights["adam"][name] == pytest.approx(0.75, rel=1e-5)
        assert weights["adamw"][name] == pytest.approx(1.0 if name in kept else 1 - 0.25 * 0.5, rel=1e-6)


def test_other_kind_of_patch_drops_the_recipes_geometry():
    square = made("--recipe", "speechcommands/ast_fftp", "--patch", "square")
    assert check_geometry(square) == PatchGrid(T=128, F=128, pt=16, pf=16, st=16, sf=16)
    assert square.mask_max_time == 15  # the rest of the recipe stays
    full = made("--recipe", "speechcommands/ast_square", "--patch", "fftp")
    assert check_geometry(full) == PatchGrid(T=128, F=128, pt=10, pf=128, st=4, sf=128)
    by_hand = made("--recipe", "speechcommands/ast_fftp", "--patch", "square", "--patch-time", "8")
    assert check_geometry(by_hand).pt == 8
    same = made("--recipe", "speechcommands/ast_square", "--patch", "square")
    assert check_geometry(same).st == 10  # the recipe's own kind: its stride counts


@pytest.mark.parametrize(
    ("flags", "offered"),
    [
        (["--eposch", "3"], "--epochs"),
        (["--modell", "ast"], "--model"),
        (["--no-rol"], "--roll"),
        (["--model", "asd"], "ast or aum"),
        (["--augment", "specmasc"], "did you mean specmask"),
        (["--data", "speechcomands"], "did you mean speechcommands"),
        (["--size=smal"], "did you mean small"),
        (["--tokens", "3"], "1 or 2"),
        (["--recipe", "ast_fftp_specmsk", "--data", "speechcommands"], "ast_fftp_specmask"),
        (["--recipe", "speechcomands/ast_square"], "speechcommands/ast_square"),
        (["train"], "There is no flag 'train'"),
        (["-e", "3"], "There is no flag '-e'"),
        (["--recipe", "nowhere.toml"], "There is no recipe file nowhere.toml"),
        (["--recipe", "speechcommands/ast_square", "--data", "synth"], "is for --data speechcommands, not synth"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unknown_words_are_refused_with_the_nearest(flags, offered):
    assert offered in refused(*flags)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--epochs", "0"], "--epochs has to be at least 1, not 0"),
        (["--epochs", "three"], "--epochs takes a whole number, not 'three'"),
        (["--epochs", "2.5"], "--epochs takes a whole number, not '2.5'"),
        (["--epochs"], "--epochs takes a value"),
        (["--batch-size", "-4"], "--batch-size has to be at least 1, not -4"),
        (["--lr", "0"], "--lr has to be above 0, not 0.0"),
        (["--lr", "nan"], "--lr has to be a finite number, not nan"),
        (["--lr", "inf"], "--lr has to be a finite number, not inf"),
        (["--lr", "fast"], "--lr takes a number, not 'fast'"),
        (["--mixup", "1.5"], "--mixup has to be from 0 to 1, not 1.5"),
        (["--beta2", "1"], "--beta2 has to be from 0 to below 1, not 1.0"),
        (["--seed", "-1"], "--seed has to be from 0 to 2^64 - 1, not -1"),
        (["--seed", str(2**64)], "--seed has to be from 0 to 2^64 - 1"),
        (["--roll=yes"], "--roll is a switch and takes no value"),
        (["--shift-ms", "-1"], "--shift-ms has to be from 0 to 10000, not -1"),
        (["--speed", "0.6"], "--speed has to be from 0 to 0.5, not 0.6"),
        (["--background", "2"], "--background has to be from 0 to 1, not 2"),
        (["--background-snr-min", "40"], "--background-snr-min 40.0 is above --background-snr-max 30.0: exchange them"),
        (["--mask-width", "0"], "--mask-width has to be at least 1"),
        (["--mask-snap", "129"], "--mask-snap has to be at most the 128 frames of --frames, not 129"),
        (["--clip-norm", "-1"], "--clip-norm has to be 0 or more"),
        (["--patch", "fftp", "--patch-freq", "16"], "--patch fftp covers all 128 mel bins"),
        (["--mean", "None"], "--mean and --std go together"),
        (["--mean", "0", "--std", "0"], "--std is above 0"),
        (["--mixup", "0.5", "--loss", "bce", "--label-smoothing", "0.1"], "--label-smoothing works with cross-entropy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_values_are_refused_and_nothing_else_is_printed(flags, named, capsys):
    assert named in refused(*flags)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epochs = 3\npatchtime = 4\n", "sets 'patchtime', which is no setting: did you mean patch_time"),
        ("epochs = 3.5\n", "epochs takes a whole number, not '3.5'"),
        ('roll = "yes"\n', "roll takes true or false, not 'yes'"),
        ("augment = 3\n", "augment takes none or specaugment or specmask, not '3'"),
        ('lr = "1e-3"\nepochs = true\n', "epochs takes a whole number, not 'True'"),
        ("epochs = \n", "is not TOML"),
        ("epochs = 0\n", "--epochs has to be at least 1"),
    ],
    ids=["key", "type", "switch", "choice", "bool for number", "not toml", "range"],
)
def test_recipe_files_with_mistakes(tmp_path, text, named):
    (tmp_path / "mine.toml").write_text(text)
    assert named in refused("--recipe", str(tmp_path / "mine.toml"))


def test_recipe_over_another(tmp_path):
    (tmp_path / "mine.toml").write_text('base = "speechcommands/ast_fftp"\ndata = "speechcommands"\nlr = 0.5\n')
    chosen = made("--recipe", str(tmp_path / "mine.toml"))
    assert chosen == replace(made("--recipe", "speechcommands/ast_fftp"), lr=0.5, recipe=chosen.recipe)
    own = tmp_path / "own.toml"
    for text, named in (
        (f'base = "{own}"\n', "is its own base"),
        ("base = 3\n", "base takes a recipe's name, not 3"),
        ('base = "speechcommands/ast_fftpp"\n', "did you mean speechcommands/ast_fftp"),
        (f'base = "{tmp_path / "none.toml"}"\n', "There is no recipe file"),
    ):
        own.write_text(text)
        assert named in refused("--recipe", str(own))


def test_recipe_file_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text('epochs = 7\nlr = 1\naugment = "none"\nmean = -4\nstd = 4\n')
    chosen = made("--recipe", str(tmp_path / "mine.toml"), "--epochs", "2")
    assert (chosen.epochs, chosen.lr, chosen.augment, chosen.mean) == (2, 1.0, "none", -4)


def test_every_setting_is_a_flag_of_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    missing = [f.name for f in fields(Settings) if f"--{f.name.replace('_', '-')}" not in shown]
    assert missing == []


def test_help_shows_the_defaults_of_the_data_set(capsys):
    for words, rate in ((["--help"], 0.001), (["--data", "folder", "--help"], 0.0005)):
        with pytest.raises(SystemExit):
            main(words)
        assert f"(default: {rate})" in capsys.readouterr().out.split("--lr ")[1].split("--body")[0]


def test_differences_are_named_but_not_where_a_run_may_differ():
    saved = settings.to_dict(made("--epochs", "5", "--out", "a"))
    now, given = from_flags(["--epochs", "6", "--out", "b", "--device", "cpu", "--workers", "3", "--model", "ast"])
    assert settings.differences(saved, now, given) == ["--epochs was 5 and is 6"]
    assert settings.from_saved(saved, out="b").epochs == 5
    with pytest.raises(UserError, match="another version: its settings hold gone"):
        settings.from_saved(saved | {"gone": 1})


@pytest.mark.parametrize("flags", [["--loss", "bce"], ["--multi-label"]], ids=["bce", "several labels"])
def test_label_smoothing_is_refused_where_it_would_do_nothing(flags):
    with pytest.raises(UserError, match="--label-smoothing works with cross-entropy alone"):
        settings.from_flags(["--label-smoothing", "0.1", *flags])
    settings.from_flags(["--label-smoothing", "0.1"])
