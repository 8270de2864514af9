"""The same work on SeedCore and on etcd, each in a process of its own, and the holders and watchers of etcd."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from seedcore.bench.changes import Lone
from seedcore.bench.etcd import EtcdClient
from seedcore.bench.ingest import IDS_PER_CALL
from seedcore.bench.listing import timed
from seedcore.core.answers import Origin
from seedcore.core.errors import RegistryUnavailableError
from seedcore.core.lifecycle import Status
from seedcore.registry.caller.listing import every_page
from seedcore.registry.protocol.connection import RegistryConnection, shared_connection
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager

PAUSE_S = 0.02
HITS = 10_000
AGENTS, LONE, WATCHED, HELD = b"agents/", b"lone", b"watched/", b"held/"
_LEASE_S = 3600
_GRANTS_AT_ONCE = 200
_PATIENCE_S = 60.0

Work = Callable[[], Awaitable[object]]


async def samples(work: Work, count: int, pause_s: float) -> list[float]:
    """The seconds of each of `count` runs, with a pause before each."""
    found = []
    for _ in range(count):
        await asyncio.sleep(pause_s)
        found.append(await timed(work))
    return found


class SeedCoreSide(Lone):
    """An agent that changes, and a caller that looks up, lists and renews."""

    def __init__(self, settings: Settings, echo: Any, name: str, instance_ids: Sequence[str], agents: int) -> None:
        """`name` is the agent to look up, `instance_ids` those to renew; a listing has `agents` of them."""
        super().__init__(settings, echo)
        self._name = name
        self._ids = instance_ids
        self._agents = agents
        self._connection = shared_connection(settings.namespace, settings.call_timeout_s)
        self._without_relay = RegistryConnection(settings.namespace, settings.call_timeout_s)
        self._manager = Tier0MemoryManager(settings)
        self._is_alive = True

    async def start(self) -> list[bytes]:
        """Wait until the relay is used and the cache is up to date. The agents of a listing, each as JSON."""
        assert await self.prepare(), "the registry names no relay of this node"
        ends_s = time.monotonic() + _PATIENCE_S
        while (await self._manager.locate(self._name)).source is not Origin.SNAPSHOT:
            if time.monotonic() > ends_s:
                raise RegistryUnavailableError("the manager does not follow the registry")
            await asyncio.sleep(0.1)
        await self._manager.resolve(self._name)
        listed = await every_page(self._connection, statuses=None)
        return [json.dumps(asdict(instance), default=str).encode() for instance in listed]

    async def run(self, work: str, count: int) -> list[float]:
        """The seconds of each of `count` runs of a work."""
        if work == "hit":
            return [await self._hit() for _ in range(count)]
        works: Mapping[str, Work] = {
            "floor": lambda: self._echo.echo.remote("agent"),
            "change": self._next_change,
            "look-up": lambda: self._connection.resolve([self._name]),
            "listing": self._list,
            "renewal": lambda: self._renew(self._connection),
            "renewal without relay": lambda: self._renew(self._without_relay),
        }
        return await samples(works[work], count, PAUSE_S)

    async def _next_change(self) -> None:
        self._is_alive = not self._is_alive
        await self._change(Status.ALIVE if self._is_alive else Status.DRAINING)()

    async def _hit(self) -> float:
        began_s = time.perf_counter()
        for _ in range(HITS):
            await self._manager.resolve(self._name)
        return (time.perf_counter() - began_s) / HITS

    async def _list(self) -> None:
        listed = await every_page(self._connection, statuses=None)
        assert len(listed) >= self._agents, f"{len(listed)} agents are listed"

    async def _renew(self, connection: RegistryConnection) -> None:
        calls = [self._ids[first : first + IDS_PER_CALL] for first in range(0, len(self._ids), IDS_PER_CALL)]
        for answer in await asyncio.gather(*(connection.beat_many(list(ids)) for ids in calls)):
            assert not answer.unknown, f"{len(answer.unknown)} agents are unknown"
            assert not answer.dead, f"{len(answer.dead)} agents are dead"


class EtcdSide:
    """A client of etcd that does the same."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._count = 0
        self._leases = range(0)

    async def start(self, rows: Sequence[bytes], leases: int) -> None:
        """Write the rows, as many of them as there are leases with one of their own."""
        self._client = EtcdClient(self._address)
        self._rows = rows
        self._leases = range(1, leases + 1)
        at_once = asyncio.Semaphore(_GRANTS_AT_ONCE)

        async def grant(lease: int) -> None:
            async with at_once:
                await self._client.grant(lease, _LEASE_S)

        await asyncio.gather(*(grant(lease) for lease in self._leases))
        await self._client.put_all(
            [(key_of(AGENTS, number), row, number + 1 if number < leases else 0) for number, row in enumerate(rows)]
        )

    async def run(self, work: str, count: int) -> list[float]:
        """The seconds of each of `count` runs of a work."""
        works: Mapping[str, Work] = {
            "floor": self._client.health,
            "change": self._change,
            "look-up": self._look_up,
            "listing": self._list,
            "renewal": self._renew,
        }
        return await samples(works[work], count, PAUSE_S)

    async def _change(self) -> None:
        self._count += 1
        await self._client.put(LONE, b"%d %s" % (self._count, self._rows[0]))

    async def _look_up(self) -> None:
        found = await self._client.get(key_of(AGENTS, 0))
        assert found is not None, "the key is not there"
        json.loads(found)

    async def _list(self) -> None:
        listed = [json.loads(value) for value in await self._client.list_values(AGENTS)]
        assert len(listed) == len(self._rows), f"{len(listed)} values are listed"

    async def _renew(self) -> None:
        renewed = await self._client.keep_alive(self._leases)
        assert renewed == len(self._leases), f"{renewed} leases are renewed"


class EtcdWatcher:
    """Watches keys in another process. A value begins with the time at which it was sent, as `sent` makes it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._delays_s: list[float] = []
        self._gone_at: dict[bytes, float] = {}

    async def start(self, prefix: bytes) -> None:
        """Watch from now on the keys with the prefix."""
        self._client = EtcdClient(self._address)
        self._task = asyncio.create_task(self._note(await self._client.watch(prefix)))

    async def delays(self, changes: int, timeout_s: float) -> list[float]:
        """Wait for so many changes, and return the seconds from each to its arrival. Raises TimeoutError after
        `timeout_s` seconds."""
        await self._until(lambda: len(self._delays_s) >= changes, f"{changes} changes have not arrived", timeout_s)
        return self._delays_s

    async def gone(self, keys: Sequence[bytes], timeout_s: float) -> list[float]:
        """Wait until all keys are gone. Returns the wall-clock time (seconds since 1970) of each end. Raises
        TimeoutError after `timeout_s` seconds."""
        await self._until(lambda: self._gone_at.keys() >= set(keys), f"{len(keys)} keys are not deleted", timeout_s)
        return [self._gone_at[key] for key in keys]

    async def _until(self, is_so: Callable[[], bool], what: str, timeout_s: float) -> None:
        ends_s = time.monotonic() + timeout_s
        while not is_so():
            if self._task.done():
                self._task.result()
            if time.monotonic() > ends_s:
                raise TimeoutError(f"{what} within {timeout_s:g} s")
            await asyncio.sleep(0.05)

    async def _note(self, events: AsyncIterator[tuple[bytes, bytes | None]]) -> None:
        async for key, value in events:
            if value is None:
                self._gone_at[key] = time.time()
            else:
                self._delays_s.append(time.time() - float(value.partition(b" ")[0]))


class EtcdHolder:
    """A process that holds a key by a lease, and renews it three times in each of its terms, as etcd's client does."""

    async def start(self, address: str, number: int, ttl_s: int, lease: int) -> int:
        """Hold the key of this number. The process id."""
        self._client = EtcdClient(address)
        await self._client.grant(lease, ttl_s)
        await self._client.put(key_of(HELD, number), sent(b""), lease)
        self._task = asyncio.create_task(self._renew(lease, ttl_s / 3))
        return os.getpid()

    async def _renew(self, lease: int, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            await self._client.keep_alive([lease])


def sent(row: bytes) -> bytes:
    """A row with the time at which it was sent: now."""
    return b"%a %s" % (time.time(), row)


def key_of(prefix: bytes, number: int) -> bytes:
    """A key of etcd."""
    return b"%s%06d" % (prefix, number)
