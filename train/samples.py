"""Where the samples of a batch come from: all of a pack on the device, or what a batch needs gathered on the host and sent.

Both give the same bits; `source_of` chooses.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from train.data.pack import Pack


@dataclass(frozen=True, eq=False)
class Clips:
    """What holds some clips, on the device: samples int16 `[n]`, start and length int64 `[B]`, labels float32 `[B, C]`.

    ready: on a GPU, the event after which a copy under way has arrived; `Streamed.arrived` waits for it.
    """

    samples: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    labels: torch.Tensor
    ready: torch.cuda.Event | None = None


class Resident:
    """All samples of a pack on the device, and its tables: a batch starts from a vector of clip numbers.

    On a CPU these are the pack's own arrays, memory-mapped where they come from the cache, and nothing is copied.
    """

    def __init__(self, pack: Pack, device: torch.device):
        self.pack, self.device = pack, device
        with warnings.catch_warnings():
            # The map is read-only, which torch cannot express; nothing writes into samples.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            self._samples = torch.from_numpy(pack.samples).to(device)
        tables = (pack.start, pack.length, pack.labels)
        self._start, self._length, self._labels = (torch.from_numpy(table).to(device) for table in tables)

    def clips(self, numbers: torch.Tensor, W: int) -> Clips:
        """Clips by their numbers in the pack, int64 `[B]` on the device, cut to W samples."""
        length = self._length[numbers].clamp_max(W)
        return Clips(self._samples, self._start[numbers], length, self._labels[numbers])

    def __str__(self) -> str:
        size = self.pack.samples.nbytes
        size = f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
        if self.device.type != "cpu":
            return f"on the device, {size}"
        return f"{'memory-mapped' if isinstance(self.pack.samples, np.memmap) else 'in memory'}, {size}"


class Streamed:
    """The samples that a batch needs, gathered on the host and copied to the device; on a GPU from pinned memory."""

    def __init__(self, pack: Pack, device: torch.device):
        self.pack, self.device = pack, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def clips(self, numbers: np.ndarray, W: int) -> Clips:
        """Clips by their numbers in the pack, int64 `[B]` on the host, cut to W samples; each is copied once.

        On a GPU the copies are only under way when this returns, whichever thread asks: see `arrived`.
        """
        once, which = np.unique(numbers, return_inverse=True)
        length = np.minimum(self.pack.length[once], W)
        start = np.cumsum(length) - length
        samples = torch.empty(int(length.sum()), dtype=torch.int16, pin_memory=self._stream is not None)
        target = samples.numpy()
        for first, n, to in zip(self.pack.start[once], length, start, strict=True):
            target[to : to + n] = self.pack.samples[first : first + n]
        host = [samples, *map(torch.from_numpy, (start[which], length[which], self.pack.labels[numbers]))]
        if self._stream is None:
            return Clips(*(tensor.to(self.device) for tensor in host))
        with torch.cuda.stream(self._stream):
            sent = [to_device(tensor, self.device) for tensor in host]
            return Clips(*sent, self._stream.record_event())

    def arrived(self, clips: Clips) -> Clips:
        """The clips, for use on this thread's stream, which waits for them; the host does not."""
        if clips.ready is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(clips.ready)
            for tensor in (clips.samples, clips.start, clips.length, clips.labels):
                tensor.record_stream(here)  # their memory is the copying stream's, which must not reuse it before
        return clips

    def __str__(self) -> str:
        return "streamed, one batch ahead"


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device; a copy to a GPU goes through pinned memory, so that the host waits for nothing."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def source_of(pack: Pack, device: torch.device, share: float) -> Resident | Streamed:
    """On a GPU the pack is resident where its samples fit into this share of the memory that is free now.

    share: 0 to 1, 0 for never. On a CPU the pack is used where it lies: gathering one batch ahead was no faster (LOG.md).
    """
    if device.type == "cpu":
        return Resident(pack, device)
    free, _ = torch.cuda.mem_get_info(device)
    return Resident(pack, device) if fits(pack, free, share) else Streamed(pack, device)


def fits(pack: Pack, free: int, share: float) -> bool:
    """Whether the pack's samples and tables take at most this share of so many free bytes."""
    return sum(array.nbytes for array in (pack.samples, pack.start, pack.length, pack.labels)) <= share * free
