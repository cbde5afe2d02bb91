"""README and docs say what is so: results come from the lines, flags and files that they name exist."""

import re
import shlex
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from bench import measure, report
from fftp import convert
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
    assert "| case | ours | ms | two / ours |" in text
    assert "| B 2, seconds 1 | one | 4 | 2.50 |" in text
    assert "| B 3, seconds 1 | one | wrong |" in text
    assert text.count("On a GPU: not measured.") == len(report.PARTS)
    measure.append(line | {"machine": "NVIDIA H200", "share": 0.5}, tmp_path)
    assert "| B 2, seconds 1 | one | 4 | 50 % | 1.50 |" in report.performance(tmp_path)
    assert report.performance(tmp_path).count("not measured") == len(report.PARTS) - 1


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_and_pictures_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name} points to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_flags_in_code_spans_exist(path):
    known = {f"--{name.replace('_', '-')}" for name in settings.to_dict(settings.Settings())}
    other = {
        "--file",
        "--checkpoint",
        "--json",
        "--embeddings",
        "--split",
        "--gpu",
        "--slow",
        "--check",
        "--help",
        "--rehearse",
    }
    known |= {
        f"--{field.name.replace('_', '-')}"
        for options in (convert.Options, reproduce.Options)
        for field in fields(options)
    }
    other = {
        "--file",
        "--checkpoint",
        "--json",
        "--embeddings",
        "--split",
        "--gpu",
        "--slow",
        "--markdown",
        "--inplace",
        "--baseline",
        "--check",
        "--help",
    }
    spans = re.findall(r"```.*?```|`[^`]+`", path.read_text(), flags=re.DOTALL)
    named = {flag for span in spans for flag in re.findall(r"--[a-z][a-z-]*[a-z](?!-\.)", span)}
    assert named <= known | other, named - known - other


def test_readme_commands_of_train_run_parse():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^python -m train\.run (.*)$", text, flags=re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        flags = shlex.split(command.split("#")[0])
        if "--help" not in flags:
            settings.from_flags(flags)


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
