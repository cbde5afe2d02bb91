"""python -m train.reproduce TABLE: train the systems of a table of the paper, or of ours, over seeds, and render it.

One process after another; stopped by anything, the same command goes on. `python -m train.reproduce recipes` prints
docs/RECIPES.md. What follows `--` goes to every `python -m train.run`.
"""

import json
import multiprocessing
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fftp import checkpoint, command, figures
from fftp.errors import UserError
from train import estimate, lines, pictures, recipe_table, settings, tables
from train import run as train_run
from train.data.decode import stay_with_parent

PROG = "python -m train.reproduce"
# What makes a system where a data set has no recipe of its own for it; the rest is the data set's default.
GEOMETRY = ("model", "directions", "place", "tokens", "patch", *settings.GEOMETRY, "augment")
SPEC_AUGMENT = ("mask_max_frequency", "mask_max_time", "mask_fill")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Runs a table's systems over seeds, one after the other, and prints it beside the paper's; goes on where it was stopped.

    `recipes` in a table's place prints all recipes. Flags of train.run go behind `--`.
    """

    data: Literal["synth", "speechcommands", "audioset", "folder"] = "audioset"
    """As train.run has it."""
    data_root: str = ""
    """Folder of the data set's files."""
    seeds: int = 3
    """Runs of each system, with the seeds 0, 1 and so on."""
    folds: str = ""
    """Of --data folder: folds held out for testing, one after the other, separated by commas; each with every seed."""
    edition: Literal["paper", "laptop"] = "paper"
    """paper: the paper's sizes and lengths; laptop: what two CPU cores train in minutes (docs/REPRODUCTION.md)."""
    only: str = ""
    """Only these systems, by the names of their runs' folders, separated by commas: several commands can
    share a folder, one after the other."""
    size: Literal["recipe", "tiny", "small", "base"] = "recipe"
    """Of the models; recipe is what the recipe says."""
    epochs: int = 0
    """0 is the recipe's."""
    dry_run: bool = False
    """List what would run and how long it will take, judged by a few steps of each system."""
    out: str = ""
    """Folder of the runs; default: one under runs/ that the data and the edition or size name."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of the plan."""

    system: tables.System
    seed: int
    fold: str
    flags: tuple[str, ...]
    out: Path

    @property
    def finished(self) -> bool:
        return (self.out / "result.json").exists()

    @property
    def key(self) -> tuple[str, int, str]:
        return self.system.key, self.seed, self.fold


def key_of(line: dict) -> tuple[str, int, str]:
    """Which run a line of results.jsonl is of."""
    return line["system"], line["case"]["seed"], line.get("fold", "")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    own, _, extra = _split(words)
    out = None
    try:
        if own == ["recipes"]:
            print(recipe_table.markdown(), end="")
            return 0
        if not own or own[0] not in (*tables.SYSTEMS, "-h", "--help"):
            raise UserError(
                f"Say what to reproduce: {PROG} {'|'.join((*tables.SYSTEMS, 'recipes'))} [FLAGS] [-- FLAGS OF train.run]."
            )
        table = own[0] if own[0] in tables.SYSTEMS else ""
        options = command.parse(
            Options, own[1:] if table else ["--help"], f"{PROG} {table or '|'.join(tables.SYSTEMS)}", Options
        )
        if options.seeds < 1 or options.epochs < 0:
            raise UserError("--seeds is 1 or more, and --epochs 0 (the recipe's) or more.")
        kind = options.size if options.edition == "paper" else options.edition
        out = Path(options.out or f"runs/reproduce-{options.data}-{kind}")
        plan = plan_of(table, options, tuple(extra), out)
        if options.dry_run:
            dry_run(plan)
            return 0
        keep_plan(out, options, extra)
        return carry_out(table, plan, out, go_on(own, extra, out), options.edition == "laptop")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not command.reader_gone():
            raise
        quiet = command.closed_pipe()
        if out is None or options.dry_run:
            return quiet
        then = f"go on with `{go_on(own, extra, out)}`"
        print(f"error: nobody reads this command's output any more, so it ends: {then}.", file=sys.stderr)
        return 1
    except OSError as error:
        if not checkpoint.disk_full(error):
            raise
        print(f"error: The disk of {out} is full: make room, then `{go_on(own, extra, out)}`.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        then = f"go on with `{go_on(own, extra, out)}`" if out else "nothing had been written yet"
        print(f"\ninterrupted: {then}.", file=sys.stderr)
        return 130


def _split(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at : at + 1], words[at + 1 :]


def go_on(own: list[str], extra: list[str], out: Path) -> str:
    """The command that goes on, which is the same one."""
    named = own if any(word.partition("=")[0] == "--out" for word in own) else [*own, "--out", str(out)]
    return f"{PROG} {shlex.join([*named, *(['--', *extra] if extra else [])])}"


def plan_of(table: str, options: Options, extra: tuple[str, ...], out: Path) -> list[Run]:
    """Every run, seed by seed, so that all systems have a figure early. UserError for flags or patches that do not fit."""
    folds = [fold.strip() for fold in options.folds.split(",") if fold.strip()] or [""]
    if folds != [""] and options.data != "folder":
        raise UserError("--folds is for --data folder, whose clips a CSV divides into folds: leave it out.")
    plan = []
    for seed in range(options.seeds):
        for fold in folds:
            for system in chosen(table, options):
                where = out / (f"{system.key}-seed{seed}" + (f"-fold{fold}" if fold else ""))
                flags = (*flags_of(system, options, extra), *(["--test-fold", fold] if fold else []))
                flags = (*flags, "--seed", str(seed), "--out", str(where))
                if seed == 0:
                    train_run.check_geometry(settings.from_flags(list(flags))[0])
                plan.append(Run(system=system, seed=seed, fold=fold, flags=flags, out=where))
    return plan


def chosen(table: str, options: Options) -> list[tables.System]:
    """The table's systems that --only leaves. Raises UserError for a name that is none of them."""
    laptop = options.edition == "laptop"
    if table in ("controls", "ablation") and not (laptop and options.data == "speechcommands"):
        raise UserError(
            f"{table} has recipes for Speech Commands at the size of two CPU cores alone: take --data speechcommands "
            "--edition laptop."
        )
    if table in ("sweep", "ablation") and options.epochs:
        raise UserError(f"The runs of {table} have {tables.SWEEP_EPOCHS} epochs: leave --epochs out.")
    if table == "sweep" and options.data == "audioset":
        raise UserError("sweep judges rates on a validation list, which AudioSet has not: take another data set.")
    every = tables.systems(table, laptop)
    names = [name.strip() for name in options.only.split(",") if name.strip()]
    known = [system.key for system in every]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--only {unknown[0]}: {table} has {', '.join(known)}.")
    return [system for system in every if not names or system.key in names]


def flags_of(system: tables.System, options: Options, extra: tuple[str, ...]) -> tuple[str, ...]:
    """Flags of train.run that make the system on this data; `extra` wins over the rest."""
    data, recipe, known = options.data, system.recipe, settings.recipe_names()
    flags = ["--fused", "--data", data, *(["--data-root", options.data_root] if options.data_root else [])]
    if f"{data}/{recipe}" in known and not (options.edition == "laptop" and not recipe.startswith(tables.LAPTOP)):
        flags += ["--recipe", f"{data}/{recipe}"]
    else:
        # Speech Commands has recipes of Table I alone: the rows of Table II are its S3 with other patches.
        base = f"{data}/{tables.LAPTOP if options.edition == 'laptop' else ''}ast_fftp_specmask"
        flags += ["--recipe", base if base in known else f"{data}/default"]
        source = f"speechcommands/{recipe}" if f"speechcommands/{recipe}" in known else f"audioset/{recipe}"
        values = settings.read_recipe(source)
        # SpecMask's sizes go with the length of the clips, so they are the data's own.
        names = (*GEOMETRY, *(SPEC_AUGMENT if values["augment"] == "specaugment" else ()))
        for name in (name for name in names if name in values):
            flags += [f"--{name.replace('_', '-')}", str(values[name])]
    flags += system.flags
    flags += ["--size", options.size] if options.size != "recipe" else []
    flags += ["--epochs", str(options.epochs)] if options.epochs else []
    return (*flags, *extra)


def keep_plan(out: Path, options: Options, extra: list[str]) -> None:
    """Write down what the folder is for. UserError when it holds the runs of another command, or something else."""
    now = {
        "data": options.data,
        "edition": options.edition,
        "size": options.size,
        "epochs": options.epochs,
        "flags": extra,
    }
    path = out / "plan.json"
    try:
        before = json.loads(path.read_text())
    except FileNotFoundError:
        if out.exists() and (not out.is_dir() or any(path.name != "plan.json.new" for path in out.iterdir())):
            raise UserError(f"--out {out} holds something else: give another folder.") from None
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made ({error.strerror}): give another folder.") from None
        checkpoint.replace(path, json.dumps(now).encode())
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: give another folder with --out.") from error
    before = {"edition": "paper"} | before  # what there was before there were editions
    if before != now:
        differ = "; ".join(
            f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in now if before.get(name) != now[name]
        )
        raise UserError(f"The runs in {out} were made with other flags ({differ}): give the same, or another --out.")


def carry_out(table: str, plan: list[Run], out: Path, again: str, laptop: bool) -> int:
    """Do what is left of the plan, with the table after each run and pictures at the end. Returns the exit code."""
    kept = keep_lines(out, plan)
    for number, run in enumerate(plan, 1):
        if run.finished:
            continue
        fold = f", fold {run.fold}" if run.fold else ""
        print(f"[{number}/{len(plan)}] {run.system.name}, seed {run.seed}{fold} -> {run.out}", flush=True)
        code = in_a_process(run)
        if code != 0:
            ended = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            print(
                f"The run in {run.out} {ended}: when that is mended, go on with `{again}`.",
                file=sys.stderr if code < 0 else sys.stdout,
            )
            return code if code in (1, 2) else 2
        kept = keep_lines(out, plan)
        checkpoint.replace(out / f"{table}.md", tables.render(table, kept, laptop).encode())
    if table == "table3" and {run.system.recipe for run in plan} == {s.recipe for s in tables.SYSTEMS[table]}:
        kept = with_latencies(out, plan, kept)
    text = tables.render(table, kept, laptop)
    checkpoint.replace(out / f"{table}.md", text.encode())
    draw(table, plan, kept, out)
    print(f"{text}\n{out / f'{table}.md'}; a line a run in {out / 'results.jsonl'}")
    return 0


def in_a_process(run: Run) -> int:
    """Start or go on with a run in a new process, which ends with this one. Returns its exit code."""
    begun = (run.out / "settings.json").exists()
    flags = [*run.flags, "--resume"] if begun else list(run.flags)
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(flags,))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.kill()  # a run may be killed at any moment, and its own farewell would only confuse
        process.join()
        raise
    return process.exitcode


def _train(flags: list[str]) -> None:
    stay_with_parent()
    sys.exit(train_run.main(flags))


def read_lines(out: Path) -> list[dict]:
    """What results.jsonl holds; a line that was cut off is left out."""
    path, kept = out / "results.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            kept.append(json.loads(text))
        except ValueError:
            continue
    return kept


def write_lines(out: Path, kept: list[dict]) -> None:
    if kept:
        checkpoint.replace(out / "results.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())


def keep_lines(out: Path, plan: list[Run]) -> list[dict]:
    """results.jsonl with a line for every finished run, and those of this plan.

    A line that was cut off is written anew; those of other tables and seeds stay.
    """
    kept = read_lines(out)
    known = set(map(key_of, kept))
    for run in plan:
        if run.finished and run.key not in known:
            grid = checkpoint.read_config(checkpoint.find(run.out)).model.grid
            about = {"part": "reproduce", "system": run.system.key, "fold": run.fold, "patches": grid.N}
            kept.append(lines.line_of(run.out) | about | {"curve": lines.curve_of(run.out)})
    write_lines(out, kept)
    wanted = {run.key for run in plan}
    return [line for line in kept if key_of(line) in wanted]


def with_latencies(out: Path, plan: list[Run], kept: list[dict]) -> list[dict]:
    """The lines, those of seed 0 with the time of a clip alone: all systems in turn, once every one is trained."""
    if all("latency_ms" in line for line in kept if line["case"]["seed"] == 0):
        return kept
    found = estimate.alone({run.system.key: run.out for run in plan if run.seed == 0})

    def with_latency(line: dict) -> dict:
        return line | (found.get(line["system"], {}) if line["case"]["seed"] == 0 else {})

    write_lines(out, [with_latency(line) for line in read_lines(out)])
    return [with_latency(line) for line in kept]


def draw(table: str, plan: list[Run], kept: list[dict], out: Path) -> None:
    """Learning curves of all systems, and for Table II the paper's Figure 4."""
    if not figures.available():
        print("no pictures: matplotlib is not installed (pip install matplotlib).")
        return
    histories: dict[str, list[list[dict]]] = {}
    for run in plan:
        histories.setdefault(run.system.name, []).append(lines.history_of(run.out))
    pictures.systems_curves(histories, out / f"{table}_curves.png")
    if table == "table2":
        metric, points = tables.metric_of(kept), []
        for system in tables.SYSTEMS[table]:
            ours = [line for line in kept if line["system"] == system.key]
            if not ours:
                continue
            scores = [100 * line["metrics"][metric] for line in ours]
            points.append((system.name, ours[0]["patches"], scores, system.paper["patches"], system.paper["map"]))
        pictures.patches_against_score(points, {"map": "mAP"}.get(metric, metric), out / "figure4.png")


def dry_run(plan: list[Run]) -> None:
    """What would run, and how long it takes: a few steps of each system are timed, nothing is kept."""
    total, unfinished = 0.0, [run for run in plan if not run.finished]
    print(f"{len(plan)} runs, {len(plan) - len(unfinished)} of them finished.")
    for key in dict.fromkeys(run.system.key for run in unfinished):
        runs = [run for run in unfinished if run.system.key == key]
        seconds, said = estimate.of_run(list(runs[0].flags))
        total += seconds * len(runs)
        seeds = ", ".join(dict.fromkeys(str(run.seed) for run in runs))
        print(f"{runs[0].system.name}: seeds {seeds}; {said}; {estimate.text(seconds)} each")
        print(f"  python -m train.run {shlex.join(runs[0].flags)}", flush=True)
    print(f"about {estimate.text(total)} in all on this machine")


if __name__ == "__main__":
    sys.exit(main())
