"""The front end: log-mel against torchaudio and stored values, batches, lengths, rolls, normalisation, statistics."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from oracles import fixture, needs_oracles, oracle
from recordings import RECORDINGS, needs_recordings

import kernels
from fftp import FrontEnd, FrontEndSettings
from fftp.frontend import PRESETS, STATISTICS, Statistics
from kernels import FbankSettings, dispatch
from kernels.fbank import native, reference
from kernels.fbank.reference import BLOCK, LOG_FLOOR, mel_matrix, window

RATE = 16_000


@pytest.fixture(params=["reference", "native"])
def backend(request) -> str:
    """What runs for float32 on the CPU; float64 is the reference's either way."""
    if request.param == "native":
        if reason := native.refuses():
            pytest.skip(f"fbank=native: {reason}")
        dispatch.use_fused(True)
    return request.param


def theirs(waveform, settings=None, **changed) -> torch.Tensor:
    """torchaudio's log-mel `[T, F]` of one clip, its mean taken off first, with AST's parameters."""
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi", reason="torchaudio is not installed")
    settings = settings or FbankSettings()
    parameters = {
        "htk_compat": True,
        "sample_frequency": settings.sample_rate,
        "use_energy": False,
        "window_type": "hanning",
        "num_mel_bins": settings.n_mels,
        "dither": 0.0,
        "frame_shift": settings.hop_ms,
        "frame_length": settings.frame_ms,
        "low_freq": settings.low_hz,
        "high_freq": settings.high_hz,
        "preemphasis_coefficient": settings.preemphasis,
    }
    return kaldi.fbank((waveform - waveform.mean())[None], **(parameters | changed))


def ours(waveform, settings=None, device="cpu", **how) -> torch.Tensor:
    """Our log-mel `[T, F]` of one clip, its mean taken off first."""
    waveform = waveform[None].to(device)
    length = torch.tensor([waveform.shape[1]], device=device)
    return kernels.fbank(kernels.remove_mean(waveform, length), None, settings, **how)[0].cpu()


def noise(*shape, seed=0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signals() -> dict[str, torch.Tensor]:
    t = torch.arange(RATE, dtype=torch.float64) / RATE
    impulse = torch.zeros(RATE, dtype=torch.float64)
    impulse[7321] = 1.0
    return {
        "white noise": noise(RATE),
        "quiet noise": 1e-4 * noise(RATE, seed=1),
        "silence": torch.zeros(RATE, dtype=torch.float64),
        "dc": torch.full((RATE,), 0.25, dtype=torch.float64),
        "impulse": impulse,
        "sweep": 0.5 * torch.sin(2 * math.pi * (50 * t + (7500 - 50) * t * t / 2)),
        "full-scale sine": torch.sin(2 * math.pi * 440 * t),
        "clipped": (3 * torch.sin(2 * math.pi * 997 * t)).clamp(-1, 1),
        "one window": noise(400, seed=2),
        "one sample short of two": noise(559, seed=3),
    }


# Stored values ------------------------------------------------------------------------------------------------------


def stored_filters() -> torch.Tensor:
    """`[128, 257]`, as torchaudio made them where the stored values come from."""
    tensors = fixture("fbank")
    filters = torch.zeros(128 * 256)
    filters[tensors["mel_places"].long()] = tensors["mel_values"]
    return nnf.pad(filters.view(128, 256), (0, 1))


@pytest.fixture
def their_filters(monkeypatch):
    """Filters of torchaudio's for ours: its float32 logarithm has other last bits on other processors, ours has not."""
    return lambda filters: monkeypatch.setattr(reference, "mel_matrix", lambda settings: filters)


def check_stored(wave, wanted64, their_filters, backend, every=1):
    # The bounds hold for any processor's filters in float32, but 1e-9 for the same filters alone. Seen: 1.5e-11.
    off = (ours(wave)[::every].double() - wanted64).abs()
    assert dispatch.in_use()["fbank"] == backend
    # Twice torchaudio's own worst float32 error (6e-3, in the sweep's nearly empty bins). Seen: 9.3e-3, mean 9e-5.
    assert float(off.max()) < 1.2e-2
    assert float(off.mean()) < 2e-4
    their_filters(stored_filters())
    got64 = ours(wave.double())[::every]
    torch.testing.assert_close(got64, wanted64, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "every"), [("short", 1), ("sweep", 8)])
def test_stored_clips(name, every, their_filters, backend):
    tensors = fixture("fbank")
    check_stored(tensors[f"wave.{name}"], tensors[f"fbank64.{name}"], their_filters, backend, every)


@needs_oracles
@pytest.mark.parametrize(
    "name", ["noise", "sweep", "dc", "impulse", "silence", "quiet_noise", "clipped", "short"]
)  # fmt: skip
def test_oracle_clips(name, their_filters, backend):
    tensors = oracle("fbank")
    check_stored(tensors[f"wave.{name}"], tensors[f"fbank64.{name}"], their_filters, backend)


@needs_oracles
@pytest.mark.parametrize("name", ["noise", "short", "clipped"])
def test_oracle_pipeline(name, their_filters):
    """Padded to 128 frames, then normalised with Speech Commands' figures."""
    their_filters(stored_filters())
    tensors = oracle("fbank")
    mean, std = STATISTICS["speechcommands"]
    front = FrontEnd(FrontEndSettings(T=128, clip_samples=16000, mean=mean, std=std))
    got = front(tensors[f"wave.{name}"].double()[None])[0]
    # The bound of the log-mel itself. Seen: 7e-14.
    torch.testing.assert_close(got, tensors[f"pipeline_sc64.{name}"], rtol=0, atol=1e-9)


def test_window_and_filters():
    # Seen: 0; the notes, by another formula: 4e-16.
    wanted = fixture("fbank")["window"]
    torch.testing.assert_close(window(FbankSettings(), torch.float64), wanted, rtol=0, atol=1e-15)
    filters = mel_matrix(FbankSettings())
    # One unit in the last place of a logarithm, 2.4e-7 of 3, times 1127 over a filter's 21.8 mel: 1.2e-5. Seen on one
    # processor: equal; on another: 1.13e-5 in 41 of the 506 entries.
    torch.testing.assert_close(filters, stored_filters(), rtol=0, atol=1.3e-5)
    assert filters.shape == (128, 257)
    assert not filters[3].any()  # the fourth filter falls between two bins
    assert not filters[:, 256].any()


@needs_oracles
def test_stored_filters_are_the_oracles():
    assert torch.equal(stored_filters()[:, :256], oracle("fbank")["mel_banks"])


def test_empty_filter_and_silence_are_at_the_floor(backend):
    log_mel = ours(torch.zeros(RATE))
    assert (log_mel == math.log(LOG_FLOOR)).all()
    assert ours(noise(RATE).float())[:, 3].unique().tolist() == pytest.approx([-15.942385], abs=1e-6)


# torchaudio ---------------------------------------------------------------------------------------------------------


def check_against_torchaudio(waveforms, their_filters, backend, settings=None):
    """float32 at most twice torchaudio's own float32 error, plus 1e-4; float64 with the same filters to 1e-9.

    waveforms: name -> float64 `[W]`, one case together. A single clip's largest error is one draw of roundings on either
    side, which differ by processor: of a hundred clips two may be off alone, and are named.
    """
    exact = {name: theirs(wave, settings) for name, wave in waveforms.items()}
    off, errors = [], []
    for name, wave in waveforms.items():
        alone, got = theirs(wave.float(), settings), ours(wave.float(), settings)
        error, allowed = (float((t.double() - exact[name]).abs().max()) for t in (got, alone))
        errors.append((error, allowed))
        if not error <= 2 * allowed + 1e-4:
            off.append(f"{name}: {error:.1e}, torchaudio {allowed:.1e}")
    assert dispatch.in_use()["fbank"] == backend
    assert max(e for e, _ in errors) <= 2 * max(a for _, a in errors) + 1e-4, off
    assert len(off) <= len(waveforms) // 50, off
    their_filters(torchaudios_filters(settings or FbankSettings()))
    for name, wave in waveforms.items():
        # The oracles' bound. Seen: 1.1e-11 (sweep), 4e-12 on recordings.
        torch.testing.assert_close(
            ours(wave, settings), exact[name], rtol=0, atol=1e-9, msg=lambda text, n=name: n + text
        )


def torchaudios_filters(settings):
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi", reason="torchaudio is not installed")
    bins = (settings.n_mels, settings.n_fft, float(settings.sample_rate), settings.low_hz, settings.high_hz)
    return nnf.pad(kaldi.get_mel_banks(*bins, 100.0, -500.0, 1.0)[0], (0, 1))


@pytest.mark.parametrize("name", signals())
def test_torchaudio_on_signals(name, their_filters, backend):
    check_against_torchaudio({name: signals()[name]}, their_filters, backend)


@pytest.mark.parametrize(
    "settings",
    [
        FbankSettings(sample_rate=8000, n_mels=40),
        FbankSettings(sample_rate=22050, n_mels=64),
        FbankSettings(sample_rate=32000, n_mels=128),
        FbankSettings(sample_rate=44100, n_mels=80, hop_ms=5.0),
        FbankSettings(n_mels=23, low_hz=100.0, high_hz=-500.0, preemphasis=0.5),
        FbankSettings(n_mels=64, frame_ms=32.0, hop_ms=12.5, high_hz=7600.0, preemphasis=0.0),
    ],
    ids=["8k-40", "22k-64", "32k-128", "44k-80", "band", "long-frame"],
)
def test_torchaudio_at_other_settings(settings, their_filters, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        waveform = noise(settings.sample_rate // 2 + 17, seed=5)
        check_against_torchaudio({"noise": waveform}, their_filters, backend, settings)


RECORDED = {"words": "speech_commands_12/*/*.*", "environmental sounds": "esc10/audio/*.*"}


@needs_recordings
@pytest.mark.parametrize("kind", RECORDED)
def test_torchaudio_on_100_real_recordings(kind, their_filters, backend):
    """Spread over the files there are; the first three seconds of each."""
    import soundfile
    import soxr

    paths = sorted(RECORDINGS.glob(RECORDED[kind]))
    waveforms = {}
    for path in paths[:: len(paths) // 100][:100]:
        samples, rate = soundfile.read(path, dtype="float64", always_2d=True)
        resampled = soxr.resample(samples[: 3 * rate, 0], rate, RATE)
        waveforms[f"{path.parent.name}/{path.stem}"] = (
            torch.tensor(resampled).float().double()
        )  # what float32 holds exactly
    assert len(waveforms) == 100
    check_against_torchaudio(waveforms, their_filters, backend)


# Batches, lengths, rolls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_i_has_the_same_bits_in_any_batch(dtype, device):
    """37 clips of mixed lengths: more frames than one block, and blocks that begin inside a clip.

    The reference in float64 on a GPU, which only tests use, multiplies as cuBLAS likes: the same to 1e-12 there.
    """
    apart = 1e-12 if device == "cuda" and dtype == torch.float64 else 0.0
    rng = np.random.default_rng(0)
    length = torch.tensor(rng.integers(1, 24000, 37), device=device)
    length[0], length[5], length[36] = 24000, 399, 400
    waveform = noise(37, 24000).to(device, dtype)
    waveform = waveform * (torch.arange(24000, device=device) < length[:, None])
    front = FrontEnd(FrontEndSettings(T=101, clip_samples=24000, mean=-4.0, std=4.5))
    roll = torch.tensor(rng.integers(-10, 10, 37), device=device)
    assert int(FbankSettings().frames(length).sum()) > 2 * BLOCK
    whole = front.log_mel(waveform, length, roll)
    for b in range(37):
        alone = front.log_mel(waveform[b : b + 1], length[b : b + 1], roll[b : b + 1])
        torch.testing.assert_close(alone[0], whole[b], rtol=0, atol=apart)
        tight = waveform[b : b + 1, : int(length[b])]  # without the padding behind it
        shorter = front.log_mel(tight, length[b : b + 1], roll[b : b + 1])
        torch.testing.assert_close(shorter[0], whole[b], rtol=0, atol=apart)


def test_clips_of_different_lengths_are_padded_with_zero_frames(device, their_filters):
    their_filters(torchaudios_filters(FbankSettings()))
    wave = noise(3, 3000, seed=8).to(device)
    length = torch.tensor([3000, 1000, 200], device=device)
    wave = wave * (torch.arange(3000, device=device) < length[:, None])
    got = kernels.fbank(kernels.remove_mean(wave, length), length, T=20)
    for b, n in enumerate((17, 4, 0)):
        assert not got[b, n:].any()
        if n:
            assert got[b, :n].all()
            # The bound of every float64 comparison here. Seen: 9e-14.
            alone = theirs(wave[b, : int(length[b])].cpu())
            torch.testing.assert_close(got[b, :n].cpu(), alone, rtol=0, atol=1e-9)


def test_cut_at_the_target_length():
    waveform = noise(RATE)
    assert torch.equal(ours(waveform, T=50), ours(waveform)[:50])
    assert ours(waveform).shape == (98, 128)


@pytest.mark.parametrize("T", [90, 98, 128])
def test_roll_is_torchs_roll(T, device):
    waveform = noise(20, RATE, seed=4).to(device)
    roll = torch.arange(-10, 10, device=device)
    plain = kernels.fbank(waveform, T=T)
    wanted = torch.stack([clip.roll(int(by), 0) for clip, by in zip(plain, roll, strict=True)])
    assert torch.equal(kernels.fbank(waveform, T=T, roll=roll), wanted)


def test_a_waveform_that_is_not_contiguous(device):
    waveform = noise(2, 2 * 4000).to(device)
    assert torch.equal(kernels.fbank(waveform[:, ::2]), kernels.fbank(waveform[:, ::2].contiguous()))


def test_empty_batch(device):
    assert kernels.fbank(torch.zeros(0, 4000, device=device)).shape == (0, 23, 128)


def test_nan_in_one_clip_stays_there(device):
    waveform = noise(3, 4000).to(device)
    clean = kernels.fbank(waveform)
    waveform[1, 2000] = float("nan")
    got = kernels.fbank(waveform)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1].isnan().any()


def test_remove_mean(device):
    waveform = (noise(4, 1000) + 0.3).to(device, torch.float32)
    length = torch.tensor([1000, 257, 1, 0], device=device)
    waveform = waveform * (torch.arange(1000, device=device) < length[:, None])
    got = kernels.remove_mean(waveform, length)
    for b, n in enumerate(length.tolist()):
        assert not got[b, n:].any()
        if n:
            wanted = waveform[b, :n].double() - waveform[b, :n].double().mean()
            # float32 rounding of values below 1. Seen: 2.1e-8, times ten.
            torch.testing.assert_close(got[b, :n].double(), wanted, rtol=0, atol=2e-7)


def test_frames_and_samples():
    s = FbankSettings()
    assert (s.frame, s.hop, s.n_fft) == (400, 160, 512)
    counts = {399: 0, 400: 1, 559: 1, 560: 2, 16000: 98, 160000: 998, 160240: 1000, 164080: 1024, 20720: 128}
    assert [s.frames(n) for n in counts] == list(counts.values())
    assert s.frames(torch.tensor(list(counts))).tolist() == list(counts.values())
    assert [s.samples(n) for n in (1, 1000, 1024, 128)] == [400, 160240, 164080, 20720]


# Front end ------------------------------------------------------------------------------------------------------------


def test_normalise_and_what_padding_and_silence_become(backend):
    """PAPER_NOTES 2.2: padding +0.4670 and +0.6150, silence -1.2776 and -0.8172 after normalisation."""
    for name, padding, silence in (("audioset", 0.4670, -1.2776), ("speechcommands", 0.6150, -0.8172)):
        mean, std = STATISTICS[name]
        front = FrontEnd(FrontEndSettings(T=128, clip_samples=16000, mean=mean, std=std))
        out = front(torch.zeros(1, 16000))
        assert out[0, :98].unique().tolist() == pytest.approx([silence], abs=5e-5)
        assert out[0, 98:].unique().tolist() == pytest.approx([padding], abs=5e-5)


@pytest.mark.parametrize(
    ("name", "T", "seconds", "mean", "std"),
    [
        ("ast-audioset", 1024, 10, -4.2677393, 4.5689974),
        ("ast-esc50", 512, 5, -6.6268077, 5.358466),
        ("ast-speechcommands", 128, 1, -6.845978, 5.5654526),
        ("aum-audioset", 1024, 10, -4.2677393, 4.5689974),
        ("aum-speechcommands", 128, 1, -6.845978, 5.5654526),
        ("fftp-audioset", 1000, 10, -4.2677393, 4.5689974),
        ("fftp-speechcommands", 128, 1, -6.845978, 5.5654526),
    ],
)
def test_published_front_ends_by_name(name, T, seconds, mean, std):
    """PAPER_NOTES 2.1 and 2.3, D-1, D-26: a clip of the data set's length, against torchaudio, padded and normalised."""
    settings = PRESETS[name]
    assert (settings.T, settings.F, settings.clip_samples, settings.fit) == (T, 128, seconds * RATE, "pad")
    wave = noise(seconds * RATE, seed=7)
    got = FrontEnd(settings)(wave.float()[None])[0]
    wanted = nnf.pad(theirs(wave)[:T], (0, 0, 0, max(0, T - FbankSettings().frames(seconds * RATE))))
    # Noise: seen 1.4e-4 in the log-mel, times five, in units of 2 std.
    torch.testing.assert_close(got.double(), (wanted - mean) / (2 * std), rtol=0, atol=7e-4 / (2 * std))
    assert set(PRESETS) == {f"{s}-{d}" for s in ("ast", "aum", "fftp") for d in ("audioset", "speechcommands")} | {
        "ast-esc50"
    }


def test_a_clip_shorter_than_a_window_is_all_padding():
    front = FrontEnd(FrontEndSettings(T=4, clip_samples=16000, mean=0.0, std=0.5))
    assert not front.log_mel(noise(2, 100).float(), torch.tensor([100, 30])).any()


@pytest.mark.parametrize("rolled", [False, True])
def test_resize_fit_is_bilinear_in_time(rolled):
    """Against numpy's interp at the centres of the new frames."""
    length = torch.tensor([16000, 9600, 8000])
    waveform = noise(3, 16000) * (torch.arange(16000) < length[:, None])
    roll = torch.tensor([3, 0, -7]) if rolled else None
    front = FrontEnd(FrontEndSettings(T=128, clip_samples=16000, mean=0.0, std=0.5, fit="resize"))
    got = front.log_mel(waveform, length, roll)
    for b, n in enumerate(length.tolist()):
        frames = ours(waveform[b, :n]).numpy()
        places = (np.arange(128) + 0.5) * len(frames) / 128 - 0.5
        wanted = np.stack([np.interp(places, np.arange(len(frames)), column) for column in frames.T], 1)
        wanted = np.roll(wanted, int(roll[b]) if rolled else 0, 0)
        # Two roundings of a weighted sum in float64. Seen: 2e-14.
        np.testing.assert_allclose(got[b].numpy(), wanted, rtol=0, atol=1e-12)
    assert front.valid_frames(length).tolist() == [128] * 3


def test_valid_frames_counts_whole_windows_up_to_the_input():
    front = FrontEnd(FrontEndSettings(T=50, clip_samples=16000, mean=0.0, std=0.5))
    assert front.valid_frames(torch.tensor([0, 399, 400, 560, 16000])).tolist() == [0, 0, 1, 2, 50]


def test_statistics_over_valid_frames_only():
    rng = np.random.default_rng(3)
    statistics, kept = Statistics(), []
    for frames in ([7, 3], [1, 0], [9, 9]):
        log_mel = rng.normal(-5, 3, (2, 9, 4))
        statistics.add(torch.tensor(log_mel), torch.tensor(frames))
        kept += [log_mel[b, :n].ravel() for b, n in enumerate(frames)]
    cells = np.concatenate(kept)
    assert statistics.mean == pytest.approx(cells.mean(), rel=1e-12)
    assert statistics.std == pytest.approx(cells.std(), rel=1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"waveform": torch.zeros(1, 1, 4000)}, r"\(B, W\)"),
        ({"waveform": torch.zeros(1, 4000, dtype=torch.int16)}, "float32 or float64"),
        ({"waveform": torch.zeros(1, 4000, dtype=torch.float16)}, "float32 or float64"),
        ({"waveform": torch.zeros(2, 4000), "length": torch.tensor([1])}, r"length and roll are \(B,\) = \(2,\)"),
        ({"waveform": torch.zeros(2, 4000), "roll": torch.tensor([1])}, r"length and roll are \(B,\) = \(2,\)"),
        ({"waveform": torch.zeros(2, 399)}, "400 samples for one window, got W=399"),
    ],
)
def test_refused(given, message):
    with pytest.raises(ValueError, match=message):
        kernels.fbank(**given)
