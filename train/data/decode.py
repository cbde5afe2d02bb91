"""Decoding many files at once, in order, in several processes and in little memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path

import numpy as np

from fftp import audio
from train.data import shards
from train.data.clips import Row

# Below this many bytes of encoded audio, starting processes takes longer than decoding.
_SMALL = 4 << 20
# One job for a process: at most so many files, and no more once they hold so many bytes (a clip can be an hour long).
_JOB_FILES, _JOB_BYTES = 64, 4 << 20

# A clip's samples, int16 (W,), or why it has none.
Decoded = np.ndarray | str


@dataclass(frozen=True)
class Task:
    source: Path | bytes | Row
    name: str
    size: int  # bytes, encoded
    segment: tuple[float, float] | None = None  # seconds, see Clip


def decode_all(tasks: list[Task], rate: int, min_samples: int, workers: int | None = None) -> Iterator[Decoded]:
    """Each task's clip in the order given, mono at `rate` Hz, or the reason why it is bad.

    `workers` processes (default: one for each core that this process may use; none for little data), started anew
    rather than forked, because a fork of a process that runs torch's threads may hang. A clip that ends its process
    is a bad one. Rows of shards are read here, as their turn comes.
    """
    reader, jobs = shards.Reader(), _jobs(tasks)
    try:
        if sum(task.size for task in tasks) < _SMALL:
            for task in tasks:
                yield decode(_loaded(task, reader), rate, min_samples)
            return
        decoders = _Decoders(min(workers or _cores(), len(jobs)), rate, min_samples)
        try:
            for job in jobs:
                decoders.submit([_loaded(task, reader) for task in job])
                if decoders.enough():
                    yield from decoders.result()
            while decoders.pending:
                yield from decoders.result()
        finally:
            decoders.pool.shutdown(cancel_futures=True)
    finally:
        reader.close()


class _Decoders:
    """Processes with their jobs, in order. When one dies, all that is pending is begun again in new ones."""

    def __init__(self, workers: int, rate: int, min_samples: int):
        self.workers, self.how = workers, (rate, min_samples)
        self.pending: deque[tuple[list[Task], Future | None]] = deque()
        self.pool = _pool(workers)

    def submit(self, job: list[Task]) -> None:
        self.pending.append((job, self._begin(job)))

    def enough(self) -> bool:
        """Whether all are kept busy; more would only wait in memory."""
        return len(self.pending) > 2 * self.workers

    def result(self) -> list[Decoded]:
        """The oldest job's clips."""
        job, future = self.pending.popleft()
        try:
            if future is not None:
                return future.result()
        except BrokenProcessPool:
            pass
        # Nobody knows whose clip it was: the oldest job goes clip by clip, and if it was another's, its turn comes.
        self.pool.shutdown(cancel_futures=True)
        self.pool = _pool(self.workers)
        self.pending = deque((waiting, self._begin(waiting)) for waiting, _ in self.pending)
        return list(self._one_by_one(job))

    def _begin(self, job: list[Task]) -> Future | None:
        try:
            return self.pool.submit(_decode_job, job, *self.how)
        except BrokenProcessPool:
            return None

    def _one_by_one(self, job: list[Task]) -> Iterator[Decoded]:
        pool = _pool(1)
        try:
            for task in job:
                try:
                    yield pool.submit(decode, task, *self.how).result()
                except BrokenProcessPool:
                    pool.shutdown()
                    pool = _pool(1)
                    yield "ends the process that decodes it"
        finally:
            pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=stay_with_parent)


def _loaded(task: Task, reader: shards.Reader) -> Task:
    return replace(task, source=reader.read(task.source)) if isinstance(task.source, Row) else task


def decode(task: Task, rate: int, min_samples: int) -> Decoded:
    """int16 (W,): rounded, and held to full scale where a float file goes beyond it. A bad file's reason otherwise."""
    try:
        waveform = audio.load(task.source, rate, min_samples, task.name, task.segment)
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


def stay_with_parent() -> None:
    """In a new process: leave Ctrl-C to the parent, and end when it does, even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
