"""Bounded waits that never lose a cancellation.

`asyncio.wait_for` before Python 3.12 returns the result, and forgets that it was cancelled, where both come at
once; a loop built on it then cannot be ended. (python/cpython#86296)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(work: Awaitable[T], timeout_s: float | None) -> T:
    """The result of `work`, or asyncio.TimeoutError after `timeout_s` seconds (None: no limit).

    Work that is late or whose waiter is cancelled is cancelled and left to end by itself.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
    except BaseException:
        abandon(task)
        raise
    if not done:
        abandon(task)
        raise asyncio.TimeoutError
    return task.result()


async def end(*tasks: asyncio.Task[None] | None) -> None:
    """Cancel tasks and wait until they have ended."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def abandon(task: asyncio.Future[T]) -> None:
    """Cancel it, and let it end by itself."""
    task.cancel()
    # whatever it still raises is nobody's any more, and must not be reported as never retrieved
    task.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())
