"""A registry at work over a database that can be lost, and agents that beat and change; with all that must hold of it.

Tests make the database fail, and ask the stage afterwards whether anything was lost.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import time
from collections.abc import Awaitable
from contextlib import ExitStack
from typing import Any

import psycopg

from seedcore.core.answers import Receipt
from seedcore.core.changes import Registration
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.ports import OnDependency, OnDraining, OnExplained, OnLostNodes, OnUnwatched
from seedcore.core.timeouts import end
from seedcore.core.verdict import Witness
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.postgres import PostgresStore
from seedcore.store.sessions import PoolLimits
from tests.builders import iid
from tests.faults.proxy import Proxy
from tests.local import LocalRegistry as Registry
from tests.servers import PostgresServer
from tests.waiting import eventually

FLEET = 6
BEAT_S = 0.3
LEASE_S = 1.5
OUTAGE_S = 1.2 * LEASE_S
DURABLE_WAIT_S = 0.8
RETRY_MAX_S = 1.0
CONNECTIONS_PER_TRY = 3  # to see it answer, to use it, and to look at the schema
STATEMENTS_PER_TRY = 5  # the term, the epoch, those who left with it, registrations and changes
LIMITS = PoolLimits(max_size=3, connect_timeout_s=0.5, statement_timeout_s=0.5)
PAUSE_S = 1.5  # that a busy machine may take of any measured time
HEALED_WITHIN_S = 6.0
CONFIG = RegistryConfig(
    ray_cluster="outages",
    beat_interval_s=BEAT_S,
    lease_s=LEASE_S,
    flush_interval_s=0.1,
    durable_wait_s=DURABLE_WAIT_S,
    reconnect_grace_s=0.5,
    retry_max_s=RETRY_MAX_S,
    epoch_check_s=0.5,
    stop_deadline_s=2.0,
)


class NoWitness:
    """Implements core.ports.DeathWitness: sees nothing, so that beats alone decide."""

    problem: str | None = None
    is_blind = False
    relays = watched = 0
    on_refined: OnExplained
    on_dependency: OnDependency
    on_lost_nodes: OnLostNodes
    on_unwatched: OnUnwatched
    on_draining: OnDraining

    def relay_of(self, node_id: str) -> None: ...

    def start(self) -> None:
        """Nothing to begin."""

    async def stop(self) -> None:
        """Nothing to end."""

    def add(self, instance: Instance) -> None:
        """Watches nothing."""

    def drop(self, instance: Instance) -> None:
        """Watches nothing."""

    async def ask_ray(self, instance: Instance, timeout_s: float) -> Witness:
        """Knows nothing."""
        return Witness.UNKNOWN


class Attempts(logging.Handler):
    """Counts the connections that are tried, also those that fail."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += str(record.msg).startswith("connection attempt")


def _registration(number: int, **details: Any) -> Registration:
    return Registration(iid(number), f"agent-{number}", **details)


class Stage:
    """A registry at work over a database that can be lost, and agents that beat."""

    def __init__(
        self,
        server: PostgresServer,
        proxy: Proxy,
        database: str,
        config: RegistryConfig = CONFIG,
        limits: PoolLimits = LIMITS,
        store: PostgresStore | None = None,
    ) -> None:
        """Nothing is started yet. Without a `store`, one that connects through the proxy is used."""
        self.server = server
        self.proxy = proxy
        self.database = database
        self.store = store if store is not None else PostgresStore(proxy.dsn(database), limits)
        self._config = config
        self.registry = self._make_registry()
        self.attempts = Attempts()
        self.beating: list[str] = []
        self.lost: set[str] = set()
        self.comes_back = False
        self.parts = 1
        self._beat_s = config.beat_interval_s
        self._beats: asyncio.Task[None] | None = None
        self._last_seq: dict[str, int] = {}
        self._sent: dict[str, list[tuple[str, int | None]]] = {}
        self.undo = ExitStack()
        self.mend = ExitStack()

    def _make_registry(self) -> Registry:
        return Registry(self._config, self._make_store, watch_factory=lambda on_death: NoWitness())

    async def replace_registry(self, store: PostgresStore) -> None:
        """End the registry, which commits what it can, and start another one with another store."""
        await self.registry.stop()
        self.store = store
        self.registry = self._make_registry()
        self.registry.start()
        await eventually(self.is_ready)

    async def _make_store(self) -> PostgresStore:
        return self.store

    def open(self) -> None:
        """Start the registry, and count what it tries."""
        log = logging.getLogger("psycopg")
        log.addHandler(self.attempts)
        self.undo.callback(log.removeHandler, self.attempts)
        self.undo.callback(log.setLevel, log.level)
        self.undo.callback(setattr, log, "propagate", log.propagate)
        log.setLevel(logging.DEBUG)
        log.propagate = False
        self.registry.start()
        self._beats = asyncio.create_task(self._beat_for_ever())

    async def start(self, fleet: int = FLEET) -> None:
        """Until the whole fleet is alive, and durably so."""
        self.open()
        await eventually(self.is_ready)
        await asyncio.gather(*(self.register(number) for number in range(fleet)))
        await asyncio.gather(*(self.turn(number, Status.ALIVE) for number in range(fleet)))
        for number in range(fleet):
            await self.until_durable(number)
        self.require_history()

    async def stop(self) -> None:
        """End the registry and mend what a test broke."""
        beats_went_on = self._beats is None or not self._beats.done()
        await end(self._beats)
        self.mend.close()
        await self.registry.stop()
        self.undo.close()
        assert beats_went_on

    # Agents

    async def register(self, number: int, **details: Any) -> Receipt:
        """The number-th agent registers, and beats from then on."""
        self._remember(number, Status.STARTING, 1)
        receipt = await self.registry.register(_registration(number, **details), 1)
        if iid(number) not in self.beating:
            self.beating.append(iid(number))
        return receipt

    async def register_until_not_durable(self, first: int) -> int:
        """New agents register, with large metadata, until a change is not committed; the number of the next."""
        for number in range(first, first + 50):
            receipt, took_s = await timed(self.register(number, metadata={"ballast": os.urandom(6000).hex()}))
            assert took_s < DURABLE_WAIT_S + PAUSE_S
            if not receipt.durable:
                assert receipt.why
                return number + 1
        raise AssertionError("everything is durable")

    async def turn(self, number: int, status: Status) -> Receipt:
        """The number-th agent changes its status."""
        seq = self._last_seq[iid(number)] + 1
        self._remember(number, status, seq)
        return await self.registry.set_status(iid(number), status, seq)

    async def repeat(self, number: int) -> Receipt:
        """The number-th agent sends its last change again, as clients do until it is durable."""
        status, seq = self._sent[iid(number)][-1]
        assert seq is not None
        return await self.registry.set_status(iid(number), status, seq)

    async def until_durable(self, number: int) -> None:
        """Until the last change of the number-th agent is acknowledged as committed."""

        async def is_durable() -> bool:
            return (await self.repeat(number)).durable

        await eventually(is_durable)

    def _remember(self, number: int, status: Status, seq: int) -> None:
        self._last_seq[iid(number)] = seq
        self._sent.setdefault(iid(number), []).append((status.value, seq))

    async def _beat_for_ever(self) -> None:
        for part in itertools.cycle(range(self.parts)):
            answer = await self.registry.beat_many(self.beating[part :: self.parts])
            self.lost |= {*answer.unknown, *answer.dead}
            if self.comes_back:
                for instance_id in answer.unknown:
                    seq = self._last_seq[instance_id]
                    await self.registry.register(_registration(int(instance_id[-12:])), seq)
                    await self.registry.set_status(instance_id, self._sent[instance_id][-1][0], seq + 1)
                    self._last_seq[instance_id] = seq + 1
            await asyncio.sleep(self._beat_s / self.parts)

    # Questions

    @property
    def effort(self) -> tuple[int, int]:
        """The connections and the statements that were tried so far."""
        return self.attempts.count, self.store.statements

    async def is_ready(self) -> bool:
        """Whether everything is committed and the registry knows it."""
        health = await self.registry.health()
        assert health.is_ready, health.store_problem
        assert health.pending_changes == 0
        return True

    async def names_the_problem(self, pattern: str) -> bool:
        """Whether health has what is wrong, in one line."""
        problem = (await self.registry.health()).store_problem
        assert problem is not None
        assert re.search(pattern, problem), problem
        assert "\n" not in problem
        return True

    async def require_fleet(self) -> None:
        """Every agent that beats is listed and resolved with its own status, and no beat was answered otherwise."""
        listed = await self.registry.list_active(None, limit=1000)
        assert {instance.instance_id for instance in listed} == set(self.beating)
        found = await self.registry.resolve([f"agent-{int(instance_id[-12:])}" for instance_id in self.beating])
        for instance_id, resolution in zip(self.beating, found.value, strict=True):
            status = self._sent[instance_id][-1][0]
            if status == Status.ALIVE.value:
                assert resolution.instance is not None, resolution
                assert (resolution.instance.instance_id, resolution.verdict) == (instance_id, Verdict.FRESH)
        assert found.complete
        assert not self.lost

    def admin(self, database: str | None = None) -> psycopg.Connection:
        """A session beside the proxy that may write whatever is set."""
        dsn = self.server.dsn(database if database is not None else self.database)
        return psycopg.connect(dsn, autocommit=True, options="-c default_transaction_read_only=off")

    def run(self, *statements: str) -> None:
        """Run statements by hand."""
        with self.admin() as connection:
            for statement in statements:
                connection.execute(statement)

    def require_history(self) -> None:
        """Every change was committed, in its order, once."""
        with self.admin() as connection:
            rows = connection.execute(
                "select instance_id::text, to_status::text, seq from registry_transition order by id"
            )
            history: dict[str, list[tuple[str, int | None]]] = {}
            for instance_id, status, seq in rows.fetchall():
                history.setdefault(instance_id, []).append((status, seq))
            assert history == self._sent
            states = connection.execute("select instance_id::text, status::text, seq from registry_instance").fetchall()
        assert {row[0]: row[1:] for row in states} == {
            instance_id: sent[-1] for instance_id, sent in self._sent.items()
        }


async def timed(call: Awaitable[Receipt]) -> tuple[Receipt, float]:
    """A receipt and the seconds that it took."""
    started_s = time.monotonic()
    return await call, time.monotonic() - started_s
