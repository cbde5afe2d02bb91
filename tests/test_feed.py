"""From clips to the model's input: order, mixing, masks and noise are what is written, and each sample's own."""

import signal
import threading
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

import kernels
from fftp import ahead
from fftp.ahead import one_ahead
from fftp.augment import Augment
from fftp.errors import UserError
from fftp.frontend import FrontEnd, FrontEndSettings
from kernels import FbankSettings, draws
from kernels.waveform import reference
from tests import runs
from tests.literal import below, words
from tests.made_data import RATE, make_files
from tests.made_data import packed as packed_files
from train import samples
from train.data.pack import Pack
from train.feed import Feed, Order, class_weights
from train.samples import Resident, Streamed
from train.settings import Settings

SEED, EPOCH, C = 3, 2, 4
T, F, W = 40, 64, 6_400  # W: samples of a training clip, 38 whole frames
FRONT_END = FrontEndSettings(T=T, clip_samples=W, mean=-5.0, std=3.0, fbank=FbankSettings(n_mels=F))
NOTHING = Settings(augment="none", mask_area=300, mask_width=9, mask_height=F)
ALL = {"augment": "specmask", "mixup": 0.5, "roll": True, "noise": True, "gain_db": 6.0}
ALL |= {"shift_ms": 60.0, "speed": 0.1, "background": 0.7}


def pack_of(count: int) -> Pack:
    """Clips of noise, of one window's length to longer than a training clip, with one label each; the first has two."""
    rng = np.random.default_rng(0)
    length = rng.integers(400, W + 2000, count)
    length[:3] = (400, W, W + 1999)
    samples = rng.integers(-(2**14), 2**14, length.sum(), dtype=np.int16)
    labels = np.eye(C, dtype=np.float32)[rng.integers(0, C, count)]
    labels[0] = (1, 1, 0, 0)
    return Pack(
        samples=samples,
        start=np.cumsum(length) - length,
        length=length,
        labels=labels,
        splits=(np.arange(count) % 4 == 3).astype(np.int8),  # every fourth is of the validation split
        names=tuple(map(str, range(count))),
        classes=("a", "b", "c", "d"),
        skipped=[],
        sample_rate=16_000,
    )


def feed_of(count=44, split="train", source=Resident) -> Feed:
    packed = pack_of(count)
    return Feed(source(packed, torch.device("cpu")), packed.indices(split), FrontEnd(FRONT_END))


def augment_of(**changed) -> Augment:
    return Augment(replace(NOTHING, **changed), SEED, T, F)


def samples_of(feed, position) -> np.ndarray:
    """A clip of the split as float32, cut to a training clip."""
    i, pack = feed.indices[position], feed.pack
    return pack.samples[pack.start[i] : pack.start[i] + min(pack.length[i], W)].astype(np.float32) / 32768


def log_mel_of(samples, roll=None):
    """One clip alone through the front end, un-normalised: `[T, F]`."""
    length = torch.tensor([len(samples)])
    return FrontEnd(FRONT_END).log_mel(torch.from_numpy(samples)[None].clone(), length, roll)[0]


def normalised(log_mel):
    return (log_mel - FRONT_END.mean) / (2 * FRONT_END.std)


@pytest.mark.parametrize("n", [1, 7, 64, 97])
def test_order_is_a_keyed_permutation_in_full_batches(n):
    feed = feed_of(4 * n // 3 + 3)
    order = Order(feed, 10, SEED, balanced=False)
    batches = order.epoch(EPOCH)
    assert order.batch_size == min(10, len(feed))
    assert len(batches) == order.steps == len(feed) // order.batch_size
    assert all(len(positions) == order.batch_size for positions, _ in batches)
    positions = np.concatenate([p for p, _ in batches])
    tickets = np.concatenate([t for _, t in batches])
    assert len(set(positions)) == len(positions)  # nothing twice
    assert (tickets == np.arange(len(tickets))).all()
    whole = draws.shuffle(SEED, EPOCH, len(feed))
    assert sorted(whole) == list(range(len(feed)))
    assert (positions == whole[: len(positions)]).all()
    again = Order(feed, 10, SEED, balanced=False).epoch(EPOCH)
    assert all((a[0] == b[0]).all() for a, b in zip(batches, again, strict=True))


def test_orders_of_other_epochs_seeds_and_batch_sizes():
    feed = feed_of(80)

    def first(seed, epoch, size=10):
        return np.concatenate([p for p, _ in Order(feed, size, seed, balanced=False).epoch(epoch)])

    assert (first(SEED, 0) != first(SEED, 1)).any()
    assert (first(SEED, 0) != first(SEED + 1, 0)).any()
    assert (first(SEED, 0, 10) == first(SEED, 0, 6)).all()  # 60 clips: the order knows no batches


def test_balanced_draws_every_class_equally_often():
    feed = feed_of(400)
    labels = feed.pack.labels[feed.indices]
    labels[labels[:, 0] > 0] = (1, 0, 0, 0)
    rare = np.flatnonzero(labels[:, 0])[5:]
    labels[rare] = (0, 1, 0, 0)  # class a keeps five clips of three hundred
    feed.pack.labels[feed.indices] = labels
    order = Order(feed, 20, SEED, balanced=True)
    drawn = np.concatenate([p for epoch in range(20) for p, _ in order.epoch(epoch)])
    share = labels[drawn].sum(0) / len(drawn)
    # 6,000 draws: the standard deviation of a share of 1/4 is 0.0056; four of them.
    np.testing.assert_allclose(share, 0.25, atol=0.0224)


def test_class_weights_are_asts():
    labels = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], dtype=np.float32)
    weights = class_weights(labels)
    # The sum over a clip's labels of 1 / (clips of that class): thirds for the first class, halves for the second.
    expected = np.array([1 / 3, 1 / 3, 1 / 3 + 1 / 2, 1 / 2, 0])
    np.testing.assert_allclose(weights / weights.sum(), expected / expected.sum(), atol=1e-8)
    assert weights.dtype == np.int64
    assert weights.min() >= 1  # also the clip without a label
    assert weights.sum() < 2**31


def test_plain_batches_are_the_front_end_of_each_clip():
    feed = feed_of(split="validation")
    positions = np.arange(len(feed))[::-1].copy()
    batch = feed.plain(positions)
    assert (batch.indices == feed.indices[positions]).all()
    assert (batch.targets.numpy() == feed.pack.labels[batch.indices]).all()
    assert batch.targets.dtype == torch.float32
    for row, position in zip(batch.log_mel, positions, strict=True):
        assert torch.equal(row, normalised(log_mel_of(samples_of(feed, position))))


def test_longer_clips_are_cut_and_shorter_ones_padded():
    feed = feed_of(4)
    log_mel, length = feed.raw(np.arange(3))  # one window; a training clip; longer than one
    assert length.tolist() == [400, W, W]
    assert (log_mel[0, 1:] == 0).all()  # AST pads with zeros before normalising
    assert (log_mel[0, 0] != 0).all()
    assert (log_mel[1:, 38:] == 0).all()
    assert (log_mel[1:, :38] != 0).any(2).all()


def test_mixup_by_hand():
    feed, tickets = feed_of(), np.arange(33)
    positions = np.roll(np.arange(33), 7)
    batch = feed.augmented(positions, tickets, EPOCH, augment_of(mixup=0.6))
    seen = {"mixed": 0, "cut": 0, "padded": 0}
    for row, target, position, ticket in zip(batch.log_mel, batch.targets, positions, tickets, strict=True):
        a, b, _, _ = words(SEED, 4 << 16, 0, EPOCH, int(ticket))  # 4: decision and partner, 5: lambda
        own, labels = samples_of(feed, position), feed.pack.labels[feed.indices[position]]
        own = own - own.mean(dtype=np.float64)
        if a < round(0.6 * 2**32):
            partner = below(b, len(feed))
            drawn = [w for k in range(5) for w in words(SEED, (5 << 16) + k, 0, EPOCH, int(ticket))][:19]
            share = sorted(drawn)[9] / 2**32
            other = samples_of(feed, partner)
            other = other - other.mean(dtype=np.float64)
            seen["mixed"] += 1
            seen["cut" if len(other) > len(own) else "padded"] += 1
            fitted = np.zeros_like(own)
            fitted[: len(other)] = other[: len(own)]
            own = share * own + (1 - share) * fitted
            labels = share * labels + (1 - share) * feed.pack.labels[feed.indices[partner]]
        # Labels: float32 sums, seen 6e-8, times two.
        np.testing.assert_allclose(target.numpy(), labels, atol=1.2e-7)
        expected = normalised(log_mel_of(own.astype(np.float32)))
        # Mixed in float32 there and float64 here, then through the log: seen 1.2e-5, times four.
        np.testing.assert_allclose(row.numpy(), expected.numpy(), atol=5e-5)
    assert min(seen.values()) > 3, seen  # all three cases came up


def test_mixup_meets_no_samples_that_are_not_finite(tmp_path):
    """A file with NaN is named; without it every mixture is finite, and the bits are those of a set that never had it."""
    soundfile = pytest.importorskip("soundfile", reason="sound files need soundfile.")
    good = make_files(tmp_path, 6)
    bad = np.zeros(5000, np.float32)
    bad[77] = np.nan
    soundfile.write(tmp_path / "bad.wav", bad, RATE, subtype="FLOAT")
    with pytest.raises(UserError, match=r"bad\.wav holds NaN or infinite samples"):
        packed_files([*good[:3], tmp_path / "bad.wav", *good[3:]])
    batches = []
    without = packed_files([*good[:3], tmp_path / "bad.wav", *good[3:]], skip_bad_files=True)
    for made in (without, packed_files(good)):
        feed = Feed(Resident(made, torch.device("cpu")), np.arange(6), FrontEnd(FRONT_END))
        batches.append(feed.augmented(np.arange(6), np.arange(6), EPOCH, augment_of(**ALL | {"mixup": 1.0})).log_mel)
    assert batches[0].isfinite().all()
    assert torch.equal(*batches)


def test_half_and_half_mixup():
    batch = feed_of().augmented(np.arange(8), np.arange(8), EPOCH, augment_of(mixup=1.0, mixup_lambda="half"))
    assert set(batch.targets.unique().tolist()) <= {0.0, 0.5, 1.0}
    assert (batch.targets == 0.5).any()


def test_gain_roll_and_noise_are_the_tickets():
    feed, tickets = feed_of(), np.arange(100, 133)
    positions = np.arange(33)
    plain, ticket = feed.plain(positions).log_mel, torch.from_numpy(tickets)
    rolled = feed.augmented(positions, tickets, EPOCH, augment_of(roll=True)).log_mel
    for row, out, by in zip(plain, rolled, draws.draw_roll(SEED, EPOCH, ticket).tolist(), strict=True):
        assert torch.equal(out, row.roll(by, 0))
    noisy = feed.augmented(positions, tickets, EPOCH, augment_of(noise=True)).log_mel
    assert torch.equal(noisy, plain + draws.draw_noise(SEED, EPOCH, ticket, T, F))
    assert float((noisy - plain).min()) >= 0
    assert float((noisy - plain).max()) <= 0.1001  # U[0, 1) times U[0, 0.1), and float32's rounding of the sum
    loud = feed.augmented(positions, tickets, EPOCH, augment_of(gain_db=6.0)).log_mel
    gains = draws.draw_gain(SEED, EPOCH, ticket, 6.0).tolist()
    for position, out, gain in zip(positions, loud, gains, strict=True):
        own = samples_of(feed, position) * np.float32(gain)
        assert torch.equal(out, normalised(log_mel_of(own)))


def test_waveforms_are_perturbed_after_mixup_and_before_the_front_end():
    feed, tickets, ticket = feed_of(), np.arange(33), torch.arange(33)
    changed = {"shift_ms": 60.0, "speed": 0.1, "background": 0.7}
    made = augment_of(mixup=0.5, **changed)
    batch = feed.augmented(np.arange(33), tickets, EPOCH, made)
    clips = feed._looked_up(np.arange(33), drawn := made.mixup(EPOCH, ticket, len(feed)))
    weight = torch.where(drawn[0], drawn[2], 1.0)
    partner = (clips.start[33:], clips.length[33:], weight)
    length = clips.length[:33]
    mixed = reference.waveforms(clips.samples, clips.start[:33], length, W, None, partner)
    moved = made.perturbed(mixed, length, 16_000, EPOCH, ticket)
    expected = FrontEnd(FRONT_END).log_mel(moved, length, centred=True)
    assert torch.equal(batch.log_mel, normalised(expected))
    assert not torch.equal(moved, mixed)


@pytest.mark.parametrize("augment", ["specmask", "specaugment"])
def test_masks_are_filled_after_padding_and_before_noise(augment):
    feed, tickets = feed_of(), np.arange(33)
    made = augment_of(augment=augment, noise=True, mask_max_frequency=20, mask_max_time=20)
    batch = feed.augmented(np.arange(33), tickets, EPOCH, made)
    raw, _ = feed.raw(np.arange(33))
    ticket = torch.from_numpy(tickets)
    hidden = kernels.paint(torch.zeros(33, T, F), made.rectangles(EPOCH, ticket), torch.ones(33)) > 0
    noise = draws.draw_noise(SEED, EPOCH, ticket, T, F)
    assert hidden.any((1, 2)).all()
    assert hidden[0, 5:].any()  # padding is masked like sound
    fill = raw.mean(2).double().mean(1).float() if augment == "specmask" else torch.zeros(33)  # padding counts
    expected = normalised(torch.where(hidden, fill[:, None, None], raw)) + noise
    assert torch.equal(batch.log_mel, expected)


@pytest.mark.parametrize("augment", ["specmask", "specaugment", "none"])
def test_a_sample_is_the_same_at_any_batch_size_and_order(augment):
    feed, made = feed_of(), augment_of(**ALL | {"augment": augment})
    positions, tickets = np.random.default_rng(1).permutation(33), np.arange(33)
    whole = feed.augmented(positions, tickets, EPOCH, made)
    for size in (1, 5):
        for i in range(0, 33, size):
            part = feed.augmented(positions[i : i + size], tickets[i : i + size], EPOCH, made)
            assert torch.equal(part.log_mel, whole.log_mel[i : i + size])
            assert torch.equal(part.targets, whole.targets[i : i + size])
    other = np.random.default_rng(2).permutation(33)
    shuffled = feed.augmented(positions[other], tickets[other], EPOCH, made)
    assert torch.equal(shuffled.log_mel, whole.log_mel[other])


def test_a_clip_drawn_twice_is_augmented_twice_differently():
    feed, made = feed_of(), augment_of(**ALL)
    twice = feed.augmented(np.array([4, 4]), np.array([8, 9]), EPOCH, made).log_mel
    later = feed.augmented(np.array([4]), np.array([8]), EPOCH + 1, made).log_mel
    assert not torch.equal(twice[0], twice[1])
    assert not torch.equal(twice[0], later[0])


# Where the samples come from -------------------------------------------------------------------------------------------


def feeds_of(count, device, split="train"):
    """One feed whose samples are on the device, one whose batches are gathered on the host."""
    packed = pack_of(count)
    sources = (source(packed, torch.device(device)) for source in (Resident, Streamed))
    return [Feed(source, packed.indices(split), FrontEnd(FRONT_END)) for source in sources]


def same(one, other):
    return torch.equal(one.log_mel, other.log_mel) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("balanced", [False, True], ids=["shuffled", "balanced"])
@pytest.mark.parametrize("changed", [{}, ALL, {"mixup": 1.0}], ids=["plain", "all", "mixup alone"])
def test_resident_and_streamed_give_the_same_bits(device, balanced, changed):
    resident, streamed = feeds_of(60, device)
    made = augment_of(**changed)
    steps = Order(resident, 7, SEED, balanced).epoch(EPOCH)
    one, other = (list(feed.training(steps, EPOCH, made)) for feed in (resident, streamed))
    assert len(one) == len(other) == 6
    for a, b, (positions, tickets) in zip(one, other, steps, strict=True):
        assert same(a, b)
        assert (a.indices == b.indices).all()
        assert (a.indices == resident.indices[positions]).all()
        for feed in (resident, streamed):  # a batch on its own, as benchmarks and tests ask for it
            assert same(a, feed.augmented(positions, tickets, EPOCH, made))
    assert not same(one[0], one[1])


def test_evaluation_is_the_split_in_its_order(device):
    resident, streamed = feeds_of(60, device, "validation")
    one, other = (list(feed.evaluation(4)) for feed in (resident, streamed))
    assert [len(batch.indices) for batch in one] == [4, 4, 4, 3]
    assert all(map(same, one, other))
    assert (np.concatenate([batch.indices for batch in other]) == streamed.indices).all()
    assert torch.equal(torch.cat([batch.log_mel for batch in one]), streamed.plain(np.arange(15)).log_mel)


def test_resident_batches_need_nothing_from_the_device():
    """On the meta device there are no values: whatever asked for one would raise."""
    feed = Feed(Resident(pack_of(44), torch.device("meta")), np.arange(33), FrontEnd(FRONT_END))
    drawn = augment_of(mixup=0.5).mixup(EPOCH, torch.arange(5, device="meta"), len(feed))
    clips = feed._looked_up(np.arange(5), drawn)
    partner = (clips.start[5:], clips.length[5:], drawn[2])
    waveform = reference.waveforms(clips.samples, clips.start[:5], clips.length[:5], W, None, partner)
    assert (waveform.device.type, waveform.shape) == ("meta", (5, W))
    assert clips.labels.shape == (10, C)


def test_streamed_batches_hold_each_clip_once():
    _, streamed = feeds_of(44, "cpu")
    numbers = np.array([3, 1, 3, 0])
    clips = streamed.source.clips(numbers, W)
    pack = streamed.pack
    assert len(clips.samples) == sum(min(pack.length[i], W) for i in (0, 1, 3))
    for number, start, length in zip(numbers, clips.start.tolist(), clips.length.tolist(), strict=True):
        first = pack.start[number]
        assert length == min(pack.length[number], W)
        assert (clips.samples[start : start + length].numpy() == pack.samples[first : first + length]).all()


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("one-ahead")]


@pytest.mark.parametrize("how", ["closed", "interrupted", "to its end"])
def test_a_stream_leaves_no_thread(how):
    _, streamed = feeds_of(60, "cpu")
    steps = Order(streamed, 7, SEED, False).epoch(EPOCH)
    if how == "interrupted":

        def step():
            with closing(streamed.training(steps, EPOCH, augment_of())) as batches:
                for _ in batches:
                    assert threads()
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            step()
    else:
        batches = streamed.training(steps, EPOCH, augment_of())
        next(batches)
        assert threads()
        batches.close() if how == "closed" else list(batches)
    assert not threads()


def test_a_stream_is_one_item_ahead_and_no_more():
    made = []
    items = one_ahead(made.append(i) or i for i in range(5))
    assert (next(items), next(items)) == (0, 1)
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)  # time enough for a fourth, were it to be made
    assert made == [0, 1, 2]
    assert list(items) == [2, 3, 4]


def test_an_error_in_the_thread_is_raised_as_itself_in_its_place():
    _, streamed = feeds_of(60, "cpu")
    steps = Order(streamed, 7, SEED, False).epoch(EPOCH)
    steps[2] = (np.array([9999]), steps[2][1])
    batches = streamed.training(steps, EPOCH, augment_of())
    assert [len(next(batches).indices) for _ in range(2)] == [7, 7]
    with pytest.raises(IndexError, match="9999"):
        next(batches)
    assert not threads()


def test_ctrl_c_while_the_thread_starts(monkeypatch):
    """The pool has not taken note of its thread yet, which is at work all the same."""
    started, go_on = threading.Event(), threading.Event()

    def items():
        started.set()
        go_on.wait(10)
        yield 1

    def cut_short(pool, function):
        threading.Thread(target=function).start()
        started.wait(10)
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(ahead.ThreadPoolExecutor, "submit", cut_short)
    with pytest.raises(KeyboardInterrupt):
        next(one_ahead(items()))
    assert go_on.is_set()  # the item being made was waited for


def test_a_pack_larger_than_the_share_is_streamed(monkeypatch):
    packed = pack_of(44)
    size = packed.samples.nbytes + 44 * (8 + 8 + 4 * C)
    chosen = {}
    for name in ("Resident", "Streamed"):
        monkeypatch.setattr(samples, name, lambda pack, device, name=name: chosen.update(name=name))
    for free, share, expected in ((size, 1.0, "Resident"), (size - 1, 1.0, "Streamed"), (10**12, 0.0, "Streamed")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        samples.source_of(packed, torch.device("cuda"), share)
        assert chosen["name"] == expected
    monkeypatch.undo()
    assert isinstance(samples.source_of(packed, torch.device("cpu"), 0.0), Resident)


def test_what_the_first_lines_say(tmp_path, capsys):
    ended = runs.run(capsys, *runs.TINY, "--out", tmp_path / "run")
    assert f"samples: in memory, {2 * 100 * 16000 / 1e6:.1f} MB" in ended.out.splitlines()  # clips of 16,000 samples
    mapped = pack_of(4)
    np.save(tmp_path / "samples.npy", mapped.samples)
    mapped = replace(mapped, samples=np.load(tmp_path / "samples.npy", mmap_mode="r"))
    assert str(Resident(mapped, torch.device("cpu"))) == f"memory-mapped, {mapped.samples.nbytes / 1e6:.1f} MB"


STREAMED = """
import sys
from train import run, samples
run.source_of = lambda pack, device, share: samples.Streamed(pack, device)
sys.exit(run.main(sys.argv[1:]))
"""


def test_ctrl_c_ends_a_streamed_run(tmp_path):
    process = runs.start(*runs.TINY, "--epochs", 9999, "--out", tmp_path / "run", code=STREAMED)
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGINT)
    ended = runs.end(process)
    assert ended.code == 130, ended.err
    assert "go on with" in ended.err


def test_a_streamed_run_ends_with_the_same_weights(tmp_path, capsys, monkeypatch):
    flags = ("--epochs", 1, "--mixup", 0.5)
    runs.train(capsys, tmp_path / "a", *flags)
    monkeypatch.setattr("train.run.source_of", lambda pack, device, share: Streamed(pack, device))
    runs.train(capsys, tmp_path / "b", *flags)
    one, other = (tmp_path / name / "last" / "model.safetensors" for name in "ab")
    assert one.read_bytes() == other.read_bytes()
