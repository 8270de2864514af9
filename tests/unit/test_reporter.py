"""An agent's side of the registry: client and reporter, with a registry over the memory store in this process."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from seedcore.core.answers import Receipt
from seedcore.core.changes import SequencedChange, StatusChange
from seedcore.core.errors import (
    InstanceDeadError,
    InvalidInputError,
    NotDurableError,
    RegistrationDelayedError,
    RegistryUnavailableError,
    RetiredEpochError,
    StoreUnavailableError,
)
from seedcore.core.lifecycle import Status
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.identity import Identity, ProcessEpoch, identify, note_process_epoch
from seedcore.registry.agent.outages import Outages
from seedcore.registry.agent.pulse import Pulse
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.agent.thread_reporter import ThreadReporter
from seedcore.registry.server.config import RegistryConfig
from seedcore.settings import Settings, get_settings
from seedcore.store.memory import MemoryStore, Tables
from seedcore.tier0.creation import prepared
from tests.builders import START
from tests.local import LocalRegistry as Registry
from tests.loops import another_loop
from tests.unit.registries import joined_registry
from tests.unit.test_registry import Closed, NoWitness
from tests.waiting import eventually

SETTINGS = Settings(beat_interval_s=0.1, namespace="nowhere")
CONFIG = RegistryConfig(
    "cluster",
    flush_interval_s=0.01,
    linger_s=0.0,
    durable_wait_s=10.0,
    beat_interval_s=0.05,
    epoch_check_s=0.1,
)


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    """One that has joined its store."""
    async with joined_registry(CONFIG, Tables(START)) as registry:
        yield registry


@pytest.fixture
async def without_database() -> AsyncIterator[Registry]:
    """One whose database is away."""

    async def store() -> MemoryStore:
        raise StoreUnavailableError("away for the test")

    registry = Registry(CONFIG, store, watch_factory=NoWitness)
    registry.start()

    async def is_noticed() -> bool:
        return "away for the test" in str((await registry.health()).store_problem)

    await eventually(is_noticed)
    yield registry
    await registry.stop()


def make_client(registry: Registry, logical_id: str = "agent", **details: Any) -> RegistryClient:
    connection: Any = registry
    return RegistryClient(logical_id, settings=SETTINGS, connection=connection, **details)


def make_reporter(registry: Registry, **details: Any) -> Reporter:
    client = make_client(registry, **details)
    return Reporter(client.logical_id, settings=SETTINGS, client=client)


def slow(gate: asyncio.Event) -> Callable[..., Awaitable[Identity]]:
    """An identity that is only known once the gate opens."""

    async def known_later(actor_name: str | None, namespace: str, timeout_s: float) -> Identity:
        await gate.wait()
        return await identify(actor_name, namespace, timeout_s)

    return known_later


class Turns:
    """A connection to one registry after the other: the next one after each status change."""

    def __init__(self, *registries: Registry) -> None:
        self.registries = list(registries)
        self.taken: list[tuple[Registry, Status]] = []

    async def take(self, change: SequencedChange) -> Receipt:
        registry = self.registries[0]
        receipt = await registry.take(change)
        if isinstance(change.change, StatusChange):
            self.taken.append((registry, change.change.status))
            if len(self.registries) > 1:
                self.registries.pop(0)
        return receipt


class Switched:
    """A connection to one registry, and later to another."""

    def __init__(self, to: Registry) -> None:
        self.to = to

    def __getattr__(self, method: str) -> Any:
        return getattr(self.to, method)


async def others_turn() -> None:
    """Let every task go on that can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def statuses(registry: Registry, logical_id: str = "agent") -> list[Status]:
    return [row.instance.status for row in (await registry.describe(logical_id)).live]


# The reporter


async def test_a_cancelled_start_can_be_repeated_and_then_reports(registry: Registry) -> None:
    reporter = make_reporter(registry)
    starting = asyncio.create_task(reporter.start())
    for _ in range(2):
        await asyncio.sleep(0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await reporter.start()
    assert await statuses(registry) == [Status.ALIVE]

    async def has_beaten() -> bool:
        return (await registry.health()).flush.beats_offered > 0

    await eventually(has_beaten)
    await reporter.stop()
    assert await statuses(registry) == []


async def test_a_cancelled_start_that_had_registered_is_ended_by_stop(registry: Registry) -> None:
    reporter = make_reporter(registry)
    starting = asyncio.create_task(reporter.start())
    await eventually(lambda: statuses(registry))
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await reporter.stop("never began")
    assert await statuses(registry) == []


async def test_who_starts_while_it_starts_waits_for_the_same(registry: Registry) -> None:
    gate = asyncio.Event()
    reporter = make_reporter(registry, identifier=slow(gate))
    starts = [asyncio.create_task(reporter.start()) for _ in range(3)]
    await others_turn()
    assert not any(start.done() for start in starts)
    gate.set()
    await asyncio.gather(*starts)
    assert await statuses(registry) == [Status.ALIVE]
    await reporter.stop()


async def test_one_cancelled_starter_does_not_undo_the_others(registry: Registry) -> None:
    gate = asyncio.Event()
    reporter = make_reporter(registry, identifier=slow(gate))
    starts = [asyncio.create_task(reporter.start()) for _ in range(3)]
    await others_turn()
    starts[0].cancel()
    starts[2].cancel()
    gate.set()
    await asyncio.wait(starts)
    assert [start.cancelled() for start in starts] == [True, False, True]
    assert await statuses(registry) == [Status.ALIVE]
    assert (await reporter.drain()) is not None
    await reporter.stop()


async def test_stop_while_it_starts_leaves_no_instance_alive(registry: Registry) -> None:
    gate = asyncio.Event()
    reporter = make_reporter(registry, identifier=slow(gate))
    starting = asyncio.create_task(reporter.start())
    await others_turn()
    stopping = asyncio.create_task(reporter.stop())
    await others_turn()
    gate.set()
    await asyncio.gather(starting, stopping)
    assert await statuses(registry) == []
    assert reporter.client.status is Status.DEAD


async def test_a_refused_start_has_not_started_and_raises_again(registry: Registry) -> None:
    for epoch in ("one", "two"):
        await registry.set_current_epoch(epoch)
    reporter = make_reporter(registry, cluster_epoch="one")
    for _ in range(2):
        with pytest.raises(RetiredEpochError):
            await reporter.start()
    assert await reporter.drain() is None
    assert await reporter.stop() is None


async def test_a_stopped_reporter_does_not_start_again(registry: Registry) -> None:
    reporter = make_reporter(registry)
    await reporter.start()
    await reporter.stop()
    with pytest.raises(InstanceDeadError):
        await reporter.start()
    assert await statuses(registry) == []
    assert await reporter.stop() is None


async def test_a_cause_beyond_its_limits_stops_nothing(registry: Registry) -> None:
    reporter = make_reporter(registry)
    await reporter.start()
    with pytest.raises(InvalidInputError, match="reason"):
        await reporter.stop("x" * 2000)
    assert await statuses(registry) == [Status.ALIVE]
    assert (await reporter.drain("still here")) is not None
    await reporter.stop()


# The client


@pytest.mark.parametrize("again", ["alive", "draining", "starting"])
async def test_an_agent_that_reported_dead_itself_never_comes_back(registry: Registry, again: str) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    instance_id = client.instance_id
    await client.set_status("dead", "enough")
    before = (await registry.health()).flush.changes_committed
    with pytest.raises(InstanceDeadError, match="enough"):
        await client.set_status(again)
    with pytest.raises(InstanceDeadError, match="enough"):
        await client.register()
    await client.beat()
    assert (client.instance_id, client.status, client.pending) == (instance_id, Status.DEAD, 0)
    assert (await registry.health()).flush.changes_committed == before
    assert await statuses(registry) == []


async def test_an_instance_declared_dead_comes_back_as_a_new_one(registry: Registry) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    first = client.instance_id
    await declare_dead(registry, first)
    receipt = await client.set_status("draining")
    assert receipt.durable
    assert client.instance_id != first
    assert await statuses(registry) == [Status.DRAINING]


async def declare_dead(registry: Registry, instance_id: str) -> None:
    [result] = await registry.deregister(instance_ids=[instance_id])
    result.raise_if_refused()


async def test_an_agent_declared_dead_several_times_in_a_row_waits_before_it_comes_back(registry: Registry) -> None:
    reporter = make_reporter(registry)
    client = reporter.client
    await reporter.start()
    ids = [client.instance_id]
    # at once after the first death, and not after the next ones
    for _ in range(2):
        await declare_dead(registry, client.instance_id)
        with suppress(RegistrationDelayedError):
            await client.beat()
        ids.append(client.instance_id)
    assert (await registry.beat(ids[1])).dead == (ids[1],)
    taken = (await registry.health()).flush.changes_committed
    for _ in range(5):
        with pytest.raises(RegistrationDelayedError, match="2 times in a row, so it registers again in"):
            await client.beat()
    receipt = await client.set_status(Status.DRAINING)
    assert (receipt.durable, "2 times in a row" in str(receipt.why)) == (False, True)
    assert (await registry.health()).flush.changes_committed == taken
    assert client.instance_id == ids[2]
    await eventually(lambda: reporter.problem is not None)

    async def is_back() -> bool:
        rows = (await registry.describe("agent")).live
        return [(row.instance.instance_id, row.instance.status) for row in rows] == [(ids[2], Status.DRAINING)]

    await eventually(is_back, within_s=5)
    await reporter.stop()


async def test_an_agent_that_stops_in_the_pause_before_a_comeback_does_not_register_again(registry: Registry) -> None:
    reporter = make_reporter(registry)
    await reporter.start()
    for _ in range(2):
        await declare_dead(registry, reporter.client.instance_id)
        with suppress(RegistrationDelayedError):
            await reporter.client.beat()
    receipt = await reporter.stop()
    assert receipt is not None
    assert (receipt.durable, reporter.client.pending) == (True, 0)
    assert len((await registry.describe("agent")).instances) == 2


async def test_dead_repeated_is_not_called_durable_before_it_is(without_database: Registry) -> None:
    client = make_client(without_database)
    await client.set_status("alive")
    for _ in range(3):
        receipt = await client.set_status("dead", "enough")
        assert (receipt.status, receipt.durable) == (Status.DEAD, False)
    assert client.pending == 2


async def test_a_change_after_a_first_beat_is_not_taken_for_a_replay(registry: Registry) -> None:
    client = make_client(registry)
    await client.beat()
    assert await statuses(registry) == [Status.STARTING]
    receipt = await client.set_status("alive")
    assert (receipt.status, receipt.durable) == (Status.ALIVE, True)
    assert await statuses(registry) == [Status.ALIVE]


async def test_a_repeated_registration_returns_number_and_epoch(registry: Registry) -> None:
    client = make_client(registry)
    first = await client.register()
    # without another call to the registry
    assert await client.register() == replace(first, registry=None)
    await client.set_status("alive")
    again = await client.register()
    assert (again.seq, again.durable, again.status) == (2, True, Status.ALIVE)
    assert again.epoch == first.epoch == (await registry.current_epoch()).value.name


@pytest.mark.parametrize(
    ("details", "field"),
    [
        ({"labels": ["k"]}, "labels"),
        ({"labels": "k"}, "labels"),
        ({"metadata": ["m"]}, "metadata"),
        ({"metadata": 7}, "metadata"),
        ({"actor_name": "seedcore-registry"}, "actor_name"),
        ({"logical_id": "seedcore-registry"}, "logical_id"),
    ],
)
async def test_a_client_names_the_field_that_it_refuses(details: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        RegistryClient(**{"logical_id": "agent", "settings": SETTINGS, **details})
    assert refused.value.field == field


async def test_a_registered_label_does_not_change_with_the_callers_own(registry: Registry) -> None:
    labels = {"tier": "hot"}
    client = make_client(registry, labels=labels)
    labels["tier"] = "cold"
    await client.register()
    assert (await registry.describe("agent")).live[0].instance.labels == {"tier": "hot"}


# The reporter on a thread beside the caller's

UNREPORTED = SETTINGS.model_copy(update={"registry_enabled": False})


def reporter_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "seedcore-loop"]


def test_a_wrong_option_is_refused_before_there_is_a_thread() -> None:
    with pytest.raises(TypeError, match="bogus"):
        ThreadReporter("wrong", bogus=1)  # type: ignore[call-arg]
    with pytest.raises(InvalidInputError):
        ThreadReporter("wrong", settings=UNREPORTED, labels=["k"])  # type: ignore[arg-type]
    assert reporter_threads() == []


def test_starts_and_stops_of_many_threads_make_one_thread_and_end_it() -> None:
    reporter = ThreadReporter("shared", settings=UNREPORTED)
    for step, threads_left in ((reporter.start, 1), (reporter.stop, 0), (reporter.start, 1), (reporter.stop, 0)):
        raised: list[BaseException] = []

        def call(step: Callable[[], object] = step, raised: list[BaseException] = raised) -> None:
            try:
                step()
            except Exception as error:  # noqa: BLE001 - shown below, whatever it is
                raised.append(error)

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(10)
        assert raised == []
        assert not any(caller.is_alive() for caller in callers)
        assert len(reporter_threads()) == threads_left


def test_a_thread_reporter_has_every_step_of_a_reporter() -> None:
    reporter = ThreadReporter("steps", settings=UNREPORTED)
    assert (reporter.drain(), reporter.undrain(), reporter.stop()) == (None, None, None)
    reporter.start()
    assert reporter.reporter is not None
    assert (reporter.drain(), reporter.undrain("again")) == (None, None)
    with pytest.raises(InvalidInputError):
        reporter.stop("x" * 2000)
    assert len(reporter_threads()) == 1
    reporter.stop()
    assert reporter_threads() == []


async def test_a_refused_registration_is_refused_again_and_never_called_durable(registry: Registry) -> None:
    for epoch in ("one", "two"):
        await registry.set_current_epoch(epoch)
    client = make_client(registry, cluster_epoch="one")
    for _ in range(3):
        with pytest.raises(RetiredEpochError):
            await client.register()
        assert client.status is None
    with pytest.raises(RetiredEpochError):
        await client.beat()
    with pytest.raises(RetiredEpochError):
        await client.register()


async def test_an_agent_that_ended_with_its_epoch_is_refused_however_often_it_registers(registry: Registry) -> None:
    await registry.set_current_epoch("one")
    client = make_client(registry, cluster_epoch="one")
    assert (await client.set_status(Status.ALIVE)).durable
    await registry.set_current_epoch("two")

    async def is_ended() -> bool:
        return bool((await registry.beat(client.instance_id)).dead)

    await eventually(is_ended)
    with pytest.raises(RetiredEpochError):
        await client.beat()
    for _ in range(2):
        with pytest.raises(RetiredEpochError):
            await client.register()


async def test_what_a_client_repeats_keeps_its_number(registry: Registry) -> None:
    connection: Any = Switched(registry)
    client = make_client(connection)
    await client.set_status(Status.ALIVE)
    sent = (await client.set_status(Status.DRAINING)).seq
    async with joined_registry(CONFIG, Tables(START)) as elsewhere:
        # it does not know the instance: the client registers again, and repeats its last status
        connection.to = elsewhere
        await client.beat()
        [row] = (await elsewhere.describe("agent")).live
        assert (row.instance.reported_status, row.instance.seq) == (Status.DRAINING, sent)


async def test_a_registry_restarted_between_two_changes_gets_both_again(
    registry: Registry, without_database: Registry
) -> None:
    connection: Any = Turns(without_database, registry)
    client = make_client(connection)
    await client.register()
    await registry.register(client.registration)
    # the one without a database takes the first change and is gone before the second, which is durable
    await client.set_status(Status.ALIVE)
    connection.registries = [without_database, registry]
    receipt = await client.set_status(Status.DRAINING)
    assert receipt.durable
    assert client.pending == 0
    assert [status for heard_by, status in connection.taken if heard_by is registry] == [Status.ALIVE, Status.DRAINING]


async def test_what_ray_did_not_know_at_the_registration_is_sent_with_a_later_beat(registry: Registry) -> None:
    known = Identity(None, None, None, None, None, 7, None)

    async def identify_as_known(actor_name: str | None, namespace: str, timeout_s: float) -> Identity:
        return known

    client = make_client(registry, identifier=identify_as_known)
    await client.register()
    await client.set_status(Status.ALIVE)
    await client.beat()
    known = Identity("actor", "ab", "ns", "node", "127.0.0.1", 7, "key")

    async def is_sent() -> bool:
        await client.beat()
        [row] = (await registry.describe("agent")).live
        return row.instance.node_id == "node"

    await eventually(is_sent)
    [row] = (await registry.describe("agent")).live
    assert (row.instance.actor_name, row.instance.namespace, row.instance.status) == ("actor", "ns", Status.ALIVE)
    await client.set_status(Status.DRAINING)
    assert client.pending == 0
    assert await statuses(registry) == [Status.DRAINING]


async def test_a_registry_that_recovers_without_the_instance_gets_its_status_too(registry: Registry) -> None:
    identities = [Identity(None, None, None, None, None, 7, None)]

    async def next_identity(actor_name: str | None, namespace: str, timeout_s: float) -> Identity:
        # more each time, until it is complete
        identities.append(Identity("actor", "ab", "ns", "node", "127.0.0.1", 7, "key"))
        return identities[len(identities) - 2]

    database = Closed(lambda: START, Tables(START))

    async def store() -> MemoryStore:
        return database

    connection: Any = Switched(registry)
    client = make_client(connection, identifier=next_identity)
    await client.set_status(Status.ALIVE)
    elsewhere = Registry(CONFIG, store, watch_factory=NoWitness)
    elsewhere.start()
    connection.to = elsewhere

    async def is_complete() -> bool:
        assert (await client.beat()).is_recovering
        return len(identities) > 2

    await eventually(is_complete)
    database.is_open.set()

    async def is_alive() -> bool:
        await client.beat()
        rows = (await elsewhere.describe("agent")).live
        return [(row.instance.node_id, row.instance.status) for row in rows] == [("node", Status.ALIVE)]

    await eventually(is_alive)
    await elsewhere.stop()


def test_a_blocking_reporter_has_the_load_of_its_reporter() -> None:
    reporter = ThreadReporter("loaded", settings=UNREPORTED)
    assert reporter.load is None
    reporter.load = 0.5
    for wrong in ("x", float("nan"), -1.0):
        with pytest.raises(InvalidInputError, match="load"):
            reporter.load = wrong  # type: ignore[assignment]
    for _ in range(2):
        with reporter:
            assert reporter.reporter is not None
            assert reporter.reporter.load == reporter.load
            reporter.load = 0.7
            assert reporter.reporter.load == 0.7


def test_reporters_of_a_process_share_a_thread_that_ends_with_the_last() -> None:
    reporters = [ThreadReporter(f"agent-{number}", settings=UNREPORTED) for number in range(5)]
    for reporter in reporters:
        reporter.start()
    assert len(reporter_threads()) == 1
    for reporter in reporters[1:]:
        reporter.stop()
    assert len(reporter_threads()) == 1
    reporters[0].stop()
    assert reporter_threads() == []
    reporters[0].start()
    assert len(reporter_threads()) == 1
    reporters[0].stop()
    assert reporter_threads() == []


# Epochs


async def is_known_dead(registry: Registry, instance_id: str) -> bool:
    return bool((await registry.beat(instance_id)).dead)


async def epochs_of(registry: Registry, logical_id: str = "agent") -> list[tuple[str, Status]]:
    return [(row.cluster_epoch, row.status) for row in (await registry.describe(logical_id)).instances]


async def test_an_agent_without_an_epoch_of_its_own_does_not_come_back_in_another(registry: Registry) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    await registry.set_current_epoch("green")
    await eventually(lambda: is_known_dead(registry, client.instance_id))
    for call in (client.beat, client.register, partial(client.set_status, "draining"), client.beat):
        with pytest.raises(RetiredEpochError) as refused:
            await call()
        assert refused.value.epoch == "epoch-1"
    assert await epochs_of(registry) == [("epoch-1", Status.DEAD)]
    # another that is made on purpose may be of the new one; and to stop remains possible
    assert (await client.set_status("dead")).durable
    assert (await make_client(registry).set_status("alive")).epoch == "green"


async def test_one_that_was_declared_dead_before_the_flip_is_refused_after_it(registry: Registry) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    await declare_dead(registry, client.instance_id)
    await registry.set_current_epoch("green")
    with pytest.raises(RetiredEpochError):
        await client.beat()
    assert await epochs_of(registry) == [("epoch-1", Status.DEAD)]


async def test_a_registry_that_was_restarted_after_the_flip_refuses_it_too() -> None:
    tables = Tables(START)
    async with joined_registry(CONFIG, tables) as first:
        connection: Any = Switched(first)
        client = make_client(connection)
        await client.set_status("alive")
    await MemoryStore(lambda: START, tables).set_current_epoch("green")
    # it knows nothing of what ended with the epoch
    async with joined_registry(CONFIG, tables) as second:
        assert (await second.beat(client.instance_id)).unknown == (client.instance_id,)
        connection.to = second
        with pytest.raises(RetiredEpochError):
            await client.beat()
    assert {row.cluster_epoch for row in tables.rows.values()} == {"epoch-1"}


async def test_agents_that_live_go_on_when_a_registry_takes_the_database_over() -> None:
    tables = Tables(START)
    async with joined_registry(CONFIG, tables) as first:
        connection: Any = Switched(first)
        client = make_client(connection)
        insisting = make_client(connection, "insisting", cluster_epoch="epoch-1")
        for one in (client, insisting):
            await one.set_status("alive")
        async with joined_registry(replace(CONFIG, ray_cluster="another"), tables) as second:
            connection.to = second
            await client.beat()
            with pytest.raises(RetiredEpochError):
                await insisting.beat()
            assert set(await epochs_of(second)) == {("epoch-1", Status.DEAD), ("epoch-2", Status.ALIVE)}
            # and from now on it is of that one
            await second.set_current_epoch("green")
            await eventually(lambda: is_known_dead(second, client.instance_id))
            with pytest.raises(RetiredEpochError):
                await client.beat()


async def test_a_reporter_of_a_retired_epoch_stops_and_calls_its_hook_once(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    retired: list[str] = []

    def note(epoch: str) -> None:
        retired.append(epoch)
        raise ValueError("the hook has a fault")

    client = make_client(registry)
    reporter = Reporter("agent", settings=SETTINGS, client=client, on_retired=note)
    await reporter.start()
    await registry.set_current_epoch("green")
    await eventually(lambda: retired)
    assert reporter.client.status is Status.ALIVE
    assert reporter.retired_epoch == "epoch-1"
    assert "retired" in str(reporter.problem)
    assert "the hook has a fault" in caplog.text
    assert await reporter.drain() is None
    with pytest.raises(RetiredEpochError):
        await reporter.start()
    receipt = await reporter.stop()
    assert receipt is not None
    assert receipt.durable
    assert retired == ["epoch-1"]
    assert await epochs_of(registry) == [("epoch-1", Status.DEAD)]


async def test_a_change_of_status_after_the_flip_retires_the_reporter() -> None:
    retired: list[str] = []
    # no beat comes first
    async with joined_registry(replace(CONFIG, beat_interval_s=600.0, lease_s=1800.0), Tables(START)) as registry:
        client = make_client(registry)
        reporter = Reporter("agent", settings=SETTINGS, client=client, on_retired=retired.append)
        await reporter.start()
        await registry.set_current_epoch("green")
        await eventually(lambda: is_known_dead(registry, client.instance_id))
        with pytest.raises(RetiredEpochError):
            await reporter.drain()
        assert retired == ["epoch-1"]


async def test_an_actors_process_belongs_to_the_epoch_that_its_maker_named(registry: Registry) -> None:
    class Agent:
        """What it is."""

        def __init__(self, agent_id: str, *, organ: str = "") -> None:
            self.client = make_client(registry, agent_id)

    own = get_settings().namespace
    try:
        for is_insisted in (False, True):
            made = prepared(Agent, own, ProcessEpoch("green", is_insisted))
            assert inspect.signature(made) == inspect.signature(Agent)
            assert (made.__name__, made.__qualname__, made.__doc__) == ("Agent", Agent.__qualname__, "What it is.")
            registration = made(f"agent-{is_insisted}", organ="vision").client.registration
            assert registration.cluster_epoch == ("green" if is_insisted else None)
            assert registration.started_epoch == (None if is_insisted else "green")
        # what an agent names itself takes precedence
        assert make_client(registry, cluster_epoch="own").registration.cluster_epoch == "own"
    finally:
        note_process_epoch(None)


# What the registry decides


class Away:
    """A connection to a registry that is away while `is_away`."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.is_away = True

    def __getattr__(self, method: str) -> Any:
        if self.is_away:
            raise RegistryUnavailableError("away for the test")
        return getattr(self.registry, method)


SELDOM = SETTINGS.model_copy(update={"beat_interval_s": 3600.0})


async def beats_of(registry: Registry) -> int:
    return (await registry.health()).flush.beats_offered


async def test_the_first_beat_comes_at_the_pace_of_the_registry(registry: Registry) -> None:
    client = make_client(registry)
    reporter = Reporter("agent", settings=SELDOM, client=client)
    await reporter.start()
    assert client.beat_interval_s == CONFIG.beat_interval_s

    async def has_beaten() -> bool:
        return await beats_of(registry) > 0

    await eventually(has_beaten)
    await reporter.stop()


async def test_every_receipt_names_the_interval_and_the_lease(registry: Registry, without_database: Registry) -> None:
    for each in (registry, without_database):
        client = make_client(each)
        for receipt in (await client.register(), await client.register(), await client.set_status("alive")):
            assert (receipt.beat_interval_s, receipt.lease_s) == (CONFIG.beat_interval_s, CONFIG.lease_s)


async def test_an_agent_that_has_no_answer_yet_retries_soon_whatever_its_environment(registry: Registry) -> None:
    connection: Any = Away(registry)
    client = RegistryClient("agent", settings=SELDOM, connection=connection)
    reporter = Reporter("agent", settings=SELDOM, client=client)
    await reporter.start()
    pulse = Pulse(client, lambda _: None)
    pauses = [pulse.pause_s]
    for _ in range(10):
        pulse.take_failure(RegistryUnavailableError("away"))
        pauses.append(pulse.pause_s)
    assert pauses == sorted(pauses)
    assert pauses[-1] == client.beat_interval_s <= 5.0
    connection.is_away = False

    async def is_registered() -> bool:
        return await statuses(registry) == [Status.ALIVE]

    await eventually(is_registered)
    await reporter.stop()


# In few lines


def lines(caplog: pytest.LogCaptureFixture, words: str, level: int = logging.INFO) -> list[str]:
    return [row.getMessage() for row in caplog.records if row.levelno >= level and words in row.getMessage()]


async def test_an_outage_of_the_registry_is_one_line_for_all_agents_and_so_is_its_end(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "seedcore")

    def has_ended(times: int) -> bool:
        return len(lines(caplog, "reported again")) == times

    connection: Any = Away(registry)
    outages = Outages()
    reporters = [make_reporter(connection, logical_id=f"agent-{number}", outages=outages) for number in range(20)]
    for outage in (1, 2):
        connection.is_away = True
        await asyncio.gather(*(reporter.start() for reporter in reporters))
        await eventually(lambda: all(reporter.problem is not None for reporter in reporters))
        await eventually(lambda: outages.unreported.concerned >= 20)
        assert len(lines(caplog, "not reported, will try again", logging.WARNING)) == outage
        connection.is_away = False
        await eventually(partial(has_ended, outage))
    first, second = lines(caplog, "not reported")
    assert "away for the test" in first
    # in the second outage all are known from its first moment
    assert "agents of this process: 20" in second
    assert all("agents of this process: 20" in line for line in lines(caplog, "reported again"))
    await asyncio.gather(*(reporter.stop() for reporter in reporters))


async def test_agents_that_register_again_are_counted_and_not_listed(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "seedcore")
    outages = Outages(burst_s=0.3)
    clients = [make_client(registry, f"agent-{number}", outages=outages) for number in range(20)]
    await asyncio.gather(*(client.beat() for client in clients))
    await eventually(lambda: lines(caplog, "19 more instances"))
    assert len(lines(caplog, "; registering again")) == 1
    assert (await registry.health()).instances["starting"] == 20


async def test_changes_that_are_not_durable_are_one_warning_and_can_be_insisted_on(
    without_database: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    outages = Outages()
    clients = [make_client(without_database, f"agent-{number}", outages=outages) for number in range(5)]
    for client in clients:
        await client.register()
        receipt = await client.set_status("alive")
        with pytest.raises(NotDurableError, match="away for the test"):
            receipt.raise_unless_durable()
    assert len(lines(caplog, "not durable", logging.WARNING)) == 1
    assert lines(caplog, "not reported") == []


async def test_a_durable_receipt_is_returned_by_what_insists_on_it(registry: Registry) -> None:
    receipt = await make_client(registry).register()
    assert receipt.raise_unless_durable() is receipt


# From several event loops


async def test_a_reporter_started_in_one_loop_is_drained_and_stopped_from_another(registry: Registry) -> None:
    connection: Any = Away(registry)
    reporter = make_reporter(connection)
    await reporter.start()
    with another_loop() as other:
        await asyncio.gather(other.run(reporter.drain()), *(reporter.undrain() for _ in range(3)))
        assert reporter.client.pending == 5
        await other.run(reporter.stop())
    await eventually(lambda: not reporter.is_beating)


async def test_a_reporter_whose_loop_has_ended_beats_in_the_next_that_uses_it(registry: Registry) -> None:
    connection: Any = Away(registry)
    reporter = make_reporter(connection)
    with another_loop() as other:
        await other.run(reporter.start())
    connection.is_away = False
    await reporter.start()

    async def has_beaten() -> bool:
        return await beats_of(registry) > 0

    await eventually(has_beaten)
    assert await statuses(registry) == [Status.ALIVE]
    await reporter.stop()


# In `with` blocks


async def test_a_reporter_and_a_client_report_for_the_time_of_their_block(registry: Registry) -> None:
    async with make_reporter(registry) as reporter:
        assert await statuses(registry) == [Status.ALIVE]
        assert reporter.is_beating
    assert not reporter.is_reporting
    async with make_client(registry) as client:
        assert await statuses(registry) == [Status.STARTING]
    assert client.status is Status.DEAD
    with pytest.raises(KeyError):
        async with make_reporter(registry):
            raise KeyError
    assert any("KeyError" in str(row.cause) for row in (await registry.describe("agent")).instances)
    assert await statuses(registry) == []


def test_a_thread_reporter_takes_what_a_reporter_takes_and_runs_for_the_time_of_its_block() -> None:
    given = dict(inspect.signature(Reporter).parameters)
    del given["client"]
    assert dict(inspect.signature(ThreadReporter).parameters) == given
    with ThreadReporter("blocking", settings=UNREPORTED) as reporter:
        assert reporter.reporter is not None
        assert len(reporter_threads()) == 1
    assert reporter_threads() == []
