"""The paper's tables over seeds: the right flags, one run after another, the same table after any interruption."""

import json
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch

import kernels
from tests import made_data, runs
from train import estimate, recipe_table, reproduce, settings, tables
from train import run as train_run

ROOT = Path(__file__).parents[1]
# Runs of some steps each, for the systems alone.
SMALL = [
    *("--synth-train", "20", "--synth-validation", "10", "--synth-test", "10", "--batch-size", "10", "--log-every", "1"),
    *("--depth", "1", "--mean", "-5", "--std", "5", "--device", "cpu", "--precision", "float32"),
]  # fmt: skip
PATCHES = {
    ("table1", "audioset"): [1212, 991, 991, 512, 991, 991],
    ("table2", "audioset"): [1212, 96, 196, 248, 496, 991],
    ("table1", "speechcommands"): [144, 119, 119, 64, 119, 119],
    ("table2", "speechcommands"): [144, 8, 21, 30, 60, 119],
    ("table3", "synth"): [144, 8, 21, 30, 60, 119],
    ("table1", "folder"): [12 * 50, 503, 503, 8 * 32, 503, 503],
}


@pytest.fixture
def here(monkeypatch):
    """Runs in this process, which is quicker; returns the flags of each."""
    begun = []

    def train(run):
        begun.append(run.flags)
        again = ["--resume"] if (run.out / "settings.json").exists() else []
        return train_run.main([*run.flags, *again])

    monkeypatch.setattr(reproduce, "in_a_process", train)
    return begun


def command(capsys, *words):
    return runs.run(capsys, *words, command=reproduce.main)


def small(table, out, seeds=1):
    return [table, "--data", "synth", "--seeds", seeds, "--size", "tiny", "--epochs", "1", "--out", out, "--", *SMALL]


def made(table, options):
    """The settings of each of a table's systems."""
    return [settings.from_flags(list(reproduce.flags_of(s, options, ())))[0] for s in reproduce.chosen(table, options)]


@pytest.mark.parametrize(("table", "data"), PATCHES)
def test_systems_of_a_table(table, data):
    options = reproduce.Options(data=data, size="tiny", epochs=3)
    found = made(table, options)
    assert [train_run.check_geometry(chosen).N for chosen in found] == PATCHES[table, data]
    for system, chosen in zip(tables.SYSTEMS[table], found, strict=True):
        assert chosen.model in system.recipe
        assert chosen.augment == ("specmask" if "specmask" in system.recipe else "specaugment")
        assert (chosen.size, chosen.epochs, chosen.fused, chosen.data) == ("tiny", 3, True, data)
        recipe = settings.read_recipe("", data) if data in ("synth", "folder") else {}
        for name in ("batch_size", "lr", "mean", "roll", "mixup"):
            assert getattr(chosen, name) == recipe.get(name, getattr(chosen, name))
        if chosen.augment == "specaugment" and data == "synth":
            assert chosen.mask_max_time == (48 if "square" in system.recipe else 15)


LAPTOP = {
    ("table1", "speechcommands"): [64, 30, 30, 64, 30, 30],
    ("controls", "speechcommands"): [64, 30, 30, 64, 64, 30, 64],
    ("sweep", "speechcommands"): [64, 64, 64, 30, 30, 30],
    ("ablation", "speechcommands"): [*[30] * 10, 23, 30, 30],
    ("table2", "speechcommands"): [144, 8, 21, 30, 60, 119],
    ("table1", "folder"): [256, 51, 51, 256, 126, 126],
}


@pytest.mark.parametrize(("table", "data"), LAPTOP)
def test_systems_of_the_size_of_two_cores(table, data):
    found = made(table, reproduce.Options(data=data, edition="laptop"))
    assert [train_run.check_geometry(chosen).N for chosen in found] == LAPTOP[table, data]
    for system, chosen in zip(tables.systems(table, laptop=True), found, strict=True):
        assert (chosen.size, chosen.data, chosen.model) == ("tiny", data, "aum" if "aum" in system.recipe else "ast")
        short = table in ("sweep", "ablation")
        assert chosen.epochs == (30 if data == "folder" else 3 if short else 2 if chosen.model == "aum" else 6)
    if data == "folder":
        return
    assert {chosen.batch_size for chosen in found} == {128}
    # One rate for each kind of patch, as the sweep chose it.
    rates = {(chosen.patch, chosen.lr) for chosen in found}
    assert len(rates) == (2 * len(tables.RATES) if table == "sweep" else len({chosen.patch for chosen in found}))


def test_the_ablation_is_of_the_best_recipes_ingredients():
    """Together they are all kinds of changes that it makes, but for the length of the run and what goes with it."""
    plain = settings.from_flags(["--recipe", "speechcommands/default"])[0]
    best = settings.from_flags(["--recipe", "speechcommands/best"])[0]
    changed = {name for name in vars(best) if getattr(best, name) != getattr(plain, name)}
    tried = set()
    for system in tables.ABLATION:
        tried |= settings.from_flags(list(system.flags))[1]
    assert changed - tried == {"recipe", "warmup_epochs", "weight_decay", "roll"} & changed
    assert tried - changed == set()


def test_a_control_differs_from_its_system_in_what_it_says():
    names = (
        "square",
        "square_specmask",
        "fftp",
        "fftp_mean",
        "fftp_specmask",
        "fftp_specmask_equal",
        "fftp_specmask_64",
    )
    found = {n: vars(settings.from_flags(["--recipe", f"speechcommands/laptop_ast_{n}"])[0]) for n in names}

    def changed(one, other):
        return {name for name in found[one] if found[one][name] != found[other][name]} - {"recipe"}

    masks = {"mask_max_frequency", "mask_max_time"}
    assert changed("square", "square_specmask") == {"augment", "mask_fill"}
    assert changed("fftp", "fftp_mean") == {"mask_fill"}
    assert changed("fftp_mean", "fftp_specmask") - masks == {"augment"}
    assert changed("fftp_specmask", "fftp_specmask_equal") == {"mask_area", "mask_clip"}
    geometry = {"patch", "patch_time", "time_stride", "patch_freq", "freq_stride"}
    assert changed("square_specmask", "fftp_specmask_64") - masks - {"lr"} == geometry
    square, full = (
        train_run.check_geometry(settings.Settings(**found[n])) for n in ("square_specmask", "fftp_specmask_64")
    )
    assert (square.N, square.pt * square.pf) == (full.N, full.pt * full.pf)


def test_equal_area_is_spec_augments_mean():
    """C3's budget against the areas of drawn SpecAugment masks."""
    rectangles, _, area = kernels.draw_spec_augment(0, 0, torch.arange(20_000), 128, 128, max_frequency=5, max_time=15)
    (_, _, f0, f1), (t0, t1, _, _) = (
        rectangles.double().unbind(1)[0].unbind(1),
        rectangles.double().unbind(1)[1].unbind(1),
    )
    twice = (f1 - f0) * (t1 - t0)  # cells under both masks
    budget = settings.read_recipe("speechcommands/laptop_ast_fftp_specmask_equal")["mask_area"]
    assert float((area - twice).mean()) == pytest.approx(budget, rel=0.01)


def test_some_systems_of_a_table(tmp_path, capsys, here, monkeypatch):
    """Two commands share a folder; a last one without --only has every line."""
    monkeypatch.setitem(tables.SYSTEMS, "table1", tables.TABLE1[:2])
    words, flags = small("table1", tmp_path / "out")[: -len(SMALL) - 1], ["--", *SMALL]
    for name in ("ast_fftp", "ast_square"):
        assert command(capsys, *words, "--only", name, *flags).code == 0
    assert len(here) == 2
    assert command(capsys, *words, *flags).out.count("| 1 |") == 2
    assert len(here) == 2
    assert (
        "--only ast_sqare: table1 has ast_square, ast_fftp."
        in command(capsys, *words, "--only", "ast_sqare", *flags).sentence
    )


def test_folds_are_runs_of_their_own(tmp_path, capsys, here, monkeypatch):
    """Each fold is held out in turn; the figure is over all of them."""
    monkeypatch.setitem(tables.SYSTEMS, "table1", tables.TABLE1[1:2])
    paths = made_data.make_files(tmp_path / "clips", 12)
    table = "file,label,fold\n" + "".join(f"{p.name},{'ab'[i % 2]},{1 + i % 3}\n" for i, p in enumerate(paths))
    (tmp_path / "clips" / "list.csv").write_text(table)
    folder = tmp_path / "clips"
    words = [
        "table1",
        "--data",
        "folder",
        "--data-root",
        folder,
        "--folds",
        "1,2",
        "--seeds",
        1,
        "--out",
        tmp_path / "out",
        "--",
    ]
    flags = [
        *SMALL[6:],
        "--csv",
        "list.csv",
        "--csv-split",
        "fold",
        "--frames",
        "64",
        "--epochs",
        "1",
        "--batch-size",
        "2",
    ]
    ended = command(capsys, *words, *flags)
    assert ended.code == 0, ended.err
    assert [flags[flags.index("--test-fold") + 1] for flags in here] == ["1", "2"]
    assert sorted(path.name for path in (tmp_path / "out").glob("ast_fftp-*")) == [
        "ast_fftp-seed0-fold1",
        "ast_fftp-seed0-fold2",
    ]
    assert re.search(r"\| S2 AST FFTP, SpecAugment \[1\] \| \d+ \| 2 \| \*\*", ended.out)


def untimed(out: Path) -> str:
    """A folder's Table I without its minutes, which other work on the machine changes: the cells of one decimal."""
    return re.sub(r"\| \d+\.\d (?=\|)", "| minutes ", (out / "table1.md").read_text())


def test_interrupted_and_gone_on_with(tmp_path, capsys, here, monkeypatch):
    """Ctrl-C amid the third run; the command that it names ends with the table of a run that nothing happened to."""
    monkeypatch.setitem(tables.SYSTEMS, "table1", tables.TABLE1[:4])
    assert command(capsys, *small("table1", tmp_path / "whole")).code == 0
    epoch, calls = train_run.loop.Trainer.epoch, []

    def pressed(trainer):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return epoch(trainer)

    monkeypatch.setattr(train_run.loop.Trainer, "epoch", pressed)
    monkeypatch.setattr(train_run, "main", lambda flags: _let_through(flags))
    stopped = command(capsys, *small("table1", tmp_path / "cut"))
    assert stopped.code == 130
    again = re.search(r"go on with `python -m train\.reproduce (.*)`\.", stopped.err).group(1).split()
    assert again == [str(word) for word in small("table1", tmp_path / "cut")]
    lines = (tmp_path / "cut" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2
    (tmp_path / "cut" / "results.jsonl").write_text("\n".join(lines)[:-40])  # a kill amid writing
    begun = len(here)
    assert command(capsys, *again).code == 0
    assert len(here) == begun + 2  # the third again, and one more
    whole, cut = (untimed(tmp_path / name) for name in ("whole", "cut"))
    assert whole == cut
    assert whole.count("| minutes |") == 5
    for system in tables.TABLE1[:4]:
        assert f"| {system.name} [" in whole or f"| {system.name} |" in whole
    assert whole.count("| 1 |") == 4
    assert runs.drawn(tmp_path / "cut" / "table1_curves.png")
    assert command(capsys, *again).code == 0  # nothing is left to do
    assert len(here) == begun + 2


def _let_through(flags):
    """train.run.main as a process of its own shows it: Ctrl-C reaches the parent."""
    wanted, given = settings.from_flags(flags)
    train_run.run(*_reordered(train_run.open_run(wanted, given)))
    return 0


def _reordered(opened):
    out, wanted, saved = opened
    return wanted, out, saved


def test_tables_two_and_three_share_their_runs(tmp_path, capsys, here, monkeypatch):
    monkeypatch.setattr(estimate, "ROUNDS", 3)
    for name, systems in (
        ("table1", tables.TABLE1[2:4]),
        ("table2", tables.TABLE2[::5]),
        ("table3", tables.TABLE2[::5]),
    ):
        monkeypatch.setitem(tables.SYSTEMS, name, systems)
    assert command(capsys, *small("table2", tmp_path / "out")).code == 0
    assert len(here) == 2
    assert runs.drawn(tmp_path / "out" / "figure4.png")
    ended = command(capsys, *small("table3", tmp_path / "out"))
    assert (ended.code, len(here)) == (0, 2)
    rows = [line.split(" | ") for line in ended.out.splitlines() if line.startswith("| (")]
    assert [row[-4:] for row in rows][1] == ["85.32", "5.2", "11.62", "18.32 |"]
    assert all(float(row[5]) > 0 and float(row[6]) > 0 for row in rows)  # a clip alone, and the square's time over it
    assert rows[0][6] == "1.00"
    lines = [json.loads(text) for text in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {line["part"] for line in lines} == {"reproduce"}
    assert {"case", "metrics", "machine", "software", "commit", "date"} <= lines[0].keys()
    # Table I's S3 is Table II's last row.
    assert command(capsys, *small("table1", tmp_path / "out")).code == 0
    assert len(here) == 3


def line(system, seed, score, **more):
    """A line of results.jsonl."""
    case = {"data": "synth", "size": "tiny", "epochs": 3, "max_steps": 0, "seed": seed, "test_fold": ""}
    made = {
        "system": system,
        "case": case,
        "metrics": {"accuracy": score},
        "patches": 7,
        "clips": {"train": 5, "test": 4},
    }
    return made | {"machine": "a laptop", "seconds": 90.0, "macs": {"paper": 2e9, "all": 3e9}} | more


def test_mean_and_spread_beside_the_papers():
    lines = [line("ast_square", seed, score) for seed, score in enumerate((0.5, 0.6, 0.7))] + [
        line("aum_fftp", 0, 0.25)
    ]
    text = tables.render("table1", lines)
    assert "| 7 | 3 | **60.00** ± 10.00 (50.00, 60.00, 70.00) |  | 1.5 | 11.25 | 85.27 |" in text
    assert "| S5 AuM FFTP, SpecAugment | 7 | 1 | 25.00 |  | 1.5 | 14.24 | 94.68 |" in text
    assert "| 0 | not run |  |  | 18.32 | 95.94 |" in text
    assert "Not the paper's data" in text
    assert "accuracy in %" in text


@pytest.mark.parametrize("table", ["table1", "table2", "table3"])
def test_every_contradiction_has_its_footnote(table):
    text = tables.render(table, [line("ast_square", 0, 0.5)])
    body, notes = text.split("\n\n[1] ")
    marks = set(re.findall(r"\[(\d)\]", body)) | {"1"}
    assert set(re.findall(r"^\[(\d)\] ", "[1] " + notes, re.M)) >= marks
    for word in {
        "table1": ("85.27, 13.28", "3.17", "+6.76"),
        "table2": ("8.80", "18.01"),
        "table3": ("4.15", "two class tokens"),
    }[table]:
        assert word in notes


def test_the_papers_figures_are_its_own():
    """Five of six costs of Table III follow from our models; the sixth is the paper's error."""
    rows = {row.split(" | ")[0].removeprefix("| "): row.split(" | ") for row in recipe_table.markdown().splitlines()}
    for system in tables.TABLE2:
        row = rows[f"audioset/{system.recipe}"]
        assert int(row[5]) == system.paper["patches"] == int(row[10])
        if system.paper["patches"] == 96:
            assert (row[7], row[11]) == ("8.80", "4.15")
        else:
            assert float(row[7]) == pytest.approx(system.paper["gmacs"], abs=0.0101)


def test_docs_have_the_recipes_as_they_are():
    assert (ROOT / "docs" / "RECIPES.md").read_text() == recipe_table.markdown()


def test_dry_run_measures_and_keeps_nothing(tmp_path, capsys):
    ended = command(capsys, *small("table1", tmp_path / "out")[: -len(SMALL) - 1], "--dry-run", "--", *SMALL)
    assert ended.code == 0, ended.err
    assert not (tmp_path / "out").exists()
    assert "6 runs, 0 of them finished." in ended.out
    for system in tables.TABLE1:
        assert f"{system.name}: seeds 0; 2 steps of " in ended.out
    assert len(re.findall(r"python -m train\.run --fused --data synth .*--seed 0 --out ", ended.out)) == 6
    assert re.search(r"about \d+ s in all", ended.out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Say what to reproduce: python -m train.reproduce table1|table2|table3|controls|sweep|ablation|recipes"),
        (["table4"], "Say what to reproduce"),
        (["table1", "--sedes", "3"], "did you mean --seeds"),
        (["table1", "--data", "synth", "--seeds", "0"], "--seeds is 1 or more"),
        (["table1", "--data", "nosuch"], "cannot make sense"),
        (["table1", "--data", "synth", "--folds", "1,2"], "--folds is for --data folder"),
        (["controls", "--data", "speechcommands"], "take --data speechcommands --edition laptop"),
        (["table1", "--data", "synth", "--", "--deph", "3"], "did you mean --depth"),
        (["table2", "--data", "synth", "--", "--frames", "40"], "40"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_bad_commands(tmp_path, capsys, words, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in command(capsys, *words).sentence
    assert runs.files(tmp_path) == []


def test_folders_that_are_something_else(tmp_path, capsys, here):
    assert command(capsys, *small("table1", tmp_path / "out")[:-2], "--max-steps", "1").code == 0
    assert (
        "were made with other flags (epochs was 1 and is 2"
        in command(
            capsys,
            "table1",
            "--data",
            "synth",
            "--seeds",
            1,
            "--size",
            "tiny",
            "--epochs",
            2,
            "--out",
            tmp_path / "out",
        ).sentence
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    assert "holds something else" in command(capsys, *small("table1", tmp_path / "other")).sentence
    (tmp_path / "out" / "plan.json").write_text("{")
    assert "plan.json is damaged" in command(capsys, *small("table1", tmp_path / "out")).sentence


def test_run_that_is_refused_ends_it(tmp_path, capsys, here):
    ended = command(
        capsys, "table1", "--data", "audioset", "--data-root", tmp_path / "absent", "--out", tmp_path / "out"
    )
    assert f"The data folder {tmp_path / 'absent'} does not exist" in ended.sentence
    assert len(here) == 1
    assert "when that is mended, go on with `python -m train.reproduce table1 --data audioset" in ended.out


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_twice_it_ends_with_the_same_table(tmp_path):
    """kill -9 of the command at random moments: its run ends with it, and the same command goes on."""
    chance = random.Random(0)
    words = [str(word) for word in small("table1", tmp_path / "whole", seeds=2)]
    started = time.perf_counter()
    assert runs.end(runs.start(*words, module="train.reproduce"), 900).code == 0
    whole = time.perf_counter() - started
    words = [str(word) for word in small("table1", tmp_path / "cut", seeds=2)]
    for _ in range(2):
        process = runs.start(*words, module="train.reproduce")
        time.sleep(chance.uniform(0.2, 0.45) * whole)
        children = [p for p in Path("/proc").glob("[0-9]*") if _parent(p) == process.pid]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and any(child.exists() for child in children):
            time.sleep(0.1)
        assert not any(child.exists() for child in children)
    assert runs.end(runs.start(*words, module="train.reproduce"), 900).code == 0
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "cut")


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1
