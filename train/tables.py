"""The paper's Tables I to III: its figures as printed, what contradicts itself in them, and our runs beside them; the controls
that it lacks, and the sweep of learning rates."""

import statistics
from dataclasses import dataclass, replace

FOOTNOTES = {
    "published": "85.27, 13.28 and 91.58 are, to the last digit, the means that AuM's publication gives for its AST and AuM "
    "baselines (16 x 16 patches without overlap, Adam, steps down, binary cross-entropy): `--recipe DATA/aum_square_published` "
    "and `ast_square_published`. So the FFTP rows differ from them in recipe, not in patches alone.",
    "spread": "AuM's publication gives a deviation of 1.07 mAP and 3.17 points of accuracy over three seeds for its square "
    "rows; the paper gives one run of each system.",
    "headlines": "The abstract's +6.76 mAP is 18.01 - 11.25, the model of 496 patches; its +8.46 points are FFTP without "
    "SpecMask (93.73 - 85.27); its 83.26 % less computation is the model of 196 patches: three systems.",
    "frames": "1212 patches need 1016 to 1025 frames, 991 need 1000: the square rows saw other lengths than the FFTP rows.",
    "gmacs": "The paper's \"GFLOPs\" are multiply-accumulates of AST-base with two class tokens and without the products of "
    "attention: FLOPs with attention are more than twice as many.",
    "4.15": "By the formula that gives the five other rows to 0.01, 96 patches cost 8.80; 4.15 fits some 48 tokens. The text's "
    "0.52 ms is of that kind too.",
    "two changes": "The square row has SpecAugment and the FFTP rows have SpecMask: the table mixes two changes. FFTP alone "
    "has 15.38 at 991 patches (Table I).",
    "hours": "5.3 hours are 1.31 s a step, 2.3 hours 0.57 s: what keeps the smaller models near 2.3 hours is not the model.",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class System:
    """A row of a table: `recipe` is its name under a data set's recipes; `paper` the paper's figures as printed.

    flags: of train.run, on top of the recipe. notes: keys of FOOTNOTES.
    """

    name: str
    recipe: str
    paper: dict[str, float]
    notes: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What its runs are called."""
        return "-".join([self.recipe, *(flag.removeprefix("--") for flag in self.flags)])


def _one(name, recipe, audioset, speechcommands, *notes):
    return System(name=name, recipe=recipe, paper={"map": audioset, "accuracy": speechcommands}, notes=notes)


TABLE1 = (
    _one("S1 AST square, SpecAugment", "ast_square", 11.25, 85.27, "published", "spread", "frames"),
    _one("S2 AST FFTP, SpecAugment", "ast_fftp", 15.38, 93.73, "headlines"),
    _one("S3 AST FFTP, SpecMask", "ast_fftp_specmask", 18.32, 95.94, "headlines"),
    _one("S4 AuM square, SpecAugment", "aum_square", 13.28, 91.58, "published", "spread"),
    _one("S5 AuM FFTP, SpecAugment", "aum_fftp", 14.24, 94.68),
    _one("S6 AuM FFTP, SpecMask", "aum_fftp_specmask", 17.59, 96.49),
)


def _two(name, recipe, patches, gmacs, hours, latency, score, *notes):
    paper = {"patches": patches, "gmacs": gmacs, "hours": hours, "latency": latency, "map": score}
    return System(name=name, recipe=recipe, paper=paper, notes=notes)


TABLE2 = (
    _two("(16, 16) / (10, 10)", "ast_square", 1212, 103.35, 5.3, 14.50, 11.25, "frames", "two changes"),
    _two("(128, 50) / (128, 10)", "ast_fftp_specmask_96", 96, 4.15, 2.3, 0.96, 14.54, "4.15", "hours"),
    _two("(128, 25) / (128, 5)", "ast_fftp_specmask_196", 196, 17.30, 2.5, 2.18, 17.15, "headlines"),
    _two("(128, 10) / (128, 4)", "ast_fftp_specmask_248", 248, 21.48, 2.6, 2.62, 17.67),
    _two("(128, 10) / (128, 2)", "ast_fftp_specmask_496", 496, 42.79, 2.8, 5.38, 18.01, "headlines"),
    _two("(128, 10) / (128, 1)", "ast_fftp_specmask", 991, 85.32, 5.2, 11.62, 18.32, "two changes"),
)


# The paper's nearest relative, from scratch on the official 35 words: a token a frame, its own recipe of some 140 epochs
# (Berg et al., "Keyword Transformer", 2021, Table 2; V2-35): name, million parameters, accuracy and its deviation in %.
KWT = (("KWT-1", 0.6, 96.95, 0.14), ("KWT-2", 2.4, 97.74, 0.03))


def _control(name, recipe, *flags):
    return System(name=name, recipe=recipe, paper={}, flags=flags)


# What Table I needs beside it, so that patches, the masks' shape, their fill and their area are told apart.
CONTROLS = (
    _control("C1 AST square, SpecMask", "ast_square_specmask"),
    _control("C2 AST FFTP, SpecAugment filled with the mean", "ast_fftp_mean"),
    _control("C3 AST FFTP, SpecMask of SpecAugment's area", "ast_fftp_specmask_equal"),
    _control("C4 AST FFTP of the squares' tokens and operations, SpecMask", "ast_fftp_specmask_64"),
    _control("C5 AST square, no augmentation", "ast_square_plain"),
    _control("C6 AST FFTP, no augmentation", "ast_fftp_plain"),
    _control("C7 AST square, SpecAugment, by Muon", "ast_square", "--optimiser", "muon"),
)
RATES = ("3e-4", "1e-3", "3e-3")
SWEEP_EPOCHS = 3
SWEEP = tuple(
    System(name=f"{kind}, {rate}", recipe=recipe, paper={}, flags=("--epochs", str(SWEEP_EPOCHS), "--lr", rate))
    for kind, recipe in (("square", "ast_square"), ("FFTP", "ast_fftp"))
    for rate in RATES
)


def _ingredient(name, **changed):
    flags = []
    for key, value in changed.items():
        flags += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return System(name=name, recipe="ast_fftp_specmask", paper={}, flags=("--epochs", str(SWEEP_EPOCHS), *flags))


# What ingredients of the recipe speechcommands/best give alone, at the strengths of its first form: what three epochs can tell.
ABLATION = (
    _ingredient("S3, nothing added"),
    _ingredient("label smoothing of 0.1", label_smoothing=0.1),
    _ingredient("moving average of the weights, 0.999", average_decay=0.999),
    _ingredient("time shift, 100 ms either way", shift_ms=100.0),
    _ingredient("speed, 0.85 to 1.15", speed=0.15),
    _ingredient("background noise in four clips of five", background=0.8),
    _ingredient("gain, 6 dB either way", gain_db=6.0),
    _ingredient("mixup of three clips in ten", mixup=0.3),
    _ingredient("twice the mask's area", mask_area=2048, mask_width=24),
    _ingredient("that, and 22 of 30 tokens kept", mask_area=2048, mask_width=24, keep_tokens=22),
    _ingredient("98 frames, without padding", frames=98),
    _ingredient("classes equally often", balanced=True),
    _ingredient("Muon", optimiser="muon"),
)
SYSTEMS = {
    "table1": TABLE1,
    "table2": TABLE2,
    "table3": TABLE2,  # more columns, and the same systems
    "controls": CONTROLS,
    "sweep": SWEEP,
    "ablation": ABLATION,
}
LAPTOP = "laptop_"  # how the recipes of the size of two CPU cores begin


def systems(table: str, laptop: bool = False) -> tuple[System, ...]:
    """The rows of a table; laptop: of the size of two CPU cores.

    The rows of Tables II and III differ in their patches, which then are the paper's.
    """
    if not laptop or SYSTEMS[table] is TABLE2:
        return SYSTEMS[table]
    return tuple(replace(system, recipe=LAPTOP + system.recipe) for system in SYSTEMS[table])


HEADS = {
    "table1": (
        "system", "patches", "runs", "ours, {metric}", "balanced", "minutes", "paper: AudioSet-18k, mAP",
        "paper: Speech Commands, %",
    ),
    "table2": ("patch / stride", "patches", "runs", "ours, {metric}", "paper: patches", "paper: AudioSet-18k, mAP"),
    "controls": ("system", "patches", "runs", "ours, {metric}", "balanced"),
    "sweep": ("patches, peak rate", "patches", "runs", "validation, {metric}", "validation loss"),
    "ablation": ("S3 for three epochs, and", "patches", "runs", "ours, {metric}", "balanced", "minutes"),
    "table3": (
        "patch / stride", "ours, {metric}", "GMAC without attention's products", "with them", "training, minutes",
        "a clip alone, ms", "square's time over it", "paper: \"GFLOPs\"", "paper: training, h", "paper: inference, ms",
        "paper: mAP",
    ),
}  # fmt: skip
_TABLE_NOTES = {"table1": ("headlines",), "table2": ("headlines",), "table3": ("gmacs",)}
_TITLES = {
    "map": "mAP",
    "accuracy": "accuracy in %",
}


def metric_of(lines: list[dict]) -> str:
    """Which figure of merit the runs have: "map" for several labels a clip, else "accuracy"."""
    return "map" if "map" in lines[0]["metrics"] else "accuracy"


def spread(values: list[float]) -> str:
    """Mean and standard deviation (n - 1) in percent, with each value: "18.32 ± 0.41 (17.90, ...)"."""
    values = [100 * value for value in values]
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "not run"
    each = ", ".join(f"{value:.2f}" for value in values)
    return f"**{statistics.mean(values):.2f}** ± {statistics.stdev(values):.2f} ({each})"


def render(table: str, lines: list[dict], laptop: bool = False) -> str:
    """A table with our runs in it, as Markdown. lines: of finished runs (train.lines), each with its `system`."""
    if not lines:
        return "No run is finished yet."
    metric = metric_of(lines)
    marks: dict[str, int] = {}
    rows = [[head.format(metric=_TITLES[metric]) for head in HEADS[table]]]
    rows.append(["---"] * len(rows[0]))
    cells_of = {"table1": _row1, "table2": _row2, "table3": _row3, "sweep": _sweep_row, "ablation": _ablation_row}
    cells_of = cells_of.get(table, _control_row)
    for system in systems(table, laptop):
        ours = [line for line in lines if line["system"] == system.key]
        notes = "".join(f" [{marks.setdefault(note, len(marks) + 1)}]" for note in system.notes)
        score = spread([line["metrics"][metric] for line in ours])
        rows.append([system.name + notes, *cells_of(system, ours, score)])
    for note in _TABLE_NOTES.get(table, ()):
        marks.setdefault(note, len(marks) + 1)
    about = _about(lines)
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    notes = "\n".join(f"[{mark}] {FOOTNOTES[note]}\n" for note, mark in marks.items())
    return f"{about}\n\n{text}\n" + (f"\n{notes}" if notes else "")


def _row1(system: System, ours: list[dict], score: str) -> list[str]:
    paper = [f"{system.paper['map']:.2f}", f"{system.paper['accuracy']:.2f}"]
    return [*_counts(ours), score, _balanced(ours), _minutes(ours), *paper]


def _row2(system: System, ours: list[dict], score: str) -> list[str]:
    return [*_counts(ours), score, str(system.paper["patches"]), f"{system.paper['map']:.2f}"]


def _ablation_row(system: System, ours: list[dict], score: str) -> list[str]:
    return [*_control_row(system, ours, score), _minutes(ours)]


def _control_row(system: System, ours: list[dict], score: str) -> list[str]:
    return [*_counts(ours), score, _balanced(ours)]


def _sweep_row(system: System, ours: list[dict], score: str) -> list[str]:
    """Of the best epoch, on the validation list: the test list has no say in the choice of a rate."""
    if not ours:
        return [*_counts(ours), score, ""]
    metric = metric_of(ours)
    loss = statistics.mean(line["validation"]["loss"] for line in ours)
    return [*_counts(ours), spread([line["validation"][metric] for line in ours]), f"{loss:.3f}"]


def _counts(ours: list[dict]) -> list[str]:
    return [str(ours[0]["patches"]) if ours else "", str(len(ours))]


def _minutes(ours: list[dict]) -> str:
    """Of training; the least over the runs, since other work on the machine only adds to it."""
    return f"{min(line['seconds'] for line in ours) / 60:.1f}" if ours else ""


def _balanced(ours: list[dict]) -> str:
    """Mean and deviation of the balanced accuracy, where there is one."""
    values = [100 * line["metrics"]["balanced_accuracy"] for line in ours if "balanced_accuracy" in line["metrics"]]
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _row3(system: System, ours: list[dict], score: str) -> list[str]:
    paper = [f"{system.paper['gmacs']:.2f}", f"{system.paper['hours']:g}"]
    paper += [f"{system.paper['latency']:.2f}", f"{system.paper['map']:.2f}"]
    if not ours:
        return [score, *[""] * 5, *paper]
    macs = ours[0]["macs"]
    minutes = statistics.median(line["seconds"] for line in ours) / 60
    alone = next((line for line in ours if "latency_ms" in line), None)
    latency = [f"{alone['latency_ms']:.2f}", f"{alone['latency_ratio']:.2f}"] if alone else ["", ""]
    times = [f"{minutes:.1f}", *latency]
    return [score, f"{macs['paper'] / 1e9:.2f}", f"{macs['all'] / 1e9:.2f}", *times, *paper]


def _about(lines: list[dict]) -> str:
    """What the runs were made on: data, sizes, lengths, machines."""
    cases = [line["case"] for line in lines]

    def said(name: str) -> str:
        return ", ".join(dict.fromkeys(str(case[name]) for case in cases))

    clips = lines[0]["clips"]
    machines = ", ".join(dict.fromkeys(line["machine"] for line in lines))
    length = f"{said('max_steps')} steps" if any(case["max_steps"] for case in cases) else f"{said('epochs')} epochs"
    text = f"Data {said('data')}, {clips['train']} training and {clips['test']} test clips; size {said('size')}, {length}; "
    text += f"{machines}."
    if said("data") not in ("audioset", "speechcommands"):
        text += " Not the paper's data: its figures are here for their order alone."
    return text
