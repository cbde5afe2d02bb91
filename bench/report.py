"""python -m bench.report: write the tables of README and docs/PERFORMANCE.md anew; with --check, only compare."""

import json
import statistics
import sys
from pathlib import Path

from bench import measure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "train.jsonl"
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "PERFORMANCE.md"
PARTS = {
    "patch_embed": "Patch embedding",
    "spec_mask": "SpecMask, drawn and painted",
    "fbank": "Front end: waveform to log-mel",
    "selective_scan": "AuM's scan, both directions",
    "rms_norm": "AuM's residual addition and norm",
}
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


def performance(folder: Path = measure.RESULTS) -> str:
    """A table for each part and machine, of the newest line of each case."""
    return "\n\n".join(f"## {title}\n\n{_part(measure.lines(part, folder))}" for part, title in PARTS.items())


def _part(rows: list[dict]) -> str:
    machines: dict[str, dict[str, dict]] = {}
    for row in rows:
        machines.setdefault(row["machine"], {})[json.dumps(row["case"])] = row  # later lines replace earlier ones
    texts = [f"{machine}:\n\n{_table(list(cases.values()))}" for machine, cases in machines.items()]
    if not any("NVIDIA" in machine for machine in machines):
        texts.append("On a GPU: not measured.")
    return "\n\n".join(texts)


def _table(rows: list[dict]) -> str:
    """Ratios are the peer's time over ours: above 1, ours is faster."""
    peers = list(dict.fromkeys(name for row in rows for name in row.get("ratio", {}) if name != row["ours"]["backend"]))
    shares = any("share" in row for row in rows)
    head = ["case", "ours", "ms", *(["of its floor's rate"] if shares else []), *(f"{name} / ours" for name in peers)]
    table = [head, ["---"] * len(head)]
    for row in rows:
        case = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["case"].items())
        ours = row["ours"]
        if not row["correct"]:
            table.append([case, ours["backend"], "wrong", *[""] * (len(head) - 3)])
            continue
        cells = [case, ours["backend"], f"{ours['ms']:.3g}"]
        if shares:
            cells.append(f"{100 * row['share']:.0f} %" if "share" in row else "")
        table.append(cells + [f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "" for name in peers])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def rendered(text: str, content: str) -> str:
    """A document with the content between its marks.

    Raises ValueError when the marks are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no place for the results: it needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("error: python -m bench.report takes --check or nothing.", file=sys.stderr)
        return 2
    behind = 0
    for path, content in ((README, table(lines())), (PERFORMANCE, performance())):
        text = path.read_text()
        new = rendered(text, content)
        behind += new != text
        if arguments:
            print(
                f"{path.name} {'agrees with bench/results' if new == text else 'is behind: run python -m bench.report'}"
            )
        else:
            path.write_text(new)
            print(f"{path.name} rendered")
    return 1 if arguments and behind else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
