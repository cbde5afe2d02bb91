"""python -m train.run: train and evaluate an audio classifier.

Ends with exit code 0 when done, 2 for what the user can mend (one sentence says what), 130 when interrupted, 143 when
terminated, 1 when another process of the same run was lost (train.ending). `torchrun --nproc-per-node N -m train.run`
trains one model with N processes (train.parallel).
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fftp import allocator, ast_model, aum_model, checkpoint, env, figures, run_folder, streaming
from fftp.errors import UserError
from fftp.frontend import FrontEnd, FrontEndSettings
from fftp.patching import PatchGrid
from kernels import FbankSettings, dispatch
from train import (
    data,
    ending,
    first_lines,
    loop,
    machine,
    metrics,
    parallel,
    pictures,
    scored,
    settings,
    start,
    statistics,
)
from train.data import clips
from train.data.pack import Pack, pack
from train.feed import Feed
from train.samples import source_of
from train.settings import Settings
from train.step import Task

MEASURED_CLIPS = 1000  # training clips that the normalisation constants are measured on, where the recipe has none
MARKS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)  # of seconds_to, validation


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    out = None
    with ending.terminable(lambda: out), parallel.one_voice():
        try:
            try:
                dispatch.check_overrides()
                allocator.keep_memory()
                wanted, given = settings.from_flags(sys.argv[1:] if arguments is None else arguments)
                with parallel.group(wanted.device):
                    out, wanted, saved = parallel.first(lambda: open_run(wanted, given))
                    run(wanted, out, saved)
                return 0
            except (Exception, KeyboardInterrupt, ending.Terminated) as error:
                return ending.told(error, out)
        except (KeyboardInterrupt, ending.Terminated) as error:  # while something else was about to be told
            return ending.told(error, out)


def open_run(wanted: Settings, given: set[str]) -> tuple[Path, Settings, dict[str, Any] | None]:
    """The run's folder, its settings, and what settings.json holds when the run is taken up again.

    Raises UserError for a folder that holds another run, and for flags that disagree with the run taken up.
    """
    if not wanted.resume:
        settings.check_data(wanted, given)
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


def prepare(wanted: Settings, out: Path, saved: dict[str, Any] | None = None) -> tuple[Task, Pack, dict[str, Any]]:
    """What a run works on, its data, and what was decided where the settings leave it open."""
    dispatch.use_fused(wanted.fused)
    dispatch.forget()
    use_deterministic(wanted.deterministic)
    if saved is not None and saved["resolved"].get("processes", 1) == parallel.size():
        torch.set_num_threads(saved["resolved"]["threads"])
    device = parallel.together(lambda: machine.device_of(wanted.device))
    check_geometry(wanted)
    check_lead(wanted)
    if wanted.init and saved is None:  # before any data is read
        parallel.together(lambda: start.check(wanted.init, model_of(wanted, 1)))
    fbank = FbankSettings(n_mels=wanted.mels)
    dataset, packed = parallel.in_turn(lambda: load(wanted, fbank))
    resolved = parallel.first(lambda: resolve(wanted, packed, dataset, fbank, device, saved))
    return parallel.together(lambda: build(wanted, resolved, packed, dataset, fbank, device, out)), packed, resolved


def run(wanted: Settings, out: Path, saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train, evaluate, and write everything into out. Returns what result.json holds."""
    task, packed, resolved = prepare(wanted, out, saved)
    if (out / "result.json").exists():
        print(f"The run in {out} is finished: its result.json has the figures.")
        return json.loads((out / "result.json").read_text())
    print("\n".join(first_lines.of(task, packed, planned(task))))
    parallel.together(lambda: check_backends(task))
    if saved is None:
        parallel.first(lambda: begin(task, resolved))
    if packed.copies_differ:
        parallel.first(lambda: checkpoint.replace(out / "clips.csv", packed.listing().encode()))
    trainer = fit(task)
    return report(task, trainer, packed)


def use_deterministic(wanted: bool) -> None:
    """Whether an operation that gives other bits each time is refused from now on."""
    if wanted:
        # cuBLAS reads this when it is first used: workspaces of a fixed size, so that it adds in a fixed order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def load(wanted: Settings, fbank: FbankSettings) -> tuple[data.DataSet, Pack]:
    """The data set and its samples. Raises UserError where there is nothing to test on, or to stop by."""
    dataset = data.load(wanted)
    if dataset.note and parallel.rank() == 0:
        print(dataset.note, file=sys.stderr)
    workers, progress = wanted.workers or None, parallel.rank() == 0
    packed = pack(dataset, fbank.sample_rate, fbank.frame, wanted.skip_bad_files, progress, workers)
    if not len(packed.indices("test")):
        raise UserError(
            f"The data set {dataset.name!r} has no test clips, and too few recordings of each class to hold some out: "
            "add recordings."
        )
    if wanted.until_accuracy and not len(packed.indices("validation")):
        raise UserError(
            f"--until-accuracy needs a validation list, which the data set {dataset.name!r} has not: leave it out, or take "
            "--epochs."
        )
    return dataset, packed


def begin(task: Task, resolved: dict[str, Any]) -> None:
    """Make the run's folder with settings.json. Raises UserError where it cannot be made."""
    out = task.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError, PermissionError) as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}): give another folder.") from None
    about = {"versions": machine.versions(), "commit": machine.commit(), "machine": machine.describe(task.device)}
    written = {"settings": settings.to_dict(task.settings), "resolved": resolved, **about, "backends": planned(task)}
    written["defaults"] = settings.to_dict(Settings())
    checkpoint.replace(out / "settings.json", json.dumps(written, indent=1).encode())


def check_geometry(wanted: Settings) -> PatchGrid:
    """The run's patch grid. Raises UserError when the patch does not fit, or fewer patches are there than are to be kept."""
    square = wanted.patch == "square"
    pt = wanted.patch_time or (16 if square else 10)
    pf = (wanted.patch_freq or 16) if square else wanted.mels
    st = wanted.time_stride or (pt if square else 4)
    sf = (wanted.freq_stride or pf) if square else wanted.mels
    grid = PatchGrid(T=wanted.frames, F=wanted.mels, pt=pt, pf=pf, st=st, sf=sf)
    if wanted.keep_tokens > grid.N:
        raise UserError(f"--keep-tokens {wanted.keep_tokens}: there are {grid.N} patches, take as many or fewer.")
    return grid


def check_lead(wanted: Settings) -> None:
    """Raises UserError for other clips in front of a model that does not carry its state on."""
    if wanted.lead and (reason := streaming.why_not_carried(model_of(wanted, 1), wanted.fit)):
        raise UserError(
            f"--lead is for a model that carries its state on, and this one does not, since {reason}: leave it out, or take "
            "--recipe speechcommands/aum_streaming."
        )
    if wanted.lead and (grid := check_geometry(wanted)).st > wanted.lead_clips * grid.T:
        raise UserError(
            f"--lead-clips {wanted.lead_clips}: clips of {grid.T} frames in front hold no patch at a stride of {grid.st}; "
            "take more clips or a smaller --time-stride."
        )


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
    begun = start.about(wanted.init, model_of(wanted, len(packed.classes)), packed.classes) if wanted.init else None
    return {
        **({"init": begun} if begun else {}),
        "precision": str(machine.precision_of(wanted.precision, device)).removeprefix("torch."),
        "processes": parallel.size(),
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


def build(wanted, resolved, packed: Pack, dataset, fbank, device, out) -> Task:
    """Model, front end and feeds."""
    model, begun = model_of(wanted, len(packed.classes)), resolved.get("init")
    if begun:
        model = start.adopted(model, begun)
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
    network = config.build()
    if begun:
        start.fill(network, wanted.init, config.labels, begun, out)
    network = network.to(device)
    source = source_of(packed, device, wanted.device_memory_share)
    feeds = [Feed(source, packed.indices(s), FrontEnd(config.front_end)) for s in ("train", "validation")]
    return Task(
        settings=wanted,
        config=config,
        model=network,
        train=feeds[0],
        validation=feeds[1] if len(feeds[1]) else None,
        device=device,
        precision=getattr(torch, resolved["precision"]),
        out=out,
        began_from=begun,
    )


def planned(task: Task) -> dict[str, str]:
    """Operation -> the backend that this run will take."""
    precision = str(task.precision).removeprefix("torch.")
    operations = {"philox": "int64", "waveforms": "int16", "fbank": "float32", "normalise": "float32"}
    if task.settings.augment != "none":
        name = {"specmask": "apply_spec_mask", "specaugment": "apply_spec_augment"}[task.settings.augment]
        operations[name] = "float32"
    operations["patch_embed"] = precision
    if task.settings.model == "ast":
        operations |= {"layer_norm": "float32", "gelu": precision}
        if task.config.model.depth > 1:  # the last block has class tokens to ask for alone
            operations["attention"] = precision
    if task.settings.model == "aum":
        operations |= {"rms_norm": "float32", "selective_scan": "float32", "causal_conv": precision}
    if precision == "bfloat16":
        operations["linear"] = precision
    return {name: dispatch.select(name, task.device.type, dtype).name for name, dtype in operations.items()}


def check_backends(task: Task) -> None:
    """On a GPU: hold this run's fused backends against their references before anything is trained with them.

    Compilers have been seen to make wrong gradients of right kernels. Raises UserError.
    """
    if task.device.type != "cuda":
        return  # the test suite covers what runs without a compiler of the user's own
    if task.settings.deterministic and planned(task)["waveforms"] == "reference":
        raise UserError(
            "--deterministic on a GPU needs --fused: waveforms=reference has no form there with the same bits."
        )
    for row in env.check("cuda", planned(task)):
        if not row.good:
            raise UserError(
                f"{row.operation}={row.backend} computes something else than its reference on this GPU (error "
                f"{row.ours:.1e}, the reference's own {row.reference:.1e}): train without it by "
                f"FFTP_BACKEND={row.operation}=reference, and please report the output of python -m fftp.env --check."
            )


def fit(task: Task) -> loop.Trainer:
    """All epochs, with a line and an entry in metrics.jsonl for each."""
    first = parallel.rank() == 0
    with tqdm(total=0, unit="step", disable=None if first else True, smoothing=0.05, leave=False) as bar:
        trainer = loop.Trainer(task, lambda step, total: bar.update(1))
        resumed = trainer.resume()
        history = trainer.progress["history"]
        bar.reset(trainer.total)
        bar.update(history[-1]["step"] if history else 0)
        if task.settings.resume:
            print(
                f"going on after epoch {trainer.progress['epoch']}"
                if resumed
                else "no epoch was finished: from the start"
            )
        parallel.first(lambda: write_history(task.out, history))
        board = open_board(task.out, history) if first else None
        while not trainer.done:
            line = trainer.epoch()
            parallel.first(lambda line=line: note(task.out, trainer.progress["history"], line, board))
            bar.write(epoch_line(line, trainer.epochs), file=sys.stdout)
        if board is not None:
            board.close()
    return trainer


def note(out: Path, history: list[dict], line: dict, board) -> None:
    """An epoch's line into metrics.jsonl and, where there is one, on TensorBoard's board."""
    write_history(out, history)
    if board is None:
        return
    for step, loss in line.get("losses", {}).items():
        board.add_scalar("step_loss", loss, int(step))
    for name in line.keys() - {"losses"}:
        board.add_scalar(name.replace("validation_", "validation/"), line[name], line["epoch"])
    board.flush()


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
        f"{line['tflops']:.3g} TFLOP/s",
        f"{line['seconds']:.0f} s",
    ]
    return "  ".join(parts)


def report(task: Task, trainer: loop.Trainer, packed: Pack) -> dict[str, Any]:
    """Evaluate the reported epoch on the test split, draw the pictures, and write result.json; returns its content."""
    reported = "best" if trainer.progress["best"] else "last"
    checkpoint.load_weights(task.model, task.out / reported / "model.safetensors")
    test = Feed(task.train.source, packed.indices("test"), task.train.front_end)
    measured, scores, targets = loop.evaluate(task, test)
    averaged = None
    if task.settings.average_last:
        task.model.load_state_dict(trainer.averages.mean())
        averaged = {"epochs": trainer.averages.count, "metrics": loop.evaluate(task, test)[0]}
    result = figures_of(task, trainer, packed, measured) | ({"averaged": averaged} if averaged else {})

    def write():
        if averaged:
            with checkpoint.replacing(task.out / "average") as beside:
                checkpoint.save(beside, task.model, task.config)
        draw(task, trainer.progress["history"], scores, targets)
        scored.keep(task.out, "test", packed, measured, scores, targets, task.config.multi_label)
        checkpoint.replace(task.out / "result.json", json.dumps(result, indent=1).encode())

    parallel.first(write)
    if task.settings.until_accuracy:
        print(mark_line(task, trainer))
    text = ", ".join(
        f"{label} {100 * measured[name]:.2f} %" for name, label in run_folder.FIGURES.items() if name in measured
    )
    spent = f"{trainer.progress['seconds']:.0f} s of training"
    print(f"test ({len(test)} clips, epoch {result['reported_epoch']}): {text}; {spent} -> {task.out}")
    return result


def stopped_at(task: Task, trainer: loop.Trainer) -> dict[str, float] | None:
    """Where --until-accuracy ended the run: {"mark", "epoch", "score", "seconds"}; None where it did not.

    seconds: of training and validation, from the first batch's samples to the figure that reached the mark.
    """
    if not trainer.reached:
        return None
    last = trainer.progress["history"][-1]
    score = {"mark": task.settings.until_accuracy, "score": last[f"validation_{task.key_metric}"]}
    return score | {"epoch": last["epoch"], "seconds": last["seconds"]}


def mark_line(task: Task, trainer: loop.Trainer) -> str:
    """What became of --until-accuracy, in a sentence."""
    name, mark, stopped = run_folder.FIGURES[task.key_metric], task.settings.until_accuracy, stopped_at(task, trainer)
    if stopped is None:
        best, epochs = trainer.progress["best"]["score"], trainer.progress["epoch"]
        return f"validation {name} did not reach {100 * mark:g} % by epoch {epochs}: the best was {100 * best:.2f} %."
    return (
        f"validation {name} {100 * stopped['score']:.2f} % reached {100 * mark:g} % in epoch {stopped['epoch']}, "
        f"{stopped['seconds']:.1f} s from data to result (training and validation)."
    )


def figures_of(task: Task, trainer: loop.Trainer, packed: Pack, measured: dict[str, float]) -> dict[str, Any]:
    """What result.json holds about a run whose figures on the test split are measured."""
    progress, history = trainer.progress, trainer.progress["history"]
    reported = progress["best"]["epoch"] if progress["best"] else progress["epoch"]
    validation = {k.removeprefix("validation_"): v for k, v in history[reported - 1].items() if "validation_" in k}
    medians = {n: float(np.median([line[n] for line in history])) for n in ("samples_per_second", "step_ms", "tflops")}
    return {
        "metrics": measured,
        "validation": validation,
        "reported_epoch": reported,
        "epochs": progress["epoch"],
        "train_loss": history[-1]["train_loss"],
        "backends": dispatch.in_use(),
        "processes": parallel.size(),
        "graph": trainer.step is not trainer.plain,
        "seconds": progress["seconds"],
        **medians,
        "seconds_to": seconds_to(history, f"validation_{task.key_metric}", task.settings.until_accuracy),
        **({"stopped_at": stopped_at(task, trainer)} if task.settings.until_accuracy else {}),
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "macs": task.config.model.macs()._asdict(),
        "clips": {split: len(packed.indices(split)) for split in clips.SPLITS},
        "absent_clips": len(packed.absent),
        "skipped_files": [{"file": name, "reason": reason} for name, reason in packed.skipped],
        "precision": str(task.precision).removeprefix("torch."),
        "machine": machine.describe(task.device),
        "commit": machine.commit(),
        **({"began_from": task.began_from} if task.began_from else {}),
        "settings": asdict(task.settings),
    }


def seconds_to(history: list[dict], name: str, own: float = 0.0) -> dict[str, float]:
    """Mark -> seconds of training and validation until a figure first reached it; own: a mark besides the usual ones."""
    reached = {}
    for mark in sorted({*MARKS, own} - {0.0}):
        first = next((line["seconds"] for line in history if line.get(name, 0.0) >= mark), None)
        if first is not None:
            reached[str(mark)] = first
    return reached


def draw(task: Task, history: list[dict], scores: np.ndarray, targets: np.ndarray) -> None:
    if not figures.available():
        print("no pictures: matplotlib is not installed (pip install matplotlib).")
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
