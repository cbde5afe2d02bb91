"""The sections of docs/PERFORMANCE.md that are more than a time beside peers': Table III, a step's parts, growing work.

Each takes a part's lines and returns Markdown; what no line holds is "not measured".
"""

import json
import statistics
from collections.abc import Callable

from kernels.ranges import PARTS as RANGES
from train.settings import read_recipe

NAMES = {"ast": "AST", "aum": "AuM"}
PATCHES = {"fftp": "FFTP", "square": "square"}
NOT_MEASURED = "On a GPU: not measured in this part."
TITLES = {"cells": "mean cells hidden"}  # of what a case holds, where its name alone does not say it
AUDIOSET_CLIPS, AUDIOSET_EPOCHS, GPUS = 1.7e6, 5, (1, 8, 64)

CONTRADICTIONS = """\
Where the paper's columns and these differ, and why:

1. What the paper calls GFLOPs are billions of multiply-accumulates of AST-base with two class tokens, without the two
   products of attention; "all" has them. One multiply-accumulate is two operations.
2. The paper prints 4.15 for 96 patches. The count that gives its five other rows to 0.01 gives 8.80.
3. 1212 patches need AST's 1024 frames, 991 need 1000: the two kinds of rows do not see the same number of frames. AuM's
   own squares do not overlap (512 patches); here it has AST's, so that a row is one patching.
4. The square row was trained with SpecAugment, the others with SpecMask, so the mAP column mixes two changes. Steps are
   measured here with the same masks.
5. The paper's hours are 0.57 to 0.69 s a step for all rows up to 496 patches, 1.28 and 1.31 s for the two others: the
   floor is its loading of data. Ours are the measured step, data to optimiser, times the recipe's clips, without evaluation.
6. The paper says neither in which type nor at which batch it timed inference. Its times fit float32 without TensorFloat-32."""


def newest(rows: list[dict]) -> list[dict]:
    """The last line of each case, in the order in which cases first came."""
    return list({json.dumps(row["case"]): row for row in rows}.values())


def kind_of(row: dict) -> str:
    """All that a run was, but for its seed and fold."""
    case = {name: value for name, value in row["case"].items() if name not in ("seed", "test_fold")}
    return json.dumps([case, row.get("recipe"), row.get("changed")])


def kinds(rows: list[dict]) -> list[list[dict]]:
    """The rows of each kind. A named recipe's are of the recipe as it stands: its earlier forms had other lengths."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        recipe = row.get("recipe")
        if not recipe or row["changed"] or row["case"]["epochs"] == read_recipe(recipe, row["case"]["data"])["epochs"]:
            found.setdefault(kind_of(row), []).append(row)
    return list(found.values())


# What goes with a row's patches and epochs, which have columns of their own.
IMPLIED = ("warmup_epochs", "average_decay", "keep_tokens", "patch_time", "time_stride", "patch_freq", "freq_stride")


def changed(row: dict) -> str:
    """What a run changed in its recipe besides, each behind a comma."""
    return "".join(
        f", {name} {value:g}" if isinstance(value, float) else f", {name} {value}"
        for name, value in (row.get("changed") or {}).items()
        if name not in IMPLIED and row.get("recipe")
    )


def minutes(rows: list[dict]) -> str:
    """Of the fastest run on each machine, as other work on a machine only adds to a time."""
    seconds: dict[str, float] = {}
    for row in rows:
        seconds[row["machine"]] = min(row["seconds"], seconds.get(row["machine"], row["seconds"]))
    return "; ".join(f"{time / 60:.1f} ({machine})" for machine, time in seconds.items())


def by_machine(rows: list[dict]) -> dict[str, list[dict]]:
    """Machine -> the newest line of each of its cases; GPUs first."""
    machines: dict[str, list[dict]] = {}
    for row in rows:
        machines.setdefault(row["machine"], []).append(row)
    machines = dict(sorted(machines.items(), key=lambda found: ("NVIDIA" not in found[0], found[0])))
    return {machine: newest(some) for machine, some in machines.items()}


def shown(rows: list[dict]) -> list[dict]:
    """The lines of one machine, for a plot: a GPU's where there are any, else those of the machine measured last."""
    machines = by_machine(rows)
    on_gpu = [machine for machine in machines if "NVIDIA" in machine]
    last = rows[-1]["machine"] if rows else None
    return [row for row in machines.get((on_gpu or [last])[-1], []) if row["correct"]]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def case_of(row: dict) -> str:
    """A line's case as people read it."""
    case = {TITLES.get(name, name): value for name, value in row["case"].items()}
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in case.items())


def section(rows: list[dict], text_of: Callable[[list[dict]], str]) -> str:
    """A text for each machine, and the sentence for GPUs where none has been measured.

    A GPU's says of which commits it is: what runs there is written in places where it cannot be timed.
    """
    machines = by_machine(rows)
    texts = []
    for machine, some in machines.items():
        commits = ", ".join(dict.fromkeys(str(row.get("commit")).rstrip("+")[:12] for row in some))
        texts.append(f"{machine}{f', commit {commits}' if 'NVIDIA' in machine else ''}:\n\n{text_of(some)}")
    if not any("NVIDIA" in machine for machine in machines):
        texts.append(NOT_MEASURED)
    return "\n\n".join(texts)


def _digits(value: float) -> str:
    """Three digits, more where they stand before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _megabytes(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 1e6:.0f}"


def _wrong(row: dict) -> str:
    return "" if row["correct"] else "wrong, no figures"


def table3(rows: list[dict], trained: list[dict]) -> str:
    """What is counted, once; what is measured, for each machine; the paper's contradictions; all of AudioSet on paper.

    trained: lines of train.jsonl, for the accuracy.
    """
    measured = section(rows, lambda some: _table3_measured(some, trained))
    return "\n\n".join(filter(None, (_table3_counted(rows), measured, CONTRADICTIONS, whole_audioset(rows))))


def _table3_counted(rows):
    found = {(row["case"]["grid"], row["case"]["model"]): row for row in rows if row["correct"]}
    head = [
        "patch / stride",
        "patches",
        "the paper prints",
        "AST-base, without attention's products",
        "with them",
        "AuM-base, counted likewise",
        "all",
    ]
    cells = []
    for grid in dict.fromkeys(grid for grid, _ in found):
        both = [found.get((grid, model)) for model in NAMES]
        either = both[0] or both[1]
        line = [grid, str(either["case"]["patches"]), f"{either['figures']['published']['gflops']:.2f}"]
        for row in both:
            macs = row["figures"]["base_macs"] if row else None
            line += [f"{macs[name] / 1e9:.2f}" if macs else "" for name in ("paper", "all")]
        cells.append(line)
    return f"Counted, billions of multiply-accumulates a clip:\n\n{markdown(head, cells)}" if cells else ""


def _table3_measured(rows, trained):
    base = any(row["case"]["size"] == "base" for row in rows)  # the paper's columns are of AST-base on an A100
    head = ["model", "patch / stride", "ms, batch 1, float32", "bfloat16", *(["the paper, A100"] if base else [])]
    head += ["clips/s, float32", "bfloat16", "MB, inference", "MB, training", "step, ms", "hours"]
    head += ["the paper, A100", "mAP", "the paper"] if base else []
    cells = []
    for row in rows:
        case = row["case"]
        name = [f"{NAMES[case['model']]}-{case['size']}", case["grid"]]
        wrong = [_wrong(row)] + [""] * (len(head) - 3)
        cells.append(name + (_table3_cells(row, trained, base) if row["correct"] else wrong))
    right = [row["figures"] for row in rows if row["correct"]]
    return "\n\n".join(filter(None, (markdown(head, cells), _how(right[0]) if right else "")))


def _table3_cells(row, trained, base):
    figures, ast = row["figures"], row["case"]["model"] == "ast"
    published = figures["published"] if ast else dict.fromkeys(figures["published"])  # its Table III has AST alone

    def printed(name, digits):
        return "" if published[name] is None else f"{published[name]:.{digits}f}"

    latency, rate, step = figures["latency_ms"], figures["clips_per_second"], figures["step"]
    return [
        *(_digits(latency[dtype]) for dtype in ("float32", "bfloat16")),
        *([printed("ms", 2)] if base else []),
        *(_digits(rate[dtype]) for dtype in ("float32", "bfloat16")),
        *(_megabytes(count) for count in (figures["peak_bytes"], step["peak_bytes"])),
        f"{step['step_ms']:.0f}",
        _digits(figures["train_hours"]),
        *([printed("hours", 1), accuracy(row["case"], trained), printed("map", 2)] if base else []),
    ]


def _how(figures):
    step, recipe = figures["step"], figures["recipe"]
    return (
        f"Clips/s at batch {figures['throughput_batch']}. A step has {step['batch']} clips, in {step['precision']}, and is "
        f"the mean of {step['steps']}; hours are those of the recipe's {recipe['steps']:,} steps of "
        f"{recipe['clips']} clips at that rate."
    )


def accuracy(case: dict, trained: list[dict]) -> str:
    """mAP in percent of a system of this size on AudioSet, the mean over its runs, or "not measured"."""
    square = not case["grid"].startswith("(128,")
    pt, st = (int(text) for text in case["grid"].rstrip().split(", ")[1].split(")/"))
    wanted = {"data": "audioset", "model": case["model"], "size": case["size"], "patch": "square" if square else "fftp"}
    wanted |= {"patch_time": pt, "time_stride": st, "depth": 0, "max_steps": 0}
    found = [line["metrics"]["map"] for line in trained if wanted.items() <= line["case"].items()]
    return f"{100 * statistics.mean(found):.2f}" if found else "not measured"


def whole_audioset(rows: list[dict]) -> str:
    """On paper: hours of a run over all of AudioSet on so many GPUs, from the steps measured on one."""
    clips = f"{AUDIOSET_CLIPS / 1e6:.1f} million clips, {AUDIOSET_EPOCHS} epochs"
    run = f"A run over all of AudioSet ({clips}) on {_listed(GPUS)} GPUs"
    lines = [row for row in newest(rows) if "NVIDIA" in row["machine"] and row["correct"]]
    if not lines:
        return f"{run}: not measured. It will stand here as soon as a GPU's steps are among the lines."
    cells = []
    for row in lines:
        step = row["figures"]["step"]
        rate = 1000 * step["batch"] / step["step_ms"]
        alone = AUDIOSET_CLIPS * AUDIOSET_EPOCHS / rate / 3600
        case = row["case"]
        cells.append([f"{NAMES[case['model']]}-{case['size']}", case["grid"], row["machine"], f"{rate:.0f}"])
        cells[-1] += [f"{alone / count:.3g}" for count in GPUS]
    head = ["model", "patch / stride", "GPU", "clips/s of one", *(f"hours on {count}" for count in GPUS)]
    return (
        f"{run}, on paper: the clips, at the rate of the steps measured on one, divided by the GPUs. Exchanging gradients, "
        f"evaluation and reading the files are not in it; several GPUs have not been measured. Each keeps its batch, so the "
        f"whole batch grows with their number: another training than the paper's.\n\n{markdown(head, cells)}"
    )


def as_good(trained: list[dict]) -> str:
    """Runs that differ in `--fused` and the type it computes in, on CPUs: whether what is faster learns as well.

    Nothing where there are none.
    """
    runs: dict[str, dict[tuple[bool, str], list[dict]]] = {}
    for row in (r for r in trained if r["case"]["data"] == "speechcommands" and "NVIDIA" not in r["machine"]):
        case = {name: value for name, value in row["case"].items() if name not in ("seed", "fused")}
        kind = json.dumps([case, row.get("recipe"), row.get("changed"), row["machine"]])
        runs.setdefault(kind, {}).setdefault((row["case"]["fused"], row["precision"]), []).append(row)
    cells = []
    for ways in (ways for ways in runs.values() if len({fused for fused, _ in ways}) == 2):
        for (fused, precision), ours in sorted(ways.items()):
            case = ours[0]["case"]
            scores = [100 * row["metrics"]["balanced_accuracy"] for row in ours]
            model = f"{NAMES[case['model']]}-{case['size']}, {case['epochs']} epochs"
            how = f"{'`--fused`' if fused else 'the references'}, {precision}"
            each = ", ".join(f"{score:.1f}" for score in scores)
            cells.append([model, how, f"{statistics.mean(scores):.1f} ({each})", minutes(ours)])
    head = ["model", "how", "test, balanced, % (each seed)", "minutes"]
    return f"With and without `--fused`, twelve spoken words:\n\n{markdown(head, cells)}" if cells else ""


def step_parts(rows: list[dict]) -> str:
    return section(rows, _step_parts)


def _step_parts(rows):
    head = ["step", *RANGES, "rest", "step, ms", "without profiling, ms"]
    cells = []
    for row in rows:
        case = row["case"]
        name = f"{NAMES[case['model']]}-{case['size']}, {case['grid']}, {case['B']} clips"
        if not row["correct"]:
            cells.append([name, _wrong(row)] + [""] * (len(head) - 2))
            continue
        figures = row["figures"]
        of_parts = [figures["parts_ms"].get(part, 0.0) for part in RANGES]
        shares = [f"{100 * ms / figures['step_ms']:.0f} %" for ms in (*of_parts, figures["step_ms"] - sum(of_parts))]
        cells.append([name, *shares, f"{figures['step_ms']:.4g}", f"{figures['plain_step_ms']:.4g}"])
    return markdown(head, cells)


def stream(rows: list[dict]) -> str:
    return section(rows, _stream)


def _stream(rows):
    head = [
        "model",
        "patch / stride",
        "window, s",
        "hop, ms",
        "each hop",
        "ms, p50",
        "p99",
        "window anew, ms",
        "anew / ours",
    ]
    cells = []
    for row in rows:
        case = row["case"]
        name = [f"{NAMES[case['model']]}-{case['size']}", case["grid"], str(case["seconds"]), str(case["hop_ms"])]
        if not row["correct"]:
            cells.append([*name, _wrong(row)] + [""] * (len(head) - 5))
            continue
        figures = row["figures"]
        how = "state carried on" if figures["carried"] else "frames kept, model anew"
        ms = (figures["ms"]["p50"], figures["ms"]["p99"], figures["anew_ms"])
        cells.append([*name, how, *map(_digits, ms), f"{figures['anew_over_ours']:.2f}"])
    return markdown(head, cells)


def scale(rows: list[dict]) -> str:
    return section(rows, _scale)


def _scale(rows):
    lengths, batches = ([row for row in rows if row["case"]["against"] == which] for which in ("length", "batch"))
    texts = []
    if lengths:
        case = lengths[0]["case"]
        head = f"One clip, {case['grid']}, {case['dtype']}. {overtaking(lengths)}"
        texts += [head, _scale_table("seconds", lengths)]
    if batches:
        case = batches[0]["case"]
        texts += [f"Clips of {case['seconds']} s, {case['grid']}, {case['dtype']}:", _scale_table("B", batches)]
    return "\n\n".join(texts)


def _scale_table(against, rows):
    size = rows[0]["case"]["size"]
    names = [f"{name}-{size}" for name in NAMES.values()]
    rates = [f"{name}, clips/s" for name in names] if against == "B" else []
    head = [{"B": "batch"}.get(against, against), "patches", *(f"{name}, ms" for name in names), *rates, "AST / AuM"]
    head += [f"{name}, MB" for name in names]
    cells = []
    for row in rows:
        first = str(row["case"][against])
        if not row["correct"]:
            cells.append([first, _wrong(row)] + [""] * (len(head) - 2))
            continue
        figures = row["figures"]
        ms = [figures["ms"][model] for model in NAMES]
        line = [first, str(figures["patches"]), *map(_digits, ms)]
        line += [_digits(1000 * row["case"]["B"] / time) for time in ms] if rates else []
        line += [f"{figures['ast_over_aum']:.2f}", *(_megabytes(figures["peak_bytes"][model]) for model in NAMES)]
        cells.append(line)
    return markdown(head, cells)


def overtaking(rows: list[dict]) -> str:
    """In words: from which length on AuM was the faster one, at every longer length that was measured too."""
    rows = sorted((row for row in rows if row["correct"]), key=lambda row: row["case"]["seconds"])
    if not rows:
        return "At which length AuM overtakes AST: not measured."
    ast, aum = (f"{name}-{rows[0]['case']['size']}" for name in NAMES.values())
    faster = [row["figures"]["ast_over_aum"] > 1 for row in rows]
    lengths = [row["case"]["seconds"] for row in rows]
    since = next((i for i in range(len(rows)) if all(faster[i:])), None)
    if since is None:
        return f"{aum} does not overtake {ast} within the {lengths[-1]} s that were measured."
    if since == 0:
        return f"{aum} is faster than {ast} at every length that was measured, from {lengths[0]} s to {lengths[-1]} s."
    before, after = lengths[since - 1], lengths[since]
    return f"{aum} overtakes {ast} between {before} s and {after} s; on shorter clips it is the slower one."


def gpu_tests(rows: list[dict]) -> str:
    """Which test files passed on a GPU, and at which commit."""
    on_gpu = [row for row in rows if "NVIDIA" in row["machine"]]
    if not on_gpu:
        return "Not measured: `make gpu` has not left its lines here yet."
    cells = [[row["case"]["file"], row["said"], row["machine"], str(row["commit"])] for row in newest(on_gpu)]
    return markdown(["file", "pytest", "GPU", "commit"], cells)


def _listed(numbers):
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
