"""python -m bench.run [--only PART ...] [--device auto|cpu|cuda] [--first N] [--seconds N] [--missing] [--results DIR]
                       [--data-root DIR]

Times every operation beside its peers, in turn, and appends a line of JSON a row under bench/results/. A row whose
correctness check fails has no time, and the command ends with exit code 1.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

from bench import measure
from bench.parts import PARTS
from fftp.errors import UserError
from train import machine


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.split("\n\n")[1])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="these parts alone")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--first", type=int, metavar="N", help="the first N rows of each part")
    parser.add_argument("--seconds", type=float, metavar="N", help="start no row of a part after so many seconds")
    parser.add_argument("--missing", action="store_true", help="leave out rows that this commit and machine have")
    parser.add_argument("--results", type=Path, default=measure.RESULTS, help="folder of the lines")
    parser.add_argument(
        "--told", action="store_true", help="get ready, then read --seconds from a line of standard input (bench.gpu)"
    )
    parser.add_argument(
        "--data-root", metavar="DIR", help="input: recordings in Speech Commands' layout, not made words"
    )
    wanted = parser.parse_args(arguments)
    if wanted.told:
        for part in wanted.only:
            importlib.import_module(f"bench.bench_{part}")
        wanted.seconds = float(sys.stdin.readline())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.device == "cuda" and device == "cpu":
        print("error: --device cuda: this machine has no GPU that torch can use; take --device cpu.", file=sys.stderr)
        return 2
    device = device if wanted.device == "auto" else wanted.device
    ceiling = measure.ceiling(device)
    print(f"{machine.describe(torch.device(device))}: copies {ceiling.copy_gbs:.0f} GB/s,", end=" ")
    print(f"products {ceiling.matmul_tflops:.2f} TFLOP/s ({'bfloat16' if device == 'cuda' else 'float32'})")
    try:
        wrong = sum(_part(part, device, wanted) for part in wanted.only)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if wrong else 0


def _part(part, device, wanted):
    """Measure a part's rows; returns how many were wrong."""
    about = measure.about(device)
    done = [
        line["case"]
        for line in measure.lines(part, wanted.results)
        if wanted.missing and all(line[name] == about[name] for name in ("machine", "commit"))
    ]
    started, wrong, left = time.monotonic(), 0, 0
    module = importlib.import_module(f"bench.bench_{part}")
    rows = module.cases(device, wanted.data_root) if part == "input" else module.cases(device)
    for number, case in enumerate(rows):
        if case.case in done or (wanted.first is not None and number >= wanted.first):
            continue
        if wanted.seconds is not None and time.monotonic() - started > wanted.seconds:
            left += 1
            continue
        try:
            line = measure.measure(case, device)
        except UserError:
            raise
        except Exception as error:  # the next row may be well
            wrong += 1
            print(f"{part} {case.case}: {type(error).__name__}: {error}"[:300], flush=True)
            continue
        measure.append(line, wanted.results)
        wrong += not line["correct"]
        print(row_of(line), flush=True)
    if left:
        print(f"{part}: {left} rows not started in {wanted.seconds:.0f} s; --missing goes on with them")
    return wrong


def row_of(line: dict) -> str:
    """A line of results as people read it."""
    text = f"{line['part']} {' '.join(f'{k}={v:g}' if isinstance(v, float) else f'{k}={v}' for k, v in line['case'].items())}"
    if not line["correct"]:
        return f"{text}: WRONG, not timed"
    if "figures" in line:
        return f"{text}: {said(line['figures'])}"
    ours = line["ours"]
    text += f": {ours['backend']} {ours['ms']:.4g} ms (spread {100 * ours['spread']:.0f} %)"
    if "share" in line:
        text += f", {100 * line['share']:.0f} % of its floor's rate"
    for name, ratio in line["ratio"].items():
        text += f"; {name} {ratio:.2f}x"
    for name, rate in line.get("clips_per_second", {}).items():
        text += f"; {name} {rate:.0f} clips/s"
    for name, reason in line.get("left_out", {}).items():
        text += f"; {name} left out: {reason}"
    return text


def said(figures: dict) -> str:
    """Figures, those within figures in brackets, in four digits."""
    texts = []
    for name, value in figures.items():
        if isinstance(value, dict):
            texts.append(f"{name} ({said(value)})")
        else:
            texts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(texts)


if __name__ == "__main__":
    sys.exit(main())
