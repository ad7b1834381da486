"""What is prepared ahead is what would be prepared in turn, errors and early ends included."""

import threading
import time
from collections.abc import Iterator

import pytest

from stillroom.errors import RunFailed
from stillroom.training.ahead import ahead


def workers() -> int:
    return sum(thread.name == "stillroom-batches" for thread in threading.enumerate())


def test_everything_comes_once_and_in_order_however_slow_either_side_is() -> None:
    def uneven(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    found = []
    for number in ahead(uneven, range(20)):
        time.sleep(0.002 * (number % 2))
        found.append(number)
    assert found == [number * number for number in range(20)]
    assert workers() == 0


def test_it_is_made_before_it_is_asked_for_but_not_far_ahead() -> None:
    made: list[int] = []
    items = ahead(lambda number: made.append(number) or number, range(100))
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2]
    items.close()  # type: ignore[attr-defined]


def test_an_error_comes_in_its_place_with_its_message() -> None:
    def prepare(number: int) -> int:
        if number == 2:
            raise RunFailed("the shard is gone")
        return number

    items = ahead(prepare, range(5))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(RunFailed, match="the shard is gone"):
        next(items)
    assert workers() == 0


def test_an_error_of_the_source_comes_too() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("no more rows")

    with pytest.raises(ValueError, match="no more rows"):
        list(ahead(str, source()))


def test_the_thread_ends_when_the_consumer_stops() -> None:
    for _ in ahead(str, iter(int, 1)):
        break
    assert workers() == 0
    with pytest.raises(KeyError):
        for _ in ahead(str, iter(int, 1)):
            raise KeyError
    deadline = time.monotonic() + 5
    while workers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers() == 0
