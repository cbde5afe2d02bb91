"""Attention on a GPU runs by a fast kernel or not at all; elsewhere, and in float32, as PyTorch chooses."""

import pytest
import torch
import torch.nn.functional as nnf

from kernels import sdpa


def switches():
    """(flash, cuDNN, memory-efficient, math): which kernels PyTorch may choose from."""
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()


@pytest.mark.parametrize("held", [True, False])
def test_what_may_be_chosen_during_the_call(held, monkeypatch):
    seen, before = [], switches()

    def watched(q, k, v, real=nnf.scaled_dot_product_attention):
        seen.append(switches())
        return real(q, k, v)

    monkeypatch.setattr(nnf, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(sdpa, "held", lambda device, dtype: held)
    q, k, v = torch.randn(3, 2, 3, 5, 8)
    exact = ((q.double() @ k.double().mT) / 8**0.5).softmax(-1) @ v.double()
    torch.testing.assert_close(sdpa.sdpa(q, k, v).double(), exact, rtol=1e-5, atol=1e-6)
    assert seen == [(True, True, False, False) if held else before]
    assert switches() == before
    assert sdpa.sdpa(q[:0], k[:0], v[:0]).shape == (0, 3, 5, 8)  # nothing to hold


def test_held_in_the_types_of_the_fast_kernels_on_a_gpu(device):
    assert sdpa.held("cuda", torch.bfloat16)
    assert sdpa.held("cuda", torch.float16)
    assert not sdpa.held("cuda", torch.float32)
    assert not sdpa.held("cpu", torch.bfloat16)
    q, k, v = torch.randn(3, 2, 3, 63, 64, device=device).bfloat16()
    exact = ((q.double() @ k.double().mT) / 8.0).softmax(-1) @ v.double()
    # Seen in 20 draws on a CPU: 0.0042; twice that.
    assert (sdpa.sdpa(q, k, v).double() - exact).abs().max() <= 0.0084
