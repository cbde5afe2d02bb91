"""python -m bench.collect OUT...: append the figures of finished runs to bench/results/train.jsonl, a line each."""

import json
import sys
from pathlib import Path

from train.lines import line_of

RESULTS = Path(__file__).parent / "results" / "train.jsonl"


def main(folders: list[str]) -> int:
    if not folders:
        print("error: name the out folders of finished runs: python -m bench.collect OUT...", file=sys.stderr)
        return 2
    try:
        lines = [json.dumps(line_of(Path(folder))) for folder in folders]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as handle:
        handle.writelines(line + "\n" for line in lines)
    print(f"{len(lines)} lines appended to {RESULTS.name}; `python -m bench.report` renders them.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
