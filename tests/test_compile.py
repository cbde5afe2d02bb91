"""Every Triton kernel compiles for the three architectures: no spills, shared memory within bounds, matrix units used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compile as ahead

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("form", ["--first", pytest.param("", marks=pytest.mark.slow)], ids=["first", "all"])
def test_the_shipped_configurations(form, tmp_path):
    """In a process of its own: under the interpreter there would be nothing to compile."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    command = [sys.executable, "-m", "bench.compile", "--json", str(tmp_path / "table.json"), *form.split()]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "table.json").read_text())
    wanted = {"kernel", "arch", "config", "registers", "shared_bytes", "spills", "matrix_instructions"}
    assert all(wanted <= row.keys() for row in rows)
    for arch in ahead.ARCHITECTURES:
        kernels = {row["kernel"] for row in rows if row["arch"] == arch}
        assert kernels == {case.kernel for case in ahead.cases(arch)}


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
