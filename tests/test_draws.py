"""Order, roll, gain, mixup, balance, noise and both kinds of masks: the stored values, and their statistics."""

import json
import math

import numpy as np
import pytest
import torch
from oracles import FIXTURES, ORACLES, needs_oracles

import kernels
from kernels import dispatch, draws

SPEC_MASKS = {  # T, F, budget, widest, highest, as the stored draws were made
    "audioset": (1000, 128, 25600, 128, 128),
    "speechcommands": (128, 128, 1024, 16, 128),
    "infeasible": (20, 8, 1000, 6, 8),
    "narrow": (101, 80, 900, 3, 5),
    "wider_than_clip": (30, 128, 2000, 400, 300),
}
SPEC_AUGMENTS = {  # T, F, widest in frequency, in time
    "audioset_fftp": (1000, 128, 5, 400),
    "speechcommands": (128, 128, 48, 48),
    "wider_than_clip": (30, 16, 48, 192),
}
WEIGHTS = [5, 1, 0, 7, 100, 3]
STORED = [
    pytest.param(FIXTURES / "keyed_draws.json", id="small"),
    pytest.param(ORACLES / "keyed_draws.json", id="full", marks=needs_oracles),
]


@pytest.fixture(scope="module", params=STORED)
def stored(request):
    return json.loads(request.param.read_text())


def by_run(cases):
    """Cases that share a seed and an epoch, as a batch."""
    groups = {}
    for case in cases:
        groups.setdefault((case["seed"], case["epoch"]), []).append(case)
    return groups.items()


def tickets_of(cases, device):
    return torch.tensor([c["ticket"] for c in cases], device=device)


def test_stored_shuffles(stored):
    for seed, order in stored["shuffle"].items():
        assert draws.shuffle(int(seed), 2, len(order)).tolist() == order


def test_stored_rolls(stored, device):
    for (seed, epoch), cases in by_run(stored["cases"]):
        assert draws.draw_roll(seed, epoch, tickets_of(cases, device)).tolist() == [c["roll"] for c in cases]


def test_stored_mixups(stored, device):
    for (seed, epoch), cases in by_run(stored["cases"]):
        mixed, partner, weight = draws.draw_mixup(seed, epoch, tickets_of(cases, device), 0.5, 18685)
        assert weight.dtype == torch.float32
        got = zip(mixed.tolist(), partner.tolist(), weight.tolist(), strict=True)
        assert list(got) == [(m, p, float(np.float32(w))) for m, p, w in (c["mixup"] for c in cases)]


def test_stored_noise(stored, device):
    for (seed, epoch), cases in by_run(stored["cases"]):
        for T, F in ((3, 3), (9, 1), (5, 7)):  # cells are counted as stored: t * F + f
            noise = draws.draw_noise(seed, epoch, tickets_of(cases, device), T, F)
            wanted = [[np.float32(c["noise"][0]) * np.float32(u) for u in c["noise"][1]] for c in cases]
            np.testing.assert_array_equal(noise.flatten(1)[:, :9].cpu().numpy(), np.array(wanted, dtype=np.float32))


@pytest.mark.parametrize("fused", [False, True])
def test_stored_noise_on_the_way_through_normalise(stored, device, fused):
    """Of zeros: the noise alone, whichever backend adds it."""
    dispatch.use_fused(fused)
    for (seed, epoch), cases in by_run(stored["cases"]):
        log_mel = torch.zeros(len(cases), 5, 7, device=device)
        noise = kernels.normalise(log_mel, 0.0, 0.5, (seed, epoch, tickets_of(cases, device))).flatten(1)[:, :9]
        wanted = [[np.float32(c["noise"][0]) * np.float32(u) for u in c["noise"][1]] for c in cases]
        np.testing.assert_array_equal(noise.cpu().numpy(), np.array(wanted, dtype=np.float32))


def test_stored_balanced_choices(stored):
    for (seed, epoch), cases in by_run(stored["cases"]):
        chosen = draws.balanced(seed, epoch, np.array(WEIGHTS), 2)
        for case in cases:
            if case["ticket"] < 2:  # a sampler draws the tickets 0..n-1
                assert chosen[case["ticket"]] == case["balanced"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", SPEC_MASKS)
def test_stored_spec_masks(stored, device, name, fused):
    dispatch.use_fused(fused)
    T, F, budget, width, height = SPEC_MASKS[name]
    for (seed, epoch), cases in by_run(stored["cases"]):
        tickets = tickets_of(cases, device)
        rectangles, count, area = kernels.draw_spec_mask(
            seed, epoch, tickets, T, F, budget=budget, max_width=width, max_height=height
        )
        for b, case in enumerate(cases):
            wanted, cells = case["spec_mask"][name]
            assert (int(count[b]), int(area[b])) == (len(wanted), cells)
            assert rectangles[b, : len(wanted)].tolist() == wanted
            assert not rectangles[b, len(wanted) :].any()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", SPEC_AUGMENTS)
def test_stored_spec_augments(stored, device, name, fused):
    dispatch.use_fused(fused)
    T, F, frequency, time = SPEC_AUGMENTS[name]
    for (seed, epoch), cases in by_run(stored["cases"]):
        rectangles, count, area = kernels.draw_spec_augment(
            seed, epoch, tickets_of(cases, device), T, F, max_frequency=frequency, max_time=time
        )
        assert rectangles.tolist() == [c["spec_augment"][name] for c in cases]
        assert count.tolist() == [2] * len(cases)
        cells = [sum((t1 - t0) * (f1 - f0) for t0, t1, f0, f1 in c["spec_augment"][name]) for c in cases]
        assert area.tolist() == cells


def test_a_seed_may_be_a_tensor_and_so_may_the_epoch(device):
    tickets = torch.arange(9, device=device)
    seed, epoch = torch.tensor([2**40 + 5], device=device), torch.tensor([3], device=device)
    assert torch.equal(draws.draw_roll(seed, epoch, tickets), draws.draw_roll(2**40 + 5, 3, tickets))
    assert torch.equal(draws.draw_noise(seed, epoch, tickets, 5, 3), draws.draw_noise(2**40 + 5, 3, tickets, 5, 3))


@pytest.mark.parametrize("batch", [1, 5, 33])
def test_draws_do_not_depend_on_the_batch(device, batch):
    tickets = torch.arange(66, device=device).flip(0)

    def everything(tickets):
        noise = draws.draw_noise(4, 1, tickets, 3, 7).flatten(1)
        columns = (
            draws.draw_roll(4, 1, tickets),
            draws.draw_gain(4, 1, tickets, 6.0),
            *draws.draw_mixup(4, 1, tickets, 0.5, 100),
        )
        return torch.cat([torch.stack([c.double() for c in columns], 1), noise.double()], 1)

    whole = everything(tickets)
    assert torch.equal(torch.cat([everything(part) for part in tickets.split(batch)]), whole)


@pytest.mark.parametrize("n", [1, 2, 97, 1000])
def test_a_shuffle_is_a_permutation_of_its_own_epoch(n):
    orders = [draws.shuffle(3, epoch, n) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(n))
    if n > 2:
        assert not (orders[0] == orders[1]).all()
        assert not (orders[1] == orders[2]).all()


def test_a_shuffle_is_uniform():
    """Where sample 0 of 10 lands over 5,000 epochs: chi-squared with 9 degrees, 99.9 % point 27.9 (seen: 9.6)."""
    places = np.array([draws.shuffle(1, epoch, 10).tolist().index(0) for epoch in range(5000)])
    seen = np.bincount(places, minlength=10)
    assert ((seen - 500.0) ** 2 / 500.0).sum() < 27.9


def test_lambda_is_beta_10_10(device):
    tickets = torch.arange(20000, device=device)
    mixed, partner, weight = draws.draw_mixup(11, 0, tickets, 0.3, 50)
    weight = weight.double()
    # Beta(10, 10): mean 1/2, variance 1/84, fourth standardised moment 3 - 6/23. Margins are four standard errors.
    assert float(weight.mean()) == pytest.approx(0.5, abs=4 * math.sqrt(1 / 84 / 20000))
    assert float(weight.std()) == pytest.approx(math.sqrt(1 / 84), rel=4 * math.sqrt((3 - 6 / 23 - 1) / 4 / 20000))
    assert float(mixed.double().mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 20000))
    counts = torch.bincount(partner, minlength=50)
    assert len(counts) == 50
    # chi-squared with 49 degrees, 99.9 % point 85.4
    assert float(((counts - 400.0) ** 2 / 400.0).sum()) < 85.4


def test_fixed_mixup_is_one_half_and_keeps_the_rest(device):
    tickets = torch.arange(50, device=device)
    beta, fixed = (draws.draw_mixup(2, 0, tickets, 0.5, 9, fixed=f) for f in (False, True))
    assert torch.equal(beta[0], fixed[0])
    assert torch.equal(beta[1], fixed[1])
    assert fixed[2].tolist() == [0.5] * 50


def test_roll_and_gain_keep_their_ranges(device):
    tickets = torch.arange(4000, device=device)
    roll = draws.draw_roll(5, 0, tickets)
    assert sorted(set(roll.tolist())) == list(range(-10, 10))
    decibels = 20 * draws.draw_gain(5, 0, tickets, 6.0).double().log10()
    assert float(decibels.abs().max()) <= 6.0 + 1e-6
    assert float(decibels.mean()) == pytest.approx(0.0, abs=4 * 6 / math.sqrt(3 * 4000))
    assert float(decibels.std()) == pytest.approx(6 / math.sqrt(3), rel=0.05)


def test_noise_is_uniform_times_a_scale_of_the_clip(device):
    noise = draws.draw_noise(6, 2, torch.arange(400, device=device), 10, 16).flatten(1).double()
    assert float(noise.min()) >= 0
    assert float(noise.max()) < 0.1
    largest = noise.max(1).values  # a clip's scale, nearly: 160 cells reach 99.4 % of it on average
    assert float(largest.mean()) == pytest.approx(0.05, abs=0.1 * 4 / math.sqrt(12 * 400))
    assert float((noise.mean(1) / largest).mean()) == pytest.approx(0.5, abs=0.01)


def test_balanced_sampling_follows_its_weights():
    weights = np.array(WEIGHTS)
    chosen = np.bincount(draws.balanced(8, 0, weights, 50000), minlength=6) / 50000
    share = weights / weights.sum()
    np.testing.assert_array_less(np.abs(chosen - share), 4 * np.sqrt(share * (1 - share) / 50000) + 1e-12)
    assert chosen[2] == 0


@pytest.mark.parametrize("weights", [[0, 0], [2**31, 2**31]])
def test_balanced_sampling_refuses_weights_it_cannot_add(weights):
    with pytest.raises(ValueError, match="add up to"):
        draws.balanced(0, 0, np.array(weights), 3)
