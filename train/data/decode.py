"""Decoding many files at once, in order, in several processes and in little memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import numpy as np

from fftp import audio

# Below this many bytes of encoded audio, starting processes takes longer than decoding.
_SMALL = 4 << 20
# One job for a process: at most so many files, and no more once they hold so many bytes (a clip can be an hour long).
_JOB_FILES, _JOB_BYTES = 64, 4 << 20

# A clip's samples, int16 (W,), or why it has none.
Decoded = np.ndarray | str


@dataclass(frozen=True)
class Task:
    source: Path | bytes
    name: str
    size: int  # bytes, encoded


def decode_all(tasks: list[Task], rate: int, min_samples: int, workers: int | None = None) -> Iterator[Decoded]:
    """Each task's clip in the order given, mono at `rate` Hz, or the reason why it is bad.

    `workers` processes (default: one for each core that this process may use; none for little data), started anew
    rather than forked, because a fork of a process that runs torch's threads may hang.
    """
    jobs = _jobs(tasks)
    workers = min(workers or _cores(), len(jobs))
    if workers <= 1 or sum(task.size for task in tasks) < _SMALL:
        for task in tasks:
            yield decode(task, rate, min_samples)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_stay_with_parent) as pool:
        try:
            pending = deque()
            for job in jobs:
                pending.append(pool.submit(_decode_job, job, rate, min_samples))
                if len(pending) > 2 * workers:  # enough to keep all busy, few enough to bound what waits in memory
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def decode(task: Task, rate: int, min_samples: int) -> Decoded:
    """int16 (W,): rounded, and held to full scale where a float file goes beyond it. A bad file's reason otherwise."""
    try:
        waveform = audio.load(task.source, rate, min_samples, task.name)
    except audio.BadAudio as error:
        return error.reason
    return np.rint(np.clip(waveform * 32768, -32768, 32767)).astype(np.int16)


def _decode_job(job: list[Task], rate: int, min_samples: int) -> list[Decoded]:
    return [decode(task, rate, min_samples) for task in job]


def _jobs(tasks: list[Task]) -> list[list[Task]]:
    jobs, size = [], _JOB_BYTES
    for task in tasks:
        if size >= _JOB_BYTES or len(jobs[-1]) == _JOB_FILES:
            jobs.append([])
            size = 0
        jobs[-1].append(task)
        size += task.size
    return jobs


def _cores() -> int:
    # sched_getaffinity knows of taskset and batch systems, but only Linux has it.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stay_with_parent() -> None:
    """In a new process: leave Ctrl-C to the parent, and end when it does, even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
