"""A real primary and its real standby, which is promoted without the last commits of a registry at work."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import psycopg
import pytest

from seedcore.core.answers import Receipt
from seedcore.core.causes import CauseKind
from seedcore.core.errors import RegistryError
from seedcore.core.lifecycle import Status
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.identity import Identity
from seedcore.registry.protocol.connection import REGISTRY_NAME, RegistryConnection
from seedcore.registry.ray_support import session
from seedcore.registry.server.config import RegistryConfig
from seedcore.settings import Settings
from seedcore.store.postgres import PostgresStore
from seedcore.store.sessions import PoolLimits
from tests.local import LocalRegistry
from tests.servers import PostgresServer
from tests.traces import short_folder
from tests.unit.test_registry import NoWitness
from tests.unit.test_relay_client import Actor
from tests.waiting import eventually

CONFIG = RegistryConfig("cluster", flush_interval_s=0.1, epoch_check_s=0.5, compare_s=1.0, durable_wait_s=10.0)
LIMITS = PoolLimits(connect_timeout_s=2.0, statement_timeout_s=5.0)
SETTINGS = Settings(beat_interval_s=1.0, namespace="nowhere")


class Pair:
    """A primary and a standby. `dsn` leads to the one that takes writes."""

    def __init__(self, primary: PostgresServer, standby: PostgresServer, database: str) -> None:
        self.primary = primary
        self.standby = standby
        self.database = database

    @property
    def dsn(self) -> str:
        hosts = f"{self.primary.folder},{self.standby.folder}"
        return f"host={hosts} dbname={self.database} user=postgres target_session_attrs=read-write"

    def lose_from_here(self) -> None:
        """What is committed from now on is lost with the primary."""
        self.standby.catch_up(self.primary)
        self.standby.stop_receiving()

    def fail_over(self) -> None:
        self.primary.stop()
        self.standby.promote()

    def query(self, text: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return connection.execute(text, parameters).fetchall()


@contextmanager
def pair_of(binaries: PostgresServer) -> Iterator[Pair]:
    folders = short_folder("pri-"), short_folder("sta-")
    primary = PostgresServer(binaries.binaries, folders[0])
    primary.start()
    servers = [primary]
    try:
        primary.make_template()
        database = primary.create_database()
        standby = PostgresServer(binaries.binaries, folders[1], primary=primary)
        servers.append(standby)
        standby.start()
        yield Pair(primary, standby, database)
    finally:
        for server in servers:
            server.stop()
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def pair(postgres18: PostgresServer) -> Iterator[Pair]:
    with pair_of(postgres18) as pair:
        yield pair


@pytest.fixture(autouse=True)
def _connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process counts as connected to Ray; its registry is found without it."""
    membership = type("Membership", (), {})()
    monkeypatch.setattr(session, "ray_connection", lambda: membership)


@asynccontextmanager
async def at_work(pair: Pair) -> AsyncIterator[LocalRegistry]:
    """A registry that has joined."""

    async def store() -> PostgresStore:
        return PostgresStore(pair.dsn, LIMITS)

    registry = LocalRegistry(CONFIG, store, watch_factory=NoWitness)
    registry.start()
    await eventually(partial(is_ready, registry))
    try:
        yield registry
    finally:
        await registry.stop()


async def is_ready(registry: LocalRegistry, losses: int = 0) -> bool:
    health = await registry.health()
    return health.is_ready and health.losses >= losses


class Way:
    """How agents find the registry that is at work now."""

    def __init__(self, registry: LocalRegistry) -> None:
        self.actor = Actor(registry)
        self.connection = RegistryConnection("nowhere", 5.0, find=self._find)

    async def _find(self, name: str, namespace: str, timeout_s: float) -> Any:
        return self.actor if name == REGISTRY_NAME else None

    def agent(self, name: str) -> RegistryClient:
        return RegistryClient(name, settings=SETTINGS, connection=self.connection, identifier=_identity)


async def _identity(*_: object) -> Identity:
    return Identity(None, None, None, None, None, 7, None)


async def test_everything_acknowledged_survives_a_standby_that_did_not_have_it(pair: Pair) -> None:
    async with at_work(pair) as registry:
        way = Way(registry)
        agents = [way.agent(f"agent-{number}") for number in range(4)]
        for agent in agents:
            await agent.set_status("alive")
        await registry.stage_epoch("blue")
        pair.lose_from_here()
        late = way.agent("late")
        await late.set_status("alive")
        await agents[1].set_status("draining", "enough")
        await registry.drain(["agent-0"], "a new kernel", "ann", 3600.0)
        await registry.deregister(["agent-2"], "it is gone", "bob")
        written = pair.query("select * from registry_transition order by id")
        rows = pair.query("select instance_id, status, reported_status, holds, seq, cause_kind, cause_detail, cause_by"
                          " from registry_instance order by 1")  # fmt: skip
        pair.fail_over()
        assert len(pair.query("select from registry_instance")) == len(rows) - 1
        seen = set()

        async def is_mended() -> bool:
            for one in (await registry.resolve(["agent-0", "agent-1", "agent-2"])).value:
                seen.add((one.logical_id, one.instance is not None))
            return await is_ready(registry, 1)

        await eventually(is_mended, every_s=0.01, within_s=20)
        assert not any(is_resolved for _, is_resolved in seen)
        assert pair.query(
            "select instance_id, status, reported_status, holds, seq, cause_kind, cause_detail, cause_by"
            " from registry_instance order by 1"
        ) == rows  # fmt: skip
        again = pair.query("select * from registry_transition order by id")
        # every column but the number, at the same time
        assert [row[1:-1] for row in again] == [row[1:-1] for row in written]
        assert max(abs((one[-1] - two[-1]).total_seconds()) for one, two in zip(again, written, strict=True)) < 1.0
        assert (await registry.health()).healed == 0


async def test_a_lost_flip_is_made_again_and_later_agents_register_in_its_epoch(pair: Pair) -> None:
    async with at_work(pair) as registry:
        await registry.stage_epoch("blue")
        pair.lose_from_here()
        await registry.set_current_epoch("blue")
        pair.fail_over()
        late = Way(registry).agent("late")

        async def entered() -> str | None:
            # a promotion may take longer than a change waits for its commit
            receipt = await late.set_status("alive")
            return receipt.epoch if receipt.durable else None

        assert await eventually(entered) == "blue"
        assert (await registry.health()).losses == 1
        assert pair.query("select current_epoch from cluster_metadata") == [("blue",)]
        assert [one.instance is not None for one in (await registry.resolve(["late"])).value] == [True]


async def test_agents_bring_their_words_to_a_registry_that_starts_after_the_failover(pair: Pair) -> None:
    async with at_work(pair) as registry:
        way = Way(registry)
        ready, draining = way.agent("ready"), way.agent("draining")
        await ready.register()
        await draining.set_status("alive")
        for agent in (ready, draining):
            await agent.beat()
        pair.lose_from_here()
        assert (await ready.set_status("alive")).durable
        assert (await draining.set_status("draining")).durable
        pair.fail_over()
    async with at_work(pair) as second:
        way.actor.inner = second
        for agent in (ready, draining, ready, draining):
            await agent.beat()
        assert pair.query("select logical_id, status::text, seq from registry_instance order by 1") == [
            ("draining", "draining", 3),
            ("ready", "alive", 2),
        ]
        assert [one.instance is not None for one in (await second.resolve(["ready", "draining"])).value] == [
            True,
            False,
        ]


async def promotion(binaries: PostgresServer, seed: int) -> int:
    """One lossy promotion under changes of every kind. Returns how many acknowledged changes were lost at first."""
    chosen = random.Random(seed)
    with pair_of(binaries) as pair:
        async with at_work(pair) as registry:
            way = Way(registry)
            agents = [way.agent(f"agent-{number}") for number in range(12)]
            acknowledged: list[tuple[Receipt, Status]] = []
            held: dict[str, bool] = {}
            ended = asyncio.Event()

            async def turn(agent: RegistryClient) -> None:
                status = Status.ALIVE
                while not ended.is_set():
                    receipt = await agent.set_status(status, f"turn of {seed}")
                    if receipt.durable:
                        acknowledged.append((receipt, status))
                    await agent.beat()
                    status = Status.DRAINING if status is Status.ALIVE else Status.ALIVE
                    await asyncio.sleep(chosen.random() * 0.05)

            async def operate() -> None:
                while not ended.is_set():
                    name = f"agent-{chosen.randrange(12)}"
                    drains = chosen.random() < 0.5
                    call = registry.drain([name], "upkeep") if drains else registry.undrain([name])
                    try:
                        results = await call
                    except RegistryError:
                        continue
                    held.pop(name, None)
                    if results and results[0].durable and results[0].error is None:
                        held[name] = drains
                    await asyncio.sleep(chosen.random() * 0.1)

            work = [asyncio.create_task(turn(agent)) for agent in agents]
            work.append(asyncio.create_task(operate()))
            await asyncio.sleep(0.5)
            await asyncio.to_thread(pair.lose_from_here)
            await asyncio.sleep(chosen.uniform(0.1, 1.0))
            await asyncio.to_thread(pair.fail_over)
            await eventually(partial(is_ready, registry, 1), within_s=30)
            await asyncio.sleep(0.3)
            ended.set()
            await asyncio.gather(*work)
            for agent in agents:
                await agent.beat()
            loss = (await registry.health()).last_loss
            assert loss is not None
            assert (loss.refused, loss.has_whole_history) == (0, True)
            written = {
                (instance_id, seq)
                for instance_id, seq in pair.query("select instance_id::text, seq from registry_transition")
            }
            # a status under a hold is no transition, and is the row's where it is the last one
            last = dict(pair.query("select instance_id::text, seq from registry_instance"))
            missing = [
                receipt
                for receipt, _ in acknowledged
                if (receipt.instance_id, receipt.seq) not in written and last[receipt.instance_id] < receipt.seq
            ]
            assert missing == []
            stored = dict(pair.query("select logical_id, holds ? 'operator' from registry_instance"))
            assert {name: stored[name] for name in held} == held
            reported = dict(pair.query("select logical_id, reported_status::text from registry_instance"))
            assert reported == {agent.logical_id: str(agent.status) for agent in agents}
            return loss.commits


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_20_lossy_promotions_under_changes_lose_nothing(postgres18: PostgresServer) -> None:
    lost = [await promotion(postgres18, seed) for seed in range(20)]
    assert len([one for one in lost if one > 0]) == 20


async def test_a_death_keeps_its_cause(pair: Pair) -> None:
    async with at_work(pair) as registry:
        agent = Way(registry).agent("gone")
        await agent.set_status("alive")
        pair.lose_from_here()
        await registry.deregister(["gone"], "it was killed", "ann")
        pair.fail_over()
        await eventually(partial(is_ready, registry, 1), within_s=20)
        assert pair.query("select status::text, cause_kind::text, cause_detail, cause_by from registry_instance") == [
            ("dead", CauseKind.OPERATOR.value, "it was killed", "ann")
        ]
