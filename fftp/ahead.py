"""What comes next is made while what came before is used."""

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def one_ahead(items: Generator[Item, None, None]) -> Iterator[Item]:
    """The same items in the same order; a thread makes the next one while the caller has the last.

    What `items` raises is raised here, as itself, in its place. Closing the iterator, or leaving it by an exception
    (Ctrl-C among them), waits for the item being made, closes `items` and ends the thread.
    """
    making = threading.Lock()

    def make():
        with making:
            return next(items, _END)

    def close():
        with making:  # a thread whose start Ctrl-C has cut short is at work, and the pool does not know it
            items.close()

    with ExitStack() as stack:
        stack.callback(close)
        thread = stack.enter_context(ThreadPoolExecutor(1, "one-ahead"))
        coming = thread.submit(make)
        while (item := coming.result()) is not _END:
            coming = thread.submit(make)
            yield item
