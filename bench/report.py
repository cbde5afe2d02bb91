"""python -m bench.report: write the tables of README, docs/PERFORMANCE.md and docs/REPRODUCTION.md anew; with --check, only
compare."""

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import measure, plots, reproduction, tables
from bench.parts import PARTS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "train.jsonl"
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "PERFORMANCE.md"
REPRODUCTION = ROOT / "docs" / "REPRODUCTION.md"
BEGIN, END = "<!-- results: python -m bench.report -->", "<!-- end of results -->"
DETAILS = "<!-- details: python -m bench.report -->"
SHORTEST = 6  # epochs of README's rows: shorter runs compare something, and tell little of a model
FIGURES = {"clips/s": "clips_per_second", "packed once, clips/s": "packing_clips_per_second"}  # column -> in a line
DATA = {"synth": "synth", "speechcommands": "12 spoken words"}
HEAD = (
    "| data | system | patches, mask | epochs | test accuracy, % | balanced, % | minutes |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def lines() -> list[dict]:
    return [json.loads(text) for text in RESULTS.read_text().splitlines()]


def table(rows: list[dict]) -> str:
    """One row of Markdown a case; seeds of a case are averaged, with each one's figure behind the mean.

    Of CPUs: what `make gpu` trains shows that the run works there, and no model. Not of one fold alone. Named recipes first,
    and of each model the longest run; what is made on the fly last.
    """
    rows = [row for row in rows if "NVIDIA" not in row["machine"] and not row["case"].get("test_fold")]
    rows = [row for row in rows if row["case"]["epochs"] >= SHORTEST]
    models = list(tables.NAMES)
    rows.sort(
        key=lambda row: (
            row["case"]["data"] == "synth",
            models.index(row["case"]["model"]),
            not row.get("recipe"),
            -row["case"]["epochs"],
        )
    )
    return "\n".join([HEAD, *(_row(group) for group in tables.kinds(rows))])


def _row(group: list[dict]) -> str:
    case, recipe = group[0]["case"], group[0].get("recipe")
    size = case["size"] + (f", {case['depth']} layers" if case["depth"] else "")
    height, width = {"fftp": (128, 10), "square": (16, 16)}[case["patch"]]
    geometry = f"{tables.PATCHES[case['patch']]} ({height}, {case['patch_time'] or width})"
    if case["time_stride"]:
        geometry += f"/{case['time_stride']}"
    epochs = f"{case['max_steps']} steps" if case["max_steps"] else str(case["epochs"])
    cells = [
        DATA.get(case["data"], case["data"]),
        f"{tables.NAMES[case['model']]}-{size}"
        + (f", `{recipe}`" if recipe else ", defaults")
        + tables.changed(group[0])
        + ("" if case["fused"] else ", float32 on the references"),
        f"{geometry}, {case['augment']}",
        epochs,
        _percent(group, "accuracy"),
        _percent(group, "balanced_accuracy"),
        tables.minutes(group),
    ]
    return "| " + " | ".join(cells) + " |"


def _percent(group: list[dict], name: str) -> str:
    values = [100 * row["metrics"][name] for row in group]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    each = ", ".join(f"{v:.1f}" for v in values)
    return f"**{statistics.mean(values):.1f}** ± {statistics.stdev(values):.1f} ({each})"


# README's: (what, part, what its case holds, the peer and what it is called).
TRAINING = "AST-tiny, FFTP: a training step of 128 words"
SQUARES = {"patches": 1212, "B": 1}
SPEED = (
    (TRAINING, "step", {}, "eager float32", "plain PyTorch, float32"),
    (TRAINING, "step", {}, "eager autocast", "plain PyTorch, autocast"),
    ("AST-base, 1212 squares", "infer", {**SQUARES, "dtype": "bfloat16"}, "transformers", "`transformers`"),
    ("AST-base, 1212 squares, float32", "infer", {**SQUARES, "dtype": "float32"}, "transformers", "`transformers`"),
    (
        "AST-base, (128, 50)/10, eight clips",
        "infer",
        {"patches": 96, "B": 8, "dtype": "bfloat16"},
        "square patches",
        "1212 squares",
    ),
)


def speed(lines: Callable[[str], list[dict]]) -> str:
    """Some of docs/PERFORMANCE.md: a row for each of SPEED, on each machine that has it."""
    table = []
    for what, part, wanted, peer, name in SPEED:
        for machine, rows in tables.by_machine(lines(part)).items():
            for row in rows:
                if row["correct"] and wanted.items() <= row["case"].items() and peer in row.get("ratio", {}):
                    table.append([what, machine, f"{row['ours']['ms']:.0f}", name, f"{row['ratio'][peer]:.2f}"])
    return tables.markdown(["in bfloat16, if not said otherwise", "machine", "ms", "beside", "its time / ours"], table)


CAPTIONS = (
    "Runs of six epochs and more:",
    "The six systems of the paper's Table I at sizes that two cores train (tiny models; six epochs on words, two for AuM; "
    "thirty on ESC-10), mean ± standard deviation (runs):",
    "Speed beside others on the same two cores, in turn; the rest, and an H200's: [docs/PERFORMANCE.md](docs/PERFORMANCE.md).",
)


def readme() -> str:
    """README's tables, each below a line that says what it is."""
    texts = (table(lines()), reproduction.brief(measure.lines), speed(measure.lines))
    return "\n\n".join(f"{caption}\n\n{text}" for caption, text in zip(CAPTIONS, texts, strict=True))


def performance(folder: Path = measure.RESULTS) -> str:
    """A section for each part: the newest line of each case, by machine, and pictures."""
    lines = partial(measure.lines, folder=folder)
    said = {name: f"{part.note}\n\n" if part.note else "" for name, part in PARTS.items()}
    sections = [f"## {part.title}\n\n{said[name]}{_part(name, lines)}" for name, part in PARTS.items()]
    sections.append(f"## Share of the ceiling\n\n{plots.reference('performance_roofline.png', lines)}")
    return "\n\n".join([*sections, f"## Tests on a GPU\n\n{tables.gpu_tests(lines('gpu_tests'))}"])


def _part(name, lines):
    rows = lines(name)
    if name == "table3":
        texts = [tables.table3(rows, lines("train")), plots.reference("performance_patches.png", lines)]
    elif name == "step_parts":
        texts = [tables.step_parts(rows), plots.reference("performance_step.png", lines)]
    elif name == "stream":
        texts = [tables.stream(rows)]
    elif name == "scale":
        texts = [tables.scale(rows)]
        texts += [plots.reference(f"performance_{which}.png", lines) for which in ("length", "batch")]
    else:
        texts = [tables.section(rows, _table)]
        texts += [tables.as_good(lines("train"))] if name == "step" else []
    return "\n\n".join(texts)


def _table(rows: list[dict]) -> str:
    """Ratios are the peer's time over ours: above 1, ours is faster. A row of figures has its step's time, and no peers."""
    rows = [{"ratio": {}, **row, **row.get("figures", {})} for row in rows]
    peers = list(dict.fromkeys(name for row in rows for name in row["ratio"] if name != row["ours"]["backend"]))
    shares = any("share" in row for row in rows)
    figures = {title: name for title, name in FIGURES.items() if any(name in row for row in rows)}
    head = ["case", "our backend", "ms", *(["of its floor's rate"] if shares else []), *figures]
    head += [f"{name} / ours" for name in peers]
    table = []
    for row in rows:
        case = tables.case_of(row)
        ours = row["ours"]
        if not row["correct"]:
            table.append([case, ours["backend"], "wrong", *[""] * (len(head) - 3)])
            continue
        cells = [case, ours["backend"], f"{ours.get('ms', row.get('step_ms')):.3g}"]
        if shares:
            cells.append(f"{100 * row['share']:.0f} %" if "share" in row else "")
        cells += [_rate(row.get(name)) for name in figures.values()]
        table.append(cells + [f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "" for name in peers])
    return tables.markdown(head, table)


def _rate(value: float | dict[str, float] | None) -> str:
    """A rate, or ours of several; nothing where the line has none."""
    value = value["ours"] if isinstance(value, dict) else value
    return "" if value is None else f"{value:.0f}"


def rendered(text: str, content: str, mark: str = BEGIN) -> str:
    """A document with the content between its marks.

    Raises ValueError when the marks are missing.
    """
    before, begin, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no place for the results: it needs the lines {mark} and {END}")
    return f"{before}{mark}\n{content}\n{END}{after}"


def main(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print(f"{__doc__}\nusage: python -m bench.report [--check]")
        return 0
    if arguments not in ([], ["--check"]):
        print("error: python -m bench.report takes --check or nothing.", file=sys.stderr)
        return 2
    behind = 0
    pages = {
        README: {BEGIN: readme()},
        PERFORMANCE: {BEGIN: performance()},
        REPRODUCTION: {BEGIN: reproduction.page(measure.lines), DETAILS: reproduction.details(measure.lines)},
    }
    for path, contents in pages.items():
        text = new = path.read_text()
        for mark, content in contents.items():
            new = rendered(new, content, mark)
        behind += new != text
        if arguments:
            print(
                f"{path.name} {'agrees with bench/results' if new == text else 'is behind: run python -m bench.report'}"
            )
        else:
            path.write_text(new)
            print(f"{path.name} rendered")
    if arguments:
        old = plots.behind(PERFORMANCE.parent, measure.lines)
        behind += len(old)
        print("\n".join(f"{name} is behind: run python -m bench.report" for name in old) or "the pictures agree")
    else:
        plots.write(PERFORMANCE.parent, measure.lines)
        print("pictures drawn")
    return 1 if arguments and behind else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
