"""Every Triton kernel compiles for the three architectures: no spills, shared memory within bounds, matrix units used."""

import json
import re
from pathlib import Path

import beside
import pytest

from bench import compile as ahead

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "form",
    [
        "--first",
        *(
            pytest.param(f"--arch {arch}", marks=[pytest.mark.slow, pytest.mark.timeout(1300)])
            for arch in ahead.ARCHITECTURES
        ),
    ],
)
def test_the_shipped_configurations(form, request):
    """In a process of its own: under the interpreter there would be nothing to compile."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    rows = json.loads(beside.compiled(form.split(), request.config))
    wanted = {"kernel", "arch", "config", "registers", "shared_bytes", "spills", "matrix_instructions"}
    assert all(wanted <= row.keys() for row in rows)
    for arch in form.split()[1:] or ahead.ARCHITECTURES:
        compiled = [(row["kernel"], row["config"], row["tile"]) for row in rows if row["arch"] == arch]
        shipped = [(case.kernel, case.config, case.tile) for case in ahead.cases(arch)]
        if form == "--first":
            shipped = list({kernel: (kernel, *rest) for kernel, *rest in reversed(shipped)}.values())
        assert sorted(compiled) == sorted(shipped)


def table_of(text: str) -> dict[str, list[tuple[str, str, str]]]:
    """(kernel, configuration, tile) of each cell of the Markdown table, by architecture."""
    found, kernel, arches = {arch: [] for arch in ahead.ARCHITECTURES}, "", []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("## "):
            kernel = line[3:]
        elif line.startswith("| configuration"):
            arches = cells[1:]
        elif line.startswith("| ") and "---" not in line:
            for arch, cell in zip(arches, cells[1:], strict=True):
                if cell != "-":
                    found[arch].append((kernel, cells[0], cell.rpartition(": ")[0]))
    return found


def test_the_document_has_the_kernels_that_there_are():
    """docs/COMPILED.md: every shipped configuration and tile, none besides, and no spill among its figures."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    text = (ROOT / "docs" / "COMPILED.md").read_text()
    found = table_of(text)
    for arch in ahead.ARCHITECTURES:
        shipped = [(case.kernel, case.config, case.tile) for case in ahead.cases(arch)]
        assert sorted(found[arch]) == sorted(shipped), "run python -m bench.compile --markdown docs/COMPILED.md"
    figures = re.findall(r"(\d+) / ([\d,]+) / (\d+) / (\d+) \|", text)
    assert len(figures) == sum(map(len, found.values()))
    assert {spills for _, _, spills, _ in figures} == {"0"}


def test_a_table_is_rendered_and_read_back():
    row = {
        "kernel": "k",
        "config": "c, masked",
        "registers": 9,
        "shared_bytes": 4096,
        "spills": 0,
        "matrix_instructions": 2,
    }
    rows = [row | {"arch": "sm_80", "tile": "8x8, 4 warps"}, row | {"arch": "sm_90", "config": "d", "tile": ""}]
    text = ahead.rendered(rows, "3.9.0")
    assert "Triton 3.9.0" in text
    assert "| c, masked | 8x8, 4 warps: 9 / 4,096 / 0 / 2 | - |" in text
    assert table_of(text) == {"sm_80": [("k", "c, masked", "8x8, 4 warps")], "sm_90": [("k", "d", "")], "sm_100": []}


@pytest.mark.parametrize(
    ("change", "product", "why"),
    [
        ({}, True, ""),
        ({"spills": 3}, False, "3 spills"),
        ({"shared_bytes": 232449}, False, "232449 bytes of shared memory, 232448 are allowed"),
        ({"arch": "sm_80", "shared_bytes": 170000}, False, "166912 are allowed"),
        ({"matrix_instructions": 0}, True, "no HGMMA"),
        ({"matrix_instructions": 0}, False, ""),
    ],
)
def test_what_is_not_good_enough(change, product, why):
    row = {"arch": "sm_90", "spills": 0, "shared_bytes": 98304, "matrix_instructions": 4} | change
    assert why in ahead.fault(row, product)
    assert bool(ahead.fault(row, product)) == bool(why)


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ahead.main(["--first"]) == 2
    assert "unset it" in capsys.readouterr().err
