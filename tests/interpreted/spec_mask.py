"""Masks by the Triton kernels against the reference, bit for bit. Run by tests/test_triton_spec_mask.py."""

import numpy as np
import pytest
import torch
from test_spec_mask import AUDIOSET, SPEECH, random_case

import kernels
from fftp.augment import Augment, AugmentSettings
from kernels import dispatch
from kernels.spec_mask import kernel, reference

SEEDS = [0, 7, 2**31, 2**40 + 12345, 2**63 - 1, 2**64 - 5]
DEFAULTS = {"full_share": 0.7, "shapes": 64, "attempts": 100, "clip": False, "snap": 1}
LAYOUTS = ["plain", "sliced", "transposed"]


@pytest.fixture
def traced():
    """For tests that trace: PyTorch's own tensors come from `torch.empty` then, and are no kernel's outputs."""


@pytest.fixture(autouse=True)
def by_triton(monkeypatch, request):
    if "traced" not in request.fixturenames:
        request.getfixturevalue("guard")
    names = ("spec_mask", "spec_augment", "apply_spec_mask", "apply_spec_augment", "paint")
    monkeypatch.setenv("FFTP_BACKEND", ",".join(f"{name}=triton" for name in names))


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


@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 40))])
def test_awkward_settings(block, device):
    """10 settings of 4 samples a block; one setting in ten cannot reach its budget."""
    rng = np.random.default_rng(1000 + block)
    for number in range(10):
        case = random_case(rng)
        T, F = case.pop("T"), case.pop("F")
        tickets = some_tickets(rng, 4, device)
        draw_both(SEEDS[(10 * block + number) % len(SEEDS)], int(rng.integers(0, 2**32)), tickets, T, F, **case)


@pytest.mark.parametrize("options", [{}, {"clip": True}, {"snap": 10}, {"clip": True, "snap": 4}], ids=str)
@pytest.mark.parametrize("case", [AUDIOSET, SPEECH], ids=["audioset", "speechcommands"])
def test_the_papers_settings(case, options, device):
    rng = np.random.default_rng(5)
    draw_both(2**63 + 9, 24, some_tickets(rng, 3, device), **case, **options)


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


@pytest.mark.parametrize("attempts", [1, 16, 17, 129])
def test_attempts_that_fill_the_vector_or_do_not(attempts, device):
    case = {"T": 60, "F": 20, "budget": 900, "max_width": 9, "max_height": 20, "shapes": 20, "attempts": attempts}
    draw_both(4, 2, torch.arange(3, device=device), **case)


def test_seed_and_epoch_on_the_device(device):
    tickets = torch.arange(3, device=device)
    wanted = reference.draw_spec_mask(2**64 - 5, 2**32 - 1, tickets, **(DEFAULTS | SPEECH))
    seed, epoch = torch.tensor([-5], device=device), torch.tensor(2**32 - 1, device=device)
    same(kernels.draw_spec_mask(seed, epoch, tickets, **SPEECH), wanted)


def test_any_batch_and_tickets_that_are_not_contiguous(device):
    tickets = torch.arange(33 if device == "cuda" else 11, device=device) * 7919
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
    tickets = torch.arange(5, device=device) * 104729
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
    for form, settings in (("spec_mask", DEFAULTS | mask), ("spec_augment", augment)):
        _, log_mel = spectrogram(guard, layout, B, T, F, dtype, device)
        log_mel[0, 3, 2] = float("nan")  # never read, so it stays where it is or is painted over
        wanted = log_mel.clone()
        drawn = getattr(reference, f"draw_{form}")(11, 2, tickets, T, F, **settings)
        reference.paint(wanted, drawn[0], fill)
        same(getattr(kernels, f"apply_{form}")(log_mel, fill, 11, 2, tickets, **settings), drawn)
        assert torch.equal(log_mel.nan_to_num(99), wanted.nan_to_num(99))
        getattr(kernels, f"apply_{form}")(log_mel[:0], fill[:0], 11, 2, tickets[:0], **settings)


def test_training_takes_the_one_kernel(device):
    """Augment.mask draws and paints at once, and its result is the reference's."""
    fill_in = AugmentSettings(augment="specmask", mask_area=300, mask_width=9)
    for chosen, used in ((fill_in, "apply_spec_mask"), (AugmentSettings(augment="specaugment"), "apply_spec_augment")):
        work, tickets = Augment(chosen, seed=3, T=40, F=16), torch.arange(3, device=device)
        log_mel = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(1)).to(device)
        wanted = reference.paint(log_mel.clone(), work.rectangles(5, tickets), work.fill(log_mel, None, None))
        dispatch.forget()
        got = log_mel.clone()
        drawn = work.mask(got, torch.full((3,), 40, device=device), 5, tickets)
        assert dispatch.in_use() == {used: "triton"}
        assert torch.equal(drawn, work.rectangles(5, tickets))
        assert torch.equal(got, wanted)
        assert not torch.equal(got, log_mel)


APPLIED = {
    "apply_spec_mask": {"budget": 300, "max_width": 9, "max_height": 16},
    "apply_spec_augment": {"max_frequency": 9, "max_time": 20},
}


def by_hand(form, log_mel, fill, seed, epoch, tickets):
    """The reference on a copy."""
    settings = APPLIED[form] | (DEFAULTS if form == "apply_spec_mask" else {})
    out = log_mel.clone()
    getattr(reference, form)(out, fill, seed, epoch, tickets, **settings)
    return out


@pytest.mark.parametrize("form", APPLIED)
def test_a_seed_or_epoch_changed_in_place_draws_anew(form, device):
    """What a CUDA graph relies on: the kernel reads the caller's own memory, at each launch."""
    seed, epoch = torch.tensor([7], device=device), torch.tensor([0], device=device)
    tickets, fill = torch.arange(2, device=device), torch.zeros(2, device=device)
    assert kernel._keys(seed, epoch, tickets)[0].data_ptr() == seed.data_ptr()
    assert kernel._keys(seed, epoch, tickets)[1].data_ptr() == epoch.data_ptr()
    seen = []
    for change in (lambda: None, lambda: epoch.add_(1), lambda: seed.add_(2**33), lambda: tickets.add_(5)):
        change()
        log_mel = torch.ones(2, 40, 16, device=device)
        wanted = by_hand(form, log_mel, fill, int(seed), int(epoch), tickets)
        getattr(kernels, form)(log_mel, fill, seed, epoch, tickets, **APPLIED[form])
        assert torch.equal(log_mel, wanted)
        assert not any(torch.equal(log_mel, before) for before in seen)
        seen.append(log_mel)


def operators(device):
    """Each operator with arguments of its own."""
    seed, epoch, tickets = (torch.tensor([n], device=device) for n in (7, 2, 3))
    log_mel, fill = torch.ones(1, 40, 16, device=device), torch.zeros(1, device=device)
    sizes, widths = (300, 9, 16, 2**31, 4, 10, False, 1), (9, 20)
    rectangles = torch.tensor([[[1, 5, 2, 4]]], dtype=torch.int32, device=device)
    return [
        (kernel.draw_spec_mask_op, (seed, epoch, tickets, 40, 16, *sizes)),
        (kernel.apply_spec_mask_op, (log_mel, fill, seed, epoch, tickets, *sizes)),
        (kernel.draw_spec_augment_op, (seed, epoch, tickets, 40, 16, *widths)),
        (kernel.apply_spec_augment_op, (log_mel, fill, seed, epoch, tickets, *widths)),
        (kernel.paint_op, (log_mel, rectangles, fill)),
    ]


@pytest.mark.parametrize("number", range(5))
def test_opcheck(number, traced, device):
    operator, arguments = operators(device)[number]
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.parametrize("form", APPLIED)
def test_under_compile(form, traced, device):
    """A change in place is seen by what comes before and after it in a traced program, which draws anew each time."""

    def step(log_mel, fill, seed, epoch, tickets):
        doubled = 2 * log_mel
        getattr(kernels, form)(doubled, fill, seed, epoch, tickets, **APPLIED[form])
        return doubled + 1, epoch.add_(1)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=False)
    log_mel, fill = torch.randn(2, 40, 16, device=device), torch.tensor([5.0, 9.0], device=device)
    seed, epoch = torch.tensor([7], device=device), torch.tensor([0], device=device)
    tickets = torch.arange(2, device=device)
    for number in range(3):
        got, _ = compiled(log_mel, fill, seed, epoch, tickets)
        assert torch.equal(got, by_hand(form, 2 * log_mel, fill, 7, number, tickets) + 1)


def test_cells_past_32_bits(tmp_path, device):
    """Rectangles behind 2^31 elements, in a file with holes: the offsets have to be 64 bits wide."""
    T, F = 2**24 + 4, 128
    if device == "cuda":
        log_mel = torch.zeros(1, T, F, dtype=torch.float16, device=device)
    else:
        log_mel = torch.from_file(str(tmp_path / "log_mel"), shared=True, size=T * F, dtype=torch.float16).view(1, T, F)
    fill = torch.ones(1, device=device)
    far = torch.tensor([[[T - 3, T + 9, 120, 140]]], dtype=torch.int32, device=device)
    kernels.paint(log_mel, far, fill)
    assert log_mel[0, -3:, 120:].all()
    assert int(log_mel[0, -4:].count_nonzero()) == 3 * 8
    assert int(log_mel[0, :4].count_nonzero()) == 0
    with pytest.raises(ValueError, match="areas are counted in 32 bits: a clip has 1073741824 cells at most"):
        kernels.apply_spec_augment(
            log_mel, fill, 0, 0, torch.zeros(1, dtype=torch.int64, device=device), max_frequency=3, max_time=3
        )
    # Two clips that overlap in memory, the second behind 2^31 elements.
    clips = log_mel.as_strided((2, 4, F), (T * F - 4 * F, F, 1))
    kernels.paint(clips, torch.tensor([[[0, 1, 3, 5]]] * 2, dtype=torch.int32, device=device), fill.expand(2))
    assert log_mel[0, -4].nonzero().flatten().tolist() == [3, 4]
    assert log_mel[0, 0].nonzero().flatten().tolist() == [3, 4]
