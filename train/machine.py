"""What a run ran on: for settings.json, and for choosing device and precision."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from fftp.errors import UserError
from fftp.inference import precision_of as precision_of
from train import parallel

PACKAGES = ("torch", "numpy", "triton", "soundfile", "soxr", "safetensors", "mamba-ssm", "causal-conv1d")


def device_of(wanted: str) -> torch.device:
    """Raises UserError for a GPU that is not there. Each of several processes on a machine has a GPU of its own."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that torch can use; take --device cpu, or auto.")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if parallel.size() == 1:
        return torch.device("cuda")
    own, there = parallel.local_rank(), torch.cuda.device_count()
    if own >= there:
        raise UserError(
            f"Every process needs a GPU of its own, and this machine has {there}: start at most {there} here."
        )
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def describe(device: torch.device) -> str:
    """The processor's name, and how many threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'' if threads == 1 else 's'}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return None
    git = ["git", "-C", os.fspath(here)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")
