"""Several things at once in threads; the first that fails, or Ctrl-C, ends them all."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def at_once(
    todo: Sequence[T], do: Callable[[T, threading.Event], R], most: int, done: Callable[[T, int], None]
) -> list[R]:
    """What `do` returns for each of `todo`, in their order, `most` of them at a time.

    Args:
        do: (thing, stop) -> result; it ends early when `stop` is set.
        done: hears (thing, how many are done), in the order in which they end.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(max(1, most)) as pool:
        try:
            futures = {pool.submit(do, each, stop): place for place, each in enumerate(todo)}
            for number, future in enumerate(as_completed(futures), start=1):
                future.result()
                done(todo[futures[future]], number)
        except BaseException:
            stop.set()  # leaving the block waits for the threads
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]
