"""python -m bench.collect OUT...: append the figures of finished runs to bench/results/train.jsonl, a line each.

An OUT of `train.reproduce` has many: they go to bench/results/reproduce.jsonl.
"""

import json
import sys
from pathlib import Path

from train import reproduce
from train.lines import curve_of, line_of

RESULTS = Path(__file__).parent / "results"


def main(folders: list[str]) -> int:
    if folders in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not folders:
        print("error: name the out folders of finished runs: python -m bench.collect OUT...", file=sys.stderr)
        return 2
    found: dict[str, list[dict]] = {"train.jsonl": [], "reproduce.jsonl": []}
    try:
        for folder in map(Path, folders):
            if many := reproduce.read_lines(folder):
                if any("curve" not in line for line in many):
                    raise ValueError(f"{folder} is from before learning curves were kept: its lines are of no use.")
                found["reproduce.jsonl"] += many
            else:
                found["train.jsonl"].append(line_of(folder) | {"curve": curve_of(folder)})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    RESULTS.mkdir(exist_ok=True)
    for name, lines in found.items():
        known = set((RESULTS / name).read_text().splitlines()) if (RESULTS / name).exists() else set()
        new = [text for text in map(json.dumps, lines) if text not in known]
        if new:
            with (RESULTS / name).open("a") as handle:
                handle.writelines(text + "\n" for text in new)
        if lines:
            print(f"{len(new)} lines appended to {name}; `python -m bench.report` renders them.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
