"""The Triton kernels of the wave stage: every case in the interpreter, or on the device under --gpu."""

import pytest
from beside import run_cases


def test_the_kernels_hold_the_2x_rule(request):
    pytest.importorskip("triton", reason="the triton package is not installed")
    assert run_cases("waveform", request.config) >= 20
