"""Parquet shards in the form of the hub's copy of AudioSet (agkphysics/AudioSet): a recording and its labels a row.

Columns: video_id; audio, a struct with the file's bytes; labels, a list of machine ids; human_labels, their names (may
be absent). pyarrow is imported where it is used, so that everything else runs without it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fftp.errors import UserError
from train.data.clips import Row

_ROWS_AT_A_TIME = (
    8  # of audio handed out together, beside the page that they lie in (at most a row group, unpacked whole)
)
_BUFFER = 1 << 20  # bytes of a column read at a time, in place of the whole of it


@dataclass(frozen=True)
class Labelled:
    """What a row says of its recording."""

    video_id: str
    labels: tuple[str, ...]
    names: tuple[str, ...]  # of the labels, or nothing


def labels_of(shard: Path) -> list[Labelled]:
    """The rows of a shard without their audio. UserError when it cannot be read or lacks a column."""
    with _open(shard) as file:
        present = file.schema_arrow.names
        for column in ("video_id", "audio", "labels"):
            if column not in present:
                raise UserError(
                    f"The shard {shard} has no column '{column}' (it has {', '.join(present)}): get it anew."
                )
        audio = file.schema_arrow.field("audio").type
        if "bytes" not in {audio.field(i).name for i in range(audio.num_fields)}:
            raise UserError(f"The column 'audio' of the shard {shard} holds no 'bytes': get the shard anew.")
        wanted = [name for name in ("video_id", "labels", "human_labels") if name in present]
        rows = file.read(columns=wanted).to_pylist()
    return [
        Labelled(str(row["video_id"]), tuple(row["labels"] or ()), tuple(row.get("human_labels") or ())) for row in rows
    ]


class Reader:
    """The bytes of rows, best asked for in rising order: at most a row group is in memory."""

    def __init__(self):
        self._shard, self._next, self._rows = None, 0, iter(())

    def read(self, row: Row) -> bytes:
        """One row's file. UserError when the shard cannot be read."""
        if row.shard != self._shard or row.number < self._next:
            self.close()
            self._shard, self._next, self._rows = row.shard, 0, _stream(row.shard)
        for content in self._rows:
            self._next += 1
            if self._next > row.number:
                return content or b""
        raise UserError(f"The shard {row.shard} has no row {row.number} any more: run the command again.")

    def close(self) -> None:
        if hasattr(self._rows, "close"):
            self._rows.close()
        self._shard = None


def _stream(shard: Path) -> Iterator[bytes | None]:
    with _open(shard) as file:
        for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=["audio.bytes"], use_threads=False):
            for value in batch.column(0).flatten()[0]:
                yield value.as_py()


@contextmanager
def _open(shard: Path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UserError("Parquet shards need the package pyarrow: install it with `pip install pyarrow`.") from error
    try:
        with parquet.ParquetFile(shard, buffer_size=_BUFFER, pre_buffer=False) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"The shard {shard} is missing, damaged or cut short ({reason}): get it anew.") from error
