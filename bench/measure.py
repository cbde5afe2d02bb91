"""Timing in turn with peers, on either device, and the line of JSON that becomes of it.

A candidate is a function of an input set's number. Candidates of a case run one after the other within each round, so
that a noisy machine disturbs all of them alike; the figure is the median over rounds of the paired ratios. On a GPU each
candidate is a captured CUDA graph of many calls, which leaves launch gaps out, and the input sets together are larger
than the cache.
"""

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from train import machine

RESULTS = Path(__file__).parent / "results"
ROUNDS = {"cuda": 15, "cpu": 7}
ROUND_MS = {"cuda": 2.0, "cpu": 60.0}  # what one candidate's turn takes, at least
CACHE_BYTES = 192 << 20  # input sets of a case on a GPU: together beyond any level of its cache
MOST_SETS = 16
WARM = 3
LONG = 0.5  # seconds of warming up on a CPU after which a call needs no more of it, and is a turn by itself
FEWEST = 3  # rounds, however long they take

Candidate = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: what runs, beside what, and how far from the machine's limits it could be at best.

    ours, peers: functions that prepare a candidate for a number of input sets; one that raises is left out, with its reason.
    correct: compares ours with the reference; without a match there is no time.
    set_bytes: of one input set. bytes, flops: that must move through memory and be computed in matrix products;
    other_ms: a floor from another unit (exponentials). clips: in one call, for clips a second. rounds: 0 for the device's.
    figures: of other things that belong into the line.
    """

    part: str
    case: dict[str, Any]
    backend: str
    ours: Callable[[int], Candidate]
    peers: dict[str, Callable[[int], Candidate]]
    correct: Callable[[], bool]
    set_bytes: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    other_ms: float = 0.0
    clips: int = 0
    rounds: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    eager: tuple[str, ...] = ()  # peers (and "ours") that cannot be captured: they wait for the host
    seconds: float | None = None  # about how long the rounds may take; None for all of them


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One row of which more is measured than a time beside peers': a row of the paper's table, or a point of a curve.

    figures: measures, and returns what the line holds of it. correct: as in `Case`.
    """

    part: str
    case: dict[str, Any]
    backend: str
    correct: Callable[[], bool]
    figures: Callable[[], dict[str, Any]]


@dataclass
class Turn:
    """A candidate ready to be timed: `run` does `calls` of them."""

    run: Callable[[], None]
    calls: int
    ms: list[float] = field(default_factory=list)
    reads: object = None  # what a captured graph reads and does not hold


@dataclass(frozen=True)
class Ceiling:
    """What this device reaches in this process: a large copy (bytes read and written) and a large matrix product."""

    copy_gbs: float
    matmul_tflops: float


@cache
def ceiling(device: str) -> Ceiling:
    gpu = device == "cuda"
    n = 1 << (28 if gpu else 25)
    source = torch.randn(n // 4, device=device)
    target = torch.empty_like(source)
    copy = min(_samples(lambda: target.copy_(source), device))
    size, dtype = (8192, torch.bfloat16) if gpu else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = min(_samples(lambda: torch.mm(a, b), device))
    return Ceiling(2 * source.nbytes / copy / 1e6, 2 * size**3 / product / 1e9)


def _samples(call, device, count=10):
    """Milliseconds of single calls."""
    for _ in range(WARM):
        call()
    return [_clock(call, device) for _ in range(count)]


def _clock(call, device):
    if device == "cpu":
        started = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - started)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def measure(case: Case | Figures, device: str) -> dict[str, Any]:
    """The case's line of JSON. A peer that cannot run stands in `left_out` with the reason."""
    found = ceiling(device)
    line = {"part": case.part, "case": case.case, "ours": {"backend": case.backend}, "correct": bool(case.correct())}
    line |= {"ceiling": vars(found)}
    if line["correct"] and isinstance(case, Figures):
        line["figures"] = case.figures()
    elif line["correct"]:
        line |= case.figures
        line |= _timed(case, device)
        # On a CPU caches and instruction sets decide: these two rates would bound nothing there.
        floor = max(case.bytes / found.copy_gbs / 1e6, case.flops / found.matmul_tflops / 1e9, case.other_ms)
        if floor and device == "cuda":
            line |= {"floor_ms": floor, "share": floor / line["ours"]["ms"]}
    return line | about(device)


def _timed(case, device):
    # A function is compiled for so many shapes and types, and run as it is after that: each case has all of them.
    torch.compiler.reset()
    sets = 1 if device == "cpu" else min(MOST_SETS, max(2, -(-CACHE_BYTES // max(1, case.set_bytes))))
    with _aside(device):
        turns, left_out = {"": _prepare(case.ours(sets), sets, device, "ours" in case.eager)}, {}
    for name, build in case.peers.items():
        try:
            with _aside(device):
                turns[name] = _prepare(build(sets), sets, device, name in case.eager)
        except Exception as error:  # a peer may fail in any way; its reason is kept
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    _rounds(turns, device, case.seconds, case.rounds or ROUNDS[device])
    ours = turns.pop("").ms
    low, middle, high = statistics.quantiles(ours, n=4)
    result = {
        "ours": {"backend": case.backend, "ms": middle, "spread": (high - low) / middle},
        "peers": {name: statistics.median(turn.ms) for name, turn in turns.items()},
        "ratio": {
            name: statistics.median(theirs / mine for theirs, mine in zip(turn.ms, ours, strict=True))
            for name, turn in turns.items()
        },
    }
    if case.clips:
        times = {"ours": middle} | result["peers"]
        result["clips_per_second"] = {name: 1000 * case.clips / ms for name, ms in times.items()}
    if left_out:
        result["left_out"] = left_out
    turns.clear()
    gc.collect()
    return result


def in_turn(calls: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, one after the other within a round; on a GPU as captured graphs.

    seconds: about how long the rounds may take; there are `FEWEST` at least.
    """
    with _aside(device):
        turns = {name: _prepare(lambda i, call=call: call(), 1, device, False) for name, call in calls.items()}
    _rounds(turns, device, seconds, ROUNDS[device])
    return {name: turn.ms for name, turn in turns.items()}


def _rounds(turns, device, seconds, count):
    started = time.perf_counter()
    for number in range(count):
        if seconds is not None and number >= FEWEST and time.perf_counter() - started > seconds:
            break
        for turn in turns.values():
            turn.ms.append(_clock(turn.run, device) / turn.calls)


def _prepare(candidate: Candidate, sets: int, device: str, eager: bool) -> Turn:
    """Warm up, and make a turn that is long enough to time."""
    started = time.perf_counter()
    for i in range(max(WARM, sets)):
        candidate(i % sets)
        if device == "cpu" and time.perf_counter() - started > LONG:
            return Turn(lambda: candidate(0), 1)
        if i + 1 >= WARM and time.perf_counter() - started > LONG:
            break
    once = max(1e-4, min(_samples(lambda: candidate(0), device, 3)))
    calls = max(1, min(200, round(ROUND_MS[device] / once)))
    if once < ROUND_MS[device]:  # a longer call finds nothing in the cache of the one before
        calls = -(-calls // sets) * sets

    def all_calls():
        for i in range(calls):
            candidate(i % sets)

    if device == "cpu" or eager:
        return Turn(all_calls, calls)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=_stream()):
        all_calls()
    torch.cuda.synchronize()
    return Turn(graph.replay, calls, reads=candidate)


@cache
def _stream():
    return torch.cuda.Stream()


def _aside(device):
    """The stream on which candidates are made and captured: a backward runs on its forward's stream, and the default one
    cannot be captured."""
    return torch.cuda.stream(_stream()) if device == "cuda" else contextlib.nullcontext()


def compiled(function: Callable) -> Callable:
    """torch.compile of a function, which begins at its first call: making a row compiles nothing."""
    made = []

    def call(*args):
        if not made:
            made.append(torch.compile(function, dynamic=False))
        return made[0](*args)

    return call


def about(device: str) -> dict[str, Any]:
    """What a line says of where and when it was measured."""
    return {
        "machine": machine.describe(torch.device(device)),
        "software": machine.versions(),
        "commit": machine.commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def append(line: dict[str, Any], folder: Path = RESULTS) -> None:
    """Add a line to its part's file, at once, so that nothing is lost when a run is cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{line['part']}.jsonl").open("a") as handle:
        handle.write(json.dumps(line) + "\n")


def lines(part: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The lines of a part, or none."""
    path = folder / f"{part}.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def worst(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error against float64; infinite where something is not finite."""
    error = (found.double() - exact).abs().max()
    return float(error) if bool(error.isfinite()) else float("inf")


def holds(ours: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]) -> bool:
    """The 2x rule: each tensor's error is at most twice the plain reference's, plus one unit of the scale's last place."""
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        unit = torch.finfo(mine.dtype).eps * float(true.abs().max())
        if worst(mine, true) > 2 * worst(theirs, true) + unit:
            return False
    return True
