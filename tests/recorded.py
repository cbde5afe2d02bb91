"""A CPU's stand-in for a CUDA graph: the operations of one call, run again on the same memory."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Each would make the host wait for a number, which a capture refuses, or let it decide by one, which a replay forgets.
HOST = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::unique_dim",
}


class Recorded:
    """`Recorded(body)()` as `train.graph.Capture`: `warm_up` calls as they are, the next one recorded, then played back.

    As in a CUDA graph, whatever was no tensor in the recorded call stays as it was, and so does every buffer. Fails where
    the host looks at a number.
    """

    warm_up = 1

    def __init__(self, body: Callable[[], None]):
        self.body, self.calls, self.tape = body, 0, None

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self.warm_up:
            self.body()
        elif self.tape is None:
            with _Tape() as self.tape:
                self.body()
        else:
            self.tape.play()


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.name()
        assert name not in HOST, f"{name} looks at a number on the host"
        out = func(*args, **kwargs)
        if not name.startswith("profiler::"):
            self.rows.append((func, args, kwargs, out))
        return out

    def play(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, kept in self.rows:
                made = func(*args, **kwargs)
                for old, new in zip(tree_leaves(kept), tree_leaves(made), strict=True):
                    # What was written in place, or is a view, lies where it lay; what is new goes there.
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
