"""Masks: the rectangles against a literal Algorithm 1 and by their properties, painting, and what fills them."""

import math

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from fftp.augment import Augment, AugmentSettings, clip_level
from kernels import dispatch
from kernels.spec_mask import native, reference
from kernels.spec_mask.reference import covered

AUDIOSET = {"T": 1000, "F": 128, "budget": 25600, "max_width": 128, "max_height": 128}
SPEECH = {"T": 128, "F": 128, "budget": 1024, "max_width": 16, "max_height": 128}


def tickets(n: int, device: str = "cpu") -> torch.Tensor:
    return torch.arange(n, device=device) * 7919 + 3


def draw(seed, epoch, some, **case):
    return kernels.draw_spec_mask(seed, epoch, some, case.pop("T"), case.pop("F"), **case)


def random_case(rng) -> dict:
    """A setting such as nobody would choose; one in ten has a budget that cannot be reached."""
    T, F = int(rng.integers(1, 200)), int(rng.integers(1, 140))
    infeasible = rng.random() < 0.1
    return {
        "T": T,
        "F": F,
        "budget": 2 * T * F if infeasible else int(rng.integers(0, T * F // 2 + 2)),
        "max_width": int(rng.integers(1, max(2, T // 3))) if rng.random() < 0.8 else int(rng.integers(1, 2 * T + 2)),
        "max_height": int(rng.integers(1, F + 20)),
        "full_share": float(rng.choice([0.0, 0.7, 0.7, 0.7, 1.0])),
        # An unreachable budget takes every shape and attempt: a short list keeps the literal form quick.
        "shapes": 5 if infeasible else int(rng.choice([1, 7, 16, 64])),
        "attempts": 7 if infeasible else int(rng.choice([1, 10, 30])),
        "clip": bool(rng.random() < 0.3),
        "snap": int(rng.integers(1, min(T, 10) + 1)) if rng.random() < 0.3 else 1,
    }


@pytest.mark.parametrize("block", range(10))
def test_the_literal_algorithm_draws_the_same(block, device):
    """200 settings x 50 samples."""
    rng = np.random.default_rng(block)
    for _ in range(20):
        case, seed, epoch = random_case(rng), int(rng.integers(0, 2**63)), int(rng.integers(0, 100))
        some = torch.tensor(rng.integers(0, 2**32, 50), device=device)
        rectangles, count, area = draw(seed, epoch, some, **case)
        assert rectangles.shape == (50, case["shapes"], 4)
        for ticket, rows, n, cells in zip(
            some.tolist(), rectangles.tolist(), count.tolist(), area.tolist(), strict=True
        ):
            wanted, wanted_cells = literal.spec_mask(seed, epoch, ticket, **case)
            assert [tuple(r) for r in rows[:n]] == wanted, case
            assert cells == wanted_cells
            assert not any(map(any, rows[n:]))


@pytest.mark.parametrize("case", [AUDIOSET, SPEECH], ids=["audioset", "speechcommands"])
def test_the_literal_algorithm_draws_the_same_at_the_papers_settings(case, device):
    some = tickets(100, device)
    rectangles, count, area = draw(2**40 + 7, 24, some, **case)
    for b, ticket in enumerate(some.tolist()):
        wanted, cells = literal.spec_mask(2**40 + 7, 24, ticket, **case)
        assert [tuple(r) for r in rectangles[b, : int(count[b])].tolist()] == wanted
        assert int(area[b]) == cells


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_properties(number, seed):
    case = random_case(np.random.default_rng(number))
    rectangles, count, area = draw(seed, 0, tickets(8), **case)
    T, F, snap = case["T"], case["F"], case["snap"]
    for rows, n, cells in zip(rectangles, count.tolist(), area.tolist(), strict=True):
        painted = np.zeros((T, F), dtype=int)
        total = 0
        for t0, t1, f0, f1 in rows[:n].tolist():
            assert 0 <= t0 < t1 <= T  # half open, inside, never empty
            assert 0 <= f0 < f1 <= F
            assert t1 - t0 <= max(min(case["max_width"], T) + snap - 1, 1)
            assert f1 - f0 in (*range(1, min(case["max_height"], F) + 1), F)
            assert t0 % snap == 0
            assert (t1 - t0) % snap == 0 or t1 - t0 == T
            assert total < case["budget"]  # no shape is added once the budget is there
            painted[t0:t1, f0:f1] += 1
            total += (t1 - t0) * (f1 - f0)
        assert painted.max(initial=0) <= 1  # no overlap
        assert total == painted.sum() == cells
    # Every shape counts, dropped or not: with fewer of them the list is the beginning of the same list.
    fewer = (case["shapes"] + 1) // 2
    shorter, kept, _ = draw(seed, 0, tickets(8), **(case | {"shapes": fewer}))
    for rows, few, n, all_ in zip(shorter, kept.tolist(), count.tolist(), rectangles, strict=True):
        assert max(0, n - (case["shapes"] - fewer)) <= few <= n
        assert torch.equal(rows[:few], all_[:few])


def test_a_reachable_budget_is_reached(device):
    for case in (AUDIOSET, SPEECH):
        _, count, area = draw(5, 0, tickets(500, device), **case)
        assert int(area.min()) >= case["budget"]
        assert int(area.max()) < case["budget"] + case["max_width"] * case["F"]
        assert int(count.min()) >= 1


def test_no_budget_no_mask(device):
    rectangles, count, area = draw(5, 0, tickets(3, device), **(SPEECH | {"budget": 0}))
    assert not rectangles.any()
    assert count.tolist() == area.tolist() == [0, 0, 0]


def test_empty_batch(device):
    rectangles, count, area = draw(5, 0, tickets(0, device), **SPEECH)
    assert rectangles.shape == (0, 64, 4)
    assert count.shape == area.shape == (0,)


@pytest.mark.parametrize(
    ("case", "share", "shapes"), [(AUDIOSET, 23.9, 4.4), (SPEECH, 10.3, 1.8)], ids=["audioset", "speechcommands"]
)
def test_masked_share_over_two_thousand_draws(case, share, shapes, device):
    """PAPER_NOTES D-18. Seen: 24.1 and 10.1 %, 4.41 and 1.82 shapes; standard errors 0.07 and 0.06 %, 0.03 shapes."""
    _, count, area = draw(1, 0, tickets(2000, device), **case)
    assert 100 * float(area.double().mean()) / (case["T"] * case["F"]) == pytest.approx(share, abs=0.3)
    assert float(count.double().mean()) == pytest.approx(shapes, abs=0.15)


def test_seven_draws_in_ten_are_full_height(device):
    """Of first shapes, which are never dropped: 0.7 + 0.3 / 128 for max_height = F; 2,000 draws give +-0.010."""
    rectangles, _, _ = draw(3, 0, tickets(2000, device), **AUDIOSET)
    heights = (rectangles[:, 0, 3] - rectangles[:, 0, 2]).cpu()
    assert float((heights == 128).double().mean()) == pytest.approx(0.7 + 0.3 / 128, abs=0.03)
    widths = (rectangles[:, 0, 1] - rectangles[:, 0, 0]).cpu()
    assert (int(widths.min()), int(widths.max())) == (1, 128)
    # uniform on 1..128: mean 64.5, standard error 0.83
    assert float(widths.double().mean()) == pytest.approx(64.5, abs=3.3)
    low = heights[heights < 128].double()
    assert float(low.mean()) == pytest.approx(64, abs=6)  # uniform on 1..127, about 600 of them: standard error 1.5


@pytest.mark.parametrize("batch", [1, 5, 33])
@pytest.mark.parametrize("case", [AUDIOSET, SPEECH | {"budget": 12000}], ids=["audioset", "crowded"])
def test_bits_do_not_depend_on_batch_or_order(case, batch, device):
    some = tickets(66, device)
    whole = draw(9, 4, some, **case)
    parts = [draw(9, 4, piece, **case) for piece in some.split(batch)]
    for number, full in enumerate(whole):
        assert torch.equal(torch.cat([p[number] for p in parts]), full)
    order = torch.randperm(66, generator=torch.Generator().manual_seed(batch)).to(device)
    for full, shuffled in zip(whole, draw(9, 4, some[order], **case), strict=True):
        assert torch.equal(shuffled, full[order])


def test_seed_epoch_and_ticket_each_change_the_draw(device):
    base = draw(1, 1, tickets(4, device), **AUDIOSET)[0]
    for other in (
        draw(2, 1, tickets(4, device), **AUDIOSET),
        draw(2**32 + 1, 1, tickets(4, device), **AUDIOSET),
        draw(1, 2, tickets(4, device), **AUDIOSET),
        draw(1, 1, tickets(4, device) + 1, **AUDIOSET),
    ):
        assert not any(torch.equal(a, b) for a, b in zip(other[0], base, strict=True))


def test_clip_lands_within_a_column_of_the_budget(device):
    rectangles, count, area = draw(2, 0, tickets(300, device), **AUDIOSET, clip=True)
    last = rectangles[torch.arange(300), count.long() - 1]
    height = last[:, 3] - last[:, 2]
    over = area - AUDIOSET["budget"]
    assert int(over.min()) >= 0
    assert bool((over < height).all())
    assert float(area.double().mean()) < 1.005 * AUDIOSET["budget"]


def test_snap_aligns_start_and_width(device):
    rectangles, count, _ = draw(2, 0, tickets(300, device), **AUDIOSET, snap=10)
    used = torch.arange(64, device=device) < count[:, None]
    starts, ends = rectangles[..., 0][used], rectangles[..., 1][used]
    assert not (starts % 10).any()
    assert not (ends % 10).any()


@pytest.mark.parametrize(("T", "F", "frequency", "time"), [(1000, 128, 5, 400), (128, 128, 48, 48), (30, 16, 48, 192)])
def test_spec_augment_widths_and_places(T, F, frequency, time, device):
    """Widths are uniform on 0..param-1 (param cut to the axis), starts on 0..axis-width-1."""
    rectangles, count, area = kernels.draw_spec_augment(
        4, 0, tickets(4000, device), T, F, max_frequency=frequency, max_time=time
    )
    bands, spans = rectangles[:, 0].cpu(), rectangles[:, 1].cpu()
    assert count.tolist() == [2] * 4000
    assert (bands[:, :2] == torch.tensor([0, T])).all()
    assert (spans[:, 2:] == torch.tensor([0, F])).all()
    for start, end, size, parameter in (
        (bands[:, 2], bands[:, 3], F, min(frequency, F)),
        (spans[:, 0], spans[:, 1], T, min(time, T)),
    ):
        width = (end - start).double()
        assert (float(width.min()), float(width.max())) == pytest.approx((0, parameter - 1), abs=parameter * 0.01)
        # mean of a uniform integer, four standard errors
        margin = 4 * ((parameter**2 - 1) / 12 / 4000) ** 0.5
        assert float(width.mean()) == pytest.approx((parameter - 1) / 2, abs=margin)
        assert int(start.min()) >= 0
        assert int(end.max()) <= size
        place = (start.double() + 0.5) / (size - width)
        assert float(place.mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / 4000) ** 0.5)
    cells = T * (bands[:, 3] - bands[:, 2]) + F * (spans[:, 1] - spans[:, 0])
    assert torch.equal(area.cpu(), cells.to(torch.int32))


def painted(log_mel, rectangles, fill):
    """The definition: one cell at a time."""
    out = log_mel.clone()
    for b, rows in enumerate(rectangles.tolist()):
        for t in range(out.shape[1]):
            for f in range(out.shape[2]):
                if any(t0 <= t < t1 and f0 <= f < f1 for t0, t1, f0, f1 in rows):
                    out[b, t, f] = fill[b]
    return out


@pytest.mark.parametrize("M", [0, 1, 5, 64])
@pytest.mark.parametrize(("B", "T", "F"), [(1, 1, 1), (3, 17, 5), (2, 9, 23)])
def test_paint(B, T, F, M, device):
    generator = torch.Generator().manual_seed(M + T)
    log_mel = torch.randn(B, T, F, generator=generator).to(device)
    fill = torch.randn(B, generator=generator).to(device)
    corners = [torch.randint(-3, size + 4, (B, M, 2), generator=generator).sort(-1).values for size in (T, F)]
    rectangles = torch.cat(corners, -1).to(device, torch.int32)  # empty ones, overlaps, ends beyond the clip's
    given = log_mel.clone()
    out = kernels.paint(given, rectangles, fill)
    assert out.data_ptr() == given.data_ptr()
    assert torch.equal(out, painted(log_mel, rectangles, fill))
    assert torch.equal(covered(rectangles, T, F), painted(torch.zeros_like(log_mel), rectangles, fill * 0 + 1) == 1)


def test_paint_all_of_one_clip_and_nothing_of_another(device):
    log_mel = torch.full((2, 4, 3), float("nan"), device=device)
    rectangles = torch.zeros(2, 3, 4, dtype=torch.int32, device=device)
    rectangles[0, 1] = torch.tensor([0, 4, 0, 3])
    out = kernels.paint(log_mel, rectangles, torch.tensor([2.5, 7.0], device=device))
    assert (out[0] == 2.5).all()
    assert out[1].isnan().all()


def test_paint_a_view_that_is_not_contiguous(device):
    whole = torch.randn(2, 7, 12, device=device)
    before, rectangles = whole.clone(), torch.tensor([[[1, 5, 2, 4]]] * 2, dtype=torch.int32, device=device)
    kernels.paint(whole[:, :, ::2], rectangles, torch.zeros(2, device=device))
    assert torch.equal(whole[:, :, 1::2], before[:, :, 1::2])
    assert not whole[:, 1:5, 4:8:2].any()
    assert int((whole != before).sum()) == 2 * 4 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_applying_is_drawing_and_painting(dtype, device):
    some, fill = tickets(3, device), torch.tensor([0.5, -2.0, 9.0], device=device)
    mask = {"budget": 300, "max_width": 9, "max_height": 16, "clip": True}
    augment = {"max_frequency": 9, "max_time": 20}
    for apply, draw_, sizes in (
        (kernels.apply_spec_mask, kernels.draw_spec_mask, mask),
        (kernels.apply_spec_augment, kernels.draw_spec_augment, augment),
    ):
        log_mel = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        drawn = draw_(7, 2, some, 40, 16, **sizes)
        wanted = painted(log_mel, drawn[0], fill)
        for ours, theirs in zip(apply(log_mel, fill, 7, 2, some, **sizes), drawn, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(log_mel, wanted)


@pytest.mark.parametrize("fill", ["default", "mean", "zero"])
@pytest.mark.parametrize("mean", ["all", "valid"])
@pytest.mark.parametrize("augment", ["specmask", "specaugment"])
@pytest.mark.parametrize("rolled", [False, True])
def test_fill(augment, fill, mean, rolled, device):
    """What masked cells hold: 0, or the mean of the clip, or of its valid frames wherever they were rolled to."""
    T, F, B = 40, 16, 5
    log_mel = torch.randn(B, T, F, generator=torch.Generator().manual_seed(1)).to(device) - 3
    valid = torch.tensor([40, 31, 7, 1, 0], device=device)
    roll = torch.tensor([3, -4, 9, -10, 5], device=device) if rolled else None
    for b in range(B):
        log_mel[b, int(valid[b]) :] = 0
        if rolled:
            log_mel[b] = log_mel[b].roll(int(roll[b]), 0)
    chosen = AugmentSettings(
        augment=augment,
        mask_area=200,
        mask_width=9,
        mask_fill=fill,
        mask_mean=mean,
        mask_max_frequency=9,
        mask_max_time=20,
    )
    work = Augment(chosen, seed=3, T=T, F=F)
    rectangles = work.rectangles(2, tickets(B, device))
    out = log_mel.clone()
    assert torch.equal(work.mask(out, valid, 2, tickets(B, device), roll), rectangles)
    for b in range(B):
        hidden = painted(torch.zeros(1, T, F), rectangles[b : b + 1].cpu(), [1.0])[0] == 1
        cells = log_mel[b].double().cpu()
        if fill == "zero" or (fill == "default" and augment == "specaugment"):
            wanted = 0.0
        elif mean == "all" or valid[b] == 0:
            wanted = float(cells.mean())
        else:
            back = cells.roll(-int(roll[b]), 0) if rolled else cells
            wanted = float(back[: int(valid[b])].mean())
        got = out[b].cpu()
        assert hidden.any()
        # float32 means of 640 cells of size 3. Seen: 2.3e-7, times ten
        torch.testing.assert_close(got[hidden].double(), torch.full_like(cells[hidden], wanted), rtol=0, atol=2e-6)
        assert torch.equal(got[~hidden], log_mel[b].cpu()[~hidden])


def test_the_mean_of_a_clip_has_the_same_bits_at_any_batch(device):
    log_mel = torch.randn(33, 101, 80, generator=torch.Generator().manual_seed(2)).to(device)
    valid, roll = torch.arange(33, device=device) * 3 + 1, torch.arange(33, device=device) - 16
    for arguments in ((None, None), (valid, None), (valid, roll)):
        whole = clip_level(log_mel, *arguments)
        for b in range(33):
            alone = [a if a is None else a[b : b + 1] for a in arguments]
            assert torch.equal(clip_level(log_mel[b : b + 1], *alone), whole[b : b + 1])


def test_no_augmentation_changes_nothing(device):
    work = Augment(AugmentSettings(), seed=0, T=6, F=4)
    log_mel = torch.randn(2, 6, 4, device=device)
    some, before = tickets(2, device), log_mel.clone()
    assert work.mixup(0, some, 9) is work.gain(0, some) is work.roll(0, some) is work.rectangles(0, some) is None
    assert work.mask(log_mel, torch.tensor([6, 6], device=device), 0, some) is None
    assert work.noise(0, some) is None
    assert torch.equal(log_mel, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": -1}, "budget"),
        ({"max_width": 0}, "max_width"),
        ({"max_height": 0}, "max_height"),
        ({"snap": 0}, "snap"),
        ({"snap": 129}, "snap=129 frames is longer"),
        ({"full_share": 1.5}, "full_share is a probability"),
        ({"T": 0}, "T=0"),
        ({"T": 2**23 + 1}, "areas are counted in 32 bits: a clip has 1073741824 cells at most, got T=8388609 x F=128"),
    ],
)
def test_spec_mask_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        draw(0, 0, tickets(2), **(SPEECH | change))


def test_tickets_and_shapes_are_checked():
    with pytest.raises(ValueError, match="tickets is int64"):
        draw(0, 0, tickets(2).int(), **SPEECH)
    with pytest.raises(ValueError, match="tickets is int64"):
        draw(0, 0, tickets(2)[None], **SPEECH)
    with pytest.raises(ValueError, match=r"tickets is an int64 tensor \(B,\), got \[0, 1\]"):
        draw(0, 0, [0, 1], **SPEECH)
    with pytest.raises(ValueError, match="max_frequency and max_time"):
        kernels.draw_spec_augment(0, 0, tickets(2), 9, 9, max_frequency=0, max_time=3)
    log_mel, rectangles = torch.zeros(2, 4, 3), torch.zeros(2, 5, 4, dtype=torch.int32)
    for arguments in (
        (log_mel[0], rectangles, torch.zeros(2)),
        (log_mel, rectangles[:1], torch.zeros(2)),
        (log_mel, rectangles[..., :3], torch.zeros(2)),
        (log_mel, rectangles, torch.zeros(1)),
    ):
        with pytest.raises(ValueError, match="paint takes"):
            kernels.paint(*arguments)
    with pytest.raises(ValueError, match=r"fill is a float32 tensor \(B,\) .* got 0.0"):
        kernels.apply_spec_mask(log_mel, 0.0, 0, 0, tickets(2), budget=1, max_width=1, max_height=1)
    for some, fill in ((tickets(2), torch.zeros(1)), (tickets(1), torch.zeros(2))):
        with pytest.raises(ValueError, match="masks are applied to log_mel"):
            kernels.apply_spec_mask(log_mel, fill, 0, 0, some, budget=1, max_width=1, max_height=1)
        with pytest.raises(ValueError, match="masks are applied to log_mel"):
            kernels.apply_spec_augment(log_mel, fill, 0, 0, some, max_frequency=1, max_time=1)
    with pytest.raises(ValueError, match="budget is a positive number"):
        kernels.apply_spec_mask(log_mel, torch.zeros(2), 0, 0, tickets(2), budget=-1, max_width=1, max_height=1)


# In C ----------------------------------------------------------------------------------------------------------------

needs_native = pytest.mark.skipif(native.refuses() is not None, reason=f"spec_mask=native: {native.refuses()}.")
SETTINGS = ("budget", "max_width", "max_height", "full_share", "shapes", "attempts", "clip", "snap")


def in_c_as_the_reference(name, log_mel, seed, epoch, some, **sizes):
    """Rectangles, count, area and every cell, where the outputs held other numbers before; returns what was drawn."""
    B, T, F = log_mel.shape
    fill = torch.randn(B, generator=torch.Generator().manual_seed(B))
    plain, ours = log_mel.clone(), log_mel.clone()
    wanted = getattr(reference, f"apply_{name}")(plain, fill, seed, epoch, some, **sizes)
    found = getattr(native, f"apply_{name}")(ours, fill, seed, epoch, some, **sizes)
    alone = getattr(native, f"draw_{name}")(seed, epoch, some, T, F, **sizes)
    for theirs, both, drawn in zip(wanted, found, alone, strict=True):
        assert theirs.dtype == both.dtype == drawn.dtype == torch.int32
        assert torch.equal(theirs, both)
        assert torch.equal(theirs, drawn)
    assert torch.equal(ours.isnan(), plain.isnan())
    assert torch.equal(ours.nan_to_num(), plain.nan_to_num())
    return wanted


@pytest.fixture
def poison(monkeypatch):
    """What is not written shows."""
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, shape, dtype: torch.full(shape, -7, dtype=dtype, device=self.device)
    )


@needs_native
@pytest.mark.parametrize("block", range(4))
def test_in_c_spec_mask_has_the_references_bits(block, poison):
    """80 settings such as nobody would choose; cells that are not masked are NaN."""
    rng = np.random.default_rng(1000 + block)
    for number in range(20):
        case, B = random_case(rng), int(rng.integers(0, 40))
        seed, epoch = int(rng.integers(0, 2**63)) * 2 + number % 2, int(rng.integers(0, 2**32))
        some = torch.tensor(rng.integers(-(2**40), 2**40, B))
        log_mel = torch.full((B, case["T"], case["F"]), math.nan)
        in_c_as_the_reference("spec_mask", log_mel, seed, epoch, some, **{n: case[n] for n in SETTINGS})


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [AUDIOSET, SPEECH], ids=["audioset", "speechcommands"])
def test_in_c_at_the_papers_settings(case, dtype, poison):
    sizes = {"full_share": 0.7, "shapes": 64, "attempts": 100, "clip": False, "snap": 1} | case
    log_mel = torch.randn(33, sizes.pop("T"), sizes.pop("F")).to(dtype)
    seed, epoch = torch.tensor([-(2**40) - 7]), torch.tensor([24])
    _, count, _ = in_c_as_the_reference("spec_mask", log_mel, seed, epoch, tickets(33), **sizes)
    assert count.all()
    in_c_as_the_reference("spec_augment", log_mel, seed, epoch, tickets(33), max_frequency=48, max_time=192)


@needs_native
@pytest.mark.parametrize(("T", "F"), [(1, 1), (1, 7), (13, 1), (101, 37)])
def test_in_c_spec_augment_has_the_references_bits(T, F, poison):
    for frequency, time in ((1, 1), (5, 400), (200, 3)):
        log_mel = torch.full((50, T, F), math.nan)
        in_c_as_the_reference(
            "spec_augment", log_mel, 2**64 - 3, 9, tickets(50), max_frequency=frequency, max_time=time
        )


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_in_c_bits_do_not_depend_on_batch_or_threads(threads):
    whole, fill = torch.zeros(66, 300, 40), torch.randn(66)
    sizes = {"budget": 6000, "max_width": 30, "max_height": 40, "full_share": 0.5}
    dispatch.use_fused(True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        drawn = kernels.apply_spec_mask(whole, fill, 9, 4, tickets(66), **sizes)
    finally:
        torch.set_num_threads(before)
    assert dispatch.in_use() == {"apply_spec_mask": "native"}
    for b in range(66):
        alone = torch.zeros(1, 300, 40)
        one = kernels.apply_spec_mask(alone, fill[b : b + 1], 9, 4, tickets(66)[b : b + 1], **sizes)
        assert torch.equal(alone[0], whole[b])
        assert all(torch.equal(o[0], d[b]) for o, d in zip(one, drawn, strict=True))


@needs_native
def test_in_c_views_operators_and_gradients():
    """Views are changed where they lie; a buffer whose clips share memory, or that wants gradients, is refused."""
    whole, some = torch.randn(3, 16, 40), tickets(6)[::2]
    sizes = {"max_frequency": 9, "max_time": 20}
    wanted, given = whole.clone(), whole.clone()
    drawn = reference.apply_spec_augment(wanted.mT, torch.arange(3.0), 7, 2, some, **sizes)
    found = native.apply_spec_augment(given.mT, torch.arange(6.0)[:3], 7, 2, some, **sizes)
    assert torch.equal(given, wanted)
    assert all(map(torch.equal, drawn, found))
    keys, numbers = (torch.tensor([7]), torch.tensor([2]), some.clone()), [100, 9, 16, 2**31, 5, 9, 0, 1]
    torch.library.opcheck(native.draw, ("spec_mask", *keys, 40, 16, numbers))
    torch.library.opcheck(native.apply, (torch.randn(3, 40, 16), torch.ones(3), "spec_mask", *keys, numbers))
    with pytest.raises(RuntimeError, match="single memory location"):
        native.apply_spec_augment(whole[:1].expand(3, -1, -1), torch.ones(3), 7, 2, some, **sizes)
    bytes_ = torch.zeros(3, 40, 16).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"apply_spec_augment=native paints float32, .* log_mel is float8_e4m3fn"):
        native.apply_spec_augment(bytes_, torch.ones(3), 7, 2, some, **sizes)
    with pytest.raises(ValueError, match="apply_spec_augment=native has no gradients, and log_mel wants one"):
        native.apply_spec_augment(whole.requires_grad_(), torch.ones(3), 7, 2, some, **sizes)


def test_in_c_refuses_with_a_reason(monkeypatch):
    monkeypatch.setattr(type(native.LIBRARY), "refuses", lambda library: "it is not built: ...")
    dispatch.use_fused(True)
    for operation in ("spec_mask", "spec_augment", "apply_spec_mask", "apply_spec_augment"):
        refuses = next(b for b in dispatch.TABLE[operation] if b.name == "native").refuses
        assert refuses("cuda", "float32") == "it is C for the CPU; the tensors are on cuda"
        assert refuses("cpu", "float32") == "it is not built: ..."
        assert dispatch.select(operation, "cpu", "float32").name == "reference"
