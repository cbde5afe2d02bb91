"""The pictures of docs/PERFORMANCE.md and docs/REPRODUCTION.md; each says in itself which lines it shows."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import reproduction, tables
from fftp import figures
from kernels.ranges import PARTS as RANGES

MARKS = {"ast": "o-", "aum": "s-"}
COLOURS = {"ast": "tab:blue", "aum": "tab:orange"}
NOTE = "lines"  # the PNG's text that holds the digest of what was drawn


@dataclass(frozen=True, kw_only=True)
class Plot:
    """parts: whose lines it takes. chosen: of each part's lines, those to draw. draw(figure, lines)."""

    title: str
    parts: tuple[str, ...]
    chosen: Callable[[list[dict]], list[dict]]
    draw: Callable[[object, list[dict]], None]


def _of(key: str, value: str) -> Callable[[list[dict]], list[dict]]:
    return lambda rows: [row for row in tables.shown(rows) if row["case"].get(key) == value]


def _with_share(rows):
    return [row for row in tables.shown(rows) if "share" in row and row["case"].get("B", 32) == 32]


def _step(drawn, rows):
    axes = drawn.subplots()
    names = [f"{tables.NAMES[r['case']['model']]}-{r['case']['size']}\n{r['case']['grid']}" for r in rows]
    left = [0.0] * len(rows)
    for number, part in enumerate(RANGES):
        shares = [100 * row["figures"]["parts_ms"].get(part, 0.0) / row["figures"]["step_ms"] for row in rows]
        axes.barh(names, shares, left=left, label=part, color=f"C{number}")
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.barh(names, [100 - a for a in left], left=left, label="rest", color="lightgrey")
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"% of a training step of {rows[0]['case']['B']} clips of ten seconds")
    axes.legend(ncols=5, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _patches(drawn, rows):
    axes = drawn.subplots()
    for model in dict.fromkeys(row["case"]["model"] for row in rows):
        some = sorted((row for row in rows if row["case"]["model"] == model), key=lambda row: row["case"]["patches"])
        for dtype, style in (("float32", "--"), ("bfloat16", "-")):
            style = style if len(some) > 2 else ""  # two points are no trend
            axes.plot(
                [row["case"]["patches"] for row in some], [row["figures"]["latency_ms"][dtype] for row in some],
                MARKS[model][0] + style, color=COLOURS[model], fillstyle="none" if dtype == "float32" else "full",
                label=f"{tables.NAMES[model]}-{some[0]['case']['size']}, {dtype}",
            )  # fmt: skip
    _finish(axes, "patches of a ten-second clip", "ms at batch 1")


def _batch(drawn, rows):
    axes = drawn.subplots()
    _both(axes, rows, "B", lambda row, model: 1000 * row["case"]["B"] / row["figures"]["ms"][model])
    _finish(axes, f"batch, clips of {rows[0]['case']['seconds']} s", f"clips/s, {rows[0]['case']['dtype']}")


def _length(drawn, rows):
    time, memory = drawn.subplots(1, 2)
    _both(time, rows, "seconds", lambda row, model: row["figures"]["ms"][model])
    _finish(time, "length of the clip, s", f"ms at batch 1, {rows[0]['case']['dtype']}")
    told = [row for row in rows if None not in row["figures"]["peak_bytes"].values()]
    _both(memory, told, "seconds", lambda row, model: row["figures"]["peak_bytes"][model] / 1e6)
    _finish(memory, "length of the clip, s", "MB at the most")


def _roofline(drawn, rows):
    axes = drawn.subplots()
    names = [f"{row['part']}, {tables.case_of(row)}" for row in rows]
    axes.barh(names, [100 * row["share"] for row in rows], color="tab:blue")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("% of what copies, products or exponentials allow")


def _both(axes, rows, against, value):
    for model in tables.NAMES:
        x, y = [row["case"][against] for row in rows], [value(row, model) for row in rows]
        name = f"{tables.NAMES[model]}-{rows[0]['case']['size']}" if rows else tables.NAMES[model]
        axes.plot(x, y, MARKS[model], color=COLOURS[model], label=name)


def _finish(axes, x, y):
    """Both axes logarithmic, with plain numbers: of what was measured along x."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    measured = sorted({float(at) for line in axes.lines for at in line.get_xdata()})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(measured, [f"{at:g}" for at in measured], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"{x} (log scale)")
    axes.set_ylabel(f"{y} (log scale)")
    axes.grid(alpha=0.3)
    axes.legend()


PLOTS = {
    "performance_patches.png": Plot(
        title="Patches against latency", parts=("table3",), chosen=tables.shown, draw=_patches
    ),
    "performance_step.png": Plot(title="A step's time by part", parts=("step_parts",), chosen=tables.shown, draw=_step),
    "performance_length.png": Plot(
        title="Length against latency and memory", parts=("scale",), chosen=_of("against", "length"), draw=_length
    ),
    "performance_batch.png": Plot(
        title="Throughput against batch", parts=("scale",), chosen=_of("against", "batch"), draw=_batch
    ),
    "performance_roofline.png": Plot(
        title="Share of the ceiling",
        parts=("patch_embed", "selective_scan", "fbank", "spec_mask", "encoder"),
        chosen=_with_share,
        draw=_roofline,
    ),
    "reproduction_curves.png": Plot(
        title="Learning curves", parts=("reproduce", "train"), chosen=reproduction.shown, draw=reproduction.curves
    ),
    "reproduction_patches.png": Plot(
        title="Patches against accuracy",
        parts=("reproduce",),
        chosen=reproduction.with_patches,
        draw=reproduction.patches,
    ),
}


def lines_of(plot: Plot, lines: Callable[[str], list[dict]]) -> list[dict]:
    """What a plot draws; lines: a part's name -> its lines."""
    return [row for part in plot.parts for row in plot.chosen(lines(part))]


def reference(name: str, lines: Callable[[str], list[dict]]) -> str:
    """The picture's place in the page, or the sentence where there is nothing to draw."""
    plot = PLOTS[name]
    return f"![{plot.title}]({name})" if lines_of(plot, lines) else f"{plot.title}: not measured."


def _digest(plot, rows):
    """Of the lines and of what draws them."""
    seen = hashlib.blake2b(json.dumps(rows, sort_keys=True).encode(), digest_size=16)
    seen.update(Path(plot.draw.__code__.co_filename).read_bytes())
    return seen.hexdigest()


def write(folder: Path, lines: Callable[[str], list[dict]]) -> None:
    """Draw anew what is behind its lines, and remove what has none."""
    for name, plot in PLOTS.items():
        rows = lines_of(plot, lines)
        if not rows:
            (folder / name).unlink(missing_ok=True)
        elif not _shows(plot, folder / name, rows):
            sizes = {_roofline: (9, 1.2 + 0.25 * len(rows)), reproduction.curves: (9, 5.4)}
            drawn = figures.figure(*sizes.get(plot.draw, (8, 3.6)))
            plot.draw(drawn, rows)
            machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
            drawn.suptitle(f"{plot.title}: {machines}", fontsize=10)
            figures.save(drawn, folder / name, {NOTE: _digest(plot, rows)})


def behind(folder: Path, lines: Callable[[str], list[dict]]) -> list[str]:
    """Names of pictures that do not show the newest lines."""
    old = []
    for name, plot in PLOTS.items():
        rows, path = lines_of(plot, lines), folder / name
        if path.exists() != bool(rows) or (rows and not _shows(plot, path, rows)):
            old.append(name)
    return old


def _shows(plot, path, rows):
    from PIL import Image

    if not path.exists():
        return False
    with Image.open(path) as picture:
        return picture.info.get(NOTE) == _digest(plot, rows)
