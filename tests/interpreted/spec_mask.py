"""Masks by the Triton kernels against the reference, bit for bit. Run by tests/test_triton_spec_mask.py."""

import numpy as np
import pytest
import torch
from test_spec_mask import AUDIOSET, SPEECH, random_case

import kernels
from kernels.spec_mask import kernel, reference

SEEDS = [0, 7, 2**31, 2**40 + 12345, 2**63 - 1, 2**64 - 5]
DEFAULTS = {"full_share": 0.7, "shapes": 64, "attempts": 100, "clip": False, "snap": 1}
LAYOUTS = ["plain", "sliced", "transposed"]


@pytest.fixture(autouse=True)
def by_triton(monkeypatch, guard):
    monkeypatch.setenv("FFTP_BACKEND", "spec_mask=triton,spec_augment=triton,paint=triton")


def same(got, wanted):
    for name, ours, theirs in zip(("rectangles", "count", "area"), got, wanted, strict=True):
        assert ours.dtype == theirs.dtype == torch.int32
        assert torch.equal(ours, theirs), name


def draw_both(seed, epoch, tickets, T, F, **case):
    case = DEFAULTS | case
    got = kernels.draw_spec_mask(seed, epoch, tickets, T, F, **case)
    same(got, reference.draw_spec_mask(seed, epoch, tickets, T, F, **case))
    return got


def some_tickets(rng, n, device):
    return torch.tensor(rng.integers(0, 2**32, n), device=device)


@pytest.mark.parametrize("block", [0, 1, *(pytest.param(b, marks=pytest.mark.slow) for b in range(2, 20))])
def test_awkward_settings(block, device):
    """20 settings of 4 samples a block; one setting in ten cannot reach its budget."""
    rng = np.random.default_rng(1000 + block)
    for number in range(20):
        case = random_case(rng)
        T, F = case.pop("T"), case.pop("F")
        tickets = some_tickets(rng, 4, device)
        draw_both(SEEDS[number % len(SEEDS)], int(rng.integers(0, 2**32)), tickets, T, F, **case)


@pytest.mark.parametrize("options", [{}, {"clip": True}, {"snap": 10}, {"clip": True, "snap": 4}], ids=str)
@pytest.mark.parametrize("case", [AUDIOSET, SPEECH], ids=["audioset", "speechcommands"])
def test_the_papers_settings(case, options, device):
    rng = np.random.default_rng(5)
    draw_both(2**63 + 9, 24, some_tickets(rng, 6, device), **case, **options)


@pytest.mark.parametrize("share", [0.0, 2.0**-32, 0.5, 1 - 2.0**-32, 1.0])
def test_probabilities_to_their_ends(share, device):
    rng = np.random.default_rng(6)
    case = SPEECH | {"max_height": 40, "full_share": share}
    rectangles, count, _ = draw_both(3, 0, some_tickets(rng, 8, device), **case)
    heights = [h for rows, n in zip(rectangles, count, strict=True) for h in (rows[:n, 3] - rows[:n, 2]).tolist()]
    if share == 1:
        assert set(heights) == {128}
    if share == 0:
        assert max(heights) <= 40


def test_a_budget_above_32_bits_and_one_of_nothing(device):
    tickets = torch.arange(2, device=device)
    draw_both(1, 0, tickets, 9, 5, budget=2**40, max_width=4, max_height=5, shapes=4)
    rectangles, count, area = draw_both(1, 0, tickets, 9, 5, budget=0, max_width=4, max_height=5)
    assert not any(t.any() for t in (rectangles, count, area))


@pytest.mark.parametrize("attempts", [1, 2, 16, 17, 128, 129])
def test_attempts_that_fill_the_vector_or_do_not(attempts, device):
    case = {"T": 60, "F": 20, "budget": 900, "max_width": 9, "max_height": 20, "shapes": 20, "attempts": attempts}
    draw_both(4, 2, torch.arange(3, device=device), **case)


def test_seed_and_epoch_on_the_device(device):
    tickets = torch.arange(3, device=device)
    wanted = reference.draw_spec_mask(2**64 - 5, 2**32 - 1, tickets, **(DEFAULTS | SPEECH))
    seed, epoch = torch.tensor([-5], device=device), torch.tensor(2**32 - 1, device=device)
    same(kernels.draw_spec_mask(seed, epoch, tickets, **SPEECH), wanted)


def test_any_batch_and_tickets_that_are_not_contiguous(device):
    tickets = torch.arange(33, device=device) * 7919
    whole = draw_both(9, 4, tickets, **SPEECH)
    for batch in (1, 5):
        parts = [kernels.draw_spec_mask(9, 4, piece, **SPEECH) for piece in tickets.split(batch)]
        same([torch.cat(p) for p in zip(*parts, strict=True)], whole)
    same(kernels.draw_spec_mask(9, 4, tickets[::3], **SPEECH), [w[::3] for w in whole])
    draw_both(9, 4, tickets[:0], **SPEECH)


@pytest.mark.parametrize(
    ("T", "F", "frequency", "time"),
    [(1000, 128, 5, 400), (128, 128, 48, 48), (30, 16, 48, 192), (1, 1, 1, 1), (7, 3, 1, 2)],
)
def test_spec_augment(T, F, frequency, time, device):
    tickets = torch.arange(12, device=device) * 104729
    for seed in SEEDS:
        arguments = (seed, 3, tickets, T, F)
        got = kernels.draw_spec_augment(*arguments, max_frequency=frequency, max_time=time)
        same(got, reference.draw_spec_augment(*arguments, max_frequency=frequency, max_time=time))
    empty = kernels.draw_spec_augment(0, 0, tickets[:0], T, F, max_frequency=frequency, max_time=time)
    assert [len(t) for t in empty] == [0, 0, 0]


def spectrogram(guard, layout, B, T, F, dtype, device):
    """A view between guard zones, and the whole buffer that it looks into."""
    generator = torch.Generator().manual_seed(B * T * F)
    shape = {"plain": (B, T, F), "sliced": (B, T, 2 * F), "transposed": (B, F, T)}[layout]
    whole = guard.hold(torch.randn(shape, generator=generator).to(device, dtype))
    return whole, {"plain": whole, "sliced": whole[:, :, ::2], "transposed": whole.transpose(1, 2)}[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("B", "T", "F", "M"), [(1, 1, 1, 1), (3, 37, 5, 7), (2, 19, 300, 4), (2, 4, 3, 0)])
def test_paint(B, T, F, M, dtype, layout, guard, device):
    rng = np.random.default_rng(M + T)
    ends = [np.sort(rng.integers(0, size + 1, (B, M, 2)), -1) for size in (T, F)]
    rectangles = torch.tensor(np.concatenate(ends, -1), dtype=torch.int32, device=device)
    fill = torch.tensor(rng.normal(size=B), dtype=torch.float32, device=device)
    whole, log_mel = spectrogram(guard, layout, B, T, F, dtype, device)
    before, wanted = whole.clone(), log_mel.clone()
    reference.paint(wanted, rectangles, fill)
    out = kernels.paint(log_mel, rectangles, fill)
    assert out.data_ptr() == log_mel.data_ptr()
    assert torch.equal(log_mel, wanted)
    if layout == "sliced":
        assert torch.equal(whole[:, :, 1::2], before[:, :, 1::2])


def test_paint_stays_inside_whatever_the_rectangles_say(guard, device):
    _, log_mel = spectrogram(guard, "plain", 2, 6, 5, torch.float32, device)
    other = log_mel[1].clone()
    outside = torch.tensor([[[-9, 99, -9, 99]], [[4, 2, 0, 5]]], dtype=torch.int32, device=device)
    kernels.paint(log_mel, outside, torch.tensor([2.5, 9.0], device=device))
    assert (log_mel[0] == 2.5).all()
    assert torch.equal(log_mel[1], other)  # it ends before it starts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drawn_and_painted_in_one_kernel(dtype, layout, guard, device):
    """The rectangles of the drawing kernel, and a spectrogram as if they had been painted afterwards."""
    T, F, B = 128, 40, 3
    tickets, fill = torch.arange(B, device=device), torch.tensor([-3.25, 0.1, 7.0], device=device)
    mask = {"budget": 900, "max_width": 16, "max_height": 30}
    augment = {"max_frequency": 20, "max_time": 60}
    for form, settings in (("draw_spec_mask", DEFAULTS | mask), ("draw_spec_augment", augment)):
        _, log_mel = spectrogram(guard, layout, B, T, F, dtype, device)
        log_mel[0, 3, 2] = float("nan")  # never read, so it stays where it is or is painted over
        wanted = log_mel.clone()
        drawn = getattr(reference, form)(11, 2, tickets, T, F, **settings)
        reference.paint(wanted, drawn[0], fill)
        same(getattr(kernel, form)(11, 2, tickets, T, F, **settings, log_mel=log_mel, fill=fill), drawn)
        assert torch.equal(log_mel.nan_to_num(99), wanted.nan_to_num(99))
