"""What comes next is made while what came before is used."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def one_ahead(items: Generator[Item, None, None]) -> Iterator[Item]:
    """The same items in the same order; a thread makes the next one while the caller has the last.

    What `items` raises is raised here, as itself, in its place. Closing the iterator, or leaving it by an exception
    (Ctrl-C among them), waits for the item being made, closes `items` and ends the thread.
    """
    with closing(items), ThreadPoolExecutor(1, "one-ahead") as thread:
        coming = thread.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, items, _END)
            yield item
