"""Keyed random numbers: numpy, torch and Triton give the words of the plain definition, bit for bit."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import literal
import numpy as np
import pytest
import torch

from kernels import philox as keyed

SEEDS = [
    0,
    1,
    7,
    12345,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32 + 7,
    2**40 + 12345,
    2**63 - 1,
    2**63,
    2**64 - 5,
    -5,
    -(2**63),
]
EDGES = [0, 1, 2, 77, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
KNOWN = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # key and counter zero (Random123's known-answer file)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: its interpreter cannot be asked."
)


def counters() -> np.ndarray:
    """Every edge in every place, and random ones: `[cases, 4]`."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2**32, (240, 4))  # more than one program of the Triton kernel takes
    for place in range(4):
        edges = rng.integers(0, 2**32, (len(EDGES), 4))
        edges[:, place] = EDGES
        rows = np.concatenate([rows, edges])
    return rows


def test_known_answer(device):
    assert literal.words(0, 0) == KNOWN
    assert [int(w) for w in keyed.philox_numpy(0, 0)] == KNOWN
    assert [int(w) for w in keyed.philox(0, torch.tensor(0, device=device))] == KNOWN


@pytest.mark.parametrize("seed", SEEDS)
def test_twins_equal_the_plain_definition(seed, device):
    rows = counters()
    wanted = np.array([literal.words(seed, *map(int, row)) for row in rows]).T
    np.testing.assert_array_equal(np.stack(keyed.philox_numpy(seed, *rows.T)), wanted)
    columns = torch.tensor(rows.T, device=device)
    for key in (seed, torch.tensor([keyed._signed(seed)], device=device)):
        got = torch.stack(keyed.philox(key, *columns)).cpu()
        assert got.dtype == torch.int64
        np.testing.assert_array_equal(got.numpy(), wanted)


def test_counters_broadcast_and_long_ones_are_cut_into_blocks(device):
    n = 2 * keyed._BLOCK + 17
    c1, c3 = torch.arange(n, device=device), torch.tensor([[3], [2**32 - 1]], device=device)
    got = torch.stack(keyed.philox(9, 5 << 16, c1, 2, c3)).cpu()
    assert got.shape == (4, 2, n)
    wanted = keyed.philox_numpy(9, 5 << 16, np.arange(n), 2, np.array([[3], [2**32 - 1]]))
    np.testing.assert_array_equal(got.numpy(), np.stack(wanted))
    some = [0, keyed._BLOCK - 1, keyed._BLOCK, n - 1]
    for row, ticket in enumerate((3, 2**32 - 1)):
        for i in some:
            assert got[:, row, i].tolist() == literal.words(9, 5 << 16, i, 2, ticket)


def test_counters_count_modulo_two_to_the_32(device):
    far = torch.tensor([2**32 + 5, -1], device=device)
    near = torch.tensor([5, 2**32 - 1], device=device)
    assert torch.equal(torch.stack(keyed.philox(1, 0, far)), torch.stack(keyed.philox(1, 0, near)))


_IN_TRITON = """
import json, sys
import torch
from kernels.philox_kernel import words

given = json.load(sys.stdin)
counters = torch.tensor(given["counters"], dtype=torch.int64, device=given["device"])
keys = torch.tensor(given["seeds"], dtype=torch.int64, device=given["device"])
print(json.dumps([words(key, list(counters.T)).tolist() for key in keys[:, None]]))
"""


@needs_triton
def test_triton_gives_the_same_words(device, tmp_path):
    """In the interpreter, or compiled under --gpu; a process of its own, since Triton reads the switch at import."""
    rows = counters()
    given = {"seeds": [keyed._signed(s) for s in SEEDS], "counters": rows.tolist(), "device": device}
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    run = subprocess.run(
        [sys.executable, "-c", _IN_TRITON],
        input=json.dumps(given),
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for seed, words in zip(SEEDS, json.loads(run.stdout), strict=True):
        wanted = np.stack(keyed.philox_numpy(seed, *rows.T))
        np.testing.assert_array_equal(np.array(words), wanted, err_msg=f"seed {seed}")


def test_below_is_the_high_word_of_the_product(device):
    word = torch.tensor(EDGES, device=device)
    for n in (1, 2, 3, 20, 128, 18685, 2**31 - 1):
        assert keyed.below(word, n).tolist() == [w * n // 2**32 for w in EDGES]
    assert keyed.below(word, 7).min() == 0
    assert keyed.below(word, 7).max() == 6
    several = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], device=device)
    assert keyed.below(word, several).tolist() == [w * n // 2**32 for w, n in zip(EDGES, range(1, 9), strict=True)]


def test_passes_at_its_edges(device):
    word = torch.tensor([0, 2**31 - 1, 2**31, 2**32 - 1], device=device)
    assert keyed.passes(word, 0.0).tolist() == [False] * 4
    assert keyed.passes(word, 1.0).tolist() == [True] * 4
    assert keyed.passes(word, 0.5).tolist() == [True, True, False, False]
    threshold = round(0.7 * 2**32)
    edge = torch.tensor([threshold - 1, threshold], device=device)
    assert keyed.passes(edge, 0.7).tolist() == [True, False]


def test_uniform_is_exact_and_below_one(device):
    word = torch.tensor([0, 255, 256, 2**31, 2**32 - 1], device=device)
    got = keyed.uniform(word)
    assert got.dtype == torch.float32
    assert got.tolist() == [0.0, 0.0, 2.0**-24, 0.5, 1.0 - 2.0**-24]
