"""One loop that beats for all agents of an event loop: those that are due at about the same time share a message.

An agent with more to send than the beat (changes that are not durable, a registration to complete) beats alone.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Protocol
from weakref import WeakKeyDictionary

from seedcore.core.answers import BeatAnswer
from seedcore.core.backoff import Backoff, supervise
from seedcore.core.errors import RegistryError
from seedcore.core.timeouts import is_running, on_loop, within
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.protocol.outbox import MAX_BEATS_PER_MESSAGE

logger = logging.getLogger(__name__)

_JITTER = 0.1
_TOGETHER = 0.05  # of an interval: an agent that is due so soon beats now
_ALONE_AT_ONCE = 200
_RETRY_S = (1.0, 30.0)


class Beater(Protocol):
    """An agent that beats."""

    @property
    def instance_id(self) -> str:
        """The instance whose lease it renews now."""
        ...

    @property
    def pause_s(self) -> float:
        """How long until the beat after this one, before jitter."""
        ...

    @property
    def load(self) -> float | None:
        """The load that its beats report, if any."""
        ...

    @property
    def has_more_to_send(self) -> bool:
        """Whether it must beat alone."""
        ...

    async def beat_alone(self) -> None:
        """Beat, send everything else that is pending, and act on the answer. Raises nothing."""
        ...

    def take_answer(self, answer: BeatAnswer) -> None:
        """Its lease is renewed."""
        ...

    def take_failure(self, error: RegistryError) -> None:
        """Its beat was not taken."""
        ...


class BeatLoop:
    """All agents that beat over one connection in one event loop. Its task runs while there are any.

    Call `join` in its own event loop, `leave` in any. It plans by the time of the event loop.
    """

    def __init__(self, connection: RegistryConnection) -> None:
        self._connection = connection
        self._due: list[tuple[float, int, Beater]] = []
        self._beating: dict[Beater, int] = {}
        self._serial = count(1)
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._alone: dict[Beater, asyncio.Task[None]] = {}
        self._turn = asyncio.Semaphore(_ALONE_AT_ONCE)

    def __contains__(self, beater: Beater) -> bool:
        return beater in self._beating and self.is_running

    @property
    def is_running(self) -> bool:
        """Whether it beats: from the first `join` to the last `leave`, unless its event loop has ended."""
        return is_running(self._task)

    @property
    def planned(self) -> int:
        """Beats that are planned or under way, those of agents that have left included."""
        return len(self._due) + len(self._sending) + len(self._alone)

    def join(self, beater: Beater) -> None:
        """Beat for this agent from now on, the first time after a pause."""
        self._beating[beater] = 0
        self._plan(beater)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="beats")

    def leave(self, beater: Beater) -> None:
        """Stop beating for this agent. A beat that is under way may still arrive."""
        task = self._task
        if task is not None:
            on_loop(task.get_loop(), partial(self._leave, beater))

    def _leave(self, beater: Beater) -> None:
        self._beating.pop(beater, None)
        alone = self._alone.get(beater)
        # an agent that learns that it is retired leaves within its own call
        if alone is not None and alone is not asyncio.current_task():
            alone.cancel()
        task = self._task
        if not self._beating and task is not None:
            # at once, since another may join before the task has ended
            self._task = None
            task.cancel()
            _forget(self, self._connection)

    def _plan(self, beater: Beater) -> None:
        if beater in self._beating:
            due_s = _now_s() + beater.pause_s * random.uniform(1 - _JITTER, 1 + _JITTER)
            # an earlier plan, of one that left and joined again, is void
            self._beating[beater] = serial = next(self._serial)
            heapq.heappush(self._due, (due_s, serial, beater))
            if self._due[0][2] is beater:
                self._woken.set()

    async def _run(self) -> None:
        try:
            await supervise(self._step, Backoff(*_RETRY_S), "the beat loop")
        finally:
            if self._task is asyncio.current_task():
                # nothing of ours keeps an event loop that has ended
                self._task = None
                _forget(self, self._connection)

    async def _step(self) -> float:
        self._woken.clear()
        wait_s = self._due[0][0] - _now_s() if self._due else None
        if wait_s is None or wait_s > 0:
            with suppress(asyncio.TimeoutError):
                await within(self._woken.wait(), wait_s)
            return 0.0
        due = self._take_due()
        together = [beater for beater in due if not beater.has_more_to_send]
        for start in range(0, len(together), MAX_BEATS_PER_MESSAGE):
            self._send(together[start : start + MAX_BEATS_PER_MESSAGE])
        for beater in due:
            if beater.has_more_to_send:
                self._send_alone(beater)
        return 0.0

    def _take_due(self) -> list[Beater]:
        until_s = _now_s() + self._due[0][2].pause_s * _TOGETHER
        due: list[Beater] = []
        while self._due and self._due[0][0] <= until_s:
            _, serial, beater = heapq.heappop(self._due)
            if self._beating.get(beater) == serial:
                due.append(beater)
        return due

    def _send(self, beaters: list[Beater]) -> None:
        task = asyncio.create_task(self._beat_together(beaters), name="beats-together")
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _beat_together(self, beaters: list[Beater]) -> None:
        by_id = {beater.instance_id: beater for beater in beaters}
        loads = {instance_id: beater.load for instance_id, beater in by_id.items() if beater.load is not None}
        lost: set[str] = set()
        try:
            answer = await self._connection.beat_many(list(by_id), loads)
        except RegistryError as error:
            for beater in beaters:
                beater.take_failure(error)
        except Exception:
            logger.exception("beats failed; the agents go on")
        else:
            lost = {*answer.unknown, *answer.dead}
            for instance_id, beater in by_id.items():
                if instance_id not in lost:
                    beater.take_answer(answer)
        for instance_id, beater in by_id.items():
            if instance_id in lost:
                self._send_alone(beater)
            else:
                self._plan(beater)

    def _send_alone(self, beater: Beater) -> None:
        """Let it beat alone: it acts on the answer itself."""
        if beater in self._beating:
            task = asyncio.create_task(self._beat_in_turn(beater), name="beat-alone")
            self._alone[beater] = task
            task.add_done_callback(partial(self._sent_alone, beater))

    async def _beat_in_turn(self, beater: Beater) -> None:
        async with self._turn:
            await beater.beat_alone()

    def _sent_alone(self, beater: Beater, task: asyncio.Task[None]) -> None:
        if self._alone.get(beater) is task:
            del self._alone[beater]
            self._plan(beater)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, BeatLoop]] = WeakKeyDictionary()


def beat_loop(connection: RegistryConnection) -> BeatLoop:
    """The loop of the agents that beat over `connection` in the running event loop."""
    loops = _loops.setdefault(asyncio.get_running_loop(), {})
    if id(connection) not in loops:
        loops[id(connection)] = BeatLoop(connection)
    return loops[id(connection)]


def _forget(ended: BeatLoop, connection: RegistryConnection) -> None:
    loops = _loops.get(asyncio.get_running_loop(), {})
    if loops.get(id(connection)) is ended:
        del loops[id(connection)]
    if not loops:
        _loops.pop(asyncio.get_running_loop(), None)
