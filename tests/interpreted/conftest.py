"""For the cases that run Triton kernels: outputs that start as poison, with guard zones round them."""

import os

import pytest
import torch

PAD = 64  # elements before and behind each buffer; keeps the alignment a kernel may count on


@pytest.fixture(scope="session", autouse=True)
def bounds_of_loops():
    """Triton 3.6's interpreter takes int() of a one-element array for a run-time loop bound, which numpy 2.4 refuses."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    def patched(tensor, scope, real=interpreter._patch_lang_tensor):
        real(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield


class Guard:
    """Hands out buffers with a guard zone on either side, and looks at the zones afterwards."""

    def __init__(self):
        self.buffers = []

    def poison(self, dtype: torch.dtype) -> float:
        return float("nan") if dtype.is_floating_point else -77

    def empty(self, *shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        n = torch.Size(shape).numel()
        whole = torch.full((n + 2 * PAD,), self.poison(dtype), dtype=dtype, device=device)
        self.buffers.append((whole, n))
        return whole[PAD : PAD + n].view(shape)

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of the tensor between guard zones: reading past its ends gives NaN."""
        return self.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)

    def check(self):
        for whole, n in self.buffers:
            zones = torch.cat([whole[:PAD], whole[PAD + n :]])
            untouched = zones.isnan() if zones.is_floating_point() else zones == self.poison(zones.dtype)
            assert untouched.all(), "a kernel wrote beside its buffer"


@pytest.fixture
def guard(monkeypatch) -> Guard:
    """`torch.empty` hands out poisoned, guarded buffers during the test; the zones are checked when it ends."""
    made = Guard()
    monkeypatch.setattr(torch, "empty", made.empty)
    yield made
    made.check()


@pytest.fixture(scope="session", autouse=True)
def patched_once_a_launch(device):
    """Triton's interpreter patches its language anew at each call from one kernel function to another, tl.sum included.

    That is half of its time here; the patches of a launch hold until it ends, so one round of them is enough.
    """
    if device == "cuda":
        yield
        return
    from triton.runtime import interpreter

    patch, launch, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        if id(function.__globals__) not in done:
            done.add(id(function.__globals__))
            return patch(function)

    def launch_anew(*args, **kwargs):
        done.clear()
        return launch(*args, **kwargs)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch_once)
        context.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield
