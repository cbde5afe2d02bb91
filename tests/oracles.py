"""Stored values: the full ones beside the repository, where they are, and the small copies in tests/fixtures."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ORACLES = Path(__file__).parents[2] / "shared" / "oracles"
FIXTURES = Path(__file__).parent / "fixtures"
needs_oracles = pytest.mark.skipif(
    not ORACLES.is_dir(), reason=f"the full oracles are not here: this test wants them in {ORACLES}."
)


def oracle(name: str) -> dict[str, torch.Tensor]:
    """Tensors of one of the full files."""
    return load_file(ORACLES / f"{name}.safetensors")


def fixture(name: str) -> dict[str, torch.Tensor]:
    """Tensors of one of the small copies, written by fixtures/make.py."""
    return load_file(FIXTURES / f"{name}.safetensors")


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start so, without that start."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def share_of_largest(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, in units of the largest entry wanted."""
    got, wanted = got.double().cpu(), wanted.double().cpu()
    return float((got - wanted).abs().max() / wanted.abs().max())
