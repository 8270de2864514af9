"""Who is notified of the changes of a follower's cache."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Protocol


class Listener(Protocol):
    """What a follower notifies, on the thread of its own event loop."""

    def note_change(self, logical_id: str) -> None:
        """Instances of this agent, or the verdict on them, changed in the cache."""
        ...

    def note_all(self) -> None:
        """The cache is current again: all agents may have changed."""
        ...


class Listeners:
    """Listeners, as long as somebody else references them. Any thread may add and remove them."""

    def __init__(self) -> None:
        self._refs: tuple[weakref.ref[Listener], ...] = ()

    def __iter__(self) -> Iterator[Listener]:
        return iter([listener for ref in self._refs if (listener := ref()) is not None])

    def add(self, listener: Listener) -> None:
        """Notify it from now on."""
        self._refs = (*(ref for ref in self._refs if ref() is not None), weakref.ref(listener))

    def remove(self, listener: Listener) -> None:
        """Notify it no longer."""
        self._refs = tuple(ref for ref in self._refs if ref() not in {None, listener})
