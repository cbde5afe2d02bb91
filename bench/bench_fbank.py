"""The front end, waveform to log-mel, beside the libraries that users turn to. Kaldi's features, AST's parameters.

Peers that make other features (torchaudio's MelSpectrogram has neither Kaldi's pre-emphasis nor its framing) are named as
what they are: they bound what a batched transform costs. kaldi-native-fbank refuses AST's 128 mel bins, one of which lies
between two frequencies of the transform and is empty: it is met at 80, where all others run again.
"""

import warnings
from collections.abc import Iterator

import numpy as np
import torch

import kernels
from bench.measure import Case, worst
from kernels import dispatch

RATE = 16000
MELS = 128  # AST's
FEWER_MELS = 80
SECONDS = {"cpu": (10.0, 1.0), "cuda": (10.0, 1.0)}
BATCH = {"cpu": (16,), "cuda": (32, 256, 1)}


def cases(device: str) -> Iterator[Case]:
    for B in BATCH[device]:
        for seconds in SECONDS[device]:
            yield _case(B, seconds, MELS, device)
    if device == "cpu":
        for seconds in SECONDS[device]:
            yield _case(BATCH[device][0], seconds, FEWER_MELS, device)


def _case(B, seconds, mels, device):
    W = int(RATE * seconds)
    dispatch.use_fused(True)
    T = kernels.FbankSettings().frames(W)
    fft = T * 2.5 * 512 * 9  # real operations of a real transform of 512 points
    peers = {"torchaudio, clip by clip": _torchaudio, "torchaudio MelSpectrogram, batched": _mel_spectrogram}
    if device == "cpu":
        peers |= {"kaldi-native-fbank": _kaldi_native, "transformers ASTFeatureExtractor": _extractor}
    eager = ("torchaudio, clip by clip",)
    if device == "cuda":
        peers |= {"torchaudio on the CPU, clip by clip": _torchaudio_cpu}
        eager += ("torchaudio on the CPU, clip by clip",)
    return Case(
        part="fbank",
        case={"B": B, "seconds": seconds} | ({} if mels == MELS else {"mels": mels}),
        backend=dispatch.select("fbank", device, "float32").name,
        ours=lambda sets: _ours(_waves(B, W, device, sets), mels),
        peers={name: lambda sets, f=f: f(_waves(B, W, device, sets), mels) for name, f in peers.items()},
        correct=lambda: _correct(W, mels, device),
        clips=B,
        set_bytes=4 * B * W,
        bytes=B * (2 * W + 4.0 * T * mels),
        flops=0.0 if device == "cpu" else B * fft,
        eager=eager,
    )


def _waves(B, W, device, sets):
    """Noise of various levels under a slow envelope, as samples of 16 bits."""
    made = []
    for _ in range(sets):
        level = torch.rand(B, 1) * 0.3 + 0.001
        envelope = torch.sin(torch.linspace(0, 9, W)).abs()
        made.append(((torch.randn(B, W) * level * envelope).clamp(-1, 1) * 32767).round().div(32768).to(device))
    return made


def _ours(waves, mels):
    settings = kernels.FbankSettings(n_mels=mels)
    return lambda i: kernels.fbank(waves[i], settings=settings)


def kaldi(wave: torch.Tensor, mels: int = MELS) -> torch.Tensor:
    """torchaudio's log-mel `[T, F]` of the first channel of `[channels, W]`, with the parameters of AST's loader."""
    import torchaudio

    return torchaudio.compliance.kaldi.fbank(
        wave, htk_compat=True, sample_frequency=RATE, use_energy=False, window_type="hanning", num_mel_bins=mels,
        dither=0.0, frame_shift=10,
    )  # fmt: skip


def _torchaudio(waves, mels):
    return lambda i: [kaldi(wave[None], mels) for wave in waves[i]]


def _torchaudio_cpu(waves, mels):
    return _torchaudio([wave.cpu() for wave in waves], mels)


def _mel_spectrogram(waves, mels):
    import torchaudio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of 128 filters the lowest ones hold no frequency of this transform
        transform = torchaudio.transforms.MelSpectrogram(
            RATE, n_fft=512, win_length=400, hop_length=160, n_mels=mels, f_min=20.0, mel_scale="htk"
        ).to(waves[0].device)
    return lambda i: transform(waves[i]).clamp_min(2**-23).log()


def _kaldi_native(waves, mels):
    """The C++ library, clip by clip; it wants numbers in the range of 16 bits or of 1 alike."""
    import kaldi_native_fbank as native

    options = native.FbankOptions()
    options.frame_opts.dither, options.frame_opts.window_type = 0.0, "hanning"
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins, options.use_energy, options.htk_compat = mels, False, True
    clips = [[np.ascontiguousarray(wave.numpy()) for wave in batch] for batch in waves]

    def run(i):
        out = []
        for clip in clips[i]:
            computer = native.OnlineFbank(options)
            computer.accept_waveform(RATE, clip)
            computer.input_finished()
            out.append(np.stack([computer.get_frame(t) for t in range(computer.num_frames_ready)]))
        return out

    return run


def _extractor(waves, mels):
    from transformers import ASTFeatureExtractor

    extract = ASTFeatureExtractor(num_mel_bins=mels)
    clips = [[wave.numpy() for wave in batch] for batch in waves]
    return lambda i: extract(clips[i], sampling_rate=RATE, return_tensors="pt")


def _correct(W, mels, device):
    """At most twice the error of torchaudio's own float32 against its float64, plus 1e-4 of a natural logarithm."""
    waves = _waves(3, W, "cpu", 1)[0]
    exact = torch.stack([kaldi(wave[None].double(), mels) for wave in waves])
    plain = torch.stack([kaldi(wave[None], mels) for wave in waves])
    return worst(_ours([waves.to(device)], mels)(0).cpu(), exact) <= 2 * worst(plain, exact) + 1e-4
