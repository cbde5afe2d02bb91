"""python -m bench.ahead PART DEVICE I/N: call rows I, I + N, ... of a part once, ours and its peers, and time nothing.

What is compiled on the way lies in Triton's and torch.compile's caches afterwards, where `bench.run` finds it.
"""

import importlib
import sys

import torch

from bench.measure import Case

MEMORY_SHARE = 0.15  # of a GPU's, for one of several such processes: tests run beside them


def main(arguments: list[str]) -> int:
    part, device, which = arguments
    first, step = map(int, which.split("/"))
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE)
    called = failed = 0
    for number, row in enumerate(importlib.import_module(f"bench.bench_{part}").cases(device)):
        if number % step != first:
            continue
        candidates = [row.correct]
        if isinstance(row, Case):
            candidates += [lambda build=build: build(1)(0) for build in (row.ours, *row.peers.values())]
        for call in candidates:
            called += 1
            try:
                call()
            except Exception:  # what cannot run is said by bench.run, with its reason
                failed += 1
    print(f"{part} {which}: {called} called, {failed} could not run")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
