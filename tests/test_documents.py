"""README and docs say what is so: results come from the lines, flags and files that they name exist."""

import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from bench import measure, plots, report, tables
from bench.parts import PARTS
from fftp import convert, explain, export, listen
from fftp import report as page
from kernels import ranges
from tests import runs
from tests.test_reproduction import line as reproduce_line
from train import reproduce, settings

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [path.name for path in DOCUMENTS]


def test_the_documents_show_what_the_results_hold(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_a_table_of_the_benchmark(tmp_path):
    """The newest line of a case counts; a wrong row has no figure; a machine with a GPU ends "not measured"."""
    line = {"part": "fbank", "case": {"B": 2, "seconds": 1.0}, "ours": {"backend": "one", "ms": 4.0}, "correct": True}
    line |= {"ratio": {"two": 1.5, "one": 1.0}, "machine": "laptop"}
    measure.append(line, tmp_path)
    measure.append(line | {"ratio": {"two": 2.5}}, tmp_path)
    measure.append(line | {"case": {"B": 3, "seconds": 1.0}, "ours": {"backend": "one"}, "correct": False}, tmp_path)
    text = report.performance(tmp_path)
    assert "| case | our backend | ms | two / ours |" in text
    assert "| B 2, seconds 1 | one | 4 | 2.50 |" in text
    assert "| B 3, seconds 1 | one | wrong |" in text
    assert text.count(tables.NOT_MEASURED) == len(PARTS)
    measure.append(line | {"machine": "NVIDIA H200", "share": 0.5, "commit": "abc+"}, tmp_path)
    text = report.performance(tmp_path)
    assert "| B 2, seconds 1 | one | 4 | 50 % | 1.50 |" in text
    assert text.count(tables.NOT_MEASURED) == len(PARTS) - 1
    assert text.index("NVIDIA H200, commit abc:") < text.index("laptop:")


def train_line(score, **changed):
    case = {"data": "speechcommands", "model": "ast", "size": "tiny", "depth": 0, "patch": "fftp", "patch_time": 0}
    case |= {
        "time_stride": 4,
        "augment": "specmask",
        "epochs": 6,
        "max_steps": 0,
        "fused": True,
        "seed": 0,
        "test_fold": "",
    }
    recipe = changed.pop("recipe", "")
    row = {
        "case": case | changed,
        "recipe": recipe,
        "changed": {},
        "machine": "laptop",
        "seconds": 120.0,
        "precision": "bfloat16",
    }
    return row | {"metrics": {"accuracy": score, "balanced_accuracy": score}}


def test_the_readmes_rows():
    """Named recipes first, as they stand; short runs, single folds and a GPU's are not there."""
    best = {"recipe": "speechcommands/best"}
    rows = [train_line(0.5), train_line(0.7, seed=1), train_line(0.1, epochs=3), train_line(0.2, test_fold="5")]
    rows += [train_line(0.9, epochs=48, **best), train_line(0.3, epochs=64, **best)]
    rows += [train_line(0.8, epochs=20, patch="square", **best) | {"changed": {"keep_tokens": 0}}]
    rows += [train_line(0.4) | {"machine": "NVIDIA H200"}]
    _, _, best, square, plain = report.table(rows).splitlines()
    assert "`speechcommands/best` | FFTP (128, 10)/4, specmask | 48 | 90.0 |" in best
    assert "`speechcommands/best` | square (16, 16)/4, specmask | 20 | 80.0 |" in square
    assert "| **60.0** ± 14.1 (50.0, 70.0) | 2.0 (laptop) |" in plain
    made, other = train_line(0.9, data="synth", epochs=99), train_line(0.2, model="aum", epochs=99)
    _, _, *ordered = report.table([made, other, *rows]).splitlines()
    assert [row.split(" | ")[1].split(",")[0] for row in ordered] == ["AST-tiny"] * 3 + ["AuM-tiny", "AST-tiny"]


def test_the_readmes_speeds(tmp_path):
    """The newest line of each machine; nothing that is wrong, of another case or without that peer."""
    line = {
        "part": "infer",
        "case": {"patches": 1212, "B": 1, "dtype": "float32"},
        "ours": {"ms": 1473.6},
        "correct": True,
    }
    line |= {"ratio": {"transformers": 1.061}, "machine": "laptop"}
    others = ({"case": line["case"] | {"B": 8}}, {"correct": False, "machine": "a"}, {"ratio": {}, "machine": "b"})
    for changed in ({"ratio": {"transformers": 2.0}}, {}, *others):
        measure.append(line | changed, tmp_path)
    _, _, *rows = report.speed(lambda part: measure.lines(part, tmp_path)).splitlines()
    assert rows == ["| AST-base, 1212 squares, float32 | laptop | 1474 | `transformers` | 1.06 |"]


def test_what_is_faster_stands_beside_what_it_replaces():
    rows = [
        train_line(0.5, fused=False) | {"precision": "float32"},
        train_line(0.6),
        train_line(0.7, seed=1),
        train_line(0.9, epochs=7),
    ]
    *_, slow, fast = tables.as_good(rows).splitlines()
    assert slow == "| AST-tiny, 6 epochs | the references, float32 | 50.0 (50.0) | 2.0 (laptop) |"
    assert fast == "| AST-tiny, 6 epochs | `--fused`, bfloat16 | 65.0 (60.0, 70.0) | 2.0 (laptop) |"
    assert tables.as_good(rows[1:]) == ""


def line_of(part, case, figures, machine="laptop", **more):
    return {"part": part, "case": case, "figures": figures, "machine": machine, "correct": True, "commit": "c"} | more


def table3_line(step_ms=500.0, machine="laptop", **case):
    given = {"model": "ast", "size": "tiny", "grid": "(128, 10)/4", "frames": 1000, "patches": 248} | case
    both = {"float32": 40.0, "bfloat16": 20.0}
    figures = {
        "latency_ms": both,
        "clips_per_second": both,
        "throughput_batch": 8,
        "peak_bytes": None,
        "train_hours": 12.3,
    }
    figures |= {"base_macs": {"paper": 21.478e9, "all": 22.63e9}, "recipe": {"steps": 14600, "clips": 32}}
    figures |= {"published": {"gflops": 21.48, "hours": 2.6, "ms": 2.62, "map": 17.67}}
    figures |= {"step": {"step_ms": step_ms, "batch": 8, "steps": 2, "precision": "bfloat16", "peak_bytes": 123e6}}
    return line_of("table3", given, figures, machine)


def test_table_iii_shows_the_papers_columns_and_what_is_missing(tmp_path):
    for model in ("ast", "aum"):
        measure.append(table3_line(model=model, size="base"), tmp_path)
    measure.append(table3_line(machine="tablet"), tmp_path)
    text = report.performance(tmp_path)
    assert "| (128, 10)/4 | 248 | 21.48 | 21.48 | 22.63 | 21.48 | 22.63 |" in text
    shown = "| 40 | 20 | 2.62 | 40 | 20 | not measured | 123 | 500 | 12.3 | 2.6 | not measured | 17.67 |"
    assert f"| AST-base | (128, 10)/4 {shown}" in text
    assert "| AuM-base | (128, 10)/4 | 40 | 20 |  | 40 |" in text  # the paper's table has AST alone
    assert "| AST-tiny | (128, 10)/4 | 40 | 20 | 40 | 20 | not measured | 123 | 500 | 12.3 |\n" in text  # and AST-base
    assert "gives 8.80" in text
    assert "on 1, 8 and 64 GPUs: not measured" in text


def test_accuracy_joins_when_it_has_been_trained():
    case = {"model": "ast", "size": "base", "grid": "(128, 10)/4"}
    trained = {"data": "audioset", "model": "ast", "size": "base", "patch": "fftp", "patch_time": 10, "time_stride": 4}
    trained |= {"depth": 0, "max_steps": 0, "seed": 0}
    lines = [{"case": trained | {"seed": seed}, "metrics": {"map": 0.17 + seed / 100}} for seed in (0, 1)]
    assert tables.accuracy(case, lines) == "17.50"
    for other in ({"size": "tiny"}, {"time_stride": 2}, {"data": "synth"}, {"max_steps": 9}, {"patch": "square"}):
        assert tables.accuracy(case, [{"case": trained | other, "metrics": {"map": 0.2}}]) == "not measured"
    square = trained | {"patch": "square", "patch_time": 16, "time_stride": 10}
    assert tables.accuracy(case | {"grid": "(16, 16)/10"}, [{"case": square, "metrics": {"map": 0.11}}]) == "11.00"


def test_all_of_audioset_is_computed_from_a_gpus_step_alone():
    assert "not measured" in tables.whole_audioset([table3_line()])
    text = tables.whole_audioset([table3_line(step_ms=10.0, machine="NVIDIA H200", size="base")])
    # 8 clips in 10 ms are 800 a second: 8.5 million take 10,625 s.
    assert "| AST-base | (128, 10)/4 | NVIDIA H200 | 800 | 2.95 | 0.369 | 0.0461 |" in text


def scale_line(seconds, ratio, against="length", B=1, **more):
    case = {"against": against, "size": "tiny", "grid": "(128, 10)/4", "seconds": seconds, "B": B, "dtype": "float32"}
    figures = {"patches": 25 * seconds, "ms": {"ast": 10.0 * ratio, "aum": 10.0}, "ast_over_aum": ratio}
    return line_of("scale", case, figures | {"peak_bytes": {"ast": 1e6, "aum": 2e6}}, **more)


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ((0.5, 0.7, 0.9), "AuM-tiny does not overtake AST-tiny within the 4 s that were measured."),
        ((0.5, 0.7, 1.1), "AuM-tiny overtakes AST-tiny between 2 s and 4 s; on shorter clips it is the slower one."),
        ((0.5, 1.1, 0.9), "AuM-tiny does not overtake AST-tiny within the 4 s that were measured."),
        ((1.2, 1.3, 1.4), "AuM-tiny is faster than AST-tiny at every length that was measured, from 1 s to 4 s."),
    ],
)
def test_where_aum_overtakes_is_said_in_words(ratios, said, tmp_path):
    lines = [scale_line(seconds, ratio) for seconds, ratio in zip((1, 2, 4), ratios, strict=True)]
    for line in [lines[2], scale_line(8, 9.0, correct=False), *lines[:2]]:
        measure.append(line, tmp_path)
    text = report.performance(tmp_path)
    assert said in text
    assert "| 8 | wrong, no figures |" in text


def test_a_step_by_parts_is_shares_of_the_step(tmp_path):
    parts = {
        "load": 10.0,
        "front end": 5.0,
        "mask": 5.0,
        "embed": 10.0,
        "encoder": 20.0,
        "head": 10.0,
        "backward": 30.0,
    }
    figures = {"parts_ms": parts | {"optimiser": 10.0}, "step_ms": 200.0, "plain_step_ms": 190.0}
    measure.append(line_of("step_parts", {"model": "aum", "size": "tiny", "grid": "g", "B": 8}, figures), tmp_path)
    row = "| AuM-tiny, g, 8 clips | 5 % | 2 % | 2 % | 5 % | 10 % | 5 % | 15 % | 5 % | 50 % | 200 | 190 |"
    assert row in report.performance(tmp_path)


def test_pictures_show_the_newest_lines(tmp_path):
    """Behind: absent, of older lines, or there without lines. Each that is drawn has something on it and is light."""

    def lines(part):
        return measure.lines(part, tmp_path)

    assert plots.behind(tmp_path, lines) == []
    for line in (
        table3_line(),
        table3_line(model="aum"),
        scale_line(1, 0.5),
        scale_line(2, 1.5),
        scale_line(1, 1.0, "batch", 8),
    ):
        measure.append(line, tmp_path)
    parts = dict.fromkeys(ranges.PARTS, 10.0)
    figures = {"parts_ms": parts, "step_ms": 200.0, "plain_step_ms": 190.0}
    measure.append(line_of("step_parts", {"model": "aum", "size": "tiny", "grid": "g", "B": 8}, figures), tmp_path)
    measure.append(line_of("fbank", {"B": 32}, {}, "NVIDIA H200", share=0.5), tmp_path)
    for name, patches in (("ast_square", 64), ("ast_fftp", 30)):
        measure.append(reproduce_line(name, 0, 0.5, patches=patches), tmp_path)
    best = reproduce_line("ast_fftp", 0, 0.9) | {"part": "train", "recipe": "speechcommands/best", "changed": {"lr": 1}}
    measure.append(best, tmp_path)
    assert plots.behind(tmp_path, lines) == list(plots.PLOTS)
    plots.write(tmp_path, lines)
    assert plots.behind(tmp_path, lines) == []
    for name in plots.PLOTS:
        assert runs.drawn(tmp_path / name)
        assert (tmp_path / name).stat().st_size < 200_000
    measure.append(best | {"machine": "another"}, tmp_path)
    assert plots.behind(tmp_path, lines) == ["reproduction_curves.png"]
    plots.write(tmp_path, lines)
    measure.append(scale_line(2, 1.6), tmp_path)
    assert plots.behind(tmp_path, lines) == ["performance_length.png"]
    (tmp_path / "step_parts.jsonl").unlink()
    assert plots.behind(tmp_path, lines) == ["performance_step.png", "performance_length.png"]
    plots.write(tmp_path, lines)
    assert plots.behind(tmp_path, lines) == []
    assert not (tmp_path / "performance_step.png").exists()


def test_live_sound_is_shown_beside_a_window_run_anew(tmp_path):
    figures = {"hops": 200, "ms": {"p50": 16.23, "p99": 20.0}, "anew_ms": 162.3, "anew_over_ours": 10.04}
    for model, carried, right in (("aum", True, True), ("ast", False, True), ("ast", False, False)):
        case = {"model": model, "size": "tiny", "grid": "g", "seconds": 10 if right else 1, "hop_ms": 100}
        measure.append(line_of("stream", case, figures | {"carried": carried}, correct=right), tmp_path)
    text = report.performance(tmp_path)
    assert "| AuM-tiny | g | 10 | 100 | state carried on | 16.2 | 20 | 162 | 10.04 |" in text
    assert "| AST-tiny | g | 10 | 100 | frames kept, model anew | 16.2 |" in text
    assert "| AST-tiny | g | 1 | 100 | wrong, no figures |  |" in text


def test_tests_on_a_gpu_are_listed(tmp_path):
    assert "Not measured" in tables.gpu_tests([])
    line = {"case": {"file": "test_x.py"}, "said": "3 passed in 2 s", "machine": "NVIDIA H200", "commit": "abc"}
    assert "| test_x.py | 3 passed in 2 s | NVIDIA H200 | abc |" in tables.gpu_tests([line, line])
    assert "Not measured" in tables.gpu_tests([line | {"machine": "laptop"}])


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_and_pictures_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name} points to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_flags_in_code_spans_exist(path):
    known = {f"--{name.replace('_', '-')}" for name in settings.to_dict(settings.Settings())}
    known |= {
        f"--{field.name.replace('_', '-')}"
        for options in (
            convert.Options,
            explain.Options,
            export.Options,
            listen.Options,
            reproduce.Options,
            page.Options,
        )
        for field in fields(options)
    }
    other = {"--json", "--embeddings", "--split", "--gpu", "--slow", "--check", "--help"}
    other |= {
        "--no-carry",
        "--markdown",
        "--inplace",
        "--rehearse",
        "--nvtx",
        "--nproc-per-node",
        "--only",
        "--baseline",
        "--scores",
        "--in-a-row",
    }
    other |= {"--trace", "--output", "--report", "--nvtx-include", "--set", "--launch-count", "--export"}  # Nsight's
    spans = re.findall(r"```.*?```|`[^`]+`", path.read_text(), flags=re.DOTALL)
    named = {flag for span in spans for flag in re.findall(r"--[a-z][a-z-]*[a-z](?!-\.)", span)}
    assert named <= known | other, named - known - other


@pytest.mark.parametrize(("document", "least"), [("README.md", 7), ("docs/REPRODUCTION.md", 9)])
def test_commands_that_train_parse(document, least):
    text = (ROOT / document).read_text().replace("\\\n", " ")
    commands = re.findall(r"^python -m train\.(run|reproduce) (.*)$", text, flags=re.MULTILINE)
    assert len(commands) >= least
    for program, command in commands:
        words = shlex.split(command.split("#")[0])
        if program == "reproduce":
            (table, *own), _, extra = reproduce._split(words)
            options = reproduce.command.parse(reproduce.Options, own, "", reproduce.Options)
            assert reproduce.plan_of(table, options, tuple(extra), Path("out"))
        elif "--help" not in words:
            settings.from_flags(words)


def test_pins_satisfy_the_ranges():
    """requirements.txt pins what pyproject.toml asks for, nothing older."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [d for part in project["optional-dependencies"].values() for d in part]
    least = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", d).groups() for d in wanted if ">=" in d)
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE))
    for name, version in pins.items():
        if name in least:
            assert _numbers(version) >= _numbers(least[name]), name


def _numbers(version):
    return [int(part) for part in version.split(".")]


def test_no_picture_is_heavy():
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.stat().st_size < 200_000, picture.name
