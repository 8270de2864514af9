"""The thread of the blocking calls: one event loop for all of a process."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from seedcore.core.timeouts import end

T = TypeVar("T")

_END_S = 30.0
_SIGNALS_S = 0.2


class LoopThread:
    """An event loop on a thread of its own, for all blocking reporters and managers of the process; it ends when the
    last one leaves."""

    _shared: LoopThread | None = None
    _door = threading.RLock()  # a signal's handler may come in while its thread is inside

    def __init__(self) -> None:
        self._users = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="seedcore-loop", daemon=True)
        self._thread.start()

    @classmethod
    def joined(cls) -> LoopThread:
        """The thread, with one user more."""
        with cls._door:
            if cls._shared is None:
                cls._shared = cls()
            cls._shared._users += 1
            return cls._shared

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on it."""
        return threading.current_thread() is self._thread

    def leave(self) -> None:
        """One user less: the last one ends the thread."""
        with self._door:
            self._users -= 1
            if self._users > 0:
                return
            if LoopThread._shared is self:
                LoopThread._shared = None
        self._end()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None, late: Exception) -> T:
        """The result of `work` on the thread. Raises `late` after `timeout_s` seconds (None: no limit). The work is
        cancelled then, and also when the wait is interrupted."""
        try:
            asked = asyncio.run_coroutine_threadsafe(work, self._loop)
            is_done = _is_done_within(timeout_s, asked)
        except BaseException:
            # Ctrl-C, perhaps before `asked` was known here
            self._loop.call_soon_threadsafe(_cancel, work)
            raise
        if not is_done:
            asked.cancel()
            raise late
        return asked.result()

    def _end(self) -> None:
        """Cancel what runs on it, and end it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_END_S)

    def _serve(self) -> None:
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._end_tasks())
        finally:
            self._loop.close()

    async def _end_tasks(self) -> None:
        await end(*(asyncio.all_tasks() - {asyncio.current_task()}))

    @classmethod
    def _note_fork(cls) -> None:
        # a forked child has none of its parent's threads, and one of them may have held the door
        cls._shared, cls._door = None, threading.RLock()


def _is_done_within(timeout_s: float | None, asked: Future[T]) -> bool:
    """Wait, in slices: a signal that another thread takes, or that comes while this one goes to sleep, does not wake
    it, so that Python's handler runs when the slice ends."""
    until = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while not wait([asked], max(0.0, min(_SIGNALS_S, until - time.monotonic()))).done:
        if time.monotonic() >= until:
            return False
    return True


def _cancel(work: Coroutine[Any, Any, object]) -> None:
    for task in asyncio.all_tasks():
        if task.get_coro() is work:
            task.cancel()
            return
    # not begun, or at its end
    work.close()


os.register_at_fork(after_in_child=LoopThread._note_fork)
