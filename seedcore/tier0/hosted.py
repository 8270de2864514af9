"""A manager for callers that block: it works on the event loop of the process's thread for blocking calls."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from seedcore.core.errors import ForkedProcessError, RegistryError, RegistryUnavailableError, RunningLoopError
from seedcore.core.loop_thread import LoopThread
from seedcore.registry.ray_support.session import refuse_forked
from seedcore.settings import Settings, get_settings
from seedcore.tier0.manager import Tier0MemoryManager

T = TypeVar("T")

_CLOSE_S = 10.0
_OF_PARENT = "this manager runs in the process that this one was forked from: make another manager in this process"


class HostedManager:
    """Runs the calls of `manager` on the thread. A cached handle is read from any thread, without it.

    The thread starts with the first call, and is left by `close`. Every call that is under way keeps it, so `close`
    breaks none of them.
    """

    def __init__(self, manager: Tier0MemoryManager, settings: Settings) -> None:
        """`manager` must not be used in another event loop."""
        self.manager = manager
        # the registry twice, since it may have been replaced, and the agent
        self.patience_s = 2 * settings.call_timeout_s + settings.probe_timeout_s
        self._pid = os.getpid()
        self._guard = threading.RLock()  # a signal's handler may come in while its thread is inside
        self._thread: LoopThread | None = None

    def run(
        self,
        call: Callable[[Tier0MemoryManager], Coroutine[Any, Any, T]],
        instead: str,
        timeout_s: float | None = None,
        late: Exception | None = None,
    ) -> T:
        """The result of a call. Raises what the call raises, `late` after `timeout_s` seconds (None: no limit but that
        of the call), RunningLoopError with `instead` in a running event loop, and ForkedProcessError."""
        if in_running_loop():
            raise RunningLoopError(f"this call would block the running event loop: {instead}")
        thread = self._joined()
        try:
            error = late if late is not None else RegistryUnavailableError(f"no answer within {timeout_s} s")
            return thread.run(call(self.manager), timeout_s, error)
        finally:
            thread.leave()

    def close(self) -> None:
        """Close the manager and leave the thread. A later call starts both again. Blocks for a moment, also in a
        running event loop, but never on the thread itself: RunningLoopError."""
        if self._pid != os.getpid():
            # the parent closes its own
            return
        with self._guard:
            thread = self._thread
            if thread is not None and thread.is_current:
                raise RunningLoopError("a manager cannot be closed by a call that it runs: close it on another thread")
            self._thread = None
            _running.discard(self)
        if thread is None:
            return
        try:
            late = RegistryUnavailableError(f"the manager has not closed within {_CLOSE_S:g} s")
            thread.run(self.manager.close(), _CLOSE_S, late)
        finally:
            thread.leave()

    def _joined(self) -> LoopThread:
        """The thread, kept for one call; the first call keeps it for the manager too."""
        refuse_forked()
        if self._pid != os.getpid():
            if self._thread is not None:
                raise ForkedProcessError(_OF_PARENT)
            # made before the fork, never used
            self._pid, self._guard = os.getpid(), threading.RLock()
        with self._guard:
            if self._thread is None:
                self._thread = LoopThread.joined()
                _running.add(self)
            return LoopThread.joined()


_running: set[HostedManager] = set()
_process: HostedManager | None = None
_making = threading.RLock()


def process_manager() -> HostedManager:
    """The process's manager for blocking calls, with the settings of the environment."""
    global _process
    with _making:
        if _process is None:
            _process = HostedManager(Tier0MemoryManager(), get_settings())
        return _process


def made_manager() -> HostedManager | None:
    """As `process_manager`, if it has been made."""
    return _process


def close_process_manager() -> None:
    """Close the process's manager; the next call makes another one, with the settings of then."""
    global _process
    with _making:
        closing, _process = _process, None
    if closing is not None:
        closing.close()


def in_running_loop() -> bool:
    """Whether an event loop runs on this thread, so that a blocking call would stop it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _close_all() -> None:
    # before Ray's own shutdown, which was registered earlier: a follower must not call Ray while it ends
    for hosted in tuple(_running):
        try:
            hosted.close()
        except RegistryError:
            # the process ends all the same
            continue


def _note_fork() -> None:
    global _process, _making
    _process, _making = None, threading.RLock()
    _running.clear()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_note_fork)
