"""The parts of the page that come from the run's own files: headline, learning curves, settings."""

import math
import shlex

from fftp import run_folder
from fftp.checkpoint import CheckpointConfig
from fftp.page import curves, markup
from fftp.page.markup import percent, text
from fftp.run_folder import Run
from fftp.scores import Scores

MODELS = {"ast": "AST", "aum": "AuM"}
COLOURS = ("one", "two", "three")


def name_of(run: Run) -> str:
    """What was trained, on what."""
    s = run.settings
    depth = f", {s['depth']} layers," if s["depth"] else ""
    return f"{MODELS.get(s['model'], s['model'])}-{s['size']}{depth} on {s['data']}"


def head(run: Run, config: CheckpointConfig | None, links: dict[str, str]) -> str:
    """Title, state, and links to the sections: name -> title."""
    s = run.settings
    planned, done = s["epochs"], len(run.history)
    parts = [f"{len(run.classes)} classes", f"{done} epoch{'s' * (done != 1)}"]
    if config is not None:
        grid = config.model.grid
        kind = "full-frequency" if grid.full_frequency else "square"
        size = f"{grid.pt} frames" if grid.full_frequency else f"{grid.pt} frames x {grid.pf} bins"
        parts.append(f"{grid.N} {kind} patches of {size}, one every {grid.st} frames")
    parts += [run_folder.MASKS[s["augment"]], f"seed {s['seed']}"]
    if run.result is not None:
        state = '<span class="state">finished</span>'
        more = ""
    else:
        state = f'<span class="state open">unfinished: {done} of {planned} epochs</span>'
        again = f"python -m train.run --resume --out {shlex.quote(str(run.folder))}"
        more = markup.missing("This run has not ended. It goes on by", again)
    items = "".join(f'<li><a href="#{name}">{text(title)}</a></li>' for name, title in links.items())
    return (
        f'<header>\n<p class="eyebrow">Report of the run {text(run.folder.resolve().name)} {state}</p>\n'
        f'<h1>{text(name_of(run))}</h1>\n<p class="lead">{text("; ".join(parts))}</p>\n{more}\n'
        f'<nav aria-label="Sections"><ul>{items}</ul></nav>\n</header>'
    )


def tiles(run: Run, scores: Scores | None, split: str) -> str:
    """The score with its spread, then time, size, machine."""
    figures, about = _figures(run, scores, split)
    spread = scores.spread if scores is not None else {}
    first = run.key if run.key in figures else next((name for name in run_folder.FIGURES if name in figures), None)
    made = []
    if first is not None:
        for name, label in run_folder.FIGURES.items():
            if name in figures and math.isfinite(figures[name]):
                made.append(_score(label, figures[name], spread.get(name), about, main=name == first))
    made.sort(key=lambda tile: "tile main" not in tile)
    result = run.result or {}
    seconds = result.get("seconds", run.history[-1]["seconds"] if run.history else None)
    if seconds is not None:
        rate = f"{result['samples_per_second']:.0f} clips a second" if result else "so far"
        made.append(_tile("Training and validation", duration(seconds), rate))
    if result:
        macs = f"{result['macs'] / 1e9:.3g} G multiply-adds a clip"
        made.append(_tile("Parameters", f"{result['parameters'] / 1e6:.2f} M", f"{macs}; {result['precision']}"))
    made.append(_tile("Clips", f"{run.clips.get('train', 0):,}", f"to train on; {_others(run.clips)}"))
    commit = f"commit {run.commit}" if run.commit else "outside of a checkout"
    versions = ", ".join(f"{name} {run.versions[name]}" for name in ("python", "torch") if name in run.versions)
    made.append(_tile("Machine", result.get("machine", run.machine), f"{commit}; {versions}"))
    return '<dl class="tiles" aria-label="Headline">\n' + "\n".join(made) + "\n</dl>"


def _figures(run, scores, split):
    """(figures, what they are of) of the split, or of what there is before the end of a run."""
    epoch = f", epoch {run.result['reported_epoch']}" if run.result is not None else ""
    if scores is not None:
        return scores.figures, f"{len(scores.names):,} {split} clips{epoch}"
    found = {} if run.result is None else run.result["metrics" if split == "test" else "validation"]
    if found:
        return found, f"{split} clips{epoch}"
    key = f"validation_{run.key}"
    best = max((line for line in run.history if key in line), key=lambda line: line[key], default=None)
    if best is None:
        return {}, ""
    found = {name.removeprefix("validation_"): value for name, value in best.items() if name.startswith("validation_")}
    return found, f"validation clips, best so far: epoch {best['epoch']}"


def _others(clips):
    return f"{clips.get('validation', 0):,} for validation, {clips.get('test', 0):,} for testing"


def _score(label, value, interval, about, main):
    more, bar = f"of {about}", ""
    if interval is not None:
        a, b = interval
        more = f"95 % interval {100 * a:.1f} to {100 * b:.1f} %, {about}"
        edges = f"--a:{100 * a:.1f}%;--b:{100 * b:.1f}%;--m:{100 * value:.1f}%"
        bar = (
            f'<dd class="more"><span class="range" style="{edges}" aria-hidden="true"><span></span><i></i></span></dd>'
        )
    return _tile(label[0].upper() + label[1:] if label.islower() else label, percent(value), more, bar, main)


def _tile(name, value, more, between="", main=False):
    return (
        f'<div class="tile{" main" if main else ""}"><dt>{text(name)}</dt><dd class="value">{text(value)}</dd>{between}'
        f'<dd class="more">{text(more)}</dd></div>'
    )


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def learning(run: Run) -> str:
    """Loss and validation figures by epoch, drawn and as a table."""
    history = run.history
    if not history:
        return markup.missing("No epoch has been finished yet: there are no curves.")
    losses = [curves.Line("training, augmented", "one", _points(history, "train_loss"))]
    losses.append(curves.Line("validation", "two", _points(history, "validation_loss")))
    per_epoch = history[0]["step"]
    inner = [(step / per_epoch, loss) for line in history for step, loss in line["losses"].items()]
    losses.append(curves.Line("training, single steps", "one", inner, faint=True))
    charts = [curves.chart("Loss", "", losses, 3)]
    names = [name for name in run_folder.FIGURES if f"validation_{name}" in history[0]]
    measured = [
        curves.Line(run_folder.FIGURES[name], colour, _points(history, f"validation_{name}", 100))
        for name, colour in zip(names, COLOURS, strict=False)
    ]
    if names:
        charts.append(curves.chart("Validation", " %", measured, 1))
    heads = [
        "epoch",
        "training loss",
        *(["validation loss"] if names else []),
        *(run_folder.FIGURES[n] for n in names),
        "time",
    ]
    rows = [
        [
            line["epoch"],
            f"{line['train_loss']:.4f}",
            *([f"{line['validation_loss']:.4f}"] if names and "validation_loss" in line else []),
            *(percent(line[f"validation_{n}"], 2) for n in names if f"validation_{n}" in line),
            duration(line["seconds"]),
        ]
        for line in history
    ]
    said = "" if names else markup.note("This data set has no validation list, so the last epoch is the reported one.")
    shown = '<div class="charts">\n' + "\n".join(charts) + "\n</div>"
    numbers = markup.folded(f"The same as a table ({len(rows)} epochs)", markup.table(heads, rows, label="Epochs"))
    return "\n".join([shown, said, numbers])


def _points(history, name, scale=1.0):
    return [(line["epoch"], scale * line[name]) for line in history if name in line]


def settings(run: Run) -> str:
    """Those that differ from the defaults, then all, then what it ran on."""
    folds = []
    if run.defaults:
        changed = {k: v for k, v in run.settings.items() if k not in run.defaults or run.defaults[k] != v}
        rows = [[_flag(name), _shown(value), _shown(run.defaults.get(name, ""))] for name, value in changed.items()]
        title = f"Different from the defaults ({len(rows)})"
        folds.append(markup.folded(title, markup.table(["setting", "here", "default"], rows, False, title)))
    else:
        folds.append(
            markup.note("This run did not write down the defaults of its version, so all settings stand together.")
        )
    rows = [[_flag(name), _shown(value)] for name, value in run.settings.items()]
    folds.append(
        markup.folded(f"All settings ({len(rows)})", markup.table(["setting", "value"], rows, False, "All settings"))
    )
    rows = [
        [name, value] for name, value in {**run.versions, **{f"{k} by": v for k, v in run.backends.items()}}.items()
    ]
    folds.append(markup.folded("Versions and backends", markup.table(["what", "which"], rows, False, "Versions")))
    return "\n".join(folds)


def _flag(name):
    return f"--{name.replace('_', '-')}"


def _shown(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value in (None, "") else value
