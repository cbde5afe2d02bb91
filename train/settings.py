"""Settings of a run: every field is a flag of `python -m train.run`, a key of a recipe, and a line of settings.json."""

import contextlib
import difflib
import io
import math
import re
import tomllib
import types
import typing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from fftp.augment import AugmentSettings
from fftp.errors import UserError

RECIPES = Path(__file__).parent / "recipes"

GEOMETRY = ("patch_time", "time_stride", "patch_freq", "freq_stride")
# What may differ when a run is taken up again: where it runs and where it lies, not what it computes.
FREE_ON_RESUME = ("device", "out", "resume", "workers", "data_root", "device_memory_share", "accumulate", "graph")


@dataclass(frozen=True, kw_only=True)
class Settings(AugmentSettings):
    """What a run does. Values not given by hand come from the recipe, then from here."""

    fused: bool = False
    """Use the fastest backend that applies for each operation; without it the plain PyTorch references."""
    recipe: str = ""
    """A recipe's name (data/name or a path to a TOML file). Default: the data set's own default.toml."""

    data: Literal["synth", "speechcommands", "audioset", "folder"] = "synth"
    """Data set: made on the fly, Speech Commands in its official layout, AudioSet, or your own: a folder a class (or train/,
    validation/ and test/ of such folders), or a CSV."""
    data_root: str | None = None
    """Folder of the data set's files."""
    words: str = ""
    """Speech Commands: only these words, separated by commas."""
    download: bool = False
    """Speech Commands: fetch the official archive into data_root first."""
    train_list: str = ""
    """AudioSet: segment CSVs, AST's JSON lists, or parquet shards or folders of them, separated by commas, below data_root.
    Default: the balanced training set in whichever form is there."""
    test_list: str = ""
    """AudioSet: the same for the evaluation set."""
    synth_train: int = 2000
    synth_validation: int = 400
    synth_test: int = 600
    csv: str = ""
    """Folder data: a CSV with a line a clip; without it, one folder a class."""
    csv_file: str = "file"
    """Name of the CSV's column of paths."""
    csv_labels: str = "label"
    """Name of its column of labels."""
    csv_split: str = "split"
    """Name of its column of splits (train, validation, test) or folds."""
    label_separator: str = ";"
    """Between several labels of a clip."""
    multi_label: bool = False
    """A clip may have several labels: sigmoid outputs, mAP."""
    test_fold: str = ""
    """Fold held out for testing."""
    validation_fold: str = ""
    """Fold held out for choosing the epoch."""
    validation_share: float = 0.1
    """Share of the training clips held out where the data has no validation split."""
    skip_bad_files: bool = False
    """Go on without files that cannot be read; they are listed in result.json."""
    workers: int = 0
    """Processes that decode while packing; 0 is one a core."""

    model: Literal["ast", "aum"] = "ast"
    size: Literal["tiny", "small", "base"] = "tiny"
    depth: int = 0
    """Layers; 0 is the size's own (AST 12, AuM 24)."""
    tokens: Literal[1, 2] = 2
    """AST's class tokens: class and distillation, or class alone."""
    directions: Literal["none", "v1", "v2"] = "v1"
    """AuM: forward only, Fo-Bi (its own design) or Bi-Bi."""
    place: Literal["head", "middle", "end"] = "middle"
    """AuM: where the class token stands."""
    positions: Literal["learned", "none"] = "learned"

    frames: int = 128
    """Frames of the model's input; clips are padded or cut."""
    mels: int = 128
    fit: Literal["pad", "resize"] = "pad"
    mean: float | None = None
    """Mean of the log-mel for normalising; without it, measured on the training clips."""
    std: float | None = None
    patch: Literal["fftp", "square"] = "fftp"
    """fftp: patches as high as the spectrogram; square: patch_time x patch_freq."""
    patch_time: int = 0
    """Patch width, frames; 0 is 10 for fftp and 16 for square."""
    time_stride: int = 0
    """Frames from patch to patch; 0 is 4 for fftp and the patch's width for square."""
    patch_freq: int = 0
    """Patch height, bins, of square patches; 0 is 16."""
    freq_stride: int = 0
    """Bins from patch to patch, of square patches; 0 is the patch's height."""

    epochs: int = 10
    max_steps: int = 0
    """Stop after so many steps, with the schedule shortened to them; 0 is all epochs."""
    until_accuracy: float = 0.0
    """Stop after the epoch whose validation reaches this accuracy (mAP where a clip may have several labels), a share of 1,
    and test; the schedule stays that of all epochs. 0 is off."""
    batch_size: int = 128
    """Clips of a step, over all processes and micro-batches."""
    accumulate: int = 1
    """Micro-batches that a process takes its clips of a step in, for batches that do not fit into memory."""
    init: str = ""
    """Begin with the weights of this checkpoint, or of the best one of this run's folder, instead of new ones (fine-tuning)."""
    lr: float = 1e-3
    """Peak learning rate."""
    body_lr_scale: float = 1.0
    """Learning rate of everything but the head, as a share of the head's; 0 trains the head alone."""
    warmup_epochs: float = 1.0
    """Linear from 0, a step at a time."""
    schedule: Literal["cosine", "step"] = "cosine"
    """After the warm-up: a cosine to lr_end, or steps down by step_factor, the first after step_from epochs."""
    lr_end: float = 0.01
    """Where the cosine ends, as a share of the peak."""
    step_from: int = 10
    step_every: int = 5
    """Epochs from one step down to the next."""
    step_factor: float = 0.5
    optimiser: Literal["adamw", "adam", "muon"] = "adamw"
    """AdamW, decoupled decay but for vectors, tokens, positions and scan decays; Muon, which is the same but for the encoder's
    matrices, whose steps are made orthogonal; or Adam, weight_decay as L2 on everything."""
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    """Gradient clipping; 0 is off."""
    loss: Literal["auto", "ce", "bce"] = "auto"
    """auto: cross-entropy for one label a clip, binary cross-entropy for several."""
    label_smoothing: float = 0.0
    balanced: bool = False
    """Draw clips so that classes are equally frequent (AST's weights), with replacement."""
    log_every: int = 50
    """Keep the training loss of every so many steps in metrics.jsonl, by step; 0 keeps none."""
    average_last: int = 0
    """Also evaluate the mean of the weights of the last so many epochs."""
    average_decay: float = 0.0
    """Evaluate and keep a moving average of the weights, this share of it from step to step (less in the first ones); 0 is
    off."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto is bfloat16 where the processor has instructions for it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    graph: Literal["auto", "on", "off"] = "auto"
    """The whole step as one CUDA graph; auto is on where it can be, and the first lines of a run say why not."""
    deterministic: bool = False
    """Only operations that give the same bits twice, also on a GPU, at some cost in speed."""
    device_memory_share: float = 0.4
    """On a GPU: keep all samples there when they fit into this share of its free memory; 0 streams them."""
    seed: int = 0
    out: str = ""
    """Folder of the run; default: the next free one under runs/."""
    resume: bool = False
    """Go on with the run in --out. Other flags may be left out; where given they have to agree, but for --accumulate,
    --graph, --device, --workers, --data-root and --device-memory-share."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("frames", "mels", "epochs", "batch_size", "accumulate", "step_every"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "depth",
            "max_steps",
            "average_last",
            "workers",
            "clip_norm",
            "weight_decay",
            "warmup_epochs",
            "log_every",
            "step_from",
            "body_lr_scale",
            *GEOMETRY,
        ):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        if self.keep_tokens and self.augment == "none":
            raise UserError(
                "--keep-tokens keeps the patches that masks cover least: add --augment specmask or specaugment, or leave it "
                "out."
            )
        if self.lead and self.keep_tokens:
            raise UserError("--lead and --keep-tokens do not go together: leave one of them out.")
        if self.background_snr_min > self.background_snr_max:
            raise UserError(
                f"--background-snr-min {self.background_snr_min} is above --background-snr-max {self.background_snr_max}: "
                "exchange them."
            )
        for name in (
            "label_smoothing",
            "validation_share",
            "until_accuracy",
            "lr_end",
            "step_factor",
            "device_memory_share",
        ):
            self._require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        for name in (n for n, value in vars(self).items() if isinstance(value, float)):
            self._require(name, math.isfinite(getattr(self, name)), "a finite number")
        for name in ("beta1", "beta2", "average_decay"):
            self._require(name, 0 <= getattr(self, name) < 1, "from 0 to below 1")
        self._require("mask_snap", self.mask_snap <= self.frames, f"at most the {self.frames} frames of --frames")
        self._require("lr", self.lr > 0, "above 0")
        self._require("seed", 0 <= self.seed < 2**64, "from 0 to 2^64 - 1")
        if self.patch == "fftp" and (self.patch_freq not in (0, self.mels) or self.freq_stride not in (0, self.mels)):
            raise UserError(
                f"--patch fftp covers all {self.mels} mel bins: leave --patch-freq and --freq-stride out, "
                "or take --patch square."
            )
        if (self.mean is None) != (self.std is None) or (self.std is not None and self.std <= 0):
            raise UserError("--mean and --std go together, and --std is above 0: give both or neither.")
        if self.label_smoothing and (self.loss == "bce" or (self.loss == "auto" and self.multi_label)):
            raise UserError("--label-smoothing works with cross-entropy alone: leave it out, or take --loss ce.")
        if self.until_accuracy and self.average_last:
            raise UserError(
                "--average-last needs to know which epochs are the last, and --until-accuracy does not: leave one out, "
                "or take --average-decay."
            )

    def _called(self, name: str) -> str:
        return f"--{name.replace('_', '-')}"


_FIELDS = {field.name: field for field in fields(Settings)}
_TYPES = typing.get_type_hints(Settings)


def from_flags(
    arguments: list[str],
    command: str = "python -m train.run",
    description: str = "Train and evaluate an audio classifier.",
) -> tuple[Settings, set[str]]:
    """Settings from the command line over the recipe's, and the names of those given by hand.

    Raises UserError; `--help` prints the flags and ends the program.
    """
    import tyro

    names = {"prog": command, "description": description}
    words = [word for word in arguments if word not in ("-h", "--help")]
    given = _check_words(words)
    recipe = read_recipe(given.get("recipe", ""), given.get("data"))
    if given.get("patch", recipe.get("patch", Settings.patch)) != recipe.get("patch", Settings.patch):
        # A recipe's patch size is of its own kind of patch.
        recipe = {name: value for name, value in recipe.items() if name not in GEOMETRY}
    if len(words) < len(arguments):
        name = given.get("recipe") or f"{given.get('data', Settings.data)}/default"
        names["description"] += (
            f"\n\nThe defaults shown are those of the recipe {name}, and of the flags given; with another --data or --recipe "
            "beside --help they are that one's."
        )
        tyro.cli(Settings, args=[*words, "--help"], default=Settings(**recipe), **names)
    return _parse(tyro, words, Settings(**recipe), names), set(given)


def _parse(tyro, arguments, default, names):
    try:
        # What Settings refuses, tyro prints in a frame of several lines; here it is one sentence.
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(Settings, args=arguments, default=default, console_outputs=False, **names)
    except SystemExit as stop:
        if isinstance(stop.__context__, UserError):
            raise stop.__context__ from None
        raise UserError(
            f"The flags {' '.join(arguments)!r} could not be understood: "
            "`python -m train.run --help` lists every flag with its values."
        ) from None


def _check_words(arguments: list[str]) -> dict[str, str]:
    """The flags given: name -> text. Raises UserError for an unknown flag or a word that a flag does not take."""
    given, position = {}, 0
    while position < len(arguments):
        flag, equals, value = arguments[position].partition("=")
        position += 1
        name = flag.removeprefix("--").replace("-", "_")
        negated = name.startswith("no_") and _TYPES.get(name[3:]) is bool
        name = name[3:] if negated else name
        if not flag.startswith("--") or name not in _FIELDS:
            known = [f"--{n.replace('_', '-')}" for n in _FIELDS]
            raise UserError(f"There is no flag {flag!r}{_nearest(flag, known)}")
        if _TYPES[name] is bool:
            if equals:
                raise UserError(f"{flag} is a switch and takes no value: write {flag} or --no-{flag[2:]}.")
            given[name] = str(not negated)
            continue
        if not equals:
            if position == len(arguments):
                raise UserError(f"{flag} takes a value: {_wanted(name)}.")
            value = arguments[position]
            position += 1
        _check_value(f"--{name.replace('_', '-')}", name, value)
        given[name] = value
    return given


def _check_value(label: str, name: str, value: Any) -> None:
    """Raises UserError unless the text (or a recipe's value) is one that the field takes."""
    choices = _choices(name)
    if choices:
        if str(value) not in map(str, choices):
            raise UserError(f"{label} takes {_wanted(name)}, not {str(value)!r}{_nearest(str(value), choices)}")
        return
    kind = next(k for k in (typing.get_args(_TYPES[name]) or (_TYPES[name],)) if k is not types.NoneType)
    if isinstance(value, str) and kind is not bool:
        good = value == "None" and type(None) in typing.get_args(_TYPES[name])
        try:
            good = good or kind(value) is not None
        except ValueError:
            good = False
    else:
        good = type(value) is kind or (kind is float and type(value) is int)
    if not good:
        raise UserError(f"{label} takes {_wanted(name)}, not {str(value)!r}.")


def _choices(name: str) -> tuple:
    return typing.get_args(_TYPES[name]) if typing.get_origin(_TYPES[name]) is Literal else ()


def _wanted(name: str) -> str:
    if choices := _choices(name):
        return " or ".join(map(str, choices))
    kinds = typing.get_args(_TYPES[name]) or (_TYPES[name],)
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kinds[0]]


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, [str(k) for k in known], n=2, cutoff=0.6)
    return f": did you mean {' or '.join(close)}?" if close else ": `python -m train.run --help` lists what there is."


def recipe_names() -> list[str]:
    return sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.toml"))


def read_recipe(name: str, data: str | None = None) -> dict[str, Any]:
    """The settings of a recipe: "data/name", "name" of the data set given, or a path to a TOML file.

    Without a name it is the data set's default. Raises UserError for an unknown one or a key that is no setting.
    """
    values = _read(_recipe_path(name, data or Settings.data, named=bool(name)))
    if data is not None and values.get("data", data) != data:
        raise UserError(f"The recipe {name!r} is for --data {values['data']}, not {data}: give one of the two.")
    return {"data": data, **values} if data else values


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a recipe's file over those of the recipe that it names as its `base`, where it has one."""
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"The recipe {path} is not TOML ({error}): mend the line it names.") from None
    base = values.pop("base", "")
    for key, value in values.items():
        if key not in _FIELDS:
            raise UserError(f"The recipe {path} sets {key!r}, which is no setting{_nearest(key, list(_FIELDS))}")
        _check_value(f"The recipe {path}: {key}", key, value)
    if not isinstance(base, str):
        raise UserError(f"The recipe {path}: base takes a recipe's name, not {base!r}.")
    if not base:
        return values
    under = _recipe_path(base, values.get("data", Settings.data), named=True)
    if under in (path, *above):
        raise UserError(f"The recipe {path} is its own base: name another one, or leave base out.")
    below = _read(under, (path, *above))
    if values.get("patch", below.get("patch")) != below.get("patch"):
        below = {name: value for name, value in below.items() if name not in GEOMETRY}  # sizes of another kind of patch
    return below | values


def _recipe_path(name: str, data: str, named: bool) -> Path:
    if not named:
        return RECIPES / data / "default.toml"
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"There is no recipe file {path}: give an existing one, or one of {', '.join(recipe_names())}."
            )
        return path
    for candidate in (RECIPES / f"{name}.toml", RECIPES / data / f"{name}.toml"):
        if candidate.is_file():
            return candidate
    known = recipe_names()
    close = difflib.get_close_matches(name, known + [k.split("/")[1] for k in known], n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(dict.fromkeys(close))}?" if close else "docs/RECIPES.md lists what there is."
    raise UserError(f"There is no recipe {name!r}: {hint}")


# Flags that say where one kind of data set has its clips.
_OF_DATA = {
    **dict.fromkeys(("words", "download"), "speechcommands"),
    **dict.fromkeys(("train_list", "test_list"), "audioset"),
    **dict.fromkeys(("csv", "csv_file", "csv_labels", "csv_split", "label_separator"), "folder"),
    **dict.fromkeys(("multi_label", "test_fold", "validation_fold"), "folder"),
}


def check_data(settings: Settings, given: set[str]) -> None:
    """Raises UserError for flags given by hand that the data set does not read: others' files would go unseen."""
    if settings.data == "synth" and "data_root" in given:
        raise UserError(
            "--data-root names recordings, and --data synth makes its own: add --data folder, or speechcommands or audioset."
        )
    for name in sorted(given):
        wanted = _OF_DATA.get(name, settings.data)
        if wanted != settings.data:
            raise UserError(
                f"{settings._called(name)} is for --data {wanted}, and this is --data {settings.data}: exchange one of them."
            )


def differences(saved: dict[str, Any], now: Settings, given: set[str]) -> list[str]:
    """Flags given by hand that disagree with a run's saved settings."""
    found = []
    for name in sorted(given - set(FREE_ON_RESUME)):
        was = saved.get(name, _FIELDS[name].default)  # a run from before there was such a flag went without
        if was != getattr(now, name):
            found.append(f"--{name.replace('_', '-')} was {was} and is {getattr(now, name)}")
    return found


def from_saved(saved: dict[str, Any], **changes: Any) -> Settings:
    """Settings as a run's settings.json holds them. Raises UserError when it is of another version."""
    unknown = sorted(set(saved) - set(_FIELDS))
    if unknown:
        raise UserError(
            f"The run was made by another version: its settings hold {', '.join(unknown)}; start a new one."
        )
    return replace(Settings(**saved), **changes)


def to_dict(settings: Settings) -> dict[str, Any]:
    return asdict(settings)


def slug(settings: Settings) -> str:
    """A name for the run's folder."""
    text = f"{settings.data}-{settings.model}-{settings.size}-{settings.patch}-{settings.augment}"
    return re.sub(r"[^\w.-]+", "-", text)
