"""The Triton kernels of log-mel and normalisation: every case in the interpreter, or on the device under --gpu."""

import pytest
from beside import run_cases


def test_the_kernels_hold_their_rules(request):
    pytest.importorskip("triton", reason="the triton package is not installed")
    assert run_cases("fbank", request.config) >= 60
