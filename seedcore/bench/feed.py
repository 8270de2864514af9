"""The delay from a change to a watcher in another process, under load. A watcher of other agents is not notified."""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import ray

from seedcore.bench.environment import Bench, Place, percentile
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.core.answers import InstanceFilter
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import RegisterChange, Registration, SequencedChange, StatusChange
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.core.paging import decode_cursor
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.nearby import Nearby
from seedcore.registry.protocol.connection import shared_connection

CHANGES_PER_S = 1000
TICK_S = 0.02


class Watcher:
    """Follows the feed in another process. The detail of each cause is the time at which the change was sent."""

    def __init__(self, namespace: str, organ_id: str | None) -> None:
        self._follower = Follower(Nearby(shared_connection(namespace, 30.0)), organ_id=organ_id, on_change=self._note)
        self._delays_s: list[float] = []
        self._last_sent: dict[str, str] = {}
        self._notified = 0

    async def start(self) -> None:
        """Start to follow, and wait until the cache is up to date."""
        self._follower.start()
        assert await self._follower.until_current(30.0), "the feed is not read"
        self._delays_s.clear()
        self._notified = 0

    async def stop(self) -> tuple[list[float], int, int]:
        """Return the delays of all changes seen, in seconds, the number of notifications, and the size of the cache."""
        await self._follower.stop()
        return self._delays_s, self._notified, len(self._follower.view)

    def _note(self, logical_id: str) -> None:
        self._notified += 1
        rows, _ = self._follower.view.page(
            InstanceFilter(statuses=None, logical_id=logical_id), decode_cursor(None), MAX_PAGE
        )
        for row in rows:
            sent = None if row.cause is None else row.cause.detail
            if sent is not None and self._last_sent.get(logical_id) != sent:
                self._last_sent[logical_id] = sent
                self._delays_s.append(time.time() - float(sent))


async def run(bench: Bench) -> Result:
    """Measure the latency of the feed at CHANGES_PER_S changes per second."""
    found = await watched_delays(bench, CHANGES_PER_S, 2.0 if bench.is_quick else 15.0)
    others = found.notified_of_others
    median_s, p99_s = statistics.median(found.delays_s), percentile(found.delays_s, 0.99)
    return Result(
        "propagation",
        [
            Figure("changes", found.changes / found.took_s, "/ s"),
            Figure("seen by the watcher", len(found.delays_s) / found.changes * 100, "%"),
            Figure("from change to watcher, median", median_s * 1000, "ms"),
            Figure("p99", p99_s * 1000, "ms"),
            Figure("notifications of the watcher", found.notified, ""),
            Figure("notifications of a watcher of other agents", others, ""),
        ],
        [
            Ratio("p99 / 100 ms", p99_s / 0.1, "<= 1"),
            Ratio("notifications of a watcher of other agents / changes", others / found.changes, "<= 0"),
        ],
        notes=["if an agent changes twice between two answers, the watcher sees only the last change"],
    )


@dataclass(frozen=True)
class Watched:
    """What a watcher in another process saw: the delay of each change (seconds), and the notifications."""

    delays_s: list[float]
    changes: int
    took_s: float
    notified: int
    notified_of_others: int


async def watched_delays(bench: Bench, changes_per_s: int, seconds: float, agents: int = 1000) -> Watched:
    """Let so many agents change, one after the other, and watch them from another process."""
    place = await bench.place("feed", lease_s=600.0)
    try:
        return await _measure(place, changes_per_s, seconds, agents)
    finally:
        await bench.leave(place)


async def _measure(place: Place, changes_per_s: int, seconds: float, agents: int) -> Watched:
    connection = place.connection
    ids = [str(uuid.uuid4()) for _ in range(agents)]
    for start in range(0, agents, MAX_PAGE):
        await connection.deliver(
            [
                SequencedChange(RegisterChange(Registration(i, f"agent-{n}", organ_id="left"), 1))
                for n, i in enumerate(ids[start : start + MAX_PAGE], start)
            ]
        )
    watcher_class: Any = ray.remote(Watcher)
    watcher, other = (
        watcher_class.options(num_cpus=0).remote(place.namespace, organ_id) for organ_id in ("left", "right")
    )
    await asyncio.gather(watcher.start.remote(), other.start.remote())

    async def send(numbers: range) -> None:
        batch = []
        for number in numbers:
            seq = number // agents + 2
            status = Status.ALIVE if seq % 2 == 0 else Status.DRAINING
            cause = Cause(CauseKind.AGENT, repr(time.time()))
            change = StatusChange(ids[number % agents], status, seq, cause)
            batch.append(SequencedChange(change))
        await connection.deliver(batch)

    sent, elapsed_s = await paced(changes_per_s, seconds, agents, send)
    await asyncio.sleep(1.0)
    delays_s, notified, cached = await watcher.stop.remote()
    _, notified_of_others, _ = await other.stop.remote()
    for one in (watcher, other):
        ray.kill(one)
    assert cached == agents, f"the cache of the watcher contains {cached} of {agents} agents"
    return Watched(delays_s, sent, elapsed_s, notified, notified_of_others)


async def paced(
    changes_per_s: int, seconds: float, most: int, send: Callable[[range], Awaitable[object]]
) -> tuple[int, float]:
    """Call `send` every TICK_S seconds with the numbers of the changes that are due, `most` at a time, while the calls
    before it go on. Returns how many changes there were, and the seconds until all of them were answered."""
    began_s, sent = time.monotonic(), 0
    sending: set[asyncio.Future[object]] = set()
    while time.monotonic() < began_s + seconds:
        due = min(most, int((time.monotonic() - began_s) * changes_per_s) - sent)
        if due > 0:
            task = asyncio.ensure_future(send(range(sent, sent + due)))
            sent += due
            sending.add(task)
            task.add_done_callback(sending.discard)
        await asyncio.sleep(TICK_S)
    await asyncio.gather(*sending)
    return sent, time.monotonic() - began_s
