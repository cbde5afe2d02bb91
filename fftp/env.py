"""python -m fftp.env: versions, what is in use on this machine, and why each other backend is not.

With --check, every backend is run against its reference on small inputs, forward and backward.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
from kernels import dispatch, native
from kernels import philox as keyed
from kernels.dispatch import TABLE

PACKAGES = (
    "torch",
    "triton",
    "mamba-ssm",
    "causal-conv1d",
    "torchaudio",
    "soundfile",
    "soxr",
    "nvtx",
    "tyro",
    "matplotlib",
)


# The others compute in float32 whatever --precision says.
FOLLOW_AUTOCAST = ("patch_embed", "attention", "linear", "causal_conv")


def versions() -> list[tuple[str, str]]:
    rows = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def other_kernels_package() -> str | None:
    """The home of another top-level package called `kernels` (Hugging Face's), which transformers looks for."""
    ours = Path(kernels.__file__).resolve().parent
    for entry in sys.path:
        found = Path(entry or ".").resolve() / "kernels"
        if found != ours and (found / "__init__.py").is_file():
            return str(found)
    return None


def instruction_set() -> str | None:
    """The one that operations in C use, in words; None where no library is built that they can use."""
    libraries = (
        importlib.import_module(f"kernels.{name}.native").LIBRARY
        for name in ("waveform", "fbank", "gelu", "norm", "selective_scan")
    )
    widest = next((library.instruction_set() for library in libraries if library.refuses() is None), None)
    products = importlib.import_module("kernels.attention.native").LIBRARY
    if products.refuses() is None and products.widest() == native.AMX:
        return f"{widest}, and AMX in products of bfloat16"
    return widest


DRAWS = 4  # of the inputs of a check: in one the reference can be lucky, in a gradient of few numbers most of all


@dataclass(frozen=True)
class Checked:
    """How far a backend and the plain reference are from the float64 reference, at the worst tensor; whether that is good.

    Good is the 2x rule for every tensor, its largest errors over several draws of the inputs: at most twice the reference's
    error in the same type, plus one unit in the last place, or 1e-4 for logarithms of energies, where nearly empty bins show
    how a transform rounds. Integers have to be equal.
    """

    operation: str
    backend: str
    ours: float
    reference: float
    good: bool


def check(device: str, backends: dict[str, str] | None = None) -> list[Checked]:
    """Run backends on small awkward inputs against their references, forward and every gradient.

    backends: operation -> name, to check these alone; without it, all that can run on the device.
    """
    rows = []
    for drawn in zip(*(_cases(device, seed) for seed in range(DRAWS)), strict=True):
        operation, _, tensors = drawn[0]
        dtype = "bfloat16" if tensors[0].dtype == torch.bfloat16 else "float32"
        wanted = [
            backend
            for backend in TABLE[operation][:-1]
            if not backend.refuses(device, dtype) and (not backends or backends.get(operation) == backend.name)
        ]
        if not wanted:
            continue
        references = [_references(*case) for case in drawn]
        for backend in wanted:
            draws = []
            for (_, call, tensors), (exact, plain) in zip(drawn, references, strict=True):
                got = _run(operation, backend.name, call, tensors, not backend.forward_only)
                results = zip(got, exact[: len(got)], plain[: len(got)], strict=True)
                draws.append([(_error(a, b), _error(c, b), _slack(operation, a.dtype, b)) for a, b, c in results])
            tensorwise = [[max(numbers) for numbers in zip(*each, strict=True)] for each in zip(*draws, strict=True)]
            good = all(ours <= 2 * theirs + slack for ours, theirs, slack in tensorwise)
            worst = [max(each[i] for each in tensorwise) for i in (0, 1)]
            rows.append(Checked(operation, backend.name, *worst, good))
    return rows


def _references(operation, call, tensors):
    """What the reference gives in float64, and in the tensors' own types."""
    name = TABLE[operation][-1].name
    return [
        _run(operation, name, call, given)
        for given in ([t.double() if t.is_floating_point() else t for t in tensors], tensors)
    ]


def _error(found, exact):
    error = (found.double() - exact.double()).abs().max()
    return float(error) if error.isfinite() else float("inf")


def _slack(operation, dtype, exact):
    if operation == "fbank":
        return 1e-4
    return torch.finfo(dtype).eps * float(exact.abs().max()) if exact.is_floating_point() else 0.0


def _run(operation, backend, call, tensors, gradients=True):
    """Outputs, and gradients where they are wanted, of one backend, asked for by name."""
    before = os.environ.get("FFTP_BACKEND")
    os.environ["FFTP_BACKEND"] = f"{operation}={backend}"
    try:
        tensors = [t.detach().requires_grad_(gradients and t.is_floating_point()) for t in tensors]
        out = call(*tensors)
        if isinstance(out, tuple):
            return out
        if not gradients:
            return [out]
        # The same numbers in every type.
        weight = torch.linspace(-1, 1, out.numel(), device=out.device).bfloat16().to(out.dtype).view_as(out)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)]
    finally:
        if before is None:
            del os.environ["FFTP_BACKEND"]
        else:
            os.environ["FFTP_BACKEND"] = before


def _cases(device, seed):
    """(operation, function of its tensors, tensors drawn by the seed) on small awkward sizes, in bfloat16 where only that has
    other backends.

    A tuple that comes back has no gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    tickets = torch.arange(33, device=device)

    def made(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    def words(tickets):
        return keyed.philox(2**40 + 7, 77, torch.arange(9, device=device)[:, None], 2**31, tickets)

    yield "philox", words, [tickets]
    samples = torch.randint(-(2**15), 2**15, (9000,), dtype=torch.int16, generator=generator).to(device)
    start, length = (torch.tensor(numbers, device=device) for numbers in ([0, 8599, 77], [3001, 401, 5000]))

    def waveforms(samples, gain, weight):
        partner = (start.flip(0), length.flip(0), weight.detach().float())
        return (kernels.waveforms(samples, start, length, 3001, gain.detach().float(), partner),)

    yield "waveforms", waveforms, [samples, made(3), torch.tensor([0.3, 1.0, 0.5], device=device)]

    def fbank(waveform):
        return (kernels.fbank(waveform.detach(), length, T=20, roll=torch.tensor([3, -1, 0], device=device)),)

    yield "fbank", fbank, [0.1 * made(3, 3001)]

    def normalise(log_mel):
        return (kernels.normalise(log_mel.detach().clone(), -4.3, 4.6, (7, 3, start)),)

    yield "normalise", normalise, [made(3, 31, 17)]

    def spec_mask(tickets):
        return kernels.draw_spec_mask(7, 3, tickets, 101, 37, budget=900, max_width=16, max_height=37)

    yield "spec_mask", spec_mask, [tickets]

    def spec_augment(tickets):
        return kernels.draw_spec_augment(7, 3, tickets, 101, 37, max_frequency=20, max_time=30)

    yield "spec_augment", spec_augment, [tickets]

    def apply(log_mel, fill):
        painted, sizes = log_mel.detach().clone(), {"budget": 200, "max_width": 9, "max_height": 16}
        rectangles = kernels.apply_spec_mask(painted, fill.detach(), 7, 3, tickets[:3], **sizes)[0]
        return painted, rectangles

    yield "apply_spec_mask", apply, [made(3, 31, 16), made(3)]

    def apply_both(log_mel, fill):
        painted, sizes = log_mel.detach().clone(), {"max_frequency": 9, "max_time": 12}
        rectangles = kernels.apply_spec_augment(painted, fill.detach(), 7, 3, tickets[:3], **sizes)[0]
        return painted, rectangles

    yield "apply_spec_augment", apply_both, [made(3, 31, 16), made(3)]

    rectangles = torch.tensor([[[0, 31, 2, 5], [4, 9, 0, 16]]] * 3, dtype=torch.int32, device=device)

    def paint(log_mel, fill):
        return (kernels.paint(log_mel.detach().clone(), rectangles, fill.detach()),)

    yield "paint", paint, [made(3, 31, 16), made(3)]

    def embed(log_mel, weight, bias, position, tokens):
        return kernels.patch_embed(log_mel, weight, bias, (3, 16), position, tokens, 1)

    yield "patch_embed", embed, [made(3, 31, 16), made(24, 1, 5, 16), made(24), made(9, 24), made(2, 24)]

    def attention(x, bias):
        return kernels.attention(x, 2, bias)

    yield "attention", attention, [made(2, 37, 3 * 2 * 64).bfloat16(), made(3 * 2 * 64)]
    yield "linear", kernels.linear, [made(2, 37, 128).bfloat16(), made(192, 128).bfloat16()]

    def scan(u, delta, A, B, C, D, z, bias, A_backward):
        return kernels.selective_scan(u, delta, -A.exp(), B, C, D, z, bias, -A_backward.exp())

    L, E = 70, 40  # several chunks of time, and blocks of channels of which the last is cut
    sizes = [(2, L, E), (2, L, E), (E, 16), (2, L, 16), (2, L, 16), (E,), (2, L, E), (E,), (E, 16)]
    yield "selective_scan", scan, [made(*size) for size in sizes]

    for reverse in (False, True):

        def conv(u, weight, bias, reverse=reverse):
            return kernels.causal_conv(u, weight, bias, reverse)

        yield "causal_conv", conv, [made(2, 19, 24), made(24, 4), made(24)]

    def norm(x, residual, weight):
        return torch.cat(kernels.rms_norm(x, residual, weight, 1e-5))

    yield "gelu", kernels.gelu, [3 * made(2, 19, 24), made(24)]
    yield "rms_norm", norm, [made(2, 19, 24), made(2, 19, 24), made(24)]

    def centred_norm(x, residual, bias, weight, shift):
        return torch.cat(kernels.layer_norm(x, residual, bias, weight, shift, 1e-5))

    yield "layer_norm", centred_norm, [made(2, 19, 24), made(2, 19, 24), *(made(24) for _ in range(3))]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in (["-h"], ["--help"]):
        print(f"{__doc__}\nusage: python -m fftp.env [--check]")
        return 0
    if arguments not in ([], ["--check"]):
        print("error: python -m fftp.env takes --check or nothing.", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    own = f"{platform.machine()}, {threads} thread{'' if threads == 1 else 's'}"
    where = torch.cuda.get_device_name() if device == "cuda" else own
    for name, version in versions():
        print(f"{name:<14} {version}")
    print(f"{'device':<14} {device} ({where})")
    print(f"{'C':<14} {instruction_set() or 'not built'}\n")
    try:
        dispatch.check_overrides()
    except dispatch.BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for dtype in ("float32", "bfloat16"):
        print(f"{'operation':<18} {'backend':<13} on {device}, {dtype}")
        for operation, backend, state in dispatch.table(device, dtype):
            if dtype == "float32" or operation in FOLLOW_AUTOCAST:
                print(f"{operation:<18} {backend:<13} {state}")
        print()
    if other := other_kernels_package():
        print(f"warning: another package called `kernels` lies at {other}; whichever is first on the path is imported.")
    if not arguments:
        return 0
    rows = check(device)
    for row in rows:
        errors = f"error {row.ours:.1e}, reference {row.reference:.1e}"
        print(f"{row.operation:<18} {row.backend:<13} {errors}: {'ok' if row.good else 'WRONG'}")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
