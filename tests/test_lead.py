"""--lead: other clips in front of a training clip are what is written, change nothing of the clip, and are heard before it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fftp import AuM, lead
from fftp.augment import Augment
from fftp.patching import PatchGrid
from kernels import draws
from tests import live, runs
from tests.literal import below, words
from tests.recorded import Recorded
from tests.tasks import task_of
from tests.test_feed import ALL, EPOCH, NOTHING, SEED, F, T, feed_of, feeds_of, same
from tests.test_graph import assert_same, trained
from train import loop, run, settings

LEAD = 14  # the purpose: a number is part of what a seed means
GRID = PatchGrid(T=T, F=F, pt=8, pf=F, st=3, sf=F)
TOGETHER = {"lead": 0.7, "lead_clips": 2}
CARRIED = {"model": "aum", **live.CARRIED}
RECIPE = [f"--{name}={value}" for name, value in CARRIED.items()]


def augment_of(**changed) -> Augment:
    return Augment(replace(NOTHING, **TOGETHER | changed), SEED, T, F, GRID)


def plain_of(**changed) -> Augment:
    return augment_of(lead=0.0, **changed)


@pytest.mark.parametrize("n", [1, 2, 33])
def test_draws_are_the_written_ones(n, device):
    seed, epoch, tickets = 2**40 + 5, 3, torch.arange(200, device=device)
    own = tickets % n
    patches = draws.draw_lead(seed, epoch, tickets, 0.7, 11).tolist()
    before = draws.lead_clips(seed, epoch, tickets, own, 3, n)
    for ticket in range(200):
        a, b, _, _ = words(seed, LEAD << 16, 0, epoch, ticket)
        assert patches[ticket] == (1 + below(b, 11) if a < round(0.7 * 2**32) else 0)
        for j in range(3):
            others = [(ticket % n + 1 + k) % n for k in range(n)][
                : max(1, n - 1)
            ]  # all but itself, from the next one on
            word = words(seed, LEAD << 16, 1 + j, epoch, ticket)[0]
            assert before[j, ticket] == others[below(word, n - 1)]
    assert n == 1 or not (before == own).any()
    assert set(patches) == set(range(12))
    numbers = np.arange(200)
    assert (draws.lead_clips_numpy(seed, epoch, numbers, numbers % n, 3, n) == before.cpu().numpy()).all()


@pytest.mark.parametrize("grid", [GRID, replace(GRID, pt=4, st=7), replace(GRID, T=8)], ids=["", "gaps", "one patch"])
@pytest.mark.parametrize("clips", [1, 3])
def test_a_row_frame_by_frame(grid, clips, device):
    most = lead.longest(grid, clips)
    patches = torch.arange(most + 1, device=device)
    B = len(patches)
    log_mel = torch.randn((1 + clips) * B, grid.T, F, device=device)
    rows = lead.in_a_row(log_mel, patches, grid)
    assert grid.N + most == lead.grid_of(grid, clips).N
    for b in range(B):
        joined = torch.cat([log_mel[j * B + b] for j in range(clips, -1, -1)])
        start = clips * grid.T - grid.st * b
        expected = joined[start:]
        assert torch.equal(rows[b, : len(expected)], expected)
        assert (rows[b, len(expected) :] == expected[-1]).all()
        first = grid.st * b  # the clip's own patches lie as they do in the clip alone
        assert torch.equal(rows[b, first : first + grid.T], log_mel[b])
    assert lead.longest(grid, clips) * grid.st > clips * grid.T - grid.st  # no room for a patch more


def test_a_clip_is_heard_after_what_stands_in_front_and_nothing_later():
    """Features and every gradient in float64, beside a model over the clip's own number of patches, alone."""
    config = live.aum(grid=live.grid(T=38))
    torch.manual_seed(0)
    model = AuM(config).double()
    log_mel = torch.randn(4, 38 + 20, live.F, dtype=torch.float64)
    ends = torch.tensor([8, 13, 1, 10])
    found = model(log_mel, None, ends)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for b, k in enumerate(ends.tolist()):
        frames = (k - 1) * 4 + 10
        short = AuM(replace(config, grid=replace(config.grid, T=frames))).double()
        short.load_state_dict(model.state_dict())
        alone = short(log_mel[b : b + 1, :frames])
        # The same sums of the same numbers: seen 1e-16 of numbers up to 0.2.
        torch.testing.assert_close(found[b : b + 1], alone, rtol=0, atol=1e-12)
        (alone * weight[b]).sum().backward()
        for name, p in short.named_parameters():
            gradients[name] -= p.grad
    assert all(float(g.abs().max()) < 1e-12 for g in gradients.values())
    assert torch.equal(model(log_mel[:, :38]), model(log_mel[:, :38], None, torch.full((4,), 8)))


@pytest.mark.parametrize("changed", [{"directions": "v1"}, {"place": "middle"}, {"positions": "learned"}], ids=str)
def test_a_model_that_hears_what_comes_later_is_refused(changed):
    with pytest.raises(ValueError, match="clips end where they like with"):
        AuM(live.aum(**changed))(torch.zeros(1, 98, live.F), None, torch.tensor([3]))


def test_a_row_is_the_clip_as_it_was_behind_clips_augmented_by_tickets_of_their_own():
    feed, tickets = feed_of(), np.arange(33)
    positions = np.random.default_rng(1).permutation(33)
    made, plain = augment_of(**ALL), plain_of(**ALL)
    led = feed.augmented(positions, tickets, EPOCH, made)
    alone = feed.augmented(positions, tickets, EPOCH, plain)
    assert alone.ends is None
    assert torch.equal(led.targets, alone.targets)
    assert (led.indices == alone.indices).all()
    before = [
        feed.augmented(p, tickets + (1 + j) * lead.TICKETS, EPOCH, plain).log_mel
        for j, p in enumerate(draws.lead_clips_numpy(SEED, EPOCH, tickets, positions, 2, 33))
    ]
    patches = draws.draw_lead(SEED, EPOCH, torch.from_numpy(tickets), 0.7, lead.longest(GRID, 2))
    assert torch.equal(led.ends, GRID.N + patches)
    assert torch.equal(led.log_mel, lead.in_a_row(torch.cat([alone.log_mel, *before]), patches, GRID))
    nothing = patches == 0
    assert 0 < nothing.sum() < 33
    assert torch.equal(led.log_mel[nothing, :T], alone.log_mel[nothing])


def test_a_row_is_the_same_at_any_batch_size_and_where_samples_come_from(device):
    resident, streamed = feeds_of(50, device)
    made, tickets, positions = augment_of(**ALL), np.arange(37), np.random.default_rng(1).permutation(37)
    whole = resident.augmented(positions, tickets, EPOCH, made)
    assert same(whole, streamed.augmented(positions, tickets, EPOCH, made))
    steps = [(positions[i : i + 1], tickets[i : i + 1]) for i in range(37)]
    for feed in (resident, streamed):
        for i, one in enumerate(feed.training(steps, EPOCH, made)):
            assert torch.equal(one.log_mel[0], whole.log_mel[i])
            assert torch.equal(one.targets[0], whole.targets[i])
            assert one.ends[0] == whole.ends[i]
    here = [torch.from_numpy(numbers).to(device) for numbers in (positions, tickets)]
    assert same(whole, resident.augmented(*here, torch.tensor([EPOCH], device=device), made))
    other = resident.augmented(positions, tickets, EPOCH + 1, made)
    assert not torch.equal(other.ends, whole.ends)


def test_without_it_nothing_is_drawn(monkeypatch):
    for name in ("draw_lead", "lead_clips", "lead_clips_numpy"):
        monkeypatch.delattr(draws, name)
    feed, whole = feed_of(), np.arange(33)
    assert feed.augmented(whole, whole, EPOCH, plain_of(**ALL)).log_mel.shape == (33, T, F)


def test_nothing_of_it_looks_at_a_number_on_the_host():
    """Draws and rows as they are captured: played back for other tickets, with the numbers of plain calls."""
    made = augment_of()
    positions, tickets, epoch = (
        torch.zeros(9, dtype=torch.int64),
        torch.zeros(9, dtype=torch.int64),
        torch.zeros(1).long(),
    )
    log_mel, rows, every = torch.randn(27, T, F), torch.zeros(9, lead.grid_of(GRID, 2).T, F), torch.zeros(2, 27).long()

    def body():
        every.copy_(torch.stack(made.with_leads(positions, tickets, epoch, 33)))
        rows.copy_(lead.in_a_row(log_mel, made.lead_patches(epoch, tickets), GRID))

    recorded = Recorded(body)
    for number in range(4):
        positions.copy_(torch.arange(9) + number)
        tickets.copy_(torch.arange(9) + 9 * number)
        epoch.fill_(number)
        recorded()
        found = rows.clone(), every.clone()
        body()
        assert torch.equal(found[0], rows)
        assert torch.equal(found[1], every)


@pytest.mark.parametrize(("streamed", "accumulate"), [(False, 1), (True, 3)], ids=["resident", "streamed, in 3 parts"])
def test_a_captured_step_is_the_plain_one(streamed, accumulate):
    given = {**CARRIED, **TOGETHER, "augment": "specmask", "mixup": 0.5, "roll": True, "noise": True}
    given |= {"streamed": streamed, "accumulate": accumulate}
    plain = trained(task_of(**given), steps=2)
    assert_same(trained(task_of(**given), lambda body: body, steps=2), plain)
    without = trained(task_of(**given | {"lead": 0.0}), steps=1)
    assert without[0][0] != plain[0][0]


def test_a_run_taken_up_again_ends_with_the_same_weights(tmp_path, capsys, monkeypatch):
    flags = ("--fused", *RECIPE, "--lead", 0.7, "--lead-clips", 2, "--frames", 38)
    runs.train(capsys, tmp_path / "a", *flags)
    step = loop.Trainer._step

    def stopped(trainer, number, *rest):
        if number == 4:
            raise KeyboardInterrupt
        return step(trainer, number, *rest)

    monkeypatch.setattr(loop.Trainer, "_step", stopped)
    assert runs.run(capsys, *runs.TINY, *flags, "--out", tmp_path / "b").code == 130
    monkeypatch.undo()
    ended = runs.run(capsys, "--resume", "--out", tmp_path / "b")
    assert "going on after epoch 1" in ended.out
    assert "8 patches (10 frames x 128 bins, stride 4 x 128)" in ended.out
    assert "up to 19 more before 70 % in training" in ended.out
    one, other = (tmp_path / name / "last" / "model.safetensors" for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_work_is_that_of_the_rows():
    task = task_of(**CARRIED, lead=1.0, lead_clips=2)
    longer = task_of(**CARRIED, frames=32 + 64)
    assert loop.step.trained(task).macs() == longer.config.model.macs()
    assert loop.step.trained(longer) is longer.config.model


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--lead", 0.5],
            "--lead is for a model that carries its state on, and this one does not, since attention compares all",
        ),
        ([*RECIPE, "--directions", "v1", "--lead", 0.5], "since it scans backward too"),
        ([*RECIPE, "--fit", "resize", "--lead", 0.5], "since it was trained on stretched clips: leave it out, or take"),
        ([*RECIPE, "--lead", 0.5, "--keep-tokens", 5], "--lead and --keep-tokens do not go together"),
        ([*RECIPE, "--lead", 1.5], "--lead has to be from 0 to 1, not 1.5"),
        ([*RECIPE, "--lead", 0.5, "--lead-clips", 9], "--lead-clips has to be from 1 to 8, not 9"),
        ([*RECIPE, "--lead", 0.5, "--frames", 20, "--time-stride", 25], "in front hold no patch at a stride of 25"),
    ],
    ids=["AST", "backward", "resize", "kept", "share", "clips", "stride"],
)
def test_what_cannot_have_clips_in_front_is_refused(flags, said, tmp_path, capsys):
    assert said in runs.run(capsys, *runs.TINY, *flags, "--out", tmp_path / "run").sentence
    assert not (tmp_path / "run").exists()


def test_the_streaming_recipe_trains_with_clips_in_front():
    chosen = settings.from_flags(["--recipe", "speechcommands/aum_streaming"])[0]
    assert chosen.lead > 0
    run.check_lead(chosen)
