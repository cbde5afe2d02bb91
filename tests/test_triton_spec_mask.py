"""The masks' Triton kernels: every case in the interpreter, or on the device under --gpu."""

import pytest
from beside import run_cases


def test_the_kernels_give_the_references_bits(request):
    pytest.importorskip("triton", reason="the triton package is not installed")
    assert run_cases("spec_mask", request.config) >= 60
