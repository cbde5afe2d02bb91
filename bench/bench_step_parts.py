"""Where a training step's time goes, by the ranges that a profiler sees: load, front end, mask, embed, ..., optimiser."""

from collections.abc import Iterator

from bench import systems, training
from bench.bench_patch_embed import GRIDS
from bench.measure import Figures
from kernels import dispatch, ranges

ROWS = ("(128, 10)/1", "(128, 50)/10", "(16, 16)/10")
ROWS_ON_A_CPU = ("(128, 10)/4", "(128, 50)/10")


def cases(device: str) -> Iterator[Figures]:
    dispatch.use_fused(True)
    for name in ROWS_ON_A_CPU if device == "cpu" else ROWS:
        for model in systems.MODELS:
            yield _row(model, name, device)


def _row(model, name, device):
    size, grid = systems.SIZE[device], GRIDS[name]
    return Figures(
        part="step_parts",
        case={"model": model, "size": size, "grid": name, "patches": grid.N, "B": training.BATCH[device]},
        backend=dispatch.select("patch_embed" if model == "ast" else "selective_scan", device, "float32").name,
        correct=lambda: systems.agrees(model, size, grid, systems.TYPES["float32"], device),
        figures=lambda: figures(model, size, name, device),
    )


def figures(model: str, size: str, name: str, device: str) -> dict:
    """Milliseconds of a step as users take it, and of one whose parts are timed: by part, and altogether."""
    spans = training.Spans(device)
    with training.trainer(model, size, GRIDS[name], device) as made:
        made.epoch()
        plain = made.epoch()["step_ms"]
    with ranges.made_by(spans.span), training.trainer(model, size, GRIDS[name], device) as made:
        made.epoch()
        spans.seen.clear()
        timed = made.epoch()
        steps = made.order.steps
    return {
        "precision": str(made.task.precision).removeprefix("torch."),
        "parts_ms": {part: ms / steps for part, ms in spans.milliseconds().items()},
        "step_ms": timed["step_ms"],
        "plain_step_ms": plain,
    }
