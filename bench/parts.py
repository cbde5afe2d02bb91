"""The parts of the benchmark, in the order of their worth: what `bench.run`, `bench.report` and `bench.gpu` read.

`bench/bench_NAME.py` holds a part's rows: `cases(device)` yields them, the ones that are worth most first.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Part:
    """title: of its section in docs/PERFORMANCE.md. gpu_share: its weight where `make gpu` divides its time. ahead: how
    many processes call its rows once before that, so that what they need is compiled. note: what a reader of its rows has
    to know."""

    title: str
    gpu_share: float
    ahead: int = 1
    note: str = ""


PARTS = {
    "table3": Part(title="Table III of the paper, put right", gpu_share=10),
    "patch_embed": Part(title="Patch embedding", gpu_share=4, ahead=3),
    "spec_mask": Part(title="SpecMask, drawn and painted", gpu_share=2),
    "selective_scan": Part(title="AuM's scan, both directions", gpu_share=4, ahead=3),
    "rms_norm": Part(title="AuM's residual addition and norm", gpu_share=1),
    "gelu": Part(title="AST's bias and GELU", gpu_share=1),
    "layer_norm": Part(title="AST's residual addition and norm", gpu_share=1),
    "fbank": Part(title="Front end: waveform to log-mel", gpu_share=2),
    "input": Part(title="The whole input path, with a model that costs nothing", gpu_share=1),
    "step": Part(title="A training step, data to optimiser", gpu_share=3),
    "infer": Part(
        title="Inference",
        gpu_share=4,
        note="A single clip of 98 tokens has all weights read for few operations, so the faster a processor multiplies, "
        "the less short clips gain alone: how many clips a second go through is told by batches of eight.",
    ),
    "stream": Part(title="Live sound: an answer every hop", gpu_share=1),
    "step_parts": Part(title="Where a training step's time goes", gpu_share=1),
    "encoder": Part(title="The encoder's blocks alone", gpu_share=3, ahead=2),
    "scale": Part(title="Cost as work grows", gpu_share=3),
}
