"""The front end of real products: by the front end's rule, other settings, torch.export and ONNX, what is refused."""

import warnings

import numpy as np
import pytest
import torch
from test_fbank import RATE, noise, signals, theirs

from fftp import FrontEnd, FrontEndSettings, RealFrontEnd
from kernels import FbankSettings

SETTINGS = FrontEndSettings(T=128, clip_samples=RATE, mean=0.0, std=0.5)  # as it comes: (x - 0) / (2 * 0.5)


@pytest.mark.parametrize("name", [name for name, wave in signals().items() if len(wave) == RATE])
def test_torchaudio_on_signals(name):
    """At most twice torchaudio's own error in float32, plus 1e-4 for the largest and 2e-6, a unit of 16, for the mean."""
    wave = signals()[name]
    exact, alone = theirs(wave), theirs(wave.float())
    got = RealFrontEnd(SETTINGS)(wave.float()[None])[0]
    ours, others = ((t.double() - exact).abs() for t in (got[:98], alone))
    assert float(ours.max()) <= 2 * float(others.max()) + 1e-4
    assert float(ours.mean()) <= 2 * float(others.mean()) + 2e-6
    assert not got[98:].any()


@pytest.mark.parametrize(
    ("changed", "W"),
    [
        ({"T": 50, "mean": -4.3, "std": 4.6}, 16_000),
        ({"T": 60, "fit": "resize"}, 9_000),
        ({"T": 1}, 400),
        ({"T": 60, "fbank": FbankSettings(sample_rate=8000, n_mels=40)}, 4_017),
        ({"T": 60, "fbank": FbankSettings(sample_rate=44100, n_mels=80, hop_ms=5.0)}, 20_000),
        ({"T": 30, "fbank": FbankSettings(n_mels=23, low_hz=100.0, high_hz=-500.0, preemphasis=0.5)}, 5_000),
    ],
    ids=["cut", "resize", "one window", "8k-40", "44k-80", "band"],
)
def test_as_the_front_end(changed, W):
    settings = FrontEndSettings(**{"clip_samples": W, "mean": 0.0, "std": 0.5} | changed)
    wave = noise(3, W, seed=6)
    exact, plain = (FrontEnd(settings)(w) for w in (wave, wave.float()))
    got = RealFrontEnd(settings)(wave.float())
    assert got.shape == exact.shape
    ours, others = (float((t.double() - exact).abs().max()) for t in (got, plain))
    assert ours <= 2 * others + 1e-4 / (2 * settings.std)


def test_torch_export_takes_it():
    """With any number of clips, to the bit, and without a complex number."""
    front = RealFrontEnd(SETTINGS)
    program = torch.export.export(front, (torch.randn(2, RATE),), dynamic_shapes=({0: torch.export.Dim("B")},))
    for B in (1, 2, 5):
        wave = noise(B, RATE, seed=B).float()
        assert torch.equal(program.module()(wave), front(wave))
    values = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert len(values) > 10
    assert {value.dtype for value in values} == {torch.float32}


def test_onnx_takes_it(tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import onnxruntime

    front = RealFrontEnd(SETTINGS).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(
            front, (torch.randn(2, RATE),), dynamo=True, dynamic_shapes=({0: torch.export.Dim("B")},), verbose=False
        )
    program.save(tmp_path / "front_end.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "front_end.onnx")
    (name,) = (given.name for given in session.get_inputs())
    for B in (1, 5):
        wave = noise(B, RATE, seed=B)
        exact = FrontEnd(SETTINGS)(wave)
        (got,) = session.run(None, {name: wave.float().numpy()})
        ours, others = (np.abs(x - exact.numpy()).max() for x in (got, front(wave.float()).numpy()))
        assert ours <= 2 * others + 1e-4


def test_refused():
    with pytest.raises(ValueError, match="W is at least one window of 400 samples, got 399"):
        RealFrontEnd(SETTINGS, W=399)
    for shape in ((RATE,), (2, RATE - 1), (1, 1, RATE)):
        with pytest.raises(ValueError, match=r"waveform is \(B, 16000\), got \(" + ", ".join(map(str, shape))):
            RealFrontEnd(SETTINGS)(torch.zeros(shape))
