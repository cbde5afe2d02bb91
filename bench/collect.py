"""python -m bench.collect OUT...: append the figures of finished runs to bench/results/train.jsonl, a line each."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "train.jsonl"
CASE = (
    "data",
    "model",
    "size",
    "depth",
    "patch",
    "patch_time",
    "time_stride",
    "augment",
    "epochs",
    "max_steps",
    "batch_size",
    "csv",
    "test_fold",
    "fused",
    "seed",
)


def line_of(out: Path) -> dict:
    """What is kept of a run: its case, figures, time, and what it ran on.

    Raises ValueError for a folder without a finished run.
    """
    try:
        result = json.loads((out / "result.json").read_text())
        about = json.loads((out / "settings.json").read_text())
        history = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    except FileNotFoundError as error:
        raise ValueError(f"{out} holds no finished run: {error.filename} is missing.") from None
    return {
        "part": "train",
        "case": {name: result["settings"][name] for name in CASE},
        "metrics": result["metrics"],
        "validation": result["validation"],
        "loss": {"first": history[0]["first_loss"], "last": history[-1]["last_loss"]},
        "seconds": result["seconds"],
        "samples_per_second": result["samples_per_second"],
        "step_ms": result["step_ms"],
        "seconds_to": result["seconds_to"],
        "parameters": result["parameters"],
        "macs": result["macs"],
        "clips": result["clips"],
        "backends": result["backends"],
        "precision": result["precision"],
        "machine": result["machine"],
        "software": about["versions"],
        "commit": result["commit"],
        "date": datetime.now(UTC).date().isoformat(),
    }


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
