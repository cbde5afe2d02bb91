"""NVTX ranges for Nsight: named spans on its time line, and nothing at all when nobody profiles."""

import contextlib
import os

# Nsight Systems and Nsight Compute announce themselves by these variables; FFTP_NVTX=1 asks for ranges by hand.
_WATCHED = ("NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID", "FFTP_NVTX")
_NOTHING = contextlib.nullcontext()


def watched() -> bool:
    """Whether somebody profiles."""
    return any(os.environ.get(name) for name in _WATCHED)


def _choose():
    if not watched():
        return lambda name: _NOTHING
    import nvtx

    return lambda name: nvtx.annotate(name, domain="fftp")


range = _choose()
"""`with ranges.range("embed"): ...` marks a span; the choice is made once, at import."""
