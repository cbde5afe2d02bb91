"""The whole step with every Triton kernel, recorded and played back on other clips, tickets, epochs and learning rates.

Run by tests/test_triton_graph.py. On a CPU the recording stands in for the CUDA graph; on a GPU it is one.
"""

import pytest

from tests.recorded import Recorded
from tests.tasks import task_of
from tests.test_graph import ALL, assert_same, trained
from train.graph import Capture

OPERATIONS = ("waveforms", "fbank", "apply_spec_mask", "apply_spec_augment", "normalise", "patch_embed")


@pytest.mark.parametrize("kind", ["specmask", "streamed", "specaugment"])
def test_played_back_steps_are_the_plain_ones(kind, device, monkeypatch):
    monkeypatch.setenv("FFTP_BACKEND", ",".join(f"{operation}=triton" for operation in OPERATIONS))
    changed = ALL | {"synth_train": 8, "batch_size": 2, "frames": 16, "mels": 16, "mask_height": 16, "mask_width": 4}
    changed |= {"mask_area": 40, "mask_max_frequency": 5, "mask_max_time": 5, "accumulate": 2}
    changed |= {"augment": "specaugment", "accumulate": 1} if kind == "specaugment" else {}
    plain = trained(task_of(device, kind == "streamed", **changed))
    assert_same(
        trained(task_of(device, kind == "streamed", **changed), Capture if device == "cuda" else Recorded), plain
    )
