"""docs/REPRODUCTION.md: differences are paired, their intervals Student's, and collected lines come once."""

import json
import math

import pytest
from scipy import stats

from bench import collect, measure, reproduction


def line(system, seed, balanced, fold="", data="speechcommands", **more):
    case = {
        "data": data,
        "model": "ast",
        "patch": "square" if "square" in system else "fftp",
        "epochs": 6,
        "seed": seed,
        "csv": "lists/esc10.csv" if data == "folder" else "",
    }
    found = {"accuracy": balanced, "balanced_accuracy": balanced}
    curve = [
        {"epoch": 1, "validation_balanced_accuracy": balanced / 2},
        {"epoch": 2, "validation_balanced_accuracy": balanced},
    ]
    made = {
        "part": "reproduce", "system": f"laptop_{system}", "recipe": f"{data}/laptop_{system}",
        "case": case | {"test_fold": fold},
        "changed": {}, "metrics": found, "validation": found | {"loss": 0.5}, "curve": curve, "seconds": 90.0, "patches": 7,
        "clips": {"train": 5, "validation": 3, "test": 4}, "machine": "laptop",
    }  # fmt: skip
    return made | more


@pytest.mark.parametrize("n", range(2, len(reproduction.T_QUANTILE) + 2))
def test_intervals_are_students(n):
    values = [0.3 * i**2 - 1 for i in range(n)]
    mean, half = reproduction.interval(values)
    assert mean == pytest.approx(sum(values) / n)
    assert half == pytest.approx(stats.t.ppf(0.975, n - 1) * stats.sem(values), rel=1e-3)


def test_one_pair_has_no_interval():
    mean, half = reproduction.interval([2.5])
    assert mean == 2.5
    assert math.isnan(half)


def test_differences_are_of_the_same_seed_and_fold():
    rows = [line("ast_fftp", 0, 0.9), line("ast_fftp", 1, 0.8), line("ast_fftp", 3, 0.1)]
    rows += [line("ast_square", 1, 0.5), line("ast_square", 0, 0.7), line("ast_square", 2, 0.2)]
    rows += [line("ast_square", 0, 0.0, fold="2")]
    assert reproduction.differences(rows, "ast_fftp", "ast_square") == pytest.approx([20, 30])


def test_the_page_from_lines(tmp_path):
    for seed, (square, full, masked) in enumerate(((0.50, 0.80, 0.81), (0.52, 0.83, 0.80), (0.51, 0.82, 0.84))):
        for name, score in (("ast_square", square), ("ast_fftp", full), ("ast_fftp_specmask", masked)):
            measure.append(line(name, seed, score), tmp_path)
    measure.append(line("ast_square-epochs-3-lr-3e-4", 0, 0.4), tmp_path)
    measure.append(line("ast_fftp", 0, 0.80, data="folder", fold="5"), tmp_path)
    text = reproduction.page(lambda part: measure.lines(part, tmp_path))
    assert "| S1 AST square, SpecAugment | 7 | 6 | 3 | 51.0 ± 1.0 | 51.0 ± 1.0 | 1.5 | 85.27 |" in text
    assert "| S2 - S1 | 3 | +30.7 ± 1.4 | shown |" in text
    assert "| S3 - S2 | 3 | +0.0 ± 6.6 | within the spread |" in text
    of_sweep = "| square, 3e-4 | 6 | 40.0 | 40.0 | 0.500 |"
    assert of_sweep not in text
    assert of_sweep in reproduction.details(lambda part: measure.lines(part, tmp_path))
    short = reproduction.brief(lambda part: measure.lines(part, tmp_path))
    assert "| S1 AST square, SpecAugment | 51.0 ± 1.0 (3) |  | 85.27 |" in short
    assert "| S2 AST FFTP, SpecAugment | 81.7 ± 1.5 (3) | 80.0 (1) | 93.73 |" in short
    assert "### Ten environmental sounds" in text
    assert "5 training, 3 validation and 4 test clips; laptop." in text
    # A run that is repeated counts once, as it came out last.
    measure.append(line("ast_fftp", 0, 0.99), tmp_path)
    assert "(128" not in text
    assert "| S2 - S1 | 3 | +37.0" in reproduction.page(lambda part: measure.lines(part, tmp_path))


def test_the_best_recipe_stands_beside_kwt(tmp_path):
    def best(seed, balanced, epochs):
        made = line("ast_fftp", seed, balanced) | {
            "part": "train",
            "recipe": "speechcommands/best",
            "parameters": 5_600_000,
        }
        return made | {"case": made["case"] | {"epochs": epochs, "size": "tiny"}}

    other = best(0, 0.9, 20)
    other["case"]["patch"] = "square"
    other["changed"] = {"keep_tokens": 0}
    for row in (
        best(0, 0.95, 48),
        best(0, 0.5, 64),
        other,
        best(1, 0.97, 48),
        line("ast_fftp", 0, 0.3) | {"part": "train"},
    ):
        measure.append(row, tmp_path)
    text = reproduction.page(lambda part: measure.lines(part, tmp_path))
    # As the recipe stands: the run of 64 epochs was of an earlier form.
    assert "| AST-tiny, FFTP patches, twelve words | 5.6 | 48 | 2 | 96.0 ± 1.4 | 96.0 ± 1.4 | 1.5 (laptop) |" in text
    assert "| AST-tiny, square patches, twelve words | 5.6 | 20 | 1 | 90.0 | 90.0 | 1.5 (laptop) |" in text
    assert "| 64 |" not in text
    assert "| KWT-2, 35 words, as published | 2.4 | 140 |  | 97.74 ± 0.03 |  |  |" in text


def test_the_curves_are_of_systems_and_of_the_best_recipe():
    from matplotlib.figure import Figure

    best = line("ast_fftp", 0, 0.9) | {"part": "train", "recipe": reproduction.BEST, "changed": {"speed": 0.1}}
    rows = [
        line("ast_square", 0, 0.5),
        line("ast_square", 1, 0.7),
        best,
        best | {"machine": "another", "seconds": 60.0},
    ]
    drawn = Figure()
    reproduction.curves(drawn, rows)
    systems, past = drawn.axes[:2]
    assert [curve.get_label() for curve in systems.lines] == ["S1 AST square, SpecAugment"]
    assert systems.lines[0].get_xydata().tolist() == [[0.75, 30.0], [1.5, 60.0]]
    assert [curve.get_label() for curve in past.lines] == [
        "AST FFTP, 6 epochs, speed 0.1, laptop",
        "AST FFTP, 6 epochs, speed 0.1, another",
    ]
    assert past.lines[1].get_xydata().tolist() == [[0.5, 45.0], [1.0, 90.0]]


def test_collected_lines_come_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collect, "RESULTS", tmp_path / "results")
    (tmp_path / "out").mkdir()
    made = [line("ast_fftp", seed, 0.5) for seed in (0, 1)]
    (tmp_path / "out" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    assert collect.main([str(tmp_path / "out")]) == 0
    assert collect.main([str(tmp_path / "out")]) == 0
    assert "0 lines appended to reproduce.jsonl" in capsys.readouterr().out
    assert measure.lines("reproduce", tmp_path / "results") == made
    assert collect.main([str(tmp_path / "none")]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_every_pair_is_of_systems():
    known = {system.key for system in (*reproduction.papers.TABLE1, *reproduction.papers.CONTROLS)}
    assert {name for _, one, other in reproduction.PAIRS for name in (one, other)} <= known
