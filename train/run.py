"""python -m train.run: train and evaluate an audio classifier.

Ends with exit code 0 when done, 2 for what the user can mend (one sentence says what), 130 when interrupted.
"""

import csv
import hashlib
import io
import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fftp import ast_model, aum_model, checkpoint, env, figures
from fftp.errors import UserError
from fftp.frontend import FrontEnd, FrontEndSettings
from fftp.patching import PatchGrid
from kernels import FbankSettings, dispatch
from train import data, loop, machine, metrics, pictures, settings, statistics
from train.data import clips
from train.data.pack import Pack, pack
from train.feed import Feed
from train.samples import source_of
from train.settings import Settings

MEASURED_CLIPS = 1000  # training clips that the normalisation constants are measured on, where the recipe has none
MARKS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)  # of seconds_to, validation


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    out = None
    try:
        dispatch.check_overrides()
        wanted, given = settings.from_flags(sys.argv[1:] if arguments is None else arguments)
        out, wanted, saved = open_run(wanted, given)
        run(wanted, out, saved)
        return 0
    except (UserError, dispatch.BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if not checkpoint.disk_full(error):
            raise
        then = f"`{go_on(out)}`" if begun(out) else "run this command again"
        print(f"error: The disk of {out or '.'} is full: make room, then {then}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        then = f"go on with `{go_on(out)}`" if begun(out) else "nothing had been written yet"
        print(f"\ninterrupted: {then}.", file=sys.stderr)
        return 130


def begun(out: Path | None) -> bool:
    """Whether there is a run to go on with."""
    return out is not None and (out / "settings.json").exists()


def go_on(out: Path) -> str:
    return f"python -m train.run --resume --out {shlex.quote(str(out))}"


def open_run(wanted: Settings, given: set[str]) -> tuple[Path, Settings, dict[str, Any] | None]:
    """The run's folder, its settings, and what settings.json holds when the run is taken up again.

    Raises UserError for a folder that holds another run, and for flags that disagree with the run taken up.
    """
    if not wanted.resume:
        out = Path(wanted.out) if wanted.out else _free_folder(wanted)
        # A kill before the first settings.json leaves its beginning, which nothing can go on from.
        if out.exists() and (not out.is_dir() or any(path.name != "settings.json.new" for path in out.iterdir())):
            raise UserError(
                f"--out {out} holds something already: go on with that run by --resume, or give another folder."
            )
        return out, replace(wanted, out=str(out)), None
    if not wanted.out:
        raise UserError("--resume needs the run's folder: add --out FOLDER.")
    out = Path(wanted.out)
    try:
        saved = json.loads((out / "settings.json").read_text())
        asked, _ = dict(saved["settings"]), saved["resolved"]["threads"]
    except FileNotFoundError:
        raise UserError(f"--resume: {out} holds no run (no settings.json): give the --out of one.") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--resume: {out / 'settings.json'} is damaged: start a new run in another folder.") from None
    if found := settings.differences(asked, wanted, given):
        raise UserError(f"--resume: the run in {out} had other settings: {'; '.join(found)}; leave these flags out.")
    kept = {name: getattr(wanted, name) for name in settings.FREE_ON_RESUME if name in given}
    return out, settings.from_saved(asked, **kept), saved


def _free_folder(wanted: Settings) -> Path:
    number = 1
    while (out := Path("runs") / f"{settings.slug(wanted)}-{number}").exists():
        number += 1
    return out


def prepare(
    wanted: Settings, out: Path, saved: dict[str, Any] | None = None
) -> tuple[loop.Task, Pack, data.DataSet, dict]:
    """What a run works on, its data, and what was decided where the settings leave it open."""
    dispatch.use_fused(wanted.fused)
    dispatch.forget()
    if saved is not None:
        torch.set_num_threads(saved["resolved"]["threads"])
    device = machine.device_of(wanted.device)
    check_geometry(wanted)
    dataset = data.load(wanted)
    fbank = FbankSettings(n_mels=wanted.mels)
    packed = pack(dataset, fbank.sample_rate, fbank.frame, wanted.skip_bad_files, workers=wanted.workers or None)
    if not len(packed.indices("test")):
        raise UserError(
            f"The data set {dataset.name!r} has no test clips, and too few recordings of each class to hold some out: "
            "add recordings."
        )
    resolved = resolve(wanted, packed, dataset, fbank, device, saved)
    return build(wanted, resolved, packed, dataset, fbank, device, out), packed, dataset, resolved


def run(wanted: Settings, out: Path, saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train, evaluate, and write everything into out. Returns what result.json holds."""
    task, packed, dataset, resolved = prepare(wanted, out, saved)
    if (out / "result.json").exists():
        print(f"The run in {out} is finished: its result.json has the figures.")
        return json.loads((out / "result.json").read_text())
    announce(task, packed)
    check_backends(task)
    if saved is None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise UserError(f"--out {out} cannot be made ({error.strerror}): give another folder.") from None
        about = {"versions": machine.versions(), "commit": machine.commit(), "machine": machine.describe(task.device)}
        written = {"settings": settings.to_dict(wanted), "resolved": resolved, **about, "backends": planned(task)}
        checkpoint.replace(out / "settings.json", json.dumps(written, indent=1).encode())
    if dataset.copies_differ:
        checkpoint.replace(out / "clips.csv", clip_list(packed).encode())
    trainer = fit(task)
    result = report(task, trainer, packed)
    checkpoint.replace(out / "result.json", json.dumps(result, indent=1).encode())
    return result


def check_geometry(wanted: Settings) -> PatchGrid:
    """The run's patch grid. Raises UserError when the patch does not fit."""
    square = wanted.patch == "square"
    pt = wanted.patch_time or (16 if square else 10)
    pf = (wanted.patch_freq or 16) if square else wanted.mels
    st = wanted.time_stride or (pt if square else 4)
    sf = (wanted.freq_stride or pf) if square else wanted.mels
    return PatchGrid(T=wanted.frames, F=wanted.mels, pt=pt, pf=pf, st=st, sf=sf)


def resolve(wanted, packed: Pack, dataset, fbank, device, saved) -> dict[str, Any]:
    """What settings leave open, decided once and kept in settings.json.

    Raises UserError when a run is taken up again on other data.
    """
    fingerprint = hashlib.blake2b(digest_size=16)
    fingerprint.update("\n".join(packed.names).encode())
    for part in (packed.length, packed.labels, packed.splits):
        fingerprint.update(part.tobytes())
    if saved is not None:
        resolved = saved["resolved"]
        clips.check_classes(packed.classes, tuple(resolved["classes"]))
        if resolved["data"] != fingerprint.hexdigest():
            raise UserError(
                "--resume: the data set holds other clips than when the run began: restore them, or start anew."
            )
        return resolved
    front_end = statistics.front_end_of(wanted, dataset, fbank)
    mean, std = wanted.mean, wanted.std
    if mean is None:
        measured, _ = statistics.measure(packed, front_end, wanted.seed, MEASURED_CLIPS)
        mean, std = measured.mean, measured.std
    return {
        "precision": str(machine.precision_of(wanted.precision, device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "mean": mean,
        "std": std,
        "clip_samples": front_end.clip_samples,
        "classes": list(packed.classes),
        "data": fingerprint.hexdigest(),
        "clips": {split: len(packed.indices(split)) for split in clips.SPLITS},
    }


def model_of(wanted: Settings, classes: int) -> ast_model.ASTConfig | aum_model.AuMConfig:
    """The configuration of the run's model. Raises UserError when the patch does not fit."""
    depth = {"depth": wanted.depth} if wanted.depth else {}
    shared = {"grid": check_geometry(wanted), "classes": classes, "positions": wanted.positions}
    if wanted.model == "ast":
        return ast_model.ASTConfig(**shared, tokens=wanted.tokens, **(ast_model.SIZES[wanted.size] | depth))
    where = {"directions": wanted.directions, "place": wanted.place}
    return aum_model.AuMConfig(**shared, **where, **(aum_model.SIZES[wanted.size] | depth))


def build(wanted, resolved, packed: Pack, dataset, fbank, device, out) -> loop.Task:
    """Model, front end and feeds."""
    model = model_of(wanted, len(packed.classes))
    level = {"mean": resolved["mean"], "std": resolved["std"]}
    config = checkpoint.CheckpointConfig(
        model=model,
        front_end=FrontEndSettings(
            T=wanted.frames, clip_samples=resolved["clip_samples"], fit=wanted.fit, fbank=fbank, **level
        ),
        labels=tuple(packed.classes),
        multi_label=dataset.multi_label,
        settings=settings.to_dict(wanted),
    )
    torch.manual_seed(wanted.seed)  # initial weights are drawn on the CPU: the same on every device
    network = config.build().to(device)
    source = source_of(packed, device, wanted.device_memory_share)
    feeds = [Feed(source, packed.indices(s), FrontEnd(config.front_end)) for s in ("train", "validation")]
    return loop.Task(
        settings=wanted,
        config=config,
        model=network,
        train=feeds[0],
        validation=feeds[1] if len(feeds[1]) else None,
        device=device,
        precision=getattr(torch, resolved["precision"]),
        out=out,
    )


def planned(task: loop.Task) -> dict[str, str]:
    """Operation -> the backend that this run will take."""
    precision = str(task.precision).removeprefix("torch.")
    operations = {"waveforms": "int16", "fbank": "float32", "normalise": "float32"}
    if task.settings.augment != "none":
        name = {"specmask": "apply_spec_mask", "specaugment": "apply_spec_augment"}[task.settings.augment]
        operations[name] = "float32"
    operations["patch_embed"] = precision
    if task.settings.model == "aum":
        operations |= {"selective_scan": "float32", "causal_conv": precision}
    return {name: dispatch.select(name, task.device.type, dtype).name for name, dtype in operations.items()}


def check_backends(task: loop.Task) -> None:
    """On a GPU: hold this run's fused backends against their references before anything is trained with them.

    Compilers have been seen to make wrong gradients of right kernels. Raises UserError.
    """
    if task.device.type != "cuda":
        return  # the test suite covers what runs without a compiler of the user's own
    for row in env.check("cuda", planned(task)):
        if not row.good:
            raise UserError(
                f"{row.operation}={row.backend} computes something else than its reference on this GPU (error "
                f"{row.ours:.1e}, the reference's own {row.reference:.1e}): train without it by "
                f"FFTP_BACKEND={row.operation}=reference, and please report the output of python -m fftp.env --check."
            )


def announce(task: loop.Task, packed: Pack) -> None:
    """The first lines of a run: what computes, then what is computed."""
    s, config = task.settings, task.config
    backends = ", ".join(f"{name}={backend}" for name, backend in planned(task).items())
    precision = str(task.precision).removeprefix("torch.")
    print(f"backends ({'fused' if s.fused else 'reference'}): {backends}; {precision}; {machine.describe(task.device)}")
    parameters = sum(p.numel() for p in task.model.parameters())
    grid, counts = config.model.grid, [len(packed.indices(split)) for split in clips.SPLITS]
    name = {"ast": "AST", "aum": "AuM"}[s.model]
    shape = f"{grid.pt} frames x {grid.pf} bins, stride {grid.st} x {grid.sf}"
    print(
        f"{name}-{s.size}, {config.model.depth} layers: {parameters / 1e6:.2f} M parameters, "
        f"{config.model.macs().all / 1e9:.3f} GMAC a clip, {grid.N} patches ({shape}), mask {s.augment}"
    )
    print(
        f"{s.data}: {len(config.labels)} classes; clips {counts[0]} train, {counts[1]} validation, {counts[2]} test -> {s.out}"
    )
    print(f"samples: {task.train.source}")
    if packed.absent:
        total = len(packed.names) + len(packed.skipped) + len(packed.absent)
        print(f"{len(packed.absent)} of {total} listed clips have no file: {clips.listed(packed.absent)}")
    if packed.skipped:
        print(f"{len(packed.skipped)} bad files left out, the first {packed.skipped[0][0]}: {packed.skipped[0][1]}")


def clip_list(packed: Pack) -> str:
    """Which clips the run had, which were listed and not there, and which could not be used: a CSV."""
    used = zip(packed.names, packed.splits, strict=True)
    rows = [("name", "split", "state"), *((name, clips.SPLITS[split], "used") for name, split in used)]
    rows += [(name, "", "absent") for name in packed.absent]
    rows += [(name, "", "skipped") for name, _ in packed.skipped]
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(rows)
    return written.getvalue()


def fit(task: loop.Task) -> loop.Trainer:
    """All epochs, with a line and an entry in metrics.jsonl for each."""
    with tqdm(total=0, unit="step", disable=None, smoothing=0.05, leave=False) as bar:
        trainer = loop.Trainer(task, lambda step, total: bar.update(1))
        resumed = trainer.resume()
        history = trainer.progress["history"]
        write_history(task.out, history)
        bar.reset(trainer.total)
        bar.update(history[-1]["step"] if history else 0)
        if task.settings.resume:
            print(
                f"going on after epoch {trainer.progress['epoch']}"
                if resumed
                else "no epoch was finished: from the start"
            )
        board = open_board(task.out, history)
        while not trainer.done:
            line = trainer.epoch()
            write_history(task.out, trainer.progress["history"])
            bar.write(epoch_line(line, trainer.epochs), file=sys.stdout)
            if board is not None:
                for step, loss in line.get("losses", {}).items():
                    board.add_scalar("step_loss", loss, int(step))
                for name in line.keys() - {"losses"}:
                    board.add_scalar(name.replace("validation_", "validation/"), line[name], line["epoch"])
                board.flush()
        if board is not None:
            board.close()
    return trainer


def write_history(out: Path, history: list[dict]) -> None:
    checkpoint.replace(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history).encode())


def open_board(out: Path, history: list[dict]):
    """TensorBoard's writer, or None where the package is absent; later lines replace those of an epoch done again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=len(history) + 1)


def epoch_line(line: dict, epochs: int) -> str:
    parts = [f"epoch {line['epoch']:>3}/{epochs}", f"loss {line['train_loss']:.4f}"]
    for name, label in (("accuracy", "accuracy"), ("balanced_accuracy", "balanced"), ("map", "mAP"), ("auc", "AUC")):
        if f"validation_{name}" in line:
            parts.append(f"{label} {100 * line[f'validation_{name}']:.2f} %")
    parts += [
        f"{line['step_ms']:.0f} ms a step",
        f"{line['samples_per_second']:.0f} clips/s",
        f"{line['seconds']:.0f} s",
    ]
    return "  ".join(parts)


def report(task: loop.Task, trainer: loop.Trainer, packed: Pack) -> dict[str, Any]:
    """Evaluate the reported epoch on the test split, draw the pictures, and return result.json's content."""
    progress, key = trainer.progress, task.key_metric
    best = progress["best"]
    reported = best["epoch"] if best else progress["epoch"]
    if best:
        checkpoint.load_weights(task.model, task.out / "best" / "model.safetensors")
    test = Feed(task.train.source, packed.indices("test"), task.train.front_end)
    measured, scores, targets = loop.evaluate(task, test)
    line = progress["history"][reported - 1]
    last = progress["history"][-1]
    macs = task.config.model.macs()
    result = {
        "metrics": measured,
        "validation": {k.removeprefix("validation_"): v for k, v in line.items() if k.startswith("validation_")},
        "reported_epoch": reported,
        "epochs": progress["epoch"],
        "train_loss": last["train_loss"],
        "backends": dispatch.in_use(),
        "seconds": progress["seconds"],
        "samples_per_second": float(np.median([entry["samples_per_second"] for entry in progress["history"]])),
        "step_ms": float(np.median([entry["step_ms"] for entry in progress["history"]])),
        "seconds_to": seconds_to(progress["history"], f"validation_{key}"),
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "macs": macs._asdict(),
        "clips": {split: len(packed.indices(split)) for split in clips.SPLITS},
        "absent_clips": len(packed.absent),
        "skipped_files": [{"file": name, "reason": reason} for name, reason in packed.skipped],
        "precision": str(task.precision).removeprefix("torch."),
        "machine": machine.describe(task.device),
        "commit": machine.commit(),
        "settings": asdict(task.settings),
    }
    if task.settings.average_last:
        task.model.load_state_dict(trainer.averages.mean())
        result["averaged"] = {"epochs": trainer.averages.count, "metrics": loop.evaluate(task, test)[0]}
        with checkpoint.replacing(task.out / "average") as beside:
            checkpoint.save(beside, task.model, task.config)
    draw(task, progress["history"], scores, targets)
    shown = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "map": "mAP", "auc": "AUC"}
    text = ", ".join(f"{label} {100 * measured[name]:.2f} %" for name, label in shown.items() if name in measured)
    print(f"test ({len(test)} clips, epoch {reported}): {text}; {progress['seconds']:.0f} s of training -> {task.out}")
    return result


def seconds_to(history: list[dict], name: str) -> dict[str, float]:
    """Mark -> seconds of training and validation until a figure first reached it."""
    reached = {}
    for mark in MARKS:
        first = next((line["seconds"] for line in history if line.get(name, 0.0) >= mark), None)
        if first is not None:
            reached[str(mark)] = first
    return reached


def draw(task: loop.Task, history: list[dict], scores: np.ndarray, targets: np.ndarray) -> None:
    if not figures.available():
        print("no pictures: matplotlib is not installed (pip install 'fftp[plots]').")
        return
    pictures.learning_curves(history, task.out / "curves.png")
    if task.config.multi_label:
        values = metrics.average_precisions(scores, targets)
        pictures.average_precision(values, task.config.labels, task.out / "average_precision.png")
    else:
        counts = metrics.confusion(scores, targets)
        pictures.confusion_matrix(counts, task.config.labels, task.out / "confusion.png")


if __name__ == "__main__":
    sys.exit(main())
