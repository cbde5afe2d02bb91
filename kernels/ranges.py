"""NVTX ranges for Nsight: named spans on its time line, and nothing at all when nobody profiles."""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

# Nsight Systems and Nsight Compute announce themselves by these variables; FFTP_NVTX=1 asks for ranges by hand.
_WATCHED = ("NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID", "FFTP_NVTX")
PARTS = (
    "load",
    "front end",
    "mask",
    "embed",
    "encoder",
    "head",
    "backward",
    "optimiser",
)  # of a training step, in order
_made_by_another = False
_NOTHING = contextlib.nullcontext()


def watched() -> bool:
    """Whether somebody profiles: an NVTX tool, or whoever uses `made_by`."""
    return _made_by_another or any(os.environ.get(name) for name in _WATCHED)


def _choose():
    if not watched():
        return lambda name: _NOTHING
    try:
        import nvtx
    except ImportError:
        if not torch.version.cuda:
            raise
        return torch.cuda.nvtx.range  # raises on a build without CUDA; its ranges are in NVTX's default domain
    return lambda name: nvtx.annotate(name, domain="fftp")


_make = _choose()  # once, at import


def range(name: str):
    """`with ranges.range("embed"): ...` marks a span. The names are the same in every model: `PARTS`."""
    return _make(name)


@contextlib.contextmanager
def made_by(make: Callable[[str], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Within it, spans are what `make` returns for their name: for a profiler that is no NVTX tool."""
    global _make, _made_by_another
    before = _make, _made_by_another
    _make, _made_by_another = make, True
    try:
        yield
    finally:
        _make, _made_by_another = before
