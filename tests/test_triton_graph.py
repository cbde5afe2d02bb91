"""The captured step with the Triton kernels: recorded in the interpreter, or a CUDA graph under --gpu."""

import pytest
from beside import run_cases


def test_played_back_steps_are_the_plain_ones(request):
    pytest.importorskip("triton", reason="the triton package is not installed")
    quick = 2 if request.config.getoption("--gpu") else 1
    assert run_cases("graph", request.config) == (3 if request.config.getoption("--slow") else quick)
