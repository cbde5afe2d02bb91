"""python -m bench.report: write README's table of results anew from bench/results/; with --check, only compare."""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "train.jsonl"
README = ROOT / "README.md"
BEGIN, END = "<!-- results: python -m bench.report -->", "<!-- end of results -->"
NAMES = {"ast": "AST", "aum": "AuM"}
DATA = {"synth": "synth", "speechcommands": "12 spoken words"}
HEAD = (
    "| data | system | patches, mask | epochs | test accuracy, % | balanced, % | minutes (median) | clips/s |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def lines() -> list[dict]:
    return [json.loads(text) for text in RESULTS.read_text().splitlines()]


def table(rows: list[dict]) -> str:
    """One row of Markdown a case; seeds of a case are averaged, with each one's figure behind the mean; times are medians."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        case = {name: value for name, value in row["case"].items() if name != "seed"}
        groups.setdefault(json.dumps(case), []).append(row)
    return "\n".join([HEAD, *(_row(group) for group in groups.values())])


def _row(group: list[dict]) -> str:
    case = group[0]["case"]
    size = case["size"] + (f", {case['depth']} layers" if case["depth"] else "")
    patch = {"fftp": "FFTP", "square": "square"}[case["patch"]]
    geometry = f"{case['patch_time'] or {'fftp': 10, 'square': 16}[case['patch']]} frames"
    if case["time_stride"]:
        geometry += f" / {case['time_stride']}"
    epochs = f"{case['max_steps']} steps" if case["max_steps"] else str(case["epochs"])
    cells = [
        DATA.get(case["data"]) or f"{case['csv']}, fold {case['test_fold']} held out",
        f"{NAMES[case['model']]}-{size}",
        f"{patch} {geometry}, {case['augment']}",
        epochs,
        _percent(group, "accuracy"),
        _percent(group, "balanced_accuracy"),
        f"{statistics.median(row['seconds'] for row in group) / 60:.1f}",
        f"{statistics.median(row['samples_per_second'] for row in group):.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _percent(group: list[dict], name: str) -> str:
    values = [100 * row["metrics"][name] for row in group]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    each = ", ".join(f"{v:.1f}" for v in values)
    return f"**{statistics.mean(values):.1f}** ± {statistics.stdev(values):.1f} ({each})"


def rendered(text: str) -> str:
    """README with the table between its marks as the results have it.

    Raises ValueError when the marks are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no place for the results: it needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table(lines())}\n{END}{after}"


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("error: python -m bench.report takes --check or nothing.", file=sys.stderr)
        return 2
    text = README.read_text()
    new = rendered(text)
    if arguments:
        print(
            "README.md agrees with bench/results" if new == text else "README.md is behind: run python -m bench.report"
        )
        return 0 if new == text else 1
    README.write_text(new)
    print("README.md rendered")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
