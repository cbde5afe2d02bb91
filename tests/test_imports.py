"""Imports point one way: train -> fftp -> kernels, and nothing imports bench or tests."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {"kernels": {"kernels"}, "fftp": {"fftp", "kernels"}, "train": {"train", "fftp", "kernels"}}
ROOMS = {"kernels", "fftp", "train", "bench", "tests"}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    """Also those inside of functions."""
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                named = [node.module]
            used = {name.split(".")[0] for name in named} & ROOMS
            assert used <= ALLOWED[room], (
                f"{path.relative_to(ROOT)}, line {node.lineno}, imports {used - ALLOWED[room]}"
            )
