"""Live sound: what an answer costs at every hop, beside running the model anew on the same window as a recording.

float32, a hop of 100 ms, noise. The carried state is AuM's by the recipe speechcommands/aum_streaming; the window that it is
compared with is the stretch of sound that a clip has, of which the state knows more.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch

from bench import systems
from bench.bench_patch_embed import GRIDS
from bench.measure import Figures
from fftp import aum_model
from fftp.checkpoint import CheckpointConfig
from fftp.frontend import STATISTICS, FrontEndSettings
from fftp.patching import PatchGrid
from fftp.predict import Classifier
from fftp.streaming import Stream
from kernels import FbankSettings, dispatch

GRID = "(128, 10)/4"
SECONDS = (1, 10)  # of the window
HOP = 0.1
WARM, HOPS, EVERY = 10, 200, 10  # hops that are not timed, that are, and from one run anew to the next
SECONDS_A_ROW, FEWEST = 30, 40  # after so long a row ends, with so many hops at least
CARRIED = {"directions": "none", "place": "end", "positions": "none"}
BOUND = (
    1e-3  # of the largest probability: two orders of sums in 12 to 24 layers; tests/test_streaming.py holds the 2x rule
)


def cases(device: str) -> Iterator[Figures]:
    dispatch.use_fused(True)
    for seconds in SECONDS:
        for model in systems.MODELS:
            yield _row(model, seconds, device)


def _row(model, seconds, device):
    size = systems.SIZE[device]
    operation = {"ast": "attention", "aum": "rms_norm"}[model]
    return Figures(
        part="stream",
        case={"model": model, "size": size, "grid": GRID, "seconds": seconds, "hop_ms": round(1000 * HOP)},
        backend=f"{operation} {dispatch.select(operation, device, 'float32').name}",
        correct=lambda: _correct(classifier(model, size, seconds, device)),
        figures=lambda: _figures(classifier(model, size, seconds, device)),
    )


def classifier(model: str, size: str, seconds: float, device: str) -> Classifier:
    """An untrained model whose clips have so many seconds of sound and no padding."""
    T = FbankSettings().frames(round(seconds * FbankSettings().sample_rate))
    grid = dataclasses.replace(GRIDS[GRID], T=T)
    network = systems.build("ast", size, grid, "cpu") if model == "ast" else _carried(size, grid)
    mean, std = STATISTICS["audioset"]
    about = CheckpointConfig(
        model=network.config,
        front_end=FrontEndSettings(T=T, clip_samples=FbankSettings().samples(T), mean=mean, std=std),
        labels=tuple(map(str, range(systems.CLASSES))),
        multi_label=False,
        settings={},
    )
    return Classifier(network, about, device, "float32")


def _carried(size: str, grid: PatchGrid) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = aum_model.SIZES[size]
    return aum_model.AuM(aum_model.AuMConfig(grid=grid, classes=systems.CLASSES, **sizes, **CARRIED)).eval()


def _noise(samples):
    return np.random.default_rng(0).integers(-3000, 3000, samples, dtype=np.int16)


def _correct(given):
    """The answer after one window is the recording's."""
    front_end = given.config.front_end
    stream, sound = Stream(given, HOP), _noise(front_end.clip_samples)
    found = (stream.push(sound) + stream.finish())[-1].probabilities
    wanted = given.predict(sound, stream.rate).probabilities
    return bool(np.abs(found - wanted).max() <= BOUND * wanted.max())


def _figures(given):
    """Milliseconds of a hop, of a window run anew, and the median of their ratios where one follows the other."""
    stream, window = Stream(given, HOP), given.config.front_end.clip_samples
    hop, sound = round(HOP * stream.rate), _noise(window)
    stream.push(sound)  # the window is full
    ours, anew, ratios = [], [], []
    started = time.monotonic()
    for number in range(WARM + HOPS):
        if number >= WARM + FEWEST and time.monotonic() - started > SECONDS_A_ROW:
            break
        piece = np.roll(sound, -number * hop)[:hop]
        began = time.perf_counter()
        (_,) = stream.push(piece)
        ours.append(1000 * (time.perf_counter() - began))
        if number % EVERY == 0:
            began = time.perf_counter()
            given.predict(sound, stream.rate)
            anew.append(1000 * (time.perf_counter() - began))
            ratios.append(anew[-1] / ours[-1])
    ours, anew, ratios = ours[WARM:], anew[WARM // EVERY :], ratios[WARM // EVERY :]
    return {
        "carried": stream.carried,
        "hops": len(ours),
        "ms": {"p50": statistics.median(ours), "p99": float(np.quantile(ours, 0.99))},
        "anew_ms": statistics.median(anew),
        "anew_over_ours": statistics.median(ratios),
    }
