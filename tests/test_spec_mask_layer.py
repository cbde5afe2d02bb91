"""SpecMask as a layer: what it hides, what it leaves alone, and what its masks depend on."""

import pytest
import torch

import kernels
from fftp import SpecMask
from kernels import dispatch

T, F = 128, 128


@pytest.fixture(params=[False, True], ids=["references", "fused"])
def log_mel(request, device):
    dispatch.use_fused(request.param)
    torch.manual_seed(0)
    return torch.randn(4, T, F, device=device) - 5


def hidden_by(seed, epoch, tickets, like):
    """What `kernels` draws for these keys, painted with a number that no spectrogram has."""
    drawn = torch.zeros_like(like)
    kernels.apply_spec_mask(
        drawn,
        torch.ones(len(like), device=like.device),
        seed,
        epoch,
        tickets,
        budget=1024,
        max_width=16,
        max_height=128,
    )
    return drawn.bool()


def test_keyed_masks_are_those_of_kernels(log_mel):
    tickets = torch.tensor([7, 3, 900, 12], device=log_mel.device)
    before = log_mel.clone()
    masked = SpecMask()(log_mel, seed=5, epoch=2, tickets=tickets)
    hidden = hidden_by(5, 2, tickets, log_mel)
    assert torch.equal(log_mel, before)
    assert torch.equal(masked[~hidden], log_mel[~hidden])
    level = log_mel.double().mean((1, 2))[:, None, None].expand_as(masked)
    torch.testing.assert_close(masked[hidden].double(), level[hidden], rtol=1e-5, atol=0)
    assert (hidden.sum((1, 2)) >= 1024).all()
    alone = SpecMask()(log_mel[2], seed=5, epoch=2, tickets=tickets[2:3])
    assert torch.equal(alone, masked[2])


def test_torch_s_seed_decides_without_keys(log_mel):
    mask = SpecMask(fill=0.0)
    torch.manual_seed(1)
    first, second = mask(log_mel), mask(log_mel)
    torch.manual_seed(1)
    assert torch.equal(mask(log_mel), first)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0] == 0, first[1] == 0)  # clips of a batch have masks of their own


def test_in_evaluation_nothing_is_hidden(log_mel):
    assert SpecMask().eval()(log_mel) is log_mel


def test_hidden_cells_have_no_gradient(log_mel):
    tickets = torch.arange(4, device=log_mel.device)
    held = SpecMask(fill=1.5)(log_mel, seed=9)
    log_mel.requires_grad_()
    masked = SpecMask(fill=1.5)(log_mel, seed=9)
    assert torch.equal(masked.detach(), held)
    masked.sum().backward()
    assert torch.equal(log_mel.grad == 0, hidden_by(9, 0, tickets, log_mel))
    assert set(log_mel.grad.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"area": -1}, "budget is a positive number"),
        ({"max_width": 0}, "max_width is a positive number"),
        ({"full_share": 1.5}, "full_share is a probability"),
        ({"fill": "zero"}, 'a number or "mean"'),
    ],
)
def test_what_cannot_be(settings, said):
    with pytest.raises(ValueError, match=said):
        SpecMask(**settings)


def test_shapes_that_are_none():
    with pytest.raises(ValueError, match=r"\(B, T, F\) or \(T, F\)"):
        SpecMask()(torch.zeros(2, 3, 4, 5))
