"""The processes of one run, as torchrun starts them: who works on what, and how all of them agree.

A process that was started alone is the first of one, and everything here is what one process would do anyway.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from fftp.errors import UserError
from kernels.dispatch import BackendError

PATIENCE = timedelta(days=7)  # the others wait in a collective for as long as the first process packs a data set
AGREED = (UserError, BackendError, OSError)  # what one process may raise for all

Result = TypeVar("Result")


def asked() -> tuple[int, int]:
    """(rank, processes) that the environment speaks of, whether or not they have met."""
    said = os.environ.get("WORLD_SIZE", "")
    processes = int(said) if said.isdecimal() else 1
    return (int(os.environ.get("RANK", 0)), processes) if processes > 1 else (0, 1)


def size() -> int:
    """Processes that have met; 1 for one that is alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if size() > 1 else 0


def local_rank() -> int:
    """Its number on this machine."""
    return int(os.environ.get("LOCAL_RANK", rank())) if size() > 1 else 0


@contextlib.contextmanager
def group(device: str) -> Iterator[None]:
    """The run's processes meet: gloo on CPUs and for words, NCCL for tensors on GPUs (device: "auto", "cpu", "cuda").

    Raises UserError when they do not find each other.
    """
    if asked()[1] == 1:
        yield
        return
    gpus = device != "cpu" and torch.cuda.is_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"The {asked()[1]} processes that WORLD_SIZE speaks of did not find each other ({reason}): start them by "
            "torchrun --nproc-per-node N -m train.run, or unset WORLD_SIZE."
        ) from None
    try:
        yield
    except AGREED:
        dist.destroy_process_group()  # all have come here; after any other error somebody may be missing
        raise
    dist.destroy_process_group()


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """What any process but the first prints goes nowhere."""
    if asked()[0] == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def together(function: Callable[[], Result]) -> Result:
    """function() on every process. What it raises on one (of AGREED) is raised on all of them."""
    if size() == 1:
        return function()
    result, error = None, None
    try:
        result = function()
    except AGREED as raised:
        error = _sent(raised)
    for each in gather(error):
        if each is not None:
            raise each
    return result


def first(function: Callable[[], Result]) -> Result:
    """function() on the first process alone; its result, or what it raised (of AGREED), on all of them."""
    if size() == 1:
        return function()
    answer = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except AGREED as raised:
            answer[1] = _sent(raised)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def in_turn(function: Callable[[], Result]) -> Result:
    """function() on one process of each machine, and then, with what it left on disk, on the others; errors as `together`."""
    leads = local_rank() == 0
    result = together(function) if size() == 1 else together(function if leads else _nothing)
    if size() == 1:
        return result
    later = together(_nothing if leads else function)
    return result if leads else later


def _nothing() -> None:
    return None


def _sent(error: Exception) -> Exception:
    """The error as it can be sent: subclasses of UserError may not survive it, their sentence does."""
    return error if isinstance(error, OSError) else UserError(str(error))


def gather(value: Result) -> list[Result]:
    """Every process's value, by rank."""
    if size() == 1:
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def add(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place; the same bits on each."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def pieces(n: int, count: int) -> list[slice]:
    """0..n-1 cut into so many spans, one behind the other, whose lengths differ by one at most."""
    return [slice(i * n // count, (i + 1) * n // count) for i in range(count)]


def share(n: int) -> slice:
    """This process's span of 0..n-1."""
    return pieces(n, size())[rank()]


def shared(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model itself, or wrapped so that its gradients are means over the processes after each backward."""
    if size() == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def lost(error: BaseException) -> bool:
    """Whether an exception means that another process is gone. gloo's has no type of its own."""
    if asked()[1] == 1:
        return False
    spoken = isinstance(error, RuntimeError) and re.search("gloo|NCCL|Connection (closed|reset) by peer", str(error))
    return bool(spoken) or isinstance(error, dist.DistError)
