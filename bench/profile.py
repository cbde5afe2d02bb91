"""python -m bench.profile [--model ast|aum] [--size ...] [--grid ...] [--device ...] [--out DIR] [--nvtx]

Where a training step's time goes: a table by range (load, front end, mask, embed, encoder, head, backward, optimiser) and
a trace of PyTorch's profiler, which chrome://tracing and ui.perfetto.dev open. The profiled step runs without a CUDA
graph, in which ranges vanish; the time of the step that users get stands beside it. --nvtx: only take the steps, for
Nsight to watch; the commands are printed where nsys is there.
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

import torch

from bench import bench_step_parts, systems, training
from bench.bench_patch_embed import GRIDS
from fftp.errors import UserError
from kernels import ranges
from train import machine

NSIGHT = """\
FFTP_NVTX=1 nsys profile --trace=cuda,nvtx --force-overwrite=true --output={out}/step {steps}
nsys stats --report nvtx_pushpop_sum --report cuda_gpu_kern_sum {out}/step.nsys-rep
FFTP_NVTX=1 ncu --nvtx --nvtx-include "{domain}embed/" --set full --launch-count 20 --export {out}/embed {steps}"""
WITHOUT_NSYS = "nsys is not on the path: docs/INTERNALS.md has its commands and ncu's, for a machine that has them."


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.split("\n\n")[1])
    parser.add_argument("--model", choices=systems.MODELS, default="ast")
    parser.add_argument("--size", choices=("tiny", "small", "base"), help="default: tiny on a CPU, base on a GPU")
    parser.add_argument("--grid", choices=GRIDS, default="(128, 10)/4", help="a row of the paper's Table II")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("profiles"), help="folder of the trace (default: %(default)s)")
    parser.add_argument("--nvtx", action="store_true", help="take the steps and measure nothing: for Nsight")
    wanted = parser.parse_args(arguments)
    try:
        device = machine.device_of(wanted.device).type
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = wanted.size or systems.SIZE[device]
    if wanted.nvtx:
        with training.trainer(wanted.model, size, GRIDS[wanted.grid], device) as made:
            made.epoch()
            made.epoch()
        return 0
    print(f"{machine.describe(torch.device(device))}: {wanted.model.upper()}-{size}, {wanted.grid}, ten-second clips")
    print(table(bench_step_parts.figures(wanted.model, size, wanted.grid, device)))
    print(f"trace: {trace(wanted.model, size, wanted.grid, device, wanted.out)}")
    print(nsight(wanted.model, size, wanted.grid, wanted.out) if shutil.which("nsys") else WITHOUT_NSYS)
    return 0


def nsight(model: str, size: str, name: str, out: Path) -> str:
    """The commands of Nsight Systems and Nsight Compute for these steps; ranges by the nvtx package are in its domain."""
    steps = f'{sys.executable} -m bench.profile --model {model} --size {size} --grid "{name}" --nvtx'
    domain = "fftp@" if importlib.util.find_spec("nvtx") else ""
    return NSIGHT.format(out=out, steps=steps, domain=domain)


def table(figures: dict) -> str:
    """A line a part, then what is between the parts, then the step beside the one without ranges."""
    parts = figures["parts_ms"]
    between = max(0.0, figures["step_ms"] - sum(parts.values()))
    rows = [f"{name:<18}{ms:>10.2f} ms{100 * ms / figures['step_ms']:>6.0f} %" for name, ms in parts.items()]
    rows.append(f"{'between them':<18}{between:>10.2f} ms{100 * between / figures['step_ms']:>6.0f} %")
    rows.append(f"{'step':<18}{figures['step_ms']:>10.2f} ms, {figures['precision']}")
    rows.append(f"{'without ranges':<18}{figures['plain_step_ms']:>10.2f} ms, the step that users get")
    return "\n".join(rows)


def trace(model: str, size: str, name: str, device: str, out: Path) -> Path:
    """Write the trace of an epoch's steps, ranges included; returns its path."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with ranges.made_by(torch.profiler.record_function), training.trainer(model, size, GRIDS[name], device) as made:
        made.epoch()
        with torch.profiler.profile(activities=kinds) as seen:
            made.epoch()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "step.json.gz"
    seen.export_chrome_trace(str(path))
    return path


if __name__ == "__main__":
    sys.exit(main())
