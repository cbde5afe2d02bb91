"""python -m fftp.convert SOURCE FOLDER: published weights of AST or AuM, or of an image model, as a checkpoint of ours.

Sizes and patch grid come from the tensors (`fftp.published`) and, for a folder of transformers, from its JSON files;
positions and patch kernels are resized where the new grid differs, and a head of other classes is replaced.
"""

import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fftp import checkpoint, command, fitting, hub, layouts
from fftp.ast_model import AST, ASTConfig
from fftp.aum_model import AuM
from fftp.errors import UserError
from fftp.frontend import STATISTICS, FrontEndSettings
from fftp.patching import PatchGrid, image_positions
from fftp.published import AST_STRIDE, Hints, from_ast, from_aum, load
from kernels import FbankSettings

__all__ = ["Options", "convert", "from_ast", "from_aum", "main"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert published weights of AST, AuM or an image model. What is not given stays as it is in the source."""

    patch: Literal["same", "fftp", "square"] = "same"
    """Patches of the new checkpoint: the file's, full-frequency, or square."""
    patch_time: int = 0
    """Patch width, frames; 0 is the file's, or 10 for fftp and 16 for square."""
    time_stride: int = 0
    """Frames from patch to patch; 0 is the file's, or 4 for fftp and the patch's width for square."""
    patch_freq: int = 0
    """Patch height, bins; 0 is the file's, or 16 for square."""
    freq_stride: int = 0
    """Bins from patch to patch; 0 is the file's, or the patch's height for square."""
    frames: int = 0
    """Frames of the model's input; 0 is as many as the file's positions are for."""
    resize: Literal["pinv", "bilinear"] = "pinv"
    """How patch kernels are resized: FlexiViT's pseudo-inverse, or bilinear with antialias."""
    labels: str = ""
    """File of class names: a line each, or a CSV with a column display_name. Another number than the file's: a new head.
    Needed for an image model."""
    multi_label: bool = False
    """A clip may have several labels, as in AudioSet: sigmoid outputs."""
    channels: Literal["sum", "mean"] = "sum"
    """Image models: the three colour channels of the patch kernels are added up, as AST does, or averaged, as AuM does."""
    mean: float | None = None
    """Of the log-mel, for normalising; default the source's, or AudioSet's."""
    std: float | None = None
    """The same."""
    place: Literal["head", "middle", "end"] = "middle"
    """AuM: where the class token of the file stands."""
    heads: int = 0
    """AST: attention heads of the file; 0 is one for each 64 dimensions."""
    file_time_stride: int = 0
    """Frames from patch to patch in the file; 0 is 10 for AST and the patch's width for AuM."""
    file_freq_stride: int = 0
    """Bins from patch to patch in the file; 0 is 10 for AST and the patch's height for AuM."""
    seed: int = 0
    """Of a new head's weights."""


def convert(source: Path, options: Options) -> tuple[AST | AuM, checkpoint.CheckpointConfig, str, str]:
    """(The model, its configuration, what was done to the weights, what that costs or "") of published weights.

    source: a file, or a folder as transformers writes it. Raises UserError.
    """
    path, said = layouts.read_folder(source) if source.is_dir() else (source, layouts.Said())
    config, weights, image = load(path, _hints(options, said))
    if said.eps is not None:
        config = replace(config, eps=said.eps)
    old = config.grid
    if image and not options.labels:
        raise UserError(f"{path} is an image model, whose head knows no sounds: name your classes by --labels FILE.")
    # AST's own geometry, for a model whose grid is that of images.
    base = PatchGrid(T=1024, F=layouts.MELS, pt=old.pt, pf=old.pf, st=AST_STRIDE, sf=AST_STRIDE) if image else old
    grid = _new_grid(options, base)
    labels = _labels(options, config.classes, said)
    made = checkpoint.CheckpointConfig(
        model=replace(config, grid=grid, classes=len(labels)),
        front_end=_front_end(options, grid, said),
        labels=labels,
        multi_label=options.multi_label or said.multi_label,
        settings={},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = made.build()  # draws the weights of a new head
    with torch.device("meta"):
        held = replace(made, model=config).build()
    held.load_state_dict(weights, assign=True)
    done = fitting.fit(held, model, not image and len(labels) == config.classes, options.resize)
    if image and not grid.full_frequency:
        position = image_positions(weights["embed.position"], config.tokens, old, grid)
        model.embed.position.data = position
    return model.eval(), made, "; ".join(done) or "weights as they are", fitting.cost(old, grid)


def _hints(options, said) -> Hints:
    return Hints(
        heads=options.heads or said.heads,
        time_stride=options.file_time_stride or said.time_stride,
        freq_stride=options.file_freq_stride or said.freq_stride,
        place=options.place,
        frames=said.frames or options.frames,
        channels=options.channels,
    )


def _new_grid(options, old) -> PatchGrid:
    if options.patch == "fftp":
        if options.patch_freq not in (0, old.F) or options.freq_stride not in (0, old.F):
            raise UserError(
                f"--patch fftp covers all {old.F} mel bins: leave --patch-freq and --freq-stride out, "
                "or take --patch square."
            )
        size = (options.patch_time or 10, old.F, options.time_stride or 4, old.F)
    elif options.patch == "square":
        pt, pf = options.patch_time or 16, options.patch_freq or 16
        size = (pt, pf, options.time_stride or pt, options.freq_stride or pf)
    else:
        size = (options.patch_time or old.pt, options.patch_freq or old.pf)
        size += (options.time_stride or old.st, options.freq_stride or old.sf)
    pt, pf, st, sf = size
    return PatchGrid(T=options.frames or old.T, F=old.F, pt=pt, pf=pf, st=st, sf=sf)


def _front_end(options, grid, said) -> FrontEndSettings:
    mean, std = (
        next(v for v in (getattr(options, name), getattr(said, name), published) if v is not None)
        for name, published in zip(("mean", "std"), STATISTICS["audioset"], strict=True)
    )
    if not std > 0 or not abs(mean) < float("inf") or std == float("inf"):
        raise UserError(f"--mean and --std are finite and --std is above 0, not {mean} and {std}.")
    fbank = FbankSettings(n_mels=grid.F)
    return FrontEndSettings(T=grid.T, clip_samples=fbank.samples(grid.T), mean=mean, std=std, fbank=fbank)


def _labels(options, classes, said) -> tuple[str, ...]:
    """Names of the classes; numbers where nothing gives them. Raises UserError."""
    if not options.labels:
        return said.labels if len(said.labels) == classes else tuple(str(number) for number in range(classes))
    path = Path(options.labels)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels {path} cannot be read as text: give a file with a class name a line.") from error
    if path.suffix == ".csv":
        rows = csv.DictReader(text.splitlines())
        if "display_name" not in (rows.fieldnames or ()):
            raise UserError(f"--labels {path} has no column display_name: give AudioSet's list, or a name a line.")
        names = [(row["display_name"] or "").strip() for row in rows]
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names or len(set(names)) != len(names) or "" in names:
        raise UserError(f"--labels {path} has no names, an empty one, or one twice: give each class's once.")
    return tuple(names)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""

    def converted(
        source: command.positional(str, "SOURCE"),
        folder: command.positional(str, "FOLDER"),
        options: command.flat(Options),
    ) -> tuple[str, str, Options]:
        """Convert published weights of AST, AuM or an image model to a checkpoint that fftp.load reads.

        Args:
            source: A .safetensors or .pth file under the original's, transformers' or timm's names, a folder as
                transformers writes it, or the id of one on the hub (NAME/NAME).
            folder: The checkpoint to write; it must not exist yet.
        """
        return source, folder, options

    try:
        words = sys.argv[1:] if arguments is None else arguments
        takes = ("SOURCE", "FOLDER")
        source, folder, options = command.parse(converted, words, "python -m fftp.convert", Options, takes)
        _check_numbers(options)
        out = Path(folder)
        if out.exists():
            raise UserError(f"{out} is there already: give a new folder.")
        given = hub.fetched(source, hub.TRANSFORMERS_FILES) if hub.is_id(source) else Path(source)
        _refuse_own(given)
        model, config, done, cost = convert(given, options)
        try:
            with checkpoint.replacing(out) as beside:
                checkpoint.save(beside, model, config)
        except OSError as error:
            raise UserError(f"{out} cannot be written ({error.strerror}): give another folder.") from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    _say(model, config, done, out)
    if cost:
        print(f"warning: {cost}", file=sys.stderr)
    return 0


def _refuse_own(source: Path) -> None:
    """Raises UserError for what `fftp.load` reads as it is."""
    folder = source if source.is_dir() else source.parent
    try:
        checkpoint.read_config(checkpoint.find(folder))
    except UserError:
        return
    raise UserError(
        f"{source} is a checkpoint of this library already: fftp.load reads it, and `python -m train.run --init {folder}` "
        "goes on from its weights."
    )


def _check_numbers(options):
    sizes = ("patch_time", "time_stride", "patch_freq", "freq_stride", "frames", "heads")
    for name in (*sizes, "file_time_stride", "file_freq_stride"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} has to be 0 or more, not {getattr(options, name)}.")


def _say(model: nn.Module, config: checkpoint.CheckpointConfig, done: str, out: Path) -> None:
    m, front_end = config.model, config.front_end
    kind = f"AST, {m.heads} heads" if isinstance(m, ASTConfig) else f"AuM, directions {m.directions}"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{kind}, {m.depth} layers of {m.dim}, {parameters:.2f} M parameters; {front_end.T} frames, {fitting.described(m.grid)}"
    )
    print(f"{done}; mean {front_end.mean:.4f}, std {front_end.std:.4f}, {len(config.labels)} classes -> {out}")


if __name__ == "__main__":
    sys.exit(main())
