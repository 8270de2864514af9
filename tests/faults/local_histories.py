"""Short histories of a registry process, its agents and its readers, under faults drawn from a seed.

Real are the registry, in a process that is stopped and killed; PostgreSQL, behind a proxy that loses the network; the
agents' clients; the follower and its cache. Ray is not there: a socket carries the calls, and now and then loses an
answer or delivers a call twice. A history takes about a second, most of which is waiting.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg

from seedcore.core.answers import Listing, Receipt
from seedcore.core.changes import SequencedChange
from seedcore.core.errors import RegistryError
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.lifecycle import Status
from seedcore.core.timeouts import end
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.identity import Identity
from seedcore.registry.caller.live_sources import SnapshotSource
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.times import FollowTimes
from seedcore.settings import Settings
from seedcore.store.postgres import PostgresStore
from tests.faults.history import History, Seen, Step
from tests.faults.proxy import Proxy
from tests.faults.recording import EVERY, Journal, calls_since, look, mark, page, read_cache, take, with_resolutions
from tests.faults.registry_process import LIMITS, Origin, Registries, RegistryProcess, Wire, registries
from tests.servers import PostgresServer, forget_everything
from tests.traces import short_folder
from tests.waiting import eventually

AGENTS = 3
CHANGES = (4, 10)
PAUSE_S = 0.06
READ_EVERY_S = 0.02
MENDED_WITHIN_S = 20.0
UNAWARE_S = 2.0
SETTINGS = Settings(namespace="histories", beat_interval_s=1.0, lease_s=20.0)


class RecordedWire:
    """A connection by a Wire that records its calls. Called as a RegistryConnection is."""

    def __init__(self, journal: Journal, wire: Wire, terms: dict[str, int]) -> None:
        """`terms` gets the first term of each stream that it sees."""
        self.journal = journal
        self._wire = wire
        self._terms = terms

    async def take(self, change: SequencedChange) -> Receipt:
        return await take(self.journal, change, lambda sent: self._wire.call("take", sent))

    async def page(self, wanted: Any, limit: int = 100, cursor: str | None = None, packed: bool = False) -> Listing:
        async def ask(*args: Any) -> Any:
            answer, origin = await self._wire.ask("page", *args)
            self._note(origin)
            return answer

        return await page(self.journal, ask, wanted, limit, cursor)

    async def resolve(self, logical_ids: list[str], *, allow_late: bool = False) -> Any:
        async with self.journal.call("resolve") as called:
            # the answer itself does not name its registry
            answer, origin = await self._wire.ask("resolve", logical_ids, allow_late=allow_late)
            self._note(origin)
            called[0] = replace(with_resolutions(called[0], answer), stream=None if origin is None else origin.stream)
        return answer

    async def beat_many(self, instance_ids: list[str]) -> Any:
        async with self.journal.call("beat_many"):
            return await self._wire.call("beat_many", instance_ids)

    async def changes(self, question: FeedQuestion) -> Any:
        async with self.journal.call("changes"):
            return await self._wire.call("changes", question)

    def _note(self, origin: Origin | None) -> None:
        if origin is not None and origin.term is not None:
            self._terms.setdefault(origin.stream, origin.term)


class Stage:
    """A database and its proxy, for one history after another."""

    def __init__(self, server: PostgresServer, registries: Registries, folder: Path) -> None:
        self._registries = registries
        self._folder = folder
        database = server.create_database()
        self._dsn = server.dsn(database)
        self.proxy = Proxy(server.socket)
        self.proxy.start()
        self._proxied_dsn = self.proxy.dsn(database)
        self._store = "real"
        self._running: list[RegistryProcess] = []
        self._terms: dict[str, int] = {}
        self._terms_seen: list[tuple[float, int]] = []
        self.wires: list[Wire] = []

    def close(self) -> None:
        self.proxy.stop()

    @property
    def registry(self) -> RegistryProcess:
        """The registry that has the name."""
        return self._running[-1]

    async def replace_registry(self) -> None:
        """Another registry takes the name. The one before runs on, unless it was killed."""
        started = await self._registries.start(self._proxied_dsn, self._store)
        await eventually(started.socket.exists, every_s=0.005)
        self._running.append(started)
        for wire in self.wires:
            wire.use(started)

    async def history(self, seed: int, store: str = "real", faults: Sequence[str] | None = None) -> History:
        """Run one, with these faults or with some drawn from the seed. Raises AssertionError where a change is never
        delivered."""
        self._store, self._running, self.wires = store, [], []
        self._terms, self._terms_seen = {}, []
        chance = random.Random(seed)
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            forget_everything(connection)
        since = mark(self._folder)
        async with AsyncExitStack() as stack:
            stack.callback(self._kill_all)
            await self.replace_registry()
            await self._act(stack, chance, faults)
        ended_s = time.monotonic()
        return History(
            "local",
            seed,
            since.at_s,
            ended_s,
            True,
            self._superseded(),
            UNAWARE_S,
            (),
            calls_since(self._folder, since),
            *self._end(),
        )

    def _superseded(self) -> dict[str, float]:
        """By stream, when a registry that another one superseded was seen in force for the last time."""
        found = {}
        for stream, term in self._terms.items():
            in_force = [at_s for at_s, seen in self._terms_seen if seen <= term]
            if in_force and len(in_force) < len(self._terms_seen):
                found[stream] = max(in_force)
        return found

    async def _act(self, stack: AsyncExitStack, chance: random.Random, named: Sequence[str] | None) -> None:
        lost_share = chance.choice([0.0, 0.02, 0.1])
        clients = [
            RegistryClient(
                f"agent-{number}",
                settings=SETTINGS,
                connection=self._connection(stack, f"agent-{number}", chance, lost_share),
                identifier=_identified,
            )
            for number in range(AGENTS)
        ]
        readers = (self._read_registry, self._read_cache, self._read_store)
        reading = [asyncio.create_task(reader(chance)) for reader in readers]
        reading.append(asyncio.create_task(self._look()))
        stack.push_async_callback(end, *reading)
        faults = chance.sample(list(FAULTS), k=chance.choice([1, 1, 2])) if named is None else named
        breaking = asyncio.gather(*(_inflict(self, FAULTS[fault], chance) for fault in faults))
        await asyncio.gather(*(_live(client, chance) for client in clients))
        await breaking
        self.proxy.heal()
        # one that was replaced ends, as Ray would end it
        for process in self._running[:-1]:
            process.signal(signal.SIGKILL)
        self.registry.signal(signal.SIGCONT)
        await asyncio.gather(*(_deliver(client) for client in clients))
        for task in reading:
            if task.done():
                task.result()

    def _connection(self, stack: AsyncExitStack, name: str, chance: random.Random, lost_share: float) -> Any:
        wire = Wire(chance, lost_share)
        wire.use(self.registry)
        self.wires.append(wire)
        stack.push_async_callback(wire.close)
        journal = Journal(self._folder, name)
        stack.callback(journal.close)
        return RecordedWire(journal, wire, self._terms)

    # Readers

    async def _read_registry(self, chance: random.Random) -> None:
        async with AsyncExitStack() as stack:
            connection = self._connection(stack, "reader", chance, 0.0)
            while True:
                await _tried(connection.page(EVERY))
                await _tried(connection.resolve([f"agent-{number}" for number in range(AGENTS)], allow_late=True))
                await asyncio.sleep(READ_EVERY_S)

    async def _read_cache(self, chance: random.Random) -> None:
        async with AsyncExitStack() as stack:
            connection = self._connection(stack, "follower", chance, 0.0)
            follower = Follower(connection, times=FollowTimes(wait_s=0.5))
            stack.push_async_callback(follower.stop)
            source = SnapshotSource(follower)
            while True:
                await _tried(read_cache(connection.journal, source))
                await asyncio.sleep(READ_EVERY_S)

    async def _read_store(self, _chance: random.Random) -> None:
        store = PostgresStore(self._proxied_dsn, LIMITS, read_only=True)
        journal = Journal(self._folder, "sql")
        try:
            await store.open()
            while True:
                await _tried(page(journal, store.list_instances, EVERY, 100, None))
                await asyncio.sleep(READ_EVERY_S)
        finally:
            journal.close()
            await store.close()

    async def _look(self) -> None:
        journal = Journal(self._folder, "test")
        try:
            while True:
                await look(journal, self._rows)
                await asyncio.sleep(READ_EVERY_S)
        finally:
            journal.close()

    # Truth

    def _rows(self) -> tuple[Seen, ...]:
        began_s = time.monotonic()
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            self._terms_seen += [(began_s, term) for (term,) in connection.execute("select term from cluster_metadata")]
            return _rows_of(connection)

    def _end(self) -> tuple[tuple[Step, ...], tuple[Seen, ...]]:
        """The history and the rows of one moment: the server may still be at a last commit."""
        with psycopg.connect(self._dsn) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            found = connection.execute(
                "select instance_id::text, seq, to_status::text, hold is not null from registry_transition order by id"
            ).fetchall()
            steps = tuple(Step(one, seq, Status(status), is_hold) for one, seq, status, is_hold in found)
            return steps, _rows_of(connection)

    def _kill_all(self) -> None:
        for process in self._running:
            process.signal(signal.SIGKILL)


@contextmanager
def stages(server: PostgresServer, count: int) -> Iterator[list[Stage]]:
    """Stages that run histories at the same time."""
    with ExitStack() as stack:
        folder = short_folder("sc-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        forker = stack.enter_context(registries(folder))
        made = []
        for number in range(count):
            own = folder / str(number)
            own.mkdir()
            made.append(Stage(server, forker, own))
            stack.callback(made[-1].close)
        yield made


def _rows_of(connection: psycopg.Connection[Any]) -> tuple[Seen, ...]:
    found = connection.execute("select instance_id::text, logical_id, status::text, seq from registry_instance")
    return tuple(Seen(one, logical_id, Status(status), seq) for one, logical_id, status, seq in found)


async def _live(client: RegistryClient, chance: random.Random) -> None:
    """An agent registers, drains and returns, and now and then ends."""
    await _tried(client.register())
    await _tried(client.set_status(Status.ALIVE))
    for number in range(chance.randint(*CHANGES)):
        await asyncio.sleep(chance.uniform(0.0, PAUSE_S))
        wanted = Status.ALIVE if client.status is Status.DRAINING else Status.DRAINING
        await _tried(client.set_status(wanted, f"turn {number}"))
    if chance.random() < 0.2:
        await _tried(client.set_status(Status.DEAD, "it has ended"))


async def _deliver(client: RegistryClient) -> None:
    """Beat until the registry has everything."""

    async def is_delivered() -> bool:
        await client.beat()
        return client.pending == 0

    await eventually(is_delivered, within_s=MENDED_WITHIN_S, every_s=0.02)


async def _tried(work: Awaitable[object]) -> None:
    with suppress(RegistryError):
        await work


async def _identified(*_: object) -> Identity:
    return Identity(None, None, None, None, None, os.getpid(), None)


# Faults

Fault = Callable[[Stage, random.Random], Awaitable[None]]


async def _inflict(stage: Stage, fault: Fault, chance: random.Random) -> None:
    await asyncio.sleep(chance.uniform(0.0, 0.4))
    await fault(stage, chance)


async def _killed(stage: Stage, chance: random.Random) -> None:
    stage.registry.signal(signal.SIGKILL)
    await asyncio.sleep(chance.choice([0.0, 0.1]))
    await stage.replace_registry()


async def _stopped(stage: Stage, chance: random.Random) -> None:
    registry = stage.registry
    registry.signal(signal.SIGSTOP)
    await asyncio.sleep(chance.uniform(0.05, 0.4))
    registry.signal(signal.SIGCONT)


async def _superseded(stage: Stage, chance: random.Random) -> None:
    """Another registry takes the name while the one before hangs, or while it still serves some of its callers."""
    registry, late = stage.registry, chance.sample(stage.wires, k=2)
    if chance.random() < 0.5:
        registry.signal(signal.SIGSTOP)
    await stage.replace_registry()
    for wire in late:
        wire.use(registry)
    await asyncio.sleep(chance.uniform(0.0, 0.2))
    registry.signal(signal.SIGCONT)
    await asyncio.sleep(chance.uniform(0.0, 0.2))
    for wire in late:
        wire.use(stage.registry)


async def _database_cut(stage: Stage, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 4)):
        await asyncio.to_thread(stage.proxy.cut)
        await asyncio.sleep(chance.uniform(0.0, 0.1))


async def _database_away(stage: Stage, chance: random.Random) -> None:
    away = chance.choice([stage.proxy.refuse, stage.proxy.go_deaf])
    await asyncio.to_thread(away)
    await asyncio.sleep(chance.uniform(0.05, 0.3))
    await asyncio.to_thread(stage.proxy.heal)


async def _answers_lost(stage: Stage, chance: random.Random) -> None:
    """The database commits, and the registry does not learn of it."""
    messages = chance.randint(1, 12)
    await asyncio.to_thread(stage.proxy.lose_after, messages)
    if chance.random() < 0.5:
        await asyncio.sleep(chance.uniform(0.0, 0.2))
        await _killed(stage, chance)


FAULTS: dict[str, Fault] = {
    "killed": _killed,
    "stopped": _stopped,
    "superseded": _superseded,
    "database cut": _database_cut,
    "database away": _database_away,
    "answers lost": _answers_lost,
}
