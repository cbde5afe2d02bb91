"""python -m fftp.explain figure1|figure2|figure3: what the paper's three figures show, from real recordings and models.

figure1: square and full-frequency patches on a spectrogram, and the two encoders. figure2: SpecAugment beside SpecMask.
figure3: attention rollout over the spectrogram, for one or more AST checkpoints; of several recordings, over a mixture of
their loudest stretches, whose times are known.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import kernels
from fftp import audio, command, figures
from fftp.ast_model import AST
from fftp.augment import Augment, AugmentSettings
from fftp.errors import UserError
from fftp.frontend import STATISTICS, FrontEnd, FrontEndSettings
from fftp.mixture import HOP_SECONDS, Sound, mean_over, mixture
from fftp.patching import PatchGrid
from fftp.predict import load

MASK_COLOUR = "#3a86c8"
FIGURE2_SEED = 9  # draws masks of both kinds, so that the picture shows them


@torch.inference_mode()
def attention_rollout(model: AST, log_mel: torch.Tensor) -> torch.Tensor:
    """How much each cell of the input `[B, T, F]` reaches AST's class tokens; `[B, T, F]`, each clip's mean 1.

    Abnar and Zuidema (2020): attention averaged over heads, half of it the identity for the residual path, rows
    renormalised, multiplied over the layers. The rows of the class tokens are averaged, patches alone kept, and overlapping
    patches averaged back onto the cells they cover; with full-frequency patches a frame's bins are all equal. Raises
    UserError for a model without attention.
    """
    if not isinstance(model, AST):
        raise UserError("Attention rollout needs attention: AuM has none, take an AST checkpoint.")
    grid, tokens = model.config.grid, model.config.tokens
    rollout = None
    for attention in model.attentions(log_mel):
        mean = attention.mean(1)  # (B, L, L)
        step = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], device=mean.device)
        step = step / step.sum(-1, keepdim=True)
        rollout = step if rollout is None else step @ rollout
    relevance = rollout[:, :tokens, tokens:].mean(1)  # (B, N)
    return _onto_cells(relevance, grid)


def _onto_cells(relevance, grid: PatchGrid):
    """Patches `[B, N]` to cells `[B, T, F]`: each cell the mean of the patches over it, 0 where there is none."""
    B = relevance.shape[0]
    total, covers = relevance.new_zeros(B, grid.T, grid.F), relevance.new_zeros(grid.T, grid.F)
    for n, value in enumerate(relevance.unbind(1)):
        t, f = (n % grid.n_t) * grid.st, (n // grid.n_t) * grid.sf
        cell = (slice(t, t + grid.pt), slice(f, f + grid.pf))
        total[:, *cell] += value[:, None, None]
        covers[cell] += 1
    cells = total / covers.clamp_min(1)
    return cells / cells.mean((1, 2), keepdim=True)


def _log_mel(path: Path, frames: int | None) -> np.ndarray:
    """Un-normalised log-mel `[T, F]` of a recording: its first frames, or all."""
    fbank = kernels.FbankSettings()
    waveform = torch.from_numpy(audio.load(path, fbank.sample_rate, fbank.frame))[None]
    T = min(frames or 1000, fbank.frames(waveform.shape[1]))
    mean, std = STATISTICS["speechcommands"]
    front_end = FrontEnd(FrontEndSettings(T=T, clip_samples=waveform.shape[1], mean=mean, std=std))
    return front_end.log_mel(waveform, torch.tensor([waveform.shape[1]]))[0].numpy()


def _show(axes, log_mel: np.ndarray, title: str, colours: str = "magma") -> None:
    """A spectrogram `[T, F]`, time to the right in seconds, mel bins upwards; NaN cells stay the background's colour."""
    T, F = log_mel.shape
    low, high = np.nanpercentile(log_mel, [2, 99.8])
    extent = (0, T * HOP_SECONDS, 0, F)
    axes.imshow(log_mel.T, origin="lower", aspect="auto", cmap=colours, extent=extent, vmin=low, vmax=high)
    axes.set(title=title, xlabel="time, s", ylabel="mel bin")


def _outline(axes, grid: PatchGrid, every: int = 1) -> None:
    from matplotlib.patches import Rectangle

    for i in range(0, grid.n_t, every):
        for j in range(grid.n_f):
            corner = (i * grid.st * HOP_SECONDS, j * grid.sf)
            size = (grid.pt * HOP_SECONDS, grid.pf)
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=0.9))


def figure1(file: Path, out: Path) -> None:
    """Square and full-frequency patches on the recording, and under them what the two encoders do with the tokens."""
    log_mel = _log_mel(file, 128)
    T, F = log_mel.shape
    square = PatchGrid(T=T, F=F, pt=16, pf=16, st=16, sf=16)
    full = PatchGrid(T=T, F=F, pt=10, pf=F, st=10, sf=F)
    figure = figures.figure(11, 8.2)
    axes = figure.subplots(2, 2, height_ratios=[1.15, 1])
    _show(axes[0, 0], log_mel, f"Square patches, 16 x 16: {square.N} tokens")
    _outline(axes[0, 0], square)
    _show(axes[0, 1], log_mel, f"Full-frequency temporal patches, {F} x 10: {full.N} tokens")
    _outline(axes[0, 1], full)
    _encoder(
        axes[1, 0],
        "AST: tokens in front, 12 blocks",
        "[class] [dist] patch 1 ... patch N   + positions",
        ["LayerNorm", "self-attention (SDPA)", "+", "LayerNorm", "MLP, GELU", "+"],
        "LayerNorm, mean of both tokens, LayerNorm, linear",
    )
    _encoder(
        axes[1, 1],
        "AuM: class token in the middle, 24 blocks",
        "patch 1 ... [class] ... patch N   + positions",
        ["RMSNorm", "project, causal conv", "scan forward | scan backward", "gate, project", "+"],
        "RMSNorm, class token, linear",
    )
    figures.save(figure, out)


def _encoder(axes, title, tokens, parts, head) -> None:
    """A column of boxes from the tokens at the bottom to the classes at the top; parts repeat in a frame."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    axes.set(title=title, xlim=(0, 10), ylim=(0, 10))
    axes.axis("off")
    rows = [tokens, *parts, head]
    step = 10 / len(rows)
    for i, text in enumerate(rows):
        inner = 0 < i < len(rows) - 1
        box = FancyBboxPatch(
            (1.6 if inner else 0.6, i * step + 0.12 * step),
            6.8 if inner else 8.8,
            0.62 * step,
            boxstyle="round,pad=0.05",
            facecolor="#e8eef5" if inner else "#f6e9d8",
            edgecolor="#44546a",
        )
        axes.add_patch(box)
        axes.text(
            5, (i + 0.43) * step, "add to the residual" if text == "+" else text, ha="center", va="center", fontsize=8.5
        )
        if i:
            arrow = {"arrowstyle": "-|>", "color": "#44546a"}
            axes.annotate("", (5, (i + 0.1) * step), (5, (i - 0.24) * step), arrowprops=arrow)
    frame = (1.2, step * 1.0), 7.6, step * (len(parts) - 0.1)
    axes.add_patch(Rectangle(*frame, fill=False, linestyle="--", edgecolor="#888888"))
    axes.text(8.9, step * (1 + len(parts) / 2), "repeated", rotation=90, va="center", fontsize=8.5, color="#555555")


def figure2(file: Path, out: Path, seed: int) -> None:
    """The recording's spectrogram under SpecAugment and SpecMask, at the paper's share of the area (20 %)."""
    log_mel = _log_mel(file, None)
    T, F = log_mel.shape
    settings = {
        "SpecAugment (Park et al.)": AugmentSettings(
            augment="specaugment", mask_max_frequency=48, mask_max_time=T // 5
        ),
        "SpecMask": AugmentSettings(augment="specmask", mask_area=T * F // 5, mask_width=max(1, T // 8), mask_height=F),
    }
    figure = figures.figure(11, 3.6)
    axes = figure.subplots(1, 3, sharey=True)
    _show(axes[0], log_mel, "log-mel")
    ticket = torch.tensor([0])
    for each, (name, chosen) in zip(axes[1:], settings.items(), strict=True):
        rectangles = Augment(chosen, seed, T, F).rectangles(0, ticket)
        hidden = kernels.paint(torch.zeros(1, T, F), rectangles, torch.ones(1))[0].numpy() > 0
        _show(each, np.where(hidden, np.nan, log_mel), f"{name}: {100 * hidden.mean():.0f} % hidden")
        each.set_facecolor(MASK_COLOUR)
    figures.save(figure, out)


def figure3(checkpoints: list[Path], files: list[Path], names: list[str], out: Path) -> None:
    """Attention rollout of each checkpoint over the recording: the sound of its first window, padding left out.

    Of several recordings: over their `mixture`, with bars where they sound, and the rollout's mean there; names: of them.
    """
    loaded = [load(path) for path in checkpoints]
    kinds = {classifier.config.model.grid.full_frequency for classifier in loaded}
    figure = figures.figure(4.2 * len(loaded) + 3.6, 3.6)
    axes, pictures = figure.subplots(1, len(loaded) + 1, sharey=True), []
    for number, classifier in enumerate(loaded, 1):
        front_end, grid = classifier.config.front_end, classifier.config.model.grid
        rate, clips = front_end.fbank.sample_rate, [classifier.prepare(*_for_prepare(file)) for file in files]
        many = len(files) > 1
        samples, sounds = mixture(clips, names, front_end.clip_samples, rate) if many else (clips[0], [])
        frames = min(front_end.fbank.frames(len(samples)), front_end.T)
        log_mel = classifier.log_mel(samples)
        heat = attention_rollout(classifier.model, log_mel)[0, :frames].numpy()
        sound = log_mel[0, :frames].numpy()
        label, probability = classifier.predict_many([samples])[0].top(1)[0]
        if number == 1:
            _show(axes[0], sound, "mixture" if many else files[0].name)
            _timeline(axes[0], sounds, rate)
        kind = "full-frequency" if grid.full_frequency else "square"
        if len(loaded) > len(kinds):  # patches alone do not tell them apart
            kind = f"{checkpoints[number - 1].name}, {kind}"
        said = f"{mean_over(sounds, heat, rate):.2f} on the sounds" if many else f"{label} {100 * probability:.0f} %"
        _show(axes[number], sound, f"{kind}, {grid.N} tokens: {said}", "gray")
        extent = (0, frames * HOP_SECONDS, 0, grid.F)
        shown = axes[number].imshow(heat.T, origin="lower", aspect="auto", cmap="turbo", alpha=0.5, extent=extent)
        _timeline(axes[number], sounds, rate)
        figure.colorbar(shown, ax=axes[number], label="rollout (mean 1)")
        pictures.append(shown)
    most = max(float(shown.get_array().max()) for shown in pictures)
    for shown in pictures:
        shown.set_clim(0, most)  # one scale for all models
    figures.save(figure, out)


def _timeline(axes, sounds: list[Sound], rate: int) -> None:
    """Bars at the spectrogram's upper edge, over what is a sound, with its name."""
    F = axes.get_ylim()[1]
    for sound in sounds:
        start, stop = sound.start / rate, sound.stop / rate
        axes.hlines(0.97 * F, start, stop, color="white", linewidth=5)
        axes.text((start + stop) / 2, 0.9 * F, sound.name, color="white", ha="center", va="top", fontsize=7)


def _for_prepare(file: Path):
    samples, rate = audio.read(file)
    return samples.T, rate


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw one of the paper's figures."""

    file: tuple[Path, ...]
    """A recording; figure3: or several, for a mixture of them."""
    out: Path | None = None
    """The picture to write; default: figureN.png here."""
    checkpoint: tuple[Path, ...] = ()
    """figure3: AST checkpoints, or out folders of runs."""
    names: tuple[str, ...] = ()
    """figure3: what to call several recordings; default: their files' names."""
    seed: int = FIGURE2_SEED
    """figure2: of the masks."""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    names = ("figure1", "figure2", "figure3")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or arguments[0] not in (*names, "-h", "--help"):
            raise UserError(f"Say which figure to draw: python -m fftp.explain {'|'.join(names)} --file RECORDING.")
        which = arguments[0] if arguments[0] in names else ""
        prog = f"python -m fftp.explain {which or '|'.join(names)}"
        options = command.parse(Options, arguments[1:] if which else ["--help"], prog, Options)
        out = options.out or Path(f"{which}.png")
        if not options.file or (len(options.file) > 1 and which != "figure3"):
            raise UserError(f"{which} shows one recording: give one behind --file.")
        if which == "figure1":
            figure1(options.file[0], out)
        elif which == "figure2":
            figure2(options.file[0], out, options.seed)
        elif not options.checkpoint:
            raise UserError("figure3 looks into a trained AST: add --checkpoint FOLDER, one or more.")
        else:
            names = list(options.names or (file.stem for file in options.file))
            if len(names) != len(options.file):
                raise UserError(
                    f"--names has {len(names)} names for {len(options.file)} recordings: give one for each."
                )
            figure3(list(options.checkpoint), list(options.file), names, out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
