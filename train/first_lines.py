"""What a run says before it trains: backends, model, data, and what its recipe sets."""

import numpy as np

from fftp import lead
from fftp.frontend import FrontEndSettings
from train import graph, machine, parallel, start
from train.data import clips
from train.data.pack import Pack
from train.settings import Settings
from train.step import Task, check_parts

# What else a run is made of than its first lines say, where it is not off.
AUGMENTATION = ("mixup", "roll", "noise", "gain_db", "shift_ms", "speed", "background")
TRAINING = ("balanced", "label_smoothing", "average_decay", "average_last")


def of(task: Task, packed: Pack, backends: dict[str, str]) -> list[str]:
    """What computes, then what is computed. backends: operation -> the one that it will take. Raises UserError as
    `step_line`."""
    s, config = task.settings, task.config
    taken = ", ".join(f"{name}={backend}" for name, backend in backends.items())
    precision = str(task.precision).removeprefix("torch.")
    parameters = sum(p.numel() for p in task.model.parameters())
    grid, counts = config.model.grid, [len(packed.indices(split)) for split in clips.SPLITS]
    name = {"ast": "AST", "aum": "AuM"}[s.model]
    shape = f"{grid.pt} frames x {grid.pf} bins, stride {grid.st} x {grid.sf}"
    said = [
        f"backends ({'fused' if s.fused else 'reference'}): {taken}; {precision}; {machine.describe(task.device)}",
        f"{name}-{s.size}, {config.model.depth} layers: {parameters / 1e6:.2f} M parameters, "
        f"{config.model.macs().all / 1e9:.3f} GMAC a clip, {grid.N} patches ({shape}), mask {s.augment}"
        + (f", {s.keep_tokens} patches in training" if s.keep_tokens else "")
        + (f", up to {lead.longest(grid, s.lead_clips)} more before {100 * s.lead:g} % in training" if s.lead else ""),
        f"{s.data}: {len(config.labels)} classes ({clips.listed(config.labels)}); clips {counts[0]} train, {counts[1]} "
        f"validation, {counts[2]} test -> {s.out}",
        length_line(packed, config.front_end),
        settings_line(s),
        start.line(task.began_from) if task.began_from else "",
        f"samples: {task.train.source}",
        step_line(task),
    ]
    if packed.absent:
        total = len(packed.names) + len(packed.skipped) + len(packed.absent)
        said.append(f"{len(packed.absent)} of {total} listed clips have no file: {clips.listed(packed.absent)}")
    if packed.skipped:
        files = "1 bad file" if len(packed.skipped) == 1 else f"{len(packed.skipped)} bad files, the first"
        said.append(f"left out: {files}, {packed.skipped[0][0]}: {packed.skipped[0][1]}")
    return list(filter(None, said))


def length_line(packed: Pack, front_end: FrontEndSettings) -> str:
    """What becomes of clips that are much longer or shorter than the model's input; nothing where few are."""
    fbank, heard = front_end.fbank, front_end.clip_samples / packed.sample_rate
    seconds = packed.length / packed.sample_rate
    span = f"clips are {seconds.min():.1f} to {seconds.max():.1f} s long"
    cut = float((seconds > 1.05 * heard).mean())
    if cut > 0.05:
        wanted = fbank.frames(int(np.quantile(packed.length, 0.9)))
        kept = f"{100 * cut:.0f} % of them are cut to the {heard:.1f} s that the model hears"
        return f"{span}: {kept} (--frames {wanted} hears more)"
    wanted = fbank.frames(int(np.quantile(packed.length, 0.99)))
    if front_end.fit == "pad" and 2 * wanted < front_end.T:
        return f"{span}: more than half of the {front_end.T} frames is padding (--frames {wanted} costs less)"
    return ""


def settings_line(s: Settings) -> str:
    """Length, rate, batches and augmentation, wherever they come from."""
    parts = [f"{s.epochs} epochs", f"batches of {s.batch_size}", f"{s.optimiser} at {s.lr:g}, {s.schedule}"]
    for name in (*AUGMENTATION, *TRAINING):
        if value := getattr(s, name):
            parts.append(name if value is True else f"{name} {value:g}")
    return f"recipe {s.recipe or f'{s.data}/default'}: {', '.join(parts)}"


def step_line(task: Task) -> str:
    """How a step runs. Raises UserError where that cannot be had."""
    reason, batch = graph.reason_against(task), min(task.settings.batch_size, len(task.train))
    check_parts(batch, task.settings.accumulate)
    parts = [f"a step: {batch} clips"]
    if parallel.size() > 1:
        parts.append(f"over {parallel.size()} processes")
    if task.settings.accumulate > 1:
        parts.append(f"in {task.settings.accumulate} micro-batches")
    if task.device.type == "cpu":
        return " ".join(parts)
    return " ".join(parts) + (f"; no CUDA graph: {reason}" if reason else "; one CUDA graph")
