"""A watch for code without an event loop: an iterator, and a context manager that closes it."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from seedcore.core.events import AgentEvent
from seedcore.registry.caller.watching import Watch
from seedcore.tier0.hosted import HostedManager

_INSTEAD = "iterate with `async for` over `manager.watch(...)` of a Tier0MemoryManager"


class BlockingWatch:
    """The events of a Watch, in order; `next` blocks until there is one. One thread reads it, any thread may close it:
    the iteration ends then, also where `next` waits. A watch that is dropped keeps nothing alive and needs no close."""

    def __init__(self, hosted: HostedManager, watch: Watch) -> None:
        """Begins to watch: the events are those after this call. Raises CannotKnowError if no registry answers."""
        self._hosted = hosted
        self._watch = watch
        hosted.run(lambda _manager: watch.begin(), _INSTEAD)

    @property
    def position(self) -> str | None:
        """The position after the last event that was read, for the `since` of a later watch."""
        return self._watch.position

    @property
    def is_current(self) -> bool:
        """Whether the registry confirms now that there are no other changes than those that were read or are
        pending."""
        return self._watch.is_current

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AgentEvent:
        """The next event. Raises WatchEndedError while another thread reads, RunningLoopError, ForkedProcessError."""
        event = self._hosted.run(lambda _manager: _next(self._watch), _INSTEAD)
        if event is None:
            raise StopIteration
        return event

    def close(self) -> None:
        """End the iteration. Idempotent."""
        self._hosted.run(lambda _manager: self._watch.close(), "call `close` on another thread")


async def _next(watch: Watch) -> AgentEvent | None:
    return await anext(watch, None)
