"""An agent changes its endpoints: ordered with its statuses, and kept over outages, restarts and losses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from seedcore.agents import RayAgent
from seedcore.core.answers import Outcome, Receipt
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import RegisterChange, Registration, SequencedChange, StatusChange
from seedcore.core.errors import (
    BacklogFullError,
    InstanceDeadError,
    InvalidInputError,
    RegistryFullError,
    RegistryReplacedError,
    RegistryUnavailableError,
    StoreRejectedError,
    StoreUnavailableError,
    UnknownInstanceError,
)
from seedcore.core.instances import Epoch, Instance, LiveState
from seedcore.core.lifecycle import Status
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.identity import Identity
from seedcore.registry.agent.pending import PendingChanges
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.agent.thread_reporter import ThreadReporter
from seedcore.registry.server.config import RegistryConfig
from seedcore.settings import Settings
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START, iid
from tests.local import LocalRegistry
from tests.local import Snapshot as Earlier
from tests.unit.registries import Away, joined_registry
from tests.unit.test_lost_commits import called, has_mended
from tests.unit.test_registry import NoWitness
from tests.waiting import eventually

SETTINGS = Settings(beat_interval_s=0.1, namespace="nowhere")
CONFIG = RegistryConfig("cluster", flush_interval_s=0.01, linger_s=0.0, epoch_check_s=0.01, compare_s=0.01)
OLD, NEW = {"http": "http://10.0.0.3:8000"}, {"http": "http://10.0.0.3:9000"}


@pytest.fixture
def tables() -> Tables:
    return Tables(START)


@pytest.fixture
async def registry(tables: Tables) -> AsyncIterator[LocalRegistry]:
    async with joined_registry(CONFIG, tables) as registry:
        yield registry


async def of_no_actor(*_: object) -> Identity:
    return Identity(None, None, None, "node", "10.0.0.3", 7, "process")


class To:
    """A connection to one registry, and later to another; or to none."""

    def __init__(self, registry: LocalRegistry | None) -> None:
        self.registry = registry
        self.taken: list[SequencedChange] = []

    async def take(self, change: SequencedChange) -> Receipt:
        self.taken.append(change)
        return await self._there().take(change)

    def __getattr__(self, method: str) -> Any:
        return getattr(self._there(), method)

    def _there(self) -> LocalRegistry:
        if self.registry is None:
            raise RegistryUnavailableError("away for the test")
        return self.registry


def client_of(registry: LocalRegistry | To, **details: Any) -> RegistryClient:
    connection: Any = registry
    return RegistryClient("agent", settings=SETTINGS, connection=connection, **details)


def known(registry: LocalRegistry, client: RegistryClient) -> Instance:
    row = registry.members.get(client.instance_id)
    assert row is not None
    return row


def without_database(tables: Tables) -> tuple[LocalRegistry, Away]:
    """A registry whose database is away until `is_there`."""
    store = Away(lambda: START, tables)
    store.is_there = False

    async def make_store() -> MemoryStore:
        return store

    config = replace(CONFIG, durable_wait_s=0.01, retry_max_s=0.01)
    return LocalRegistry(config, make_store, watch_factory=NoWitness), store


# The change


async def test_other_endpoints_are_durable_and_change_nothing_else(registry: LocalRegistry, tables: Tables) -> None:
    client = client_of(registry, endpoints=OLD, labels={"a": "b"})
    await client.set_status("alive")
    before = known(registry, client)
    assert before.endpoints == OLD
    version = registry.members.feed.version
    receipt = await client.set_endpoints(NEW)
    assert receipt is not None
    assert (receipt.durable, receipt.seq, receipt.status) == (True, 3, Status.ALIVE)
    after = known(registry, client)
    assert after == replace(before, endpoints=NEW, seq=3, last_heartbeat=after.last_heartbeat)
    assert tables.rows[client.instance_id].endpoints == NEW
    assert registry.members.feed.version > version
    version = registry.members.feed.version
    assert (await client.set_endpoints(dict(NEW))) is not None
    assert registry.members.feed.version == version, "the same again is no change"


async def test_endpoints_from_before_the_registration_go_with_it(registry: LocalRegistry) -> None:
    client = client_of(registry, endpoints=OLD)
    given = dict(NEW)
    assert await client.set_endpoints(given) is None
    given["late"] = "http://10.0.0.3:1"
    await client.register()
    assert (known(registry, client).endpoints, known(registry, client).seq) == (NEW, 1)


async def test_bad_endpoints_and_a_full_queue_change_nothing(registry: LocalRegistry) -> None:
    client = client_of(registry, endpoints=OLD)
    await client.set_status("alive")
    with pytest.raises(InvalidInputError, match="'http': must be an absolute URL"):
        await client.set_endpoints({"http": "10.0.0.3:8000"})
    queue = PendingChanges(limit=2)
    queue.register(client.registration)
    queue.set_status(client.instance_id, Status.ALIVE, None)
    with pytest.raises(BacklogFullError):
        queue.change_details(client.registration)
    assert len(queue) == 2
    assert (client.pending, client.registration.endpoints) == (0, OLD)
    await client.set_status("dead")
    with pytest.raises(InstanceDeadError):
        await client.set_endpoints(NEW)


async def test_endpoints_that_the_database_refuses_are_not_repeated(tables: Tables) -> None:
    class Refuses(MemoryStore):
        async def register_many(self, changes: Any) -> Any:
            if any(change.registration.endpoints == NEW for change in changes):
                raise StoreRejectedError("a rule of the owner")
            return await super().register_many(changes)

    async with joined_registry(CONFIG, tables, store=Refuses(lambda: START, tables)) as registry:
        client = client_of(registry, endpoints=OLD)
        await client.set_status("alive")
        with pytest.raises(StoreRejectedError):
            await client.set_endpoints(NEW)
        assert (client.pending, client.registration.endpoints) == (0, OLD)
        assert known(registry, client).endpoints == OLD
        assert (await client.set_status("draining")).durable


async def test_reporters_and_agents_set_them_before_and_after_the_start(registry: LocalRegistry) -> None:
    agent = RayAgent("agent", endpoints=OLD, settings=Settings(registry_enabled=False))
    await agent.set_endpoints(NEW)
    with pytest.raises(InvalidInputError, match="endpoints"):
        await agent.set_endpoints([])  # type: ignore[arg-type]
    client = client_of(registry)
    reporter = Reporter("agent", settings=SETTINGS, client=client)
    assert await reporter.set_endpoints(OLD) is None
    await reporter.start()
    assert known(registry, client).endpoints == OLD
    assert (await reporter.set_endpoints(NEW)) is not None
    assert known(registry, client).endpoints == NEW
    await reporter.stop()
    assert await reporter.set_endpoints(OLD) is None
    threaded = ThreadReporter("agent", settings=Settings(registry_enabled=False))
    assert threaded.set_endpoints(NEW) is None
    with threaded:
        assert threaded.reporter is not None
        assert threaded.reporter.client.registration.endpoints == NEW


# Order


async def test_endpoints_do_not_overtake_a_status_that_a_registry_lacks(tables: Tables) -> None:
    first, _ = without_database(tables)
    first.start()
    to = To(first)
    client = client_of(to)
    await eventually(lambda: first.writer.problem is not None)
    assert not (await client.set_status("alive")).durable
    change = SequencedChange(
        RegisterChange(replace(client.registration, endpoints=NEW), 3, is_update=True), first.members.feed.stream
    )
    async with joined_registry(CONFIG, tables) as second:
        with pytest.raises(RegistryReplacedError):
            await second.take(change)
        with pytest.raises(UnknownInstanceError):
            await second.take(replace(change, after=None))
        assert len(second.members) == 0
        to.registry = second
        receipt = await client.set_endpoints(NEW)
        assert receipt is not None
        assert receipt.durable
        row = known(second, client)
        assert (row.status, row.endpoints, row.seq) == (Status.ALIVE, NEW, 3)
        # the first try names the registry before, and is refused
        assert [(type(one.change), one.change.seq, one.after) for one in to.taken[1:]] == [
            (RegisterChange, 2, first.members.feed.stream),
            (RegisterChange, 1, None),
            (StatusChange, 2, second.members.feed.stream),
            (RegisterChange, 3, second.members.feed.stream),
        ]
    await first.stop()


async def test_endpoints_set_in_an_outage_arrive_once_with_the_last_word(registry: LocalRegistry) -> None:
    to = To(registry)
    client = client_of(to, endpoints=OLD)
    await client.set_status("alive")
    to.registry = None
    for port in range(1, 2000):
        receipt = await client.set_endpoints({"http": f"http://10.0.0.3:{port}"})
        assert receipt is not None
        assert (receipt.durable, client.pending) == (False, 1)
    await client.set_status("draining")
    await client.set_endpoints(NEW)
    assert client.pending == 3
    to.registry = registry
    await client.beat()
    row = known(registry, client)
    assert (row.status, row.endpoints, client.pending) == (Status.DRAINING, NEW, 0)


# Restarts


async def test_a_registry_that_does_not_know_the_instance_gets_status_and_endpoints(tables: Tables) -> None:
    to = To(None)
    async with joined_registry(CONFIG, tables) as first:
        to.registry = first
        client = client_of(to, endpoints=OLD)
        await client.set_status("alive")
        await client.set_endpoints(NEW)
    async with joined_registry(CONFIG, Tables(START)) as other:
        to.registry = other
        await client.beat()
        row = known(other, client)
        assert (row.status, row.endpoints, row.seq) == (Status.ALIVE, NEW, 3)


@pytest.mark.parametrize("is_durable", [True, False])
async def test_endpoints_win_over_the_older_row_that_a_registry_reads_later(tables: Tables, is_durable: bool) -> None:
    """The registry starts while its database is away, and the agent registers again in memory."""
    to = To(None)
    async with joined_registry(CONFIG, tables) as first:
        to.registry = first
        client = client_of(to, endpoints=OLD)
        await client.set_status("alive")
        if is_durable:
            await client.set_endpoints(NEW)
    to.registry = None
    if not is_durable:
        await client.set_endpoints(NEW)
    second, store = without_database(tables)
    second.start()
    await eventually(lambda: second.writer.problem is not None)
    # as it does once its database has been away for a whole lease
    await second.take(SequencedChange(RegisterChange(client.registration, 1)))
    await second.take(SequencedChange(StatusChange(client.instance_id, Status.ALIVE, 2)))
    to.registry = second
    with suppress(RegistryUnavailableError):
        await client.beat()
    store.is_there = True

    async def is_settled() -> bool:
        await client.beat()
        return second.writer.problem is None and client.pending == 0 and not second.writer.backlog.pending_changes

    await eventually(is_settled)
    row = known(second, client)
    assert (row.status, row.endpoints) == (Status.ALIVE, NEW)
    assert tables.rows[client.instance_id].endpoints == NEW
    await second.stop()


async def test_a_client_that_registers_again_in_memory_repeats_its_last_details_under_their_number() -> None:
    registration = Registration(iid(1), "agent")
    queue = PendingChanges()
    queue.register(registration)
    queue.set_status(iid(1), Status.ALIVE, None)
    changed = queue.change_details(replace(registration, endpoints=NEW))
    queue.clear()
    newest = replace(registration, endpoints=NEW, pid=7)
    queue.register_again(newest, as_new=False)
    assert list(queue) == [
        RegisterChange(newest, 1),
        StatusChange(iid(1), Status.ALIVE, 2),
        RegisterChange(newest, 3, is_update=True),
    ]
    assert isinstance(changed, RegisterChange)
    assert changed.seq == 3
    queue.set_status(iid(1), Status.DRAINING, None)
    queue.register_again(newest, as_new=False)
    assert [(type(change), change.seq) for change in queue] == [
        (RegisterChange, 1),
        (StatusChange, 2),
        (RegisterChange, 3),
        (StatusChange, 4),
    ]
    queue.register_again(replace(newest, instance_id=iid(2)), as_new=True)
    assert [(type(change), change.seq) for change in queue] == [
        (RegisterChange, 1),
        (StatusChange, 2),
        (StatusChange, 3),
    ]


async def test_an_instance_that_comes_back_as_a_new_one_has_the_last_endpoints(registry: LocalRegistry) -> None:
    client = client_of(registry, endpoints=OLD)
    await client.set_status("alive")
    before = client.instance_id
    await registry.deregister(instance_ids=[before])
    receipt = await client.set_endpoints(NEW)
    assert receipt is not None
    assert client.instance_id != before
    assert (known(registry, client).endpoints, known(registry, client).status) == (NEW, Status.ALIVE)


# Losses of the database


@pytest.mark.parametrize("journal", [0, 100])
async def test_endpoints_that_the_database_has_lost_are_written_again(tables: Tables, journal: int) -> None:
    async with joined_registry(replace(CONFIG, journal_capacity=journal), tables) as registry:
        client = client_of(registry, endpoints=OLD)
        await client.set_status("alive")
        earlier = Earlier(tables)
        await client.set_endpoints(NEW)
        earlier.restore()
        await eventually(partial(has_mended, registry))
        row = tables.rows[client.instance_id]
        assert (row.endpoints, row.status, row.seq) == (NEW, Status.ALIVE, 3)
        assert (await registry.health()).healed == 0
        assert known(registry, client).endpoints == NEW


class EndsHalfway(MemoryStore):
    """After a join while `breaks`, it takes everything but statuses."""

    breaks = is_broken = False
    failures = 0

    async def begin(self, *args: Any, **kwargs: Any) -> Epoch:
        epoch = await super().begin(*args, **kwargs)
        self.is_broken = self.breaks
        return epoch

    async def set_status_many(self, changes: Sequence[StatusChange]) -> list[Outcome]:
        if self.is_broken:
            self.failures += 1
            raise StoreUnavailableError("away for the test")
        return await super().set_status_many(changes)


async def changes_endpoints(client: RegistryClient) -> None:
    await client.set_endpoints(NEW)


async def is_not_ready(client: RegistryClient) -> None:
    await client.set_ready(False, "loading")


async def mends_halfway_then_whole(
    registry: LocalRegistry, store: EndsHalfway, client: RegistryClient, earlier: Earlier
) -> None:
    """The database loses the status `draining` and the change after it, of which only the last is in the journal."""
    store.breaks = True
    earlier.restore()
    await eventually(lambda: store.failures > 0)
    row = store.tables.rows[client.instance_id]
    assert (row.reported_status, row.seq) == (Status.ALIVE, 2), "so its agent is ahead, and repeats both"
    store.breaks = False
    await eventually(partial(has_mended, registry))
    known = registry.members.index.by_id[client.instance_id]
    assert (known.reported_status, known.seq) == (Status.DRAINING, 4)
    assert LiveState.of(store.tables.rows[client.instance_id]) == LiveState.of(known)
    loss = (await registry.health()).last_loss
    assert loss is not None
    assert not loss.has_whole_history


@pytest.mark.parametrize("change", [changes_endpoints, is_not_ready])
async def test_a_loss_that_ends_halfway_lets_no_number_stand_for_what_made_room(
    tables: Tables, change: Callable[[RegistryClient], Awaitable[None]]
) -> None:
    store = EndsHalfway(lambda: START, tables)
    async with joined_registry(replace(CONFIG, journal_capacity=1, compare_s=3600.0), tables, store=store) as registry:
        client = client_of(registry, endpoints=OLD)
        await client.set_status("alive")
        earlier = Earlier(tables)
        await client.set_status("draining")
        await change(client)
        await mends_halfway_then_whole(registry, store, client, earlier)


@pytest.mark.parametrize("change", [changes_endpoints, is_not_ready])
async def test_a_loss_that_ends_halfway_lets_no_number_stand_for_what_an_earlier_registry_wrote(
    tables: Tables, change: Callable[[RegistryClient], Awaitable[None]]
) -> None:
    to = To(None)
    async with joined_registry(CONFIG, tables) as first:
        to.registry = first
        client = client_of(to, endpoints=OLD)
        await client.set_status("alive")
        earlier = Earlier(tables)
        await client.set_status("draining")
    store = EndsHalfway(lambda: START, tables)
    async with joined_registry(replace(CONFIG, compare_s=3600.0), tables, store=store) as second:
        to.registry = second
        await change(client)
        await mends_halfway_then_whole(second, store, client, earlier)


async def test_an_agent_repeats_its_endpoints_to_a_registry_after_the_loss(tables: Tables, connected: object) -> None:
    async with joined_registry(CONFIG, tables) as first, called(first) as (connection, replace_by):
        client = RegistryClient(
            "agent", settings=SETTINGS, connection=connection, endpoints=OLD, identifier=of_no_actor
        )
        await client.set_status("alive")
        await client.beat()
        earlier = Earlier(tables)
        await client.set_endpoints(NEW)
    earlier.restore()
    async with joined_registry(CONFIG, tables) as second:
        replace_by(second)

        async def is_back() -> bool:
            await client.beat()
            return tables.rows[client.instance_id].endpoints == NEW

        await eventually(is_back)
        row = known(second, client)
        assert (row.endpoints, row.status, row.seq) == (NEW, Status.ALIVE, 3)


async def test_endpoints_bring_the_status_that_the_database_has_lost(tables: Tables) -> None:
    """The number of the registration would count for the status before it, which then never came again."""
    to = To(None)
    async with joined_registry(CONFIG, tables) as first:
        to.registry = first
        client = client_of(to, endpoints=OLD)
        await client.set_status("alive")
        earlier = Earlier(tables)
        await client.set_status("draining", "a new disk")
        await client.set_endpoints({"http": "http://10.0.0.3:1"})
        moved = RegisterChange(client.registration, 4, is_update=True)
        assert to.taken[-1] == SequencedChange(moved, first.members.feed.stream)
    earlier.restore()
    async with joined_registry(CONFIG, tables) as second:
        to.registry, sent = second, len(to.taken)
        await client.set_endpoints(NEW)
        row = known(second, client)
        assert (row.status, row.endpoints, row.seq) == (Status.DRAINING, NEW, 5)
        assert tables.rows[client.instance_id].status is Status.DRAINING
        status = StatusChange(client.instance_id, Status.DRAINING, 3, Cause(CauseKind.AGENT, "a new disk"))
        stream = second.members.feed.stream
        assert to.taken[sent:] == [
            SequencedChange(RegisterChange(client.registration, 5, is_update=True), first.members.feed.stream),
            SequencedChange(status),
            SequencedChange(RegisterChange(client.registration, 5, is_update=True), stream),
        ]


async def test_a_status_brings_the_endpoints_that_the_database_has_lost(tables: Tables) -> None:
    to = To(None)
    async with joined_registry(CONFIG, tables) as first:
        to.registry = first
        client = client_of(to, endpoints=OLD)
        await client.set_status("alive")
        earlier = Earlier(tables)
        await client.set_endpoints(NEW)
    earlier.restore()
    async with joined_registry(CONFIG, tables) as second:
        to.registry = second
        await client.set_status("draining")
        row = known(second, client)
        assert (row.status, row.endpoints, row.seq) == (Status.DRAINING, NEW, 4)
        assert tables.rows[client.instance_id].endpoints == NEW
        sent = len(to.taken)
        await client.set_status("alive")
        assert len(to.taken) == sent + 1, "the registry that took the last change has those before it"


async def test_endpoints_that_an_sql_client_changes_reach_the_registry(registry: LocalRegistry, tables: Tables) -> None:
    by_sql = MemoryStore(lambda: START, tables)
    for endpoints in (OLD, NEW):
        await by_sql.register_many([RegisterChange(Registration(iid(1), "agent", endpoints=endpoints))])
        await eventually(partial(_has, registry, endpoints))


def _has(registry: LocalRegistry, endpoints: dict[str, str]) -> bool:
    row = registry.members.get(iid(1))
    return row is not None and row.endpoints == endpoints


async def test_memory_ahead_of_the_database_writes_its_endpoints_again(registry: LocalRegistry, tables: Tables) -> None:
    client = client_of(registry, endpoints=OLD)
    await client.set_status("alive")
    await client.set_endpoints(NEW)
    row = tables.rows[client.instance_id]
    # a row that a program has put back, which is no loss of commits
    tables.put(replace(row, endpoints=OLD, seq=2))
    await eventually(lambda: tables.rows[client.instance_id].endpoints == NEW)
    assert tables.rows[client.instance_id].seq == 3


async def test_endpoints_without_room_are_given_up_and_keep_nothing_behind_them(tables: Tables) -> None:
    many = {f"port-{number}": f"http://10.0.0.3/{'x' * 2000}" for number in range(16)}
    async with joined_registry(replace(CONFIG, max_instance_bytes=16 * 1024), tables) as registry:
        client = client_of(To(registry))
        await client.set_status("alive")
        with pytest.raises(RegistryFullError):
            await client.set_endpoints(many)
        assert client.registration.endpoints == {}
        assert client.pending == 0
        assert (await client.set_status("draining")).durable
        receipt = await client.set_endpoints(NEW)
        assert receipt is not None
        assert receipt.durable
        assert known(registry, client).endpoints == NEW
