"""Bounded waits that never lose a cancellation.

Before Python 3.12, `asyncio.wait_for` loses a cancellation that arrives together with the result. A loop that uses it
then cannot be cancelled. (python/cpython#86296)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def within(work: Awaitable[T], timeout_s: float | None) -> T:
    """Return the result of `work`. Raises asyncio.TimeoutError after `timeout_s` seconds (None: no limit).

    If the time is over or the caller is cancelled, the work is cancelled, but this function does not wait for its end.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
    except BaseException:
        abandon(task)
        raise
    if not done:
        abandon(task)
        raise TimeoutError
    return task.result()


async def end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks and wait until they have ended. Those of another event loop are cancelled there, without a wait."""
    here = asyncio.get_running_loop()
    running = [task for task in tasks if task is not None]
    for task in running:
        on_loop(task.get_loop(), task.cancel)
    await asyncio.gather(*(task for task in running if task.get_loop() is here), return_exceptions=True)


def is_running(task: asyncio.Task[None] | None) -> bool:
    """Whether a task goes on by itself: neither has it ended, nor the event loop that runs it."""
    return task is not None and not task.done() and task.get_loop().is_running()


def on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Call on the thread of `loop`: at once where that is this one, never where the loop has ended."""
    if loop is asyncio.get_running_loop():
        call()
        return
    with suppress(RuntimeError):
        # closed: what it ran has ended with it
        loop.call_soon_threadsafe(call)


def abandon(task: asyncio.Future[T]) -> None:
    """Cancel it, and let it end by itself."""
    task.cancel()
    # retrieve a later exception, so that asyncio does not log "exception was never retrieved"
    task.add_done_callback(lambda ended: None if ended.cancelled() else ended.exception())
