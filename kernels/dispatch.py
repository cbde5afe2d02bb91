"""Which backend runs an operation, and why not another.

One table: operation -> backends in order of preference, the plain PyTorch reference last. With `use_fused(True)` the
first backend that applies runs, otherwise the reference. The environment variable FFTP_BACKEND="op=name,op=name"
overrides both, for tests and benchmarks; a backend asked for by name that cannot run raises, it never falls back.
"""

import contextlib
import importlib
import importlib.util
import os
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import torch

from kernels import packages


class BackendError(ValueError):
    """A backend was asked for by name that does not exist or cannot run here."""


def _always(device: str, dtype: str) -> str | None:
    return None


def _exported(device: str, dtype: str) -> str | None:
    return "it is one loop of a graph, for which fftp.export alone asks"


def _cpu_float32(device: str, dtype: str) -> str | None:
    if device != "cpu":
        return f"it is written for the CPU's caches; the tensors are on {device}"
    # float64 is for proofs, and the reference is what they are about.
    return "it computes in float32; the tensors are float64" if dtype == "float64" else None


def _cpu_bfloat16(device: str, dtype: str) -> str | None:
    if device != "cpu":
        return f"it is for the CPU, where SDPA gains nothing from bfloat16; the tensors are on {device}"
    return None if dtype == "bfloat16" else f"SDPA is the faster one in {dtype}"


def _native(folder: str, only: str | None = None) -> Callable[[str, str], str | None]:
    """For an operation in C (kernels/native.py) on tensors of one type, or of the one type that the operation takes."""

    def refuses(device: str, dtype: str) -> str | None:
        if device != "cpu":
            return f"it is C for the CPU; the tensors are on {device}"
        if only is not None and dtype != only:
            return f"it computes in {only}; the tensors are {dtype}"
        return _native_module(folder).refuses()

    return refuses


@cache
def _native_module(folder: str) -> types.ModuleType:
    return importlib.import_module(f"kernels.{folder}.native")


def _native_attention(device: str, dtype: str) -> str | None:
    return _cpu_bfloat16(device, dtype) or _native("attention")(device, dtype)


def _native_float32(folder: str) -> Callable[[str, str], str | None]:
    """For an operation in C that takes every type but float64."""
    return lambda device, dtype: _cpu_float32(device, dtype) or _native(folder)(device, dtype)


def _triton(device: str, dtype: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"it runs on an NVIDIA GPU; the tensors are on {device}"


def _triton_float32(device: str, dtype: str) -> str | None:
    return _triton(device, dtype) or ("it adds in float32; the tensors are float64" if dtype == "float64" else None)


def _stock(wanted: packages.PackageFunction, device: str, dtype: str) -> str | None:
    if device != "cuda":
        return f"it runs on an NVIDIA GPU; the tensors are on {device}"
    if dtype == "float64":
        return "it takes float32, float16 and bfloat16; the tensors are float64"
    return packages.refusal(wanted)


def _mamba_ssm(device: str, dtype: str) -> str | None:
    if device == "cuda" and torch.are_deterministic_algorithms_enabled():
        return "its backward adds with atomics, and deterministic algorithms are asked for"
    return _stock(packages.SELECTIVE_SCAN, device, dtype)


def _causal_conv1d(device: str, dtype: str) -> str | None:
    return _stock(packages.CAUSAL_CONV, device, dtype)


def _triton_descriptor(device: str, dtype: str) -> str | None:
    reason = _triton_float32(device, dtype)
    if reason is None and device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9:
        return "tensor descriptors in hardware begin with sm_90"
    return reason


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    path: "module:function", imported when it is first chosen, so that no backend costs anything until it runs.
    refuses: (device type, dtype name) -> the reason why it cannot run, or None.
    by_name_only: device type -> why `--fused` passes it over there, although it can run; FFTP_BACKEND still reaches it.
    forward_only: it refuses tensors that require gradients.
    """

    name: str
    path: str
    refuses: Callable[[str, str], str | None] = _always
    by_name_only: dict[str, str] = field(default_factory=dict)
    forward_only: bool = False

    def load(self) -> Callable:
        return _load(self.path)


@cache
def _load(path: str) -> Callable:
    module, function = path.split(":")
    return getattr(importlib.import_module(module), function)


_INTERPRETED = {"cpu": "Triton's interpreter is for tests: ask for it by FFTP_BACKEND"}

TABLE: dict[str, tuple[Backend, ...]] = {
    "philox": (
        Backend("triton", "kernels.philox_kernel:words", _triton, _INTERPRETED),
        Backend("reference", "kernels.philox:words"),
    ),
    "waveforms": (
        Backend("triton", "kernels.waveform.kernel:waveforms", _triton, _INTERPRETED),
        Backend("native", "kernels.waveform.native:waveforms", _native("waveform")),
        Backend("reference", "kernels.waveform.reference:waveforms"),
    ),
    "fbank": (
        Backend("triton", "kernels.fbank.fused:fbank", _triton_float32, _INTERPRETED),
        Backend("native", "kernels.fbank.native:fbank", _native("fbank", "float32")),
        Backend("reference", "kernels.fbank.reference:fbank"),
    ),
    "spec_mask": (
        Backend("triton", "kernels.spec_mask.kernel:draw_spec_mask", _triton, _INTERPRETED),
        Backend("native", "kernels.spec_mask.native:draw_spec_mask", _native("spec_mask")),
        Backend("reference", "kernels.spec_mask.reference:draw_spec_mask"),
    ),
    "spec_augment": (
        Backend("triton", "kernels.spec_mask.kernel:draw_spec_augment", _triton, _INTERPRETED),
        Backend("native", "kernels.spec_mask.native:draw_spec_augment", _native("spec_mask")),
        Backend("reference", "kernels.spec_mask.reference:draw_spec_augment"),
    ),
    "apply_spec_mask": (
        Backend("triton", "kernels.spec_mask.kernel:apply_spec_mask", _triton, _INTERPRETED),
        Backend("native", "kernels.spec_mask.native:apply_spec_mask", _native("spec_mask")),
        Backend("reference", "kernels.spec_mask.reference:apply_spec_mask"),
    ),
    "apply_spec_augment": (
        Backend("triton", "kernels.spec_mask.kernel:apply_spec_augment", _triton, _INTERPRETED),
        Backend("native", "kernels.spec_mask.native:apply_spec_augment", _native("spec_mask")),
        Backend("reference", "kernels.spec_mask.reference:apply_spec_augment"),
    ),
    "paint": (
        Backend("triton", "kernels.spec_mask.kernel:paint", _triton, _INTERPRETED),
        Backend("reference", "kernels.spec_mask.reference:paint"),
    ),
    "normalise": (
        Backend("triton", "kernels.fbank.fused:normalise", _triton_float32, _INTERPRETED),
        Backend("native", "kernels.fbank.native:normalise", _native("fbank", "float32")),
        Backend("reference", "kernels.fbank.reference:normalise"),
    ),
    "patch_embed": (
        Backend("triton", "kernels.patch_embed.fused:patch_embed", _triton_float32, _INTERPRETED),
        Backend(
            "triton_descriptor",
            "kernels.patch_embed.fused:patch_embed_by_descriptor",
            _triton_descriptor,
            {
                **_INTERPRETED,
                "cuda": "it takes no masks, and little is gained (docs/INTERNALS.md): ask by FFTP_BACKEND",
            },
        ),
        Backend("native", "kernels.patch_embed.native:patch_embed", _native("patch_embed", "bfloat16")),
        Backend("reference", "kernels.patch_embed.reference:patch_embed"),
    ),
    "attention": (
        Backend("native", "kernels.attention.native:attention", _native_attention),
        Backend("products", "kernels.attention.products:attention", _cpu_bfloat16),
        Backend("reference", "kernels.attention.reference:attention"),
    ),
    "linear": (
        Backend("native", "kernels.linear.native:linear", _native("linear", "bfloat16")),
        Backend("reference", "kernels.linear.reference:linear"),
    ),
    "gelu": (
        Backend("triton", "kernels.gelu.fused:gelu", _triton_float32, _INTERPRETED),
        Backend("native", "kernels.gelu.native:gelu", _native_float32("gelu")),
        Backend("reference", "kernels.gelu.reference:gelu"),
    ),
    "rms_norm": (
        Backend("triton", "kernels.norm.fused:rms_norm", _triton_float32, _INTERPRETED),
        Backend("native", "kernels.norm.native:rms_norm", _native_float32("norm")),
        Backend("reference", "kernels.norm.reference:rms_norm"),
    ),
    "layer_norm": (
        Backend("triton", "kernels.norm.fused:layer_norm", _triton_float32, _INTERPRETED),
        Backend("native", "kernels.norm.native:layer_norm", _native_float32("norm")),
        Backend("reference", "kernels.norm.reference:layer_norm"),
    ),
    "selective_scan": (
        Backend("triton", "kernels.selective_scan.fused:selective_scan", _triton_float32, _INTERPRETED),
        Backend("mamba_ssm", "kernels.selective_scan.stock:selective_scan", _mamba_ssm),
        Backend(
            "triton_chunked",
            "kernels.selective_scan.chunked:selective_scan",
            _triton_float32,
            {
                **_INTERPRETED,
                "cuda": "it makes every exponential twice and serves single clips, without gradients: ask by FFTP_BACKEND",
            },
            forward_only=True,
        ),
        Backend("native", "kernels.selective_scan.native:selective_scan", _native_float32("selective_scan")),
        Backend("blocked", "kernels.selective_scan.blocked:selective_scan", _cpu_float32),
        Backend("loop", "kernels.selective_scan.loop:selective_scan", _exported),
        Backend("reference", "kernels.selective_scan.reference:selective_scan"),
    ),
    "causal_conv": (
        Backend("triton", "kernels.selective_scan.fused:causal_conv", _triton_float32, _INTERPRETED),
        Backend("causal_conv1d", "kernels.selective_scan.stock:causal_conv", _causal_conv1d),
        Backend("native", "kernels.selective_scan.native:causal_conv", _native_float32("selective_scan")),
        Backend("reference", "kernels.selective_scan.reference:causal_conv"),
    ),
}

_fused = False
_plain: dict[str, str] | None = None  # what `plain` names, while it holds
_in_use: dict[str, str] = {}
# Operation and backend -> what was loaded. No dict: torch.compile looks at a dict once, at an attribute when it is read.
_functions = types.SimpleNamespace()


def use_fused(fused: bool) -> None:
    """From now on: the first backend that applies (True), or the reference (False)."""
    global _fused
    _fused = bool(fused)


def fused() -> bool:
    return _fused


@cache
def _overrides(text: str) -> dict[str, str]:
    chosen = {}
    for pair in filter(None, (p.strip() for p in text.split(","))):
        operation, equals, name = pair.partition("=")
        if not equals or operation not in TABLE:
            raise BackendError(f"FFTP_BACKEND takes op=name,...: {pair!r} names none of {', '.join(TABLE)}.")
        names = [b.name for b in TABLE[operation]]
        if name not in names:
            raise BackendError(f"FFTP_BACKEND: {operation} has no backend {name!r}; there are {', '.join(names)}.")
        chosen[operation] = name
    return chosen


def check_overrides() -> None:
    """Read FFTP_BACKEND now, so that a wrong one is refused before any work.

    Raises BackendError.
    """
    _overrides(os.environ.get("FFTP_BACKEND", ""))


def select(operation: str, device: str, dtype: str) -> Backend:
    """The backend that a call on this device and dtype would take.

    Raises BackendError when FFTP_BACKEND asks for one that cannot run.
    """
    backends = TABLE[operation]
    if _plain is not None:
        return next(b for b in backends if b.name == _plain.get(operation, backends[-1].name))
    wanted = _overrides(os.environ.get("FFTP_BACKEND", "")).get(operation)
    if wanted is not None:
        backend = next(b for b in backends if b.name == wanted)
        if reason := backend.refuses(device, dtype):
            raise BackendError(f"FFTP_BACKEND asks for {operation}={wanted}, which cannot run: {reason}.")
        return backend
    if not _fused:
        return backends[-1]
    return _first(backends, device, dtype)


def _first(backends: tuple[Backend, ...], device: str, dtype: str) -> Backend:
    """What `--fused` takes."""
    return next(b for b in backends if device not in b.by_name_only and b.refuses(device, dtype) is None)


def choose(operation: str, tensor: torch.Tensor) -> Callable:
    """The function that runs this operation on such a tensor; remembers its name for `in_use`.

    The type that counts is the one computed in.
    """
    return getattr(_functions, _chosen(operation, tensor.device.type, str(computed_in(tensor)).removeprefix("torch.")))


def computed_in(tensor: torch.Tensor) -> torch.dtype:
    """The type that an operation on it computes in: autocast's where it is on, which leaves float64 and integers alone."""
    device = tensor.device.type
    mixed = tensor.is_floating_point() and tensor.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if mixed else tensor.dtype


def _chosen(operation, device, dtype):
    """The name in `_functions` of what runs: a text, so that it can be a constant of compiled code."""
    backend = select(operation, device, dtype)
    _in_use[operation] = backend.name
    name = f"{operation}_{backend.name}"
    setattr(_functions, name, backend.load())
    return name


# torch.compiler.assume_constant_result, without importing the compiler: the choice is made once, when a call is traced.
_chosen._dynamo_marked_constant = True


def unmixed(device: str) -> contextlib.AbstractContextManager:
    """In here autocast is off. Where it is off already nothing happens, which torch.export can write to a file."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


@contextlib.contextmanager
def plain(**named: str) -> Iterator[None]:
    """In here the references run, and for each operation named the backend of that name, whatever else was asked for and
    whatever it refuses."""
    global _plain
    before, _plain = _plain, named
    try:
        yield
    finally:
        _plain = before


def in_use() -> dict[str, str]:
    """Operation -> name of the backend that ran last, in the table's order, for those that ran at all."""
    return {operation: _in_use[operation] for operation in TABLE if operation in _in_use}


def forget() -> None:
    """Empty what `in_use` remembers: a new run starts."""
    _in_use.clear()


def table(device: str, dtype: str) -> list[tuple[str, str, str]]:
    """Rows (operation, backend, state) for `fftp.env`: "runs with --fused", "runs without", or why it is not taken."""
    rows = []
    for operation, backends in TABLE.items():
        first, alone = _first(backends, device, dtype), len(backends) == 1
        for backend in backends:
            reason = backend.refuses(device, dtype)
            if reason:
                state = f"cannot run: {reason}"
            elif device in backend.by_name_only:
                state = backend.by_name_only[device]
            elif backend is first:
                state = "runs" if alone else "runs with --fused"
            else:
                state = "runs without --fused" if backend is backends[-1] else f"{first.name} is preferred"
            rows.append((operation, backend.name, state))
    return rows
