"""Many processes that follow: each by itself, and through the relay of its node. The delays, and the registry's work.

A node is a real relay's copy, which follows the registry through Ray, and its callers; many share a process here, since
a process of Ray uses 50 MiB. Those of REAL nodes ask an actor of the relay's class, as processes of a real node do.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from functools import partial
from typing import Any

import ray

from seedcore.bench.environment import Bench, Place, percentile
from seedcore.bench.report import Figure, Ratio, Result
from seedcore.core.answers import InstanceFilter, Listing
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import RegisterChange, Registration, SequencedChange, StatusChange
from seedcore.core.feed import FeedBatch
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.lifecycle import Status
from seedcore.core.paging import decode_cursor
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.nearby import FeedSource
from seedcore.registry.node.copy import NodeCopy
from seedcore.registry.node.relay import RelayActor
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.ray_support import session

AGENTS = 100
CHANGES_PER_S = 1
REAL = 4
HOSTS = 2
_EVERY = InstanceFilter(statuses=None, fresh_only=False)


class _Asked:
    """A FeedSource: the relay of a node, in this process or an actor."""

    def __init__(self, relay: Any) -> None:
        self._relay = relay

    async def changes(self, question: FeedQuestion) -> FeedBatch:
        """See NodeCopy.changes."""
        if isinstance(self._relay, NodeCopy):
            return await self._relay.changes(question)
        batch: FeedBatch = await session.ask(self._relay, "changes", question)
        return batch

    async def page(
        self, wanted: InstanceFilter, limit: int = 100, cursor: str | None = None, packed: bool = False
    ) -> Listing:
        """See NodeCopy.page."""
        if isinstance(self._relay, NodeCopy):
            listing = await self._relay.page(wanted, limit, cursor)
        else:
            listing = await session.ask(self._relay, "page", wanted, limit, cursor)
        return listing if packed else listing.unpacked()


class Callers:
    """Callers of some nodes. The detail of each cause is the time at which the change was sent."""

    def __init__(self, namespace: str, nodes: int, callers: int, relays: list[Any], *, is_direct: bool) -> None:
        self._delays_s: list[float] = []
        self._followers: list[Follower] = []
        sources: list[FeedSource] = [_Asked(relay) for relay in relays]
        for _ in range(nodes):
            connection = RegistryConnection(namespace, 30.0)
            sources.append(connection if is_direct else _Asked(NodeCopy(connection)))
        for source in sources:
            for _ in range(callers):
                note = partial(self._note, len(self._followers), {})
                follower = Follower(source, on_change=note)
                self._followers.append(follower)

    async def start(self) -> int:
        """Start to follow, and wait until every copy is current. How many there are."""
        for follower in self._followers:
            follower.start()
        are_current = await asyncio.gather(*(follower.until_current(60.0) for follower in self._followers))
        assert all(are_current), f"{are_current.count(False)} copies are not current"
        self._delays_s.clear()
        return len(self._followers)

    async def stop(self) -> list[float]:
        """The delays of all changes that the callers saw, in seconds."""
        await asyncio.gather(*(follower.stop() for follower in self._followers))
        return self._delays_s

    def _note(self, at: int, seen: dict[str, str], logical_id: str) -> None:
        wanted = InstanceFilter(statuses=None, logical_id=logical_id)
        for row in self._followers[at].view.page(wanted, decode_cursor(None), 1)[0]:
            sent = None if row.cause is None else row.cause.detail
            if sent is not None and seen.get(logical_id) != sent:
                seen[logical_id] = sent
                self._delays_s.append(time.time() - float(sent))


async def run(bench: Bench) -> Result:
    """Measure callers that follow the registry, and callers on many nodes that follow their relay."""
    nodes, callers, seconds = (8, 5, 2.0) if bench.is_quick else (50, 5, 20.0)
    direct = await _measure(bench, nodes, 1, seconds, is_direct=True)
    relayed = await _measure(bench, nodes, callers, seconds, is_direct=False)
    p99 = percentile(relayed["delays"], 0.99)
    return Result(
        "callers",
        [
            Figure("callers that follow the registry", direct["callers"], ""),
            Figure("from change to caller, p99", percentile(direct["delays"], 0.99) * 1000, "ms"),
            Figure("registry, per change", direct["busy"] * 1000, "ms"),
            Figure(f"callers that follow the relays of {nodes + REAL} nodes", relayed["callers"], ""),
            Figure("from change to caller, median", percentile(relayed["delays"], 0.5) * 1000, "ms"),
            Figure("p99", p99 * 1000, "ms"),
            Figure("changes seen", relayed["seen"] * 100, "%"),
            Figure("registry, per change", relayed["busy"] * 1000, "ms"),
        ],
        [
            Ratio("p99 through relays / 250 ms", p99 / 0.25),
            Ratio(
                "registry's work for all of them / for one caller per node", relayed["busy"] / direct["busy"], "<= 2"
            ),
        ],
        notes=[f"{CHANGES_PER_S} changes per second; all callers, relays and the registry share this machine"],
    )


async def _measure(bench: Bench, nodes: int, callers: int, seconds: float, *, is_direct: bool) -> dict[str, Any]:
    place = await bench.place("callers", lease_s=600.0)
    relay_class: Any = ray.remote(RelayActor)
    host_class: Any = ray.remote(Callers)
    relays = (
        []
        if is_direct
        else [
            relay_class.options(num_cpus=0, max_concurrency=1000).remote(place.namespace, 30.0, 0.25)
            for _ in range(REAL)
        ]
    )
    hosts = [
        host_class.options(num_cpus=0).remote(
            place.namespace, nodes // HOSTS, callers, relays[number::HOSTS], is_direct=is_direct
        )
        for number in range(HOSTS)
    ]
    try:
        ids = await _registered(place)
        count = sum(await asyncio.gather(*(host.start.remote() for host in hosts)))
        process = await place.process()
        busy_s = sum(process.cpu_times()[:2])
        changes = await _change(place, ids, seconds)
        busy_s = sum(process.cpu_times()[:2]) - busy_s
        delays = [one for some in await asyncio.gather(*(host.stop.remote() for host in hosts)) for one in some]
    finally:
        for one in (*hosts, *relays):
            ray.kill(one)
        await bench.leave(place)
    seen = len(delays) / (changes * count)
    return {"callers": count, "delays": delays, "busy": busy_s / changes, "seen": seen}


async def _registered(place: Place) -> list[str]:
    ids = [str(uuid.uuid4()) for _ in range(AGENTS)]
    first = [RegisterChange(Registration(one, f"agent-{number}"), 1) for number, one in enumerate(ids)]
    await place.connection.deliver([SequencedChange(change) for change in first])
    return ids


async def _change(place: Place, ids: list[str], seconds: float) -> int:
    """Change one agent after the other. How many changes there were."""
    changes = int(seconds * CHANGES_PER_S)
    for number in range(changes):
        status = Status.ALIVE if (number // AGENTS) % 2 == 0 else Status.DRAINING
        cause = Cause(CauseKind.AGENT, repr(time.time()))
        change = StatusChange(ids[number % AGENTS], status, number // AGENTS + 2, cause)
        await place.connection.deliver([SequencedChange(change)])
        await asyncio.sleep(1 / CHANGES_PER_S)
    await asyncio.sleep(1.0)
    return changes
