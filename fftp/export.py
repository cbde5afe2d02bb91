"""python -m fftp.export CHECKPOINT FILE: a trained model as one ONNX or torch.export file, waveform in, probabilities out.

The front end and the cutting into windows are inside, so that a runtime needs nothing of ours. Any number of recordings of one
length, which may be any from one window of the front end on. Compared with our own answers before it takes its name.
"""

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fftp import checkpoint, command
from fftp.errors import UserError
from fftp.frontend import RealFrontEnd
from fftp.predict import Classifier
from kernels import dispatch

BOUND = 1e-4  # probabilities: what the file may differ from ours by
OLDEST_OPSET = 18  # of torch's exporter
ONNX_PACKAGES = ("onnx", "onnxscript")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a trained model as one file for other runtimes."""

    format: Literal["onnx", "pt2"] = "onnx"
    """onnx, or pt2: what torch.export.load reads."""
    opset: int = 20
    """ONNX: the version of its operators, 18 or newer."""


class Deployed(nn.Module):
    """Waveforms `[B, samples]` in -1..1 at the checkpoint's rate -> probabilities `[B, C]`, as `Classifier.predict` says them.

    Recordings longer than the model's window are cut into windows, end to end, the last one ending with the recording, whose
    probabilities are averaged; shorter ones are padded. In float32, of operations that torch.export takes with both sizes
    dynamic.
    """

    def __init__(self, model: nn.Module, config: checkpoint.CheckpointConfig):
        super().__init__()
        self.front_end, self.model, self.config = RealFrontEnd(config.front_end), model, config

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        S = self.front_end.W  # samples of a window
        B, samples = waveform.shape
        total = torch.scalar_tensor(samples, dtype=torch.int64, device=waveform.device)
        # A number out of a tensor (int() would ask for its value), of which the exporter assumes nothing: one window is no
        # case of its own.
        count = ((total + (S - 1)) // S).item()
        torch._check(count >= 1)
        last = (total - S).clamp_min(0)
        starts = torch.minimum(torch.arange(count, device=waveform.device) * S, last)  # (count,)
        padded = torch.cat([waveform, waveform.new_zeros(B, S)], 1)
        pieces = padded[:, starts[:, None] + torch.arange(S, device=waveform.device)]  # (B, count, S)
        log_mel = self.front_end(pieces.flatten(0, 1), samples)  # (B * count, T, F)
        probabilities = self.config.probabilities(self.model(log_mel))
        return probabilities.unflatten(0, (B, count)).mean(1)


def exported(model: nn.Module, config: checkpoint.CheckpointConfig) -> torch.export.ExportedProgram:
    """`Deployed` as torch.export writes it down, for any number of clips and samples. The model is one of ours, in float32."""
    deployed, S = Deployed(model, config).eval(), config.front_end.clip_samples
    clips, samples = torch.export.Dim("clips", min=1), torch.export.Dim("samples", min=config.front_end.fbank.frame)
    example = torch.zeros(2, 2 * S + 1)
    with _quiet(), torch.no_grad(), dispatch.plain(selective_scan="loop"):
        return torch.export.export(deployed, (example,), dynamic_shapes=({0: clips, 1: samples},))


def write(model: nn.Module, config: checkpoint.CheckpointConfig, path: Path, options: Options) -> str:
    """Write the file; returns what was seen when it was compared with our own answers, a sentence.

    Raises UserError for packages that are missing, an opset that cannot be had, a file that cannot be written, and answers
    that differ by more than BOUND; then there is no file.
    """
    onnx = options.format == "onnx"
    if onnx:
        _check_onnx(options.opset)
    beside = path.with_name(path.name + ".new")
    try:
        program = exported(model, config)
        if onnx:
            _save_onnx(program, config, beside, options.opset)
        else:
            with _quiet():
                torch.export.save(program, beside)
        seen = _compared(_runner(beside, onnx), model, config)
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another file.") from None
    finally:
        beside.unlink(missing_ok=True)
    return seen


def _check_onnx(opset):
    import importlib.util

    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {' and '.join(missing)}: pip install onnx onnxscript onnxruntime, or take --format "
            "pt2, which needs nothing."
        )
    from onnx.defs import onnx_opset_version

    if not OLDEST_OPSET <= opset <= onnx_opset_version():
        raise UserError(f"--opset has to be from {OLDEST_OPSET} to {onnx_opset_version()}, not {opset}.")


def _save_onnx(program, config, path, opset):
    with _quiet(), torch.no_grad():  # with gradients the exporter cannot take the scan apart
        made = torch.onnx.export(
            program,
            input_names=["waveform"],
            output_names=["probabilities"],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    written = made.model.opset_imports[""]
    if written != opset:
        raise UserError(f"--opset {opset}: this model needs operators of version {written}: take --opset {written}.")
    made.model.metadata_props.update({name: json.dumps(value) for name, value in described(config).items()})
    made.save(path)


def described(config: checkpoint.CheckpointConfig) -> dict[str, Any]:
    """What an ONNX file says of itself, each as JSON in its metadata."""
    front_end = config.front_end
    return {
        "labels": list(config.labels),
        "multi_label": config.multi_label,
        "sample_rate": front_end.fbank.sample_rate,
        "window_samples": front_end.clip_samples,
        "shortest_samples": front_end.fbank.frame,
    }


def _runner(path, onnx) -> Callable[[np.ndarray], np.ndarray] | None:
    """Waveforms to probabilities by the file itself; None where nothing here can run it."""
    if not onnx:
        with _quiet():
            module = torch.export.load(path).module()
        return lambda waveform: module(torch.from_numpy(waveform)).detach().numpy()
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda waveform: session.run(["probabilities"], {"waveform": waveform})[0]


def _compared(run, model, config) -> str:
    """A sentence. Raises UserError for answers that are too far from ours."""
    if run is None:
        return "not checked against ours: onnxruntime is not installed (pip install onnx onnxscript onnxruntime)"
    classifier = Classifier(model, config, precision="float32")
    rng, S, shortest, worst = np.random.default_rng(0), config.front_end.clip_samples, config.front_end.fbank.frame, 0.0
    lengths = [max(shortest, S // 3), S, 2 * S + S // 2]
    for clips, samples in zip((1, 2, 3), lengths, strict=True):
        waveform = (0.1 * rng.normal(size=(clips, samples))).astype(np.float32)
        with dispatch.plain():
            ours = np.stack([prediction.probabilities for prediction in classifier.predict_many(list(waveform))])
        worst = max(worst, float(np.abs(run(waveform) - ours).max()))
    if not worst <= BOUND:
        raise UserError(
            f"The file's probabilities differ from ours by {worst:.1e}, more than {BOUND:.0e}: please report this."
        )
    return f"checked: probabilities within {worst:.1e} of ours on noise of {', '.join(map(str, lengths))} samples"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own warnings and log lines, which are of their insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""

    def written(
        checkpoint: command.positional(str, "CHECKPOINT"),
        file: command.positional(str, "FILE"),
        options: command.flat(Options),
    ) -> tuple[str, str, Options]:
        """Write a trained model as one file: waveform [clips, samples] in, probabilities [clips, classes] out.

        Args:
            checkpoint: A checkpoint folder, or the out folder of a run.
            file: The file to write, model.onnx for example; it must not exist yet.
        """
        return checkpoint, file, options

    try:
        words = sys.argv[1:] if arguments is None else arguments
        takes = ("CHECKPOINT", "FILE")
        source, file, options = command.parse(written, words, "python -m fftp.export", Options, takes)
        path = Path(file)
        if path.exists():
            raise UserError(f"{path} is there already: give a new file.")
        if path.suffix in (".onnx", ".pt2") and path.suffix != f".{options.format}":
            raise UserError(
                f"{path} is to be of --format {options.format}, and ends in {path.suffix}: change one of them."
            )
        model, config = checkpoint.load(source)
        seen = write(model, config, path, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    fbank = config.front_end.fbank
    print(
        f"{path}: waveform [clips, samples] at {fbank.sample_rate} Hz, {fbank.frame} samples or more -> probabilities "
        f"[clips, {len(config.labels)}]; {path.stat().st_size / 1e6:.1f} MB"
    )
    print(seen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
