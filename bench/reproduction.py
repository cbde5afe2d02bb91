"""docs/REPRODUCTION.md: Table I on real recordings and its controls, from the collected lines of `train.reproduce`."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from bench import tables
from train import tables as papers

SPEECH, SOUNDS = "speechcommands", "esc10.csv"
# Two-sided 95 % quantile of Student's t for 1, 2, 3 ... degrees of freedom.
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
# What two rows differ in, and which: system minus system.
PAIRS = (
    ("Table I's first step: patches, and with them the masks' sizes", "ast_fftp", "ast_square"),
    ("Table I's second step: SpecMask for SpecAugment", "ast_fftp_specmask", "ast_fftp"),
    ("both steps", "ast_fftp_specmask", "ast_square"),
    ("patches alone, both under SpecMask", "ast_fftp_specmask", "ast_square_specmask"),
    ("patches alone, as many tokens and operations", "ast_fftp_specmask_64", "ast_square_specmask"),
    ("patches alone, no augmentation", "ast_fftp_plain", "ast_square_plain"),
    ("the mask on square patches", "ast_square_specmask", "ast_square"),
    ("the mask's fill alone: mean for zero", "ast_fftp_mean", "ast_fftp"),
    ("the mask's shape and area, both filled with the mean", "ast_fftp_specmask", "ast_fftp_mean"),
    ("the mask's shape alone, equal area and fill", "ast_fftp_specmask_equal", "ast_fftp_mean"),
    ("Muon for AdamW, square patches", "ast_square-optimiser-muon", "ast_square"),
    ("SpecAugment against none, FFTP", "ast_fftp", "ast_fftp_plain"),
    ("SpecMask against none, FFTP", "ast_fftp_specmask", "ast_fftp_plain"),
    ("AuM: patches", "aum_fftp", "aum_square"),
    ("AuM: SpecMask for SpecAugment", "aum_fftp_specmask", "aum_fftp"),
)
SCORE = "balanced_accuracy"
NEAR = 10  # patches between two texts of a picture that would touch
BEST = "speechcommands/best"
SECTIONS = (
    ("Spoken words, the paper's sizes", SPEECH, False),
    ("Twelve spoken words", SPEECH, True),
    ("Ten environmental sounds, each fold held out once", SOUNDS, True),
)


def page(lines: Callable[[str], list[dict]]) -> str:
    """The tables of the page. lines: of a part (bench.measure.lines)."""
    rows = newest(lines("reproduce"))
    sections = []
    for title, data, laptop in SECTIONS:
        some = _of(rows, data, laptop)
        parts = [part for part in (_systems(some), _pairs(some)) if part]
        sections += [f"### {title}", _about(some), *parts] if parts else []
    if best := _best([row for row in lines("train") if row.get("recipe") == BEST]):
        sections += [f"### Past the paper: `{BEST}`", best]
    return "\n\n".join(sections) or "No run has been collected yet."


def details(lines: Callable[[str], list[dict]]) -> str:
    """What the page has behind its answer: the sweep of rates and the ablation."""
    some = _of(newest(lines("reproduce")), SPEECH, True)
    return "\n\n".join(part for part in (_sweep(some), _ablation(some)) if part) or "No run has been collected yet."


def brief(lines: Callable[[str], list[dict]]) -> str:
    """README's: Table I's systems at the sizes of two CPU cores, on words and on sounds, beside the paper's figures."""
    rows = newest(lines("reproduce"))
    sets = [_of(rows, data, True) for data in (SPEECH, SOUNDS)]
    table = []
    for system in papers.TABLE1:
        found = [[row for row in some if _name(row) == system.recipe] for some in sets]
        if any(found):
            table.append([system.name, *map(_balanced, found), f"{system.paper['accuracy']:.2f}"])
    head = ["system of Table I", "12 words, balanced, %", "ESC-10, balanced, %", "the paper, 35 words, accuracy, %"]
    return tables.markdown(head, table) if table else "No run has been collected yet."


def _balanced(rows: list[dict]) -> str:
    """The mean over runs, their deviation and their number."""
    scores = [100 * row["metrics"][SCORE] for row in rows]
    return f"{_spread(scores)} ({len(scores)})" if scores else ""


def _of(rows: list[dict], data: str, laptop: bool) -> list[dict]:
    return [row for row in rows if _data(row) == data and _laptop(row) == laptop]


def _data(row: dict) -> str:
    """The data set; of one's own recordings the CSV's name."""
    return Path(row["case"]["csv"]).name if row["case"]["data"] == "folder" else row["case"]["data"]


def newest(rows: list[dict]) -> list[dict]:
    """The last line of each run; of a system that has runs of several lengths or settings, those like the last."""
    last = {(_data(row), row["system"]): tables.kind_of(row) for row in rows}
    runs = {}
    for row in rows:
        if tables.kind_of(row) == last[_data(row), row["system"]]:
            runs[_data(row), row["system"], row["case"]["seed"], row["case"]["test_fold"]] = row
    return list(runs.values())


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean of paired differences and half the width of its 95 % interval by Student's t; the latter NaN for one pair."""
    n = len(differences)
    if n < 2:
        return differences[0], math.nan
    quantile = T_QUANTILE[min(n - 1, len(T_QUANTILE)) - 1]
    return statistics.mean(differences), quantile * statistics.stdev(differences) / math.sqrt(n)


def differences(rows: list[dict], one: str, other: str, score: str = SCORE) -> list[float]:
    """Points by which `one` is ahead of `other`, of each seed and fold that both have."""
    scores: dict[str, dict[tuple, float]] = {}
    for row in rows:
        run = (row["case"]["seed"], row["case"]["test_fold"])
        scores.setdefault(_name(row), {})[run] = 100 * row["metrics"][score]
    first, second = scores.get(one, {}), scores.get(other, {})
    return [first[run] - second[run] for run in sorted(first.keys() & second.keys())]


def _laptop(row: dict) -> bool:
    """Whether a run has the sizes of two CPU cores."""
    return papers.LAPTOP in row["recipe"] or row["case"]["data"] == "folder"


def _name(row: dict) -> str:
    """The system's name in train.tables; Table II's rows of that size, which have no recipes of their own, are told apart."""
    own = row["system"].startswith(papers.LAPTOP) or not _laptop(row)
    return row["system"].removeprefix(papers.LAPTOP) if own else f"table2 {row['system']}"


def _about(rows: list[dict]) -> str:
    """What the runs were made on."""
    clips, letters = rows[0]["clips"], _letters(rows)
    machines = ", ".join(f"{machine}{f' ({letter})' if letter else ''}" for machine, letter in letters.items())
    return f"{clips['train']} training, {clips['validation']} validation and {clips['test']} test clips; {machines}."


def _letters(rows: list[dict]) -> dict[str, str]:
    """Machine -> the letter that stands for it beside minutes; none where all runs were made on one."""
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    return dict(zip(machines, "abcdefgh" if len(machines) > 1 else [""], strict=False))


def _minutes(rows: list[dict], letters: dict[str, str]) -> str:
    """Of the fastest run on each machine, as other work on a machine only adds to a time."""
    seconds = {machine: [row["seconds"] for row in rows if row["machine"] == machine] for machine in letters}
    return "; ".join(f"{min(some) / 60:.1f} {letters[machine]}".rstrip() for machine, some in seconds.items() if some)


def _systems(rows: list[dict]) -> str:
    """Every system that ran, beside the paper's figure."""
    letters = _letters(rows)
    systems = [(system.name, system.key, system) for system in (*papers.TABLE1, *papers.CONTROLS)]
    systems += [(f"Table II: {system.name}", f"table2 {system.recipe}", system) for system in papers.TABLE2]
    table = []
    for name, key, system in systems:
        ours = [row for row in rows if _name(row) == key]
        if not ours:
            continue
        accuracy, balanced = ([100 * row["metrics"][name] for row in ours] for name in ("accuracy", SCORE))
        paper = f"{system.paper['accuracy']:.2f}" if "accuracy" in system.paper else ""
        case = ours[0]["case"]
        cells = [name, str(ours[0]["patches"]), str(case["epochs"]), str(len(ours)), _spread(accuracy)]
        table.append([*cells, _spread(balanced), _minutes(ours, letters), *([paper] if case["data"] == SPEECH else [])])
    if not table:
        return ""
    head = ["system", "patches", "epochs", "runs", "test accuracy, %", "balanced, %", "minutes"]
    said = "± is the standard deviation over runs.\n\n"
    return said + tables.markdown([*head, *(["paper, 35 words, %"] if len(table[0]) > len(head) else [])], table)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _pairs(rows: list[dict]) -> str:
    table = []
    for question, one, other in PAIRS:
        found = differences(rows, one, other)
        if found:
            mean, half = interval(found)
            said = f"{mean:+.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")
            table.append([question, _minus(one, other), str(len(found)), said, _verdict(mean, half)])
    if not table:
        return ""
    said = "± is half of the 95 % interval of the paired differences; shown: it leaves zero out.\n\n"
    return said + tables.markdown(["what changes", "systems", "pairs", "points of balanced accuracy", "verdict"], table)


def _minus(*keys: str) -> str:
    """Two systems by the letters and numbers of the table above."""
    return " - ".join(map(_numbers().__getitem__, keys))


def _numbers() -> dict[str, str]:
    """Key -> letter and number."""
    return {system.key: system.name.split()[0] for system in (*papers.TABLE1, *papers.CONTROLS)}


def _verdict(mean: float, half: float) -> str:
    if math.isnan(half):
        return "one pair: no spread"
    return "shown" if abs(mean) > half else "within the spread"


def _sweep(rows: list[dict]) -> str:
    table = []
    for system in papers.systems("sweep", laptop=True):
        ours = [row for row in rows if row["system"] == system.key]
        for row in ours:
            found = row["validation"]
            cells = [f"{100 * found[name]:.1f}" for name in ("accuracy", SCORE)]
            table.append([system.name, str(row["case"]["epochs"]), *cells, f"{found['loss']:.3f}"])
    if not table:
        return ""
    head = ["patches, peak rate", "epochs", "validation accuracy, %", "balanced, %", "validation loss"]
    return "The sweep, one seed, judged on the validation list:\n\n" + tables.markdown(head, table)


def _ablation(rows: list[dict]) -> str:
    """Each ingredient beside the run without any, seed by seed."""
    plain, *added = papers.systems("ablation", laptop=True)
    ours = {system: [row for row in rows if row["system"] == system.key] for system in (plain, *added)}
    table = []
    for system in (s for s in (plain, *added) if ours[s]):
        scores = [100 * row["metrics"][SCORE] for row in ours[system]]
        gains = differences(rows, _name(ours[system][0]), plain.key.removeprefix(papers.LAPTOP))
        ahead = f"{statistics.mean(gains):+.1f}" if gains and system is not plain else ""
        table.append([system.name, str(len(scores)), _spread(scores), ahead])
    if not table:
        return ""
    head = ["S3 for three epochs, and", "runs", "test, balanced, %", "ahead of nothing added"]
    return "What ingredients of `speechcommands/best` give alone:\n\n" + tables.markdown(head, table)


def _best(rows: list[dict]) -> str:
    """The recipe's runs as it stands, and those with other settings, above what KWT's publication has on another set."""
    table = []
    for ours in tables.kinds(rows):
        case = ours[0]["case"]
        accuracy, balanced = ([100 * row["metrics"][name] for row in ours] for name in ("accuracy", SCORE))
        name = f"{tables.NAMES[case['model']]}-{case['size']}, {tables.PATCHES[case['patch']]} patches, twelve words"
        name += tables.changed(ours[0])
        cells = [name, f"{ours[0]['parameters'] / 1e6:.1f}", str(case["epochs"]), str(len(ours))]
        table.append([*cells, _spread(accuracy), _spread(balanced), tables.minutes(ours)])
    if not table:
        return ""
    for name, parameters, accuracy, deviation in papers.KWT:
        table.append(
            [f"{name}, 35 words, as published", f"{parameters}", "140", "", f"{accuracy} ± {deviation}", "", ""]
        )
    return tables.markdown(
        ["model and data", "M parameters", "epochs", "runs", "test accuracy, %", "balanced, %", "minutes"], table
    )


def shown(rows: list[dict]) -> list[dict]:
    """What the learning curves are drawn from, on words: Table I's systems and controls, and runs of the best recipe."""
    if any(row["part"] == "train" for row in rows):
        best = [row for row in rows if row.get("recipe") == BEST and "curve" in row]
        return [row for ours in tables.kinds(best) for row in ours]
    names = {system.key for system in (*papers.TABLE1, *papers.CONTROLS)}
    return [r for r in newest(rows) if r["case"]["data"] == SPEECH and _laptop(r) and _name(r) in names]


def with_patches(rows: list[dict]) -> list[dict]:
    """What the plot against patches is drawn from: the same and Table II's rows, of AST."""
    some = [r for r in newest(rows) if r["case"]["data"] == SPEECH and _laptop(r) and r["case"]["model"] == "ast"]
    some = [r for r in some if "-epochs-" not in r["system"]]  # without the sweep and the ablation
    return some if len({r["patches"] for r in some}) > 1 else []


def curves(drawn, rows: list[dict]) -> None:
    """Balanced accuracy on the validation list by minutes of training, of the systems and of the best recipe: a mark an
    epoch, means over the seeds, for the best recipe over those of one machine."""
    from matplotlib import colormaps

    (systems, past), below = drawn.subplots(2, 2, height_ratios=(5, 3))
    of_tables = [row for row in rows if row["part"] != "train"]
    for number, system in enumerate((*papers.TABLE1, *papers.CONTROLS)):
        if ours := [row for row in of_tables if _name(row) == system.key]:
            style = "--" if "square" in system.recipe else "-"
            colour = colormaps["tab20"](2 * number % 20 + number // 10)
            systems.plot(*_mean_curve(ours), style, marker=".", color=colour, label=system.name)
    for kind in tables.kinds([row for row in rows if row["part"] == "train"]):
        for machine in dict.fromkeys(row["machine"] for row in kind):
            ours, case = [row for row in kind if row["machine"] == machine], kind[0]["case"]
            label = f"{tables.NAMES[case['model']]} {tables.PATCHES[case['patch']]}, {case['epochs']} epochs"
            label += f"{tables.changed(kind[0])}, {machine}"
            label += f", {len(ours)} runs" if len(ours) > 1 else ""
            style = "--" if case["patch"] == "square" else "-"
            past.plot(*_mean_curve(ours), style, marker=".", markersize=3, label=label)
    systems.set(ylabel="balanced accuracy, validation list, %", title="Table I and controls")
    past.set(ylim=(80, 100), title=BEST)
    for axes, names in zip((systems, past), below, strict=True):
        names.axis("off")
        axes.grid(alpha=0.3)
        axes.title.set_size(9)
        axes.set_xlabel("minutes of training")
        if axes.lines:
            names.legend(handles=axes.lines, fontsize=7, loc="upper center")


def _mean_curve(rows: list[dict]) -> tuple[list[float], list[float]]:
    """Minutes after each epoch, by the fastest run, as other work on a machine only adds to a time; scores in percent."""
    # Seeds may have stopped in other epochs: the mean is over those that all have.
    scores = [statistics.mean(points) for points in zip(*(_curve(row) for row in rows), strict=False)]
    epoch = min(row["seconds"] / len(row["curve"]) for row in rows) / 60
    return [epoch * (i + 1) for i in range(len(scores))], scores


def _curve(row: dict) -> list[float]:
    return [100 * point[f"validation_{SCORE}"] for point in row["curve"]]


def patches(drawn, rows: list[dict]) -> None:
    """Balanced accuracy on the test list against the number of patches: the form of the paper's Figure 4.

    Each kind of patch has its own axis, as squares may lie far below.
    """
    numbers = _numbers()
    kinds = [kind for kind in ("fftp", "square") if any(row["case"]["patch"] == kind for row in rows)]
    every = drawn.subplots(
        1, len(kinds), width_ratios=[{"fftp": 3, "square": 2}[kind] for kind in kinds], squeeze=False
    )
    for kind, axes in zip(kinds, every[0], strict=True):
        found: dict[str, list[dict]] = {}
        for row in rows:
            if row["case"]["patch"] == kind:
                found.setdefault(_name(row), []).append(row)
        named: dict[int, list[tuple[float, str]]] = {}  # those with as many patches stand in one text
        for name, ours in found.items():
            scores = [100 * row["metrics"][SCORE] for row in ours]
            bar = statistics.stdev(scores) if len(scores) > 1 else 0
            x, y, case = ours[0]["patches"], statistics.mean(scores), ours[0]["case"]
            filled = "full" if "specmask" in name else "bottom" if name.endswith("_plain") else "none"
            style = {"fillstyle": filled, "marker": "o" if kind == "fftp" else "s"}
            colour = "tab:blue" if kind == "fftp" else "tab:orange"
            axes.errorbar([x], [y], yerr=[bar], color=colour, capsize=3, **style)
            text = numbers.get(name, name)
            if name.startswith("table2 "):
                text = f"{case['patch_time']} frames / {case['time_stride']}"
            named.setdefault(x, []).append((y, text))
        last = -math.inf
        for x, some in sorted(named.items()):
            text = "\n".join(f"{name}: {score:.1f}" for score, name in sorted(some, reverse=True))
            at = (x, statistics.mean(score for score, _ in some))
            if len(some) > 1:
                beside = {"xytext": (-8, 0), "va": "center", "ha": "right"}
            else:  # below, where the one before stands above and near
                beside = {"xytext": (0, 9 if x - last > NEAR else -15), "ha": "center"}
            axes.annotate(text, at, fontsize=7, textcoords="offset points", **beside)
            last = x
        axes.margins(x=0.5, y=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
        left, right = axes.get_xlim()  # texts stand left of the first patches
        axes.set_xticks([at for at in axes.get_xticks() if max(0, left) <= at <= right])
        axes.set_xlim(left, right)
        axes.set_xlabel(f"{tables.PATCHES[kind]} patches of a clip of one second")
        axes.grid(alpha=0.3)
    every[0][0].set_ylabel("balanced accuracy, test list, %")
