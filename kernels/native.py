"""Operations in C: the compiled library beside an operation, whether it can be used, and how it is called.

`python setup.py build_ext --inplace` builds the libraries; nothing is built on import.
"""

import ctypes
import importlib.machinery
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.autograd import forward_ad

SETS = ("the plain instruction set", "AVX2", "AVX-512", "AMX")
AMX = SETS.index("AMX")
TYPES = (torch.float32, torch.bfloat16)  # that operations read and write; others go through float32
BUILD = "python setup.py build_ext --inplace"

use_set: int | None = None  # an index of SETS in place of a wider one, for tests


@dataclass(frozen=True, eq=False)  # itself alone, which is quickly found in a cache
class Library:
    """folder/_native.*.so, made of sources (relative to the folder), with functions fftp_NAME that take a structure."""

    folder: Path
    sources: tuple[str, ...]
    functions: tuple[str, ...]

    def checksum(self) -> int | None:
        """Of the sources beside the library; None where they are not installed."""
        paths = [self.folder / name for name in self.sources]
        return zlib.crc32(b"".join(p.read_bytes() for p in paths)) if all(p.is_file() for p in paths) else None

    def path(self) -> Path | None:
        """The compiled library, or None."""
        paths = (self.folder / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
        return next((p for p in paths if p.is_file()), None)

    def refuses(self) -> str | None:
        """Why the library cannot be used, or None."""
        return _load(self)[1] or None

    def instruction_set(self) -> str:
        """The one in use, in words."""
        return SETS[self.widest()]

    def widest(self) -> int:
        """The index in SETS of the widest one in use, of those that the operation has code for."""
        widest = _answer(self, "widest")
        return widest if use_set is None else min(widest, use_set)

    def asks(self, name: str) -> bool:
        """What fftp_NAME, which takes nothing, answers of the processor."""
        return bool(_answer(self, name))

    def call(self, name: str, work: ctypes.Structure) -> None:
        """Run fftp_NAME on torch's number of threads. Raises MemoryError where there is no scratch space."""
        function = getattr(_load(self)[0], f"fftp_{name}")
        # ctypes lets go of Python's lock during the call.
        if function(ctypes.addressof(work), self.widest(), torch.get_num_threads(), _parallel_region()):
            raise MemoryError(f"{name}: no memory for the scratch space of one thread")


def structure(counts: str, pointers: str, reals: str = "") -> type[ctypes.Structure]:
    """What a function of a library takes: int64, then double, then pointers, by their names."""
    fields = [(name, ctypes.c_int64) for name in counts.split()] + [(name, ctypes.c_double) for name in reals.split()]
    fields += [(name, ctypes.c_void_p) for name in pointers.split()]
    return type("Given", (ctypes.Structure,), {"_fields_": tuple(fields)})


def pointers(*tensors: torch.Tensor | None) -> list[int | None]:
    """Where their numbers lie. Raises TypeError for a tensor that has none, as PyTorch's tracers make them."""
    found = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if 0 in found and any(t is not None and t.numel() and not t.data_ptr() for t in tensors):
        raise TypeError("an operation in C needs tensors with memory, not fake ones or those on meta")
    return found


def new(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory to write to, whatever type and device new tensors have by default."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def recorded(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what is done to any of them, or something else watches operations: then a call of C, which
    is none, would be passed over in silence."""
    return (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)) or watched()


def watched() -> bool:
    """Whether operations are being compiled or traced, dispatched to a mode (fake tensors, make_fx), or carry tangents."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """It, in float32 where it is not of TYPES."""
    return tensor if tensor.dtype in TYPES else tensor.float()


def float32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """It, in that type."""
    return tensor if tensor is None or tensor.dtype == torch.float32 else tensor.float()


@cache
def _load(library: Library) -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason why there is none."""
    path = library.path()
    if path is None:
        return None, f"it is not built: {BUILD} needs a C compiler"
    try:
        loaded = ctypes.CDLL(str(path))
        loaded.fftp_sources.restype = loaded.fftp_widest.restype = ctypes.c_int64
        built_from = loaded.fftp_sources()
        for name in library.functions:
            function = getattr(loaded, f"fftp_{name}")
            function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
            function.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        return None, f"the library did not load ({error}): {BUILD} builds it anew"
    if library.checksum() not in (None, built_from):
        return None, f"the library was built from other sources than these: {BUILD} builds it anew"
    return loaded, ""


@cache
def _answer(library: Library, name: str) -> int:
    function = getattr(_load(library)[0], f"fftp_{name}")
    function.restype = ctypes.c_int64
    return function()


@cache
def _parallel_region():
    """GOMP_parallel of the OpenMP that torch has loaded (libgomp, or libomp and libiomp5 in its stead), or None."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value
