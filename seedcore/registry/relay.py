"""The relay: a small actor on each node that watches the agents' processes there and tells the registry of exits.

Owns no truth: the registry makes it, tells it whom to watch, and makes another when it is lost.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from seedcore.core.waiting import within
from seedcore.registry.processes import ActorStateWatch, OnExit, PidfdWatch, Watch, Watched

MAX_WATCHED_A_CALL = 1000


@dataclass(frozen=True, slots=True)
class Exit:
    """An instance whose process or actor has ended. `number` grows by one with each that a relay reports."""

    number: int
    instance_id: str
    cause: str


class Relay:
    """A plain class; `deathwatch.py` puts it on Ray. Its lists are bounded by the instances it watches."""

    def __init__(self, watches: Sequence[Callable[[OnExit], Watch]] = (PidfdWatch, ActorStateWatch)) -> None:
        self._exits: deque[Exit] = deque()
        self._count = 0
        self._news = asyncio.Event()
        self._watches = tuple(watch(self._note) for watch in watches)

    async def watch(self, instances: Sequence[Watched]) -> list[str]:
        """Watch these, at most MAX_WATCHED_A_CALL; the ids of those that nothing here can watch."""
        are_watched = await asyncio.gather(*(self._watch(watched) for watched in instances))
        return [
            watched.instance_id for watched, is_watched in zip(instances, are_watched, strict=True) if not is_watched
        ]

    async def unwatch(self, instance_ids: Sequence[str]) -> None:
        """Watch these no more."""
        for instance_id in instance_ids:
            for watch in self._watches:
                watch.discard(instance_id)

    async def exits(self, handled: int, wait_s: float) -> list[Exit]:
        """The exits numbered above `handled`, as soon as there are any; nothing after `wait_s` seconds without.

        Those up to `handled` are forgotten, so that a lost answer is asked for again.
        """
        while self._exits and self._exits[0].number <= handled:
            self._exits.popleft()
        if not self._exits:
            self._news.clear()
            try:
                await within(self._news.wait(), wait_s)
            except asyncio.TimeoutError:
                return []
        return list(self._exits)

    async def _watch(self, watched: Watched) -> bool:
        for watch in self._watches:
            if await watch.add(watched):
                return True
        return False

    def _note(self, instance_id: str, cause: str) -> None:
        self._count += 1
        self._exits.append(Exit(self._count, instance_id, cause))
        self._news.set()
