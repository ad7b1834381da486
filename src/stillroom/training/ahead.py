"""Prepare the next batches in a thread while a step computes."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")

_DEPTH = 2
"""How many are prepared ahead: one to take, one in the making."""


def ahead(prepare: Callable[[_Given], _Made], source: Iterable[_Given]) -> Iterator[_Made]:
    """Yield ``prepare(item)`` for every item, in order, each made before it is asked for.

    One thread prepares, in the order of `source`, at most two items ahead; so what is yielded is what a
    plain `map` yields, as long as `prepare` draws nothing from a random generator that others use. An
    error in `source` or `prepare` is raised where its item would have been yielded. When the consumer
    stops early (by `close`, or an error of its own) the thread ends with the item in its hands.

    Example:
        >>> list(ahead(str, [1, 2, 3]))
        ['1', '2', '3']
    """
    made: queue.Queue[tuple[_Made | None, BaseException | None, bool]] = queue.Queue(_DEPTH - 1)
    stopped = threading.Event()

    def put(item: tuple[_Made | None, BaseException | None, bool]) -> bool:
        while not stopped.is_set():
            try:
                made.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for given in source:
                if not put((prepare(given), None, False)):
                    return
        except BaseException as error:
            put((None, error, True))
        else:
            put((None, None, True))

    worker = threading.Thread(target=work, name="stillroom-batches", daemon=True)
    worker.start()
    try:
        while True:
            item, error, last = made.get()
            if error is not None:
                raise error
            if last:
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        worker.join()
