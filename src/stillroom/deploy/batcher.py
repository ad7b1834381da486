"""Compute the texts of concurrent requests together, and give each request its own answers."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFull(Exception):
    """More waits than the queue holds; it can be asked again in a moment."""


class Stopped(Exception):
    """The batcher ended before it came to the request."""


@dataclass
class _Request(Generic[Item, Result]):
    items: Sequence[Item]
    answer: "asyncio.Future[list[Result]]"


class Batcher(Generic[Item, Result]):
    """One thread that computes, and a queue of requests that wait for it.

    A batch starts `max_wait` seconds after its first request, or when `max_batch` items wait; what
    comes while it is computed makes the next one. Where a batch fails, its requests are computed one
    by one, so that only those that fail alone get the error.
    """

    def __init__(
        self,
        compute: Callable[[list[Item]], list[Result]],
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
    ):
        """Make a batcher; it works inside `async with`.

        Args:
            compute: Returns one result for each item, in their order. Runs in the batcher's thread.
            max_batch: Items from which on a batch waits no longer.
            max_wait: Seconds, from a batch's first request.
            max_queue: Items that may wait or be computed; beyond them `ask` raises `QueueFull`.
        """
        self._compute = compute
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self.waiting = 0
        self._queue: asyncio.Queue[_Request[Item, Result]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Batcher[Item, Result]":
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        while not self._queue.empty():
            self._fail(self._queue.get_nowait(), Stopped())
        # What is being computed ends first: a thread cannot be stopped.
        await asyncio.to_thread(self._thread.shutdown)

    @property
    def alive(self) -> bool:
        """Whether requests are being worked on."""
        return self._task is not None and not self._task.done()

    async def ask(self, items: Sequence[Item]) -> list[Result]:
        """Return the results of one request's items, in their order.

        Raises:
            QueueFull: If the queue has no room for so many.
            Stopped: If the batcher ends before.
        """
        if not items:
            return []
        if self.waiting + len(items) > self.max_queue:
            raise QueueFull
        request: _Request[Item, Result] = _Request(items, asyncio.get_running_loop().create_future())
        self.waiting += len(items)
        try:
            self._queue.put_nowait(request)
            return await request.answer
        finally:
            self.waiting -= len(items)

    async def _work(self) -> None:
        while True:
            batch = await self._next()
            # Nobody waits any longer for what was cancelled.
            batch = [request for request in batch if not request.answer.done()]
            try:
                await self._answer(batch)
            except BaseException:
                # The server stops in the middle of a batch.
                for request in batch:
                    self._fail(request, Stopped())
                raise

    async def _next(self) -> list[_Request[Item, Result]]:
        batch = [await self._queue.get()]
        count = len(batch[0].items)
        loop = asyncio.get_running_loop()
        end = loop.time() + self.max_wait
        while count < self.max_batch:
            try:
                request = self._queue.get_nowait()
            except asyncio.QueueEmpty:
                left = end - loop.time()
                if left <= 0:
                    break
                try:
                    request = await asyncio.wait_for(self._queue.get(), left)
                except TimeoutError:
                    break
            batch.append(request)
            count += len(request.items)
        return batch

    async def _answer(self, batch: Sequence[_Request[Item, Result]]) -> None:
        """Give every request of a batch its results or its error."""
        if not batch:
            return
        items = [item for request in batch for item in request.items]
        try:
            results = await self._run(items)
        except Exception as error:
            if len(batch) > 1:
                for request in batch:
                    await self._answer([request])
            else:
                self._fail(batch[0], error)
            return
        start = 0
        for request in batch:
            end = start + len(request.items)
            if not request.answer.done():
                request.answer.set_result(results[start:end])
            start = end

    @staticmethod
    def _fail(request: _Request[Item, Result], error: Exception) -> None:
        if not request.answer.done():
            request.answer.set_exception(error)

    async def _run(self, items: list[Item]) -> list[Result]:
        results = await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, items)
        if len(results) != len(items):
            raise RuntimeError(f"expected {len(items)} results, found {len(results)}")
        return results
