"""The whole step with every Triton kernel, recorded and played back on other clips, tickets, epochs and learning rates.

Run by tests/test_triton_graph.py. On a CPU the recording stands in for the CUDA graph; on a GPU it is one.
"""

import pytest

from kernels import dispatch
from tests.recorded import Recorded
from tests.tasks import task_of
from tests.test_graph import ALL, assert_same, trained
from train.graph import Capture

OPERATIONS = (
    "waveforms",
    "fbank",
    "apply_spec_mask",
    "apply_spec_augment",
    "normalise",
    "patch_embed",
    "layer_norm",
    "gelu",
)
SMALL = {
    "synth_train": 10,
    "batch_size": 2,
    "frames": 16,
    "mels": 16,
    "mask_height": 16,
    "mask_width": 4,
    "mask_area": 40,
}


def pytest_generate_tests(metafunc):
    """Long forms in the interpreter; a GPU copies streamed samples beside the capture, which only it can show."""
    quick = ("resident", "streamed") if metafunc.config.getoption("--gpu") else ("resident",)
    kinds = ("resident", "streamed", "specaugment")
    metafunc.parametrize(
        "kind", [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]
    )


def test_played_back_steps_are_the_plain_ones(kind, device, monkeypatch):
    if device == "cuda":  # there they are what --fused takes, and the statistics are measured on the host
        dispatch.use_fused(True)
    else:
        monkeypatch.setenv("FFTP_BACKEND", ",".join(f"{operation}=triton" for operation in OPERATIONS))
    changed = ALL | SMALL | {"accumulate": 2}
    if kind == "specaugment":
        changed |= {"augment": kind, "accumulate": 1, "mask_max_frequency": 5, "mask_max_time": 5}
    # Two epochs: on a CPU one plain step, one recorded, two played back; on a GPU three, and three replayed.
    capture, steps = (Capture, 3) if device == "cuda" else (Recorded, 2)
    plain = trained(task_of(device, kind == "streamed", **changed), steps=steps)
    assert_same(trained(task_of(device, kind == "streamed", **changed), capture, steps), plain)
