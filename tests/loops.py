"""A second event loop, on a thread of its own, as each concurrency group of a Ray actor has one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class OtherLoop:
    """Runs what it is given on its thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._is_abandoned = False

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(self.start(work))

    def serve(self) -> None:
        """Until it is stopped; what runs then is cancelled, unless it was abandoned."""
        self.loop.run_forever()
        if not self._is_abandoned:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()

    def abandon(self) -> None:
        """At its end, leave its tasks as they are."""
        self._is_abandoned = True


@contextmanager
def another_loop() -> Iterator[OtherLoop]:
    other = OtherLoop()
    thread = threading.Thread(target=other.serve)
    thread.start()
    try:
        yield other
    finally:
        if not other.loop.is_closed():
            other.loop.call_soon_threadsafe(other.loop.stop)
        thread.join()
