"""Bounded waits that never lose a cancellation.

Before Python 3.12, `asyncio.wait_for` loses a cancellation that arrives together with the result. A loop that uses it
then cannot be cancelled. (python/cpython#86296)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(work: Awaitable[T], timeout_s: float | None) -> T:
    """Return the result of `work`. Raises asyncio.TimeoutError after `timeout_s` seconds (None: no limit).

    If the time is over or the caller is cancelled, the work is cancelled, but this function does not wait for its end.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
    except BaseException:
        _abandon(task)
        raise
    if not done:
        _abandon(task)
        raise asyncio.TimeoutError
    return task.result()


async def end(*tasks: asyncio.Task[None] | None) -> None:
    """Cancel tasks and wait until they have ended."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def _abandon(task: asyncio.Future[T]) -> None:
    task.cancel()
    # retrieve a later exception, so that asyncio does not log "exception was never retrieved"
    task.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())
