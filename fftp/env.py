"""python -m fftp.env: versions, what is in use on this machine, and why each other backend is not.

With --check, every backend is run against its reference on small inputs, forward and backward.
"""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

import torch

import kernels
from kernels import dispatch
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


FOLLOW_AUTOCAST = ("patch_embed", "causal_conv")  # the others compute in float32 whatever --precision says


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


def check(device: str) -> list[tuple[str, str, float, float, bool]]:
    """Rows (operation, backend, its error, the reference's, good?) against float64, forward and every gradient.

    Good is the 2x rule: at most twice the reference's error in the same type, plus one unit in the last place.
    """
    rows = []
    for operation, call, tensors in _cases(device):
        exact = _run(operation, TABLE[operation][-1], call, [t.double() for t in tensors])
        plain = _run(operation, TABLE[operation][-1], call, tensors)
        for backend in TABLE[operation][:-1]:
            if backend.refuses(device, "float32"):
                continue
            got = _run(operation, backend, call, tensors)
            pairs = [(_error(a, b), _error(c, b), b) for a, b, c in zip(got, exact, plain, strict=True)]
            good = all(ours <= 2 * theirs + 2**-23 * float(b.abs().max()) for ours, theirs, b in pairs)
            rows.append((operation, backend.name, max(p[0] for p in pairs), max(p[1] for p in pairs), good))
    return rows


def _error(found, exact):
    return float((found.double() - exact).abs().max())


def _run(operation, backend, call, tensors):
    """Output and gradients of one backend, asked for by name."""
    before = os.environ.get("FFTP_BACKEND")
    os.environ["FFTP_BACKEND"] = f"{operation}={backend.name}"
    try:
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = call(*tensors)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), tensors)]
    finally:
        if before is None:
            del os.environ["FFTP_BACKEND"]
        else:
            os.environ["FFTP_BACKEND"] = before


def _cases(device):
    """(operation, function of its tensors, tensors) on small awkward sizes."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    def embed(log_mel, weight, bias, position, tokens):
        return kernels.patch_embed(log_mel, weight, bias, (3, 16), position, tokens, 1)

    yield "patch_embed", embed, [made(3, 31, 16), made(24, 1, 5, 16), made(24), made(9, 24), made(2, 24)]

    def scan(u, delta, A, B, C, D, z, bias, A_backward):
        return kernels.selective_scan(u, delta, -A.exp(), B, C, D, z, bias, -A_backward.exp())

    sizes = [(2, 19, 12), (2, 19, 12), (12, 16), (2, 19, 16), (2, 19, 16), (12,), (2, 19, 12), (12,), (12, 16)]
    yield "selective_scan", scan, [made(*size) for size in sizes]
    yield "causal_conv", kernels.causal_conv, [made(2, 19, 12), made(12, 4), made(12)]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments not in ([], ["--check"]):
        print("error: python -m fftp.env takes --check or nothing.", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    for name, version in versions():
        print(f"{name:<14} {version}")
    print(f"{'device':<14} {device} ({where})\n")
    try:
        dispatch.check_overrides()
    except dispatch.BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for dtype in ("float32", "bfloat16"):
        print(f"{'operation':<15} {'backend':<13} on {device}, {dtype}")
        for operation, backend, state in dispatch.table(device, dtype):
            if dtype == "float32" or operation in FOLLOW_AUTOCAST:
                print(f"{operation:<15} {backend:<13} {state}")
        print()
    if other := other_kernels_package():
        print(f"warning: another package called `kernels` lies at {other}; whichever is first on the path is imported.")
    if not arguments:
        return 0
    rows = check(device)
    for operation, backend, ours, theirs, good in rows:
        print(f"{operation:<15} {backend:<13} error {ours:.1e}, reference {theirs:.1e}: {'ok' if good else 'WRONG'}")
    return 0 if all(row[-1] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
