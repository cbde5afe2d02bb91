"""Live sound: the same bits however it is cut, the answers of the offline pass, and nothing that grows."""

import dataclasses
import sys

import numpy as np
import pytest
import soxr
import torch

import fftp
import kernels
from bench import memory
from fftp import AuM, FrontEnd, UserError, checkpoint
from fftp.streaming import Carried, Sliding, why_window
from kernels import dispatch
from tests import live

RATE = 16_000
PIECES = (1, 7, 160, 1600, 16_000)


def answers(classifier, samples, size=1600, hop=0.1, rate=None):
    """All answers about the samples in pieces of so many."""
    stream = fftp.stream(classifier, hop, rate)
    found = [answer for i in range(0, len(samples), size) for answer in stream.push(samples[i : i + size])]
    return found + stream.finish()


def same(ours, theirs):
    """Whether two lists of answers are the same bits at the same times."""
    return len(ours) == len(theirs) and all(
        (a.start, a.time) == (b.start, b.time) and np.array_equal(a.probabilities, b.probabilities)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "fused"), [*((name, True) for name in live.MODELS), ("carried", False), ("ast", False)]
)
def test_pieces_of_any_size_give_the_same_bits(name, fused):
    dispatch.use_fused(fused)
    classifier, samples = live.classifier(live.MODELS[name]), live.sound(1.17)
    whole = answers(classifier, samples, len(samples))
    assert [a.time for a in whole[-2:]] == [1.1, 1.17]  # the hop's, and what was left at the end
    for size in PIECES:
        assert same(answers(classifier, samples, size), whole), size
    rng = np.random.default_rng(0)
    stream, found = fftp.stream(classifier), []
    for piece in np.split(samples, np.sort(rng.integers(0, len(samples), 30))):  # some of them empty
        found += stream.push(piece)
    assert same(found + stream.finish(), whole)


@pytest.mark.parametrize("rate", [8000, 44_100])
def test_another_rate_is_resampled_as_a_file_is(rate):
    """The same bits in any pieces, and as the stream of a file that was resampled whole; 0.15 s later at the most."""
    classifier, samples = live.classifier(live.MODELS["carried"]), live.sound(0.77, rate)
    whole = answers(classifier, samples, len(samples), rate=rate)
    for size in PIECES:
        assert same(answers(classifier, samples, size, rate=rate), whole), size
    file = soxr.resample((samples / 32768).astype(np.float32), rate, RATE, quality="HQ")
    assert same(answers(classifier, file), whole)
    stream = fftp.stream(classifier, rate=rate)
    assert stream.push(samples[: round(0.45 * rate)])[-1].time >= 0.3


def test_types_of_samples():
    classifier, samples = live.classifier(live.MODELS["ast"]), live.sound(0.5)
    wanted = answers(classifier, samples)
    floats = samples.astype(np.float32) / 32768
    for other in (floats, torch.from_numpy(samples), torch.from_numpy(floats), np.repeat(floats, 2)[::2]):
        assert same(answers(classifier, other), wanted)


@pytest.mark.parametrize("fit", ["pad", "resize"])
@pytest.mark.parametrize("name", ["two ways", "ast", "square", "carried"])
def test_a_sliding_window_is_what_predict_says_of_those_samples(name, fit):
    classifier, samples = live.classifier(live.MODELS[name], fit=fit), live.sound(1.6)
    stream = fftp.stream(classifier, carry=False)
    assert name != "carried" or fit == "resize" or stream.why_window == "it was asked not to"
    found = stream.push(samples)
    assert [a.time for a in found] == pytest.approx([0.1 * k for k in range(1, 17)])
    for answer in found:
        start, end = round(answer.start * RATE), round(answer.time * RATE)
        assert start == max(0, end - stream.classifier.config.front_end.clip_samples)
        offline = classifier.predict(samples[start:end], RATE).probabilities
        # The clip's mean is rounded off each sample there, and not here. Seen: 3e-7.
        np.testing.assert_allclose(answer.probabilities, offline, rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", ["carried", "carried, stride above patch"])
def test_a_carried_state_is_the_offline_pass_in_float64(name):
    """20 s of frames by tens, with reads in between, against one pass over all of them."""
    classifier = live.classifier(live.MODELS[name])
    model = classifier.model.double()
    carried, log_mel = Carried(classifier), 3 * torch.randn(1, 2007, live.F, dtype=torch.float64)
    for i in range(0, 2007, 10):
        carried.hear(log_mel[:, i : i + 10].clone())
    grid = dataclasses.replace(model.config.grid, T=2007)
    whole = AuM(dataclasses.replace(model.config, grid=grid)).double()
    whole.load_state_dict(model.state_dict())
    with torch.no_grad():
        wanted = whole.features(classifier.front_end.normalise(log_mel))
        assert carried.state.patches == grid.N
        # Seen: 2e-15.
        torch.testing.assert_close(model.class_features(carried.state), wanted, rtol=0, atol=1e-12)


def offline(classifier, samples, dtype=torch.float32):
    """The probabilities of one pass over a recording of any length, by the offline front end."""
    waveform = torch.from_numpy(samples).to(dtype)[None] / 32768
    settings = classifier.config.front_end
    T = settings.fbank.frames(len(samples))
    config = classifier.config.model
    model = AuM(dataclasses.replace(config, grid=dataclasses.replace(config.grid, T=T)))
    model.load_state_dict(classifier.model.state_dict())
    with torch.no_grad():
        logits = model.to(dtype)(FrontEnd(dataclasses.replace(settings, T=T))(waveform))
    return logits.softmax(-1)[0].double().numpy()


@pytest.mark.parametrize("fused", [False, True], ids=["references", "fused"])
def test_a_carried_stream_is_the_offline_pass_in_float32(fused):
    """At most twice as far from float64 as the offline pass in float32, over the answers together."""
    dispatch.use_fused(fused)
    classifier, samples = live.classifier(live.MODELS["carried"]), live.sound(6.03)
    ours, theirs = 0.0, 0.0
    for answer in answers(classifier, samples)[9::16]:
        heard = samples[: round(answer.time * RATE)]
        exact = offline(classifier, heard, torch.float64)
        ours = max(ours, float(np.abs(answer.probabilities - exact).max()))
        theirs = max(theirs, float(np.abs(offline(classifier, heard) - exact).max()))
    assert 0 < ours <= 2 * theirs + np.finfo(np.float32).eps


def test_a_carried_stream_in_bfloat16():
    classifier, samples = live.classifier(live.MODELS["carried"], "bfloat16"), live.sound(1.0)
    last = answers(classifier, samples)[-1]
    x = classifier.front_end(torch.from_numpy(samples).float()[None] / 32768)
    wanted = classifier.config.probabilities(classifier.prepared(x))[0].numpy()
    # A bfloat16 product of few rows may round another way: 2^-8 of 1, a layer.
    np.testing.assert_allclose(last.probabilities, wanted, rtol=0, atol=2 * 2**-8)
    exact = answers(live.classifier(live.MODELS["carried"]), samples)[-1].probabilities
    assert not np.array_equal(last.probabilities, exact)  # or it ran in float32


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])
def test_frames_are_those_of_the_whole_recording(fused, monkeypatch):
    """Bit for bit those of one call over all samples; without the mean taken off before, to float32's rounding."""
    dispatch.use_fused(fused)
    classifier, samples = live.classifier(live.MODELS["ast"]), live.sound(2.0) + np.int16(3000)
    heard = []
    monkeypatch.setattr(Sliding, "hear", lambda self, log_mel: heard.append(log_mel))
    monkeypatch.setattr(Sliding, "probabilities", lambda self: None)
    answers(classifier, samples, hop=0.07)
    waveform = torch.from_numpy(samples).float()[None] / 32768
    frames = torch.cat(heard, 1)
    assert torch.equal(frames, kernels.fbank(waveform))
    front_end = FrontEnd(dataclasses.replace(classifier.config.front_end, T=frames.shape[1]))
    exact = front_end.log_mel(waveform.double(), torch.tensor([len(samples)]))
    error, theirs = (
        float((found - exact).abs().max())
        for found in (frames, front_end.log_mel(waveform, torch.tensor([len(samples)])))
    )
    assert error <= 2 * theirs + 1e-4  # the front end's own rule


def test_after_a_gap_it_is_a_new_stream_with_later_times():
    for name in ("carried", "ast"):
        classifier, samples = live.classifier(live.MODELS[name]), live.sound(2.0)
        stream = fftp.stream(classifier)
        before = stream.push(samples[:9000]) + stream.gap(4000)
        after = stream.push(samples[9000:]) + stream.finish()
        assert same(before, answers(classifier, samples[:9000]))
        anew = answers(classifier, samples[9000:])
        assert [(a.start, a.time) for a in after] == pytest.approx(
            [(a.start + 13_000 / RATE, a.time + 13_000 / RATE) for a in anew]
        )
        assert all(np.array_equal(a.probabilities, b.probabilities) for a, b in zip(after, anew, strict=True))


def test_the_end():
    classifier, samples = live.classifier(live.MODELS["carried"]), live.sound(0.5)
    stream = fftp.stream(classifier)
    assert stream.shortest == 0.115  # ten frames
    assert stream.push(samples[:1839]) == []
    assert stream.push(samples[1839:1840]) == []
    (only,) = stream.finish()
    assert (only.start, only.time, only.labels) == (0, 0.115, live.LABELS)
    assert only.top(1) == [(live.LABELS[int(only.probabilities.argmax())], float(only.probabilities.max()))]
    assert stream.finish() == []
    with pytest.raises(UserError, match="This stream is finished: open another one"):
        stream.push(samples)
    for closed, lost in ((stream, 3), (fftp.stream(classifier), -1)):
        with pytest.raises(
            UserError, match=f"A gap is of 0 samples or more, in a stream that is not finished, not {lost}"
        ):
            closed.gap(lost)
    assert answers(classifier, samples[:1839]) == []
    assert answers(classifier, samples[:0]) == []
    # Less than a frame after the last hop is nothing new.
    assert [a.time for a in answers(classifier, samples[: 3200 + 79])] == [0.2]
    assert [a.time for a in answers(classifier, samples[: 3200 + 80])] == [0.2, 0.205]


def test_samples_in_float64_are_those_in_float32():
    """What soundfile reads if not asked."""
    classifier, samples = live.classifier(live.MODELS["carried"]), live.sound(0.4) / 32768
    assert samples.dtype == np.float64
    assert same(answers(classifier, samples), answers(classifier, samples.astype(np.float32)))


@pytest.mark.parametrize(
    ("piece", "said"),
    [
        (np.array([0.1, np.nan], np.float32), "NaN or infinite"),
        (np.array([np.inf], np.float32), "NaN or infinite"),
        (np.zeros(3, np.int64), r"int16, float32 or float64 samples of shape \(n,\), not int64 \(3,\)"),
        (np.zeros(3, np.int32), r"not int32 \(3,\)"),
        (np.zeros((2, 3), np.int16), r"not int16 \(2, 3\)"),
        (torch.zeros(3, dtype=torch.float16), r"not float16 \(3,\)"),
    ],
)
def test_refused_pieces_leave_the_stream_as_it_was(piece, said):
    classifier, samples = live.classifier(live.MODELS["carried"]), live.sound(0.4)
    stream = fftp.stream(classifier)
    found = stream.push(samples[:3000])
    with pytest.raises(UserError, match=said):
        stream.push(piece)
    assert same(found + stream.push(samples[3000:]) + stream.finish(), answers(classifier, samples))


def test_refused_settings(monkeypatch):
    classifier = live.classifier(live.MODELS["carried"])
    for hop in (0.0, -0.1, 0.015, float("nan"), float("inf")):
        with pytest.raises(UserError, match="The hop has to be a whole number of frames of 10 ms, not"):
            fftp.stream(classifier, hop)
    for rate in (0, 999, 44_100.5, 768_001, float("nan")):
        with pytest.raises(UserError, match=r"The rate of a stream is a whole number from 1000 to 768000 Hz, not"):
            fftp.stream(classifier, rate=rate)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(
        UserError, match="Sound of another rate needs the package soxr: install it with `pip install soxr`"
    ):
        fftp.stream(classifier, rate=8000)
    assert fftp.stream(classifier).rate == RATE  # which needs no soxr


@pytest.mark.parametrize(
    ("config", "fit", "said"),
    [
        (live.aum(), "pad", None),
        (live.aum(directions="v1"), "pad", "scans backward too"),
        (live.aum(directions="v2"), "pad", "scans backward too"),
        (live.aum(place="head"), "pad", "stands in the head"),
        (live.aum(place="middle"), "pad", "stands in the middle"),
        (live.aum(positions="learned"), "pad", "positions end"),
        (live.aum(grid=live.grid(pt=16, st=16, pf=16, sf=16)), "pad", "square patches"),
        (live.aum(), "resize", "stretched clips"),
        (live.ast(), "pad", "attention"),
    ],
)
def test_which_models_carry_a_state_on(config, fit, said, tmp_path):
    classifier = live.classifier(config, fit=fit)
    checkpoint.save(tmp_path, classifier.model, classifier.config)
    stream = fftp.stream(tmp_path)  # as users name them
    assert (stream.why_window is None) == (said is None) == stream.carried
    assert said is None or said in why_window(classifier.config)
    assert stream.window == (None if said is None else 0.995)  # 98 frames
    assert len(stream.push(live.sound(0.4))) in (3, 4)


def held(stream):
    """Bytes of all arrays and tensors that a stream holds, the classifier's apart."""
    total, left, seen = 0, [vars(stream)], set()
    while left:
        thing = left.pop()
        if id(thing) in seen or thing is stream.classifier or thing is stream.classifier.prepared:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            total += thing.untyped_storage().nbytes()
        elif isinstance(thing, np.ndarray):
            total += (thing if thing.base is None else thing.base).nbytes
        elif isinstance(thing, dict):
            left += thing.values()
        elif isinstance(thing, (tuple, list)):
            left += thing
        elif type(thing).__module__ == "fftp.streaming":
            left.append(vars(thing))
    return total


@pytest.mark.parametrize("name", ["carried", "ast"])
def test_what_a_stream_holds_does_not_grow(name):
    dispatch.use_fused(True)
    stream = fftp.stream(live.classifier(live.MODELS[name]), hop=0.2)
    piece, sizes = live.sound(1.0), []
    for _ in range(20):
        stream.push(piece)
        sizes.append(held(stream))
    assert sizes[1] > 1000  # something was counted
    assert len(set(sizes[1:])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["carried", "ast"])
def test_memory_is_flat_over_ten_minutes(name):
    dispatch.use_fused(True)
    stream, piece = fftp.stream(live.classifier(live.MODELS[name])), live.sound(10.0)
    for _ in range(6):
        stream.push(piece)
    before = held(stream)
    grown = memory.peak(lambda: [stream.push(piece) and None for _ in range(60)], "cpu")
    if grown is None:
        pytest.skip("this system does not tell how much memory a process takes: it is Linux's /proc that does")
    assert held(stream) == before
    # 16 kHz of ten minutes would be 38 MB as float32, log-mels 31 MB. Seen: 0.3 MB.
    assert grown < 2e6
