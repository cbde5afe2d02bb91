"""The whole step as one CUDA graph: from clip numbers and tickets to the optimiser's update, one launch a step.

Captured and replayed on an H200; on a CPU what is captured is proven by recording a step's operations and running them
again on other inputs (tests/test_graph.py).
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from fftp.errors import UserError
from kernels import dispatch, ranges
from train import parallel
from train.feed import Batch
from train.samples import Clips, to_device
from train.step import Part, Step, Task

WARM_UP = 3  # steps before the capture: kernels compile, libraries choose, the optimiser makes its state


def reason_against(task: Task) -> str | None:
    """Why a step of this run is not captured, or None where it is. Raises UserError where --graph on cannot be had."""
    wanted = task.settings.graph
    if wanted == "off":
        return "--graph off"
    reason = _refusal(task)
    if wanted == "on" and reason:
        raise UserError(f"--graph on cannot be had here ({reason}): leave it out, or take --graph off.")
    return reason


def _refusal(task: Task) -> str | None:
    if task.device.type != "cuda":
        return "CUDA graphs need a GPU"
    if parallel.size() > 1:
        return "several processes exchange their gradients"
    if ranges.watched():
        return "NVTX ranges are watched, and would vanish in a graph"
    if task.settings.fit == "resize":
        return "--fit resize asks for each clip's length"
    if dispatch.select("fbank", "cuda", "float32").name == "reference":
        return "fbank=reference asks for each clip's length; --fused has another"
    return None


class Capture:
    """`Capture(body)()` does what `body()` does, as a CUDA graph after some calls. body takes and returns nothing.

    The first WARM_UP calls run as they are, on a stream of their own; the next one is captured. Raises UserError when it
    cannot be.
    """

    def __init__(self, body: Callable[[], None]):
        self.body, self.graph, self.calls = body, None, 0
        self.side = torch.cuda.Stream()

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= WARM_UP:
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.body()
            torch.cuda.current_stream().wait_stream(self.side)
            return
        if self.graph is None:
            self.graph = self._captured()
        self.graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread's calls are held to be captured: another one may be copying the next batch.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.body()
        except RuntimeError as error:
            raise UserError(
                f"The step could not be captured as a CUDA graph ({str(error).splitlines()[0]}): take --graph off, and "
                "please report this with the output of python -m fftp.env."
            ) from error
        return graph


class Graphed:
    """`Step` with the same calls, whose work is captured: inputs are copied into buffers, and the graph reads those.

    capture: what makes a function of the buffers one launch; `Capture`, or another for tests.
    """

    def __init__(self, step: Step, capture: Callable[[Callable[[], None]], Callable[[], None]] = Capture):
        self.step, feed = step, step.task.train
        sizes = [len(positions) for positions, _ in step.divided([(np.zeros(step.clips),) * 2])]
        self.picks = [
            tuple(torch.zeros(n, dtype=torch.int64, device=feed.device) for _ in ("positions", "tickets"))
            for n in sizes
        ]
        self.clips: list[Clips | None] = [None] * len(sizes)  # where samples are streamed: the last ones that came
        self.epoch = torch.zeros(1, dtype=torch.int64, device=feed.device)
        self.run = capture(lambda: step.update(self._batches()))

    def inputs(self, parts: list[Part], epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray, Clips | None]]:
        """What the calls of an epoch take, settings.accumulate at a time."""
        return self.step.task.train.coming(parts, epoch, self.step.augment)

    def __call__(self, number: int, epoch: int, coming: Iterable) -> torch.Tensor:
        self.step.aim(number)
        self.epoch.fill_(epoch)
        for i, (positions, tickets, gathered) in enumerate(coming):
            for buffer, numbers in zip(self.picks[i], (positions, tickets), strict=True):
                buffer.copy_(to_device(torch.from_numpy(numbers), buffer.device))
            if gathered is not None:
                self.clips[i] = self._kept(self.clips[i], self.step.task.train.source.arrived(gathered))
        self.run()
        return self.step.loss

    def _kept(self, buffers: Clips | None, came: Clips) -> Clips:
        """The buffers, made when they are first needed, with what came in them."""
        if buffers is None:
            samples = came.samples.new_zeros(came.start.numel() * self.step.task.train.W)  # the most there can be
            buffers = Clips(samples, *map(torch.empty_like, (came.start, came.length, came.labels)))
        buffers.samples[: came.samples.numel()].copy_(came.samples)
        for name in ("start", "length", "labels"):
            getattr(buffers, name).copy_(getattr(came, name))
        return buffers

    def _batches(self) -> Iterator[Batch]:
        for (positions, tickets), clips in zip(self.picks, self.clips, strict=True):
            yield self.step.task.train.augmented(positions, tickets, self.epoch, self.step.augment, clips)
