"""A lock and an event for tasks of several event loops.

A Ray actor runs one event loop per concurrency group, each on a thread of its own, and a process may run more of them.
The primitives of asyncio belong to one loop: set from another one, they wake no waiter.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import Future


class LoopsLock:
    """As asyncio.Lock: first come, first served, and cancelled waiters are skipped."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_held = False
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, Future[None]]] = deque()

    def locked(self) -> bool:
        """Whether a task holds it."""
        return self._is_held

    @property
    def waiting(self) -> int:
        """How many tasks wait for it, those of loops that have ended included."""
        return len(self._waiting)

    async def __aenter__(self) -> None:
        with self._guard:
            if not self._is_held:
                self._is_held = True
                return
            mine: Future[None] = Future()
            self._waiting.append((asyncio.get_running_loop(), mine))
        try:
            await asyncio.wrap_future(mine)
        except BaseException:
            # cancelled in the moment in which the lock was passed on
            if not mine.cancel():
                self._pass_on()
            raise

    async def __aexit__(self, *_raised: object) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        with self._guard:
            while self._waiting:
                loop, following = self._waiting.popleft()
                # a loop that has ended runs none of its waiters
                if not loop.is_closed() and following.set_running_or_notify_cancel():
                    break
            else:
                self._is_held = False
                return
        following.set_result(None)


class LoopsEvent:
    """As asyncio.Event."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_set = False
        self._waiting: set[Future[None]] = set()

    def is_set(self) -> bool:
        """Whether a wait ends at once."""
        return self._is_set

    @property
    def waiting(self) -> int:
        """How many tasks wait for it."""
        return len(self._waiting)

    def set(self) -> None:
        """End every wait, and those to come."""
        with self._guard:
            self._is_set = True
            woken, self._waiting = self._waiting, set()
        for waiter in woken:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)

    def clear(self) -> None:
        """Let those to come wait again."""
        self._is_set = False

    async def wait(self) -> None:
        """Until it is set."""
        with self._guard:
            if self._is_set:
                return
            mine: Future[None] = Future()
            self._waiting.add(mine)
        try:
            await asyncio.wrap_future(mine)
        finally:
            with self._guard:
                self._waiting.discard(mine)
