"""How much memory a call takes at the most."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def peak(call: Callable[[], object], device: str) -> int | None:
    """Bytes held at the most during a call, above what was held before it; None where the system does not tell.

    On a GPU these are PyTorch's own allocations, on a CPU the pages of the whole process (Linux).
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        # What earlier calls freed is still the process's, and would hide what this one takes.
        ctypes.CDLL(None).malloc_trim(0)
        before = _kilobytes("VmRSS")
        (PROCESS / "clear_refs").write_text("5")  # the high-water mark is now what is held
    except (AttributeError, OSError):
        call()
        return None
    call()
    return 1024 * max(0, _kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{PROCESS / 'status'} has no {name}")


def held(model: torch.nn.Module) -> int:
    """Bytes of a model's weights."""
    return sum(p.nbytes for p in model.parameters())
