"""One contract: the registry, its connection and the relay have the methods that it declares, and keep its rules."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from seedcore.core.answers import InstanceFilter
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import SequencedChange, StatusChange
from seedcore.core.errors import (
    InstanceDeadError,
    InvalidInputError,
    NotResolvableError,
    RegistryReplacedError,
    RegistryUnavailableError,
    StoreUnavailableError,
    UnknownInstanceError,
)
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.holds import HoldKind
from seedcore.core.lifecycle import Status
from seedcore.registry.node.relay import Relay
from seedcore.registry.protocol.api import Answered, RegistryApi, RelayApi, Repeats, rules_of
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.registry import Registry
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START, holds, iid, joins
from tests.local import LocalRegistry
from tests.unit.registries import joined_registry
from tests.unit.test_registry import NoWitness
from tests.unit.test_relay_client import Actor
from tests.waiting import eventually

EVERY = InstanceFilter(statuses=None)
UPKEEP = Cause(CauseKind.OPERATOR, "upkeep", "ada")
CONFIG = RegistryConfig("cluster", flush_interval_s=0.01, linger_s=0.0)

Method = Callable[..., Coroutine[Any, Any, Any]]


def implementations(
    registry: Registry, connection: RegistryConnection, relay: Relay
) -> tuple[RegistryApi, RegistryApi, RelayApi]:
    """Checked by mypy: these have every method of the contract, with its types."""
    return registry, connection, relay


def declared(api: type) -> dict[str, Method]:
    return {
        name: method
        for kind in api.__mro__
        for name, method in vars(kind).items()
        if inspect.iscoroutinefunction(method) and not name.startswith("_")
    }


def shape(method: Method) -> list[tuple[str, Any, Any]]:
    # where a test has made an actor of the class in this process, Ray has given its methods one more parameter
    parameters = [one for one in inspect.signature(method).parameters.values() if one.name != "_ray_trace_ctx"]
    return [(one.name, one.kind, one.default) for one in parameters]


def named(methods: dict[str, Method]) -> list[Any]:
    return [pytest.param(name, method, id=name) for name, method in methods.items()]


@pytest.mark.parametrize(("name", "method"), named(declared(RegistryApi)))
def test_registry_and_connection_have_each_method_of_the_contract_and_its_signature(name: str, method: Method) -> None:
    for kind in (Registry, RegistryConnection):
        has = getattr(kind, name)
        assert shape(has) == shape(method)
        assert inspect.signature(has).return_annotation == inspect.signature(method).return_annotation


@pytest.mark.parametrize(("name", "method"), named(declared(RelayApi)))
def test_relay_has_each_method_that_it_may_answer(name: str, method: Method) -> None:
    assert shape(getattr(Relay, name)) == shape(method)
    assert rules_of(method).by_relay


def test_registry_answers_nothing_that_the_contract_does_not_declare() -> None:
    public = declared(Registry).keys()
    # ends the actor; called by whatever owns it
    assert public - {"stop"} == declared(RegistryApi).keys()


@pytest.mark.parametrize(("name", "method"), named(declared(RegistryApi)))
def test_rules_of_a_method_fit_together(name: str, method: Method) -> None:
    rules = rules_of(method)
    assert rules.name == name
    # the relay passes on what agents send, and they wait for it as long as the registry asks
    assert rules.by_relay == rules.agent_bound
    # readers read: to repeat that changes nothing
    assert not rules.is_read or rules.repeats is Repeats.CONNECTION
    given = set(inspect.signature(method).parameters)
    for derived in (rules.waits_s, rules.reads_database):
        if derived is not None:
            kinds = inspect.signature(derived).parameters.values()
            assert {one.name for one in kinds if one.kind is one.POSITIONAL_OR_KEYWORD} <= given


def answered(how: Answered) -> list[str]:
    return [name for name, method in declared(RegistryApi).items() if rules_of(method).answered is how]


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "deliver": ([],),
    "beat_many": ([iid(1)],),
    "drain": (["agent-1"],),
    "undrain": (["agent-1"],),
    "deregister": (["agent-1"],),
    "report_dead_call": (iid(1),),
    "resolve": (["agent-1"],),
    "page": (EVERY,),
    "changes": (FeedQuestion(EVERY),),
    "get_instance": (iid(9),),
    "transitions": ("agent-1",),
    "describe": ("agent-1",),
    "set_current_epoch": ("epoch-2",),
    "stage_epoch": ("epoch-2",),
}


@pytest.fixture
async def registry() -> AsyncIterator[LocalRegistry]:
    async with joined_registry(CONFIG, Tables(START)) as registry:
        yield registry


@pytest.fixture
async def without_database() -> AsyncIterator[LocalRegistry]:
    """One whose database has never answered."""

    async def store() -> MemoryStore:
        raise StoreUnavailableError("away for the test")

    registry = LocalRegistry(RegistryConfig("cluster", durable_wait_s=0.05), store, watch_factory=NoWitness)
    registry.start()

    async def is_noticed() -> bool:
        return (await registry.health()).store_problem is not None

    await eventually(is_noticed)
    yield registry
    await registry.stop()


@pytest.mark.parametrize(
    "name", [n for n, m in declared(RegistryApi).items() if rules_of(m).answered is Answered.FROM_MEMORY]
)
async def test_what_is_answered_from_memory_needs_no_database(without_database: LocalRegistry, name: str) -> None:
    await asyncio.wait_for(getattr(without_database, name)(*ARGUMENTS.get(name, ())), 1.0)


@pytest.mark.parametrize(
    "name", [n for n, m in declared(RegistryApi).items() if rules_of(m).answered is Answered.FROM_DATABASE]
)
async def test_what_the_database_answers_is_refused_without_it(without_database: LocalRegistry, name: str) -> None:
    with pytest.raises(StoreUnavailableError):
        await getattr(without_database, name)(*ARGUMENTS.get(name, ()))


async def test_the_dead_are_listed_by_the_database_alone(without_database: LocalRegistry) -> None:
    reads = rules_of(RegistryApi.page).reads_database
    dead = InstanceFilter(statuses=frozenset({Status.DEAD}))
    assert reads is not None
    assert (reads(dead), reads(EVERY, 5), reads(wanted=dead)) == (True, False, True)
    with pytest.raises(StoreUnavailableError):
        await without_database.page(dead)


# Over a connection


class Counting:
    """Serves a registry, and counts the calls; hangs or dies on demand."""

    def __init__(self, inner: Registry) -> None:
        self.actors: list[Actor] = []
        self.inner = inner

    async def find(self, name: str, namespace: str, timeout_s: float) -> Actor:
        self.actors.append(Actor(self.inner))
        return self.actors[-1]


async def test_a_repeatable_call_goes_once_more_to_the_actor_that_replaced_the_first(
    connected: None, registry: LocalRegistry
) -> None:
    cluster = Counting(registry)
    async with RegistryConnection("nowhere", 1.0, find=cluster.find) as connection:
        assert (await connection.register(joins(1, "agent-1").registration)).durable
        cluster.actors[-1].is_dead = True
        assert [found.logical_id for found in (await connection.resolve(["agent-1"])).value] == ["agent-1"]
        assert len(cluster.actors) == 2
        # a registration needs nothing from before it
        cluster.actors[-1].is_dead = True
        assert (await connection.register(joins(2, "agent-1").registration)).durable
        # a status does, and an operator's call has no number
        for call, error in (
            (lambda: connection.set_status(iid(1), Status.ALIVE, 2), "."),
            (lambda: connection.drain(["agent-1"]), "may have been carried out"),
        ):
            await connection.health()
            cluster.actors[-1].is_dead = True
            with pytest.raises(RegistryReplacedError, match=error):
                await call()


@pytest.mark.parametrize(
    ("call", "is_silence"),
    [
        (lambda connection: connection.resolve(["a"]), True),
        (lambda connection: connection.health(), True),
        (lambda connection: connection.changes(FeedQuestion(EVERY, wait_s=0.01)), True),
        (lambda connection: connection.page(InstanceFilter(statuses=frozenset({Status.DEAD}))), False),
        (lambda connection: connection.describe("a"), False),
        (lambda connection: connection.deregister(["a"]), False),
    ],
)
async def test_after_silence_of_the_registry_itself_readers_fail_at_once(
    connected: None,
    registry: LocalRegistry,
    call: Callable[[RegistryConnection], Awaitable[object]],
    is_silence: bool,
) -> None:
    cluster = Counting(registry)
    async with RegistryConnection("nowhere", 0.05, find=cluster.find) as connection:
        await connection.health()
        [actor] = cluster.actors
        actor.is_hung = True
        with pytest.raises(RegistryUnavailableError, match="no answer to"):
            await call(connection)
        before = actor.count("resolve")
        with pytest.raises(RegistryUnavailableError, match="no answer to"):
            await connection.resolve(["a"])
        assert actor.count("resolve") == before + (not is_silence)


# Operators


async def test_operations_answer_for_each_instance(registry: LocalRegistry) -> None:
    for number in (1, 2):
        await registry.register(joins(number, "agent-1").registration)
    await registry.set_status(iid(1), Status.ALIVE, 2)
    drained = await registry.drain(["agent-1", "missing"], "upkeep", "ada", instance_ids=[iid(2), iid(9)])
    by_id = {result.instance_id: result for result in drained}
    assert by_id.keys() == {None, iid(1), iid(2), iid(9)}
    assert isinstance(by_id[None].error, NotResolvableError)
    assert by_id[None].logical_id == "missing"
    assert isinstance(by_id[iid(9)].error, UnknownInstanceError)
    for number in (1, 2):
        result = by_id[iid(number)]
        assert (result.logical_id, result.status, result.durable, result.error) == (
            "agent-1",
            Status.DRAINING,
            True,
            None,
        )
        assert result.raise_if_refused() is result
    transitions = await registry.transitions("agent-1", 1)
    assert (transitions[0].cause, transitions[0].hold) == (UPKEEP, HoldKind.OPERATOR)
    [gone] = await registry.deregister(instance_ids=[iid(1)])
    assert (gone.status, gone.durable) == (Status.DEAD, True)
    [refused] = await registry.drain(instance_ids=[iid(1)])
    with pytest.raises(InstanceDeadError):
        refused.raise_if_refused()


async def test_a_starting_instance_is_not_made_alive_by_an_operator(registry: LocalRegistry) -> None:
    await registry.register(joins(1, "agent-1").registration)
    for _ in range(2):
        await registry.drain(["agent-1"])
        for results in (await registry.undrain(["agent-1"]), await registry.undrain(instance_ids=[iid(1)])):
            [result] = results
            assert (result.status, result.durable, result.error) == (Status.STARTING, True, None)
            assert result.why == "the agent has not reported alive yet"


async def test_an_undrain_releases_the_operators_hold_and_not_what_the_agent_reports(registry: LocalRegistry) -> None:
    await registry.register(joins(1, "agent-1").registration)
    await registry.set_status(iid(1), Status.ALIVE, 2)
    await registry.drain(["agent-1"], "upkeep", "ada", duration_s=60.0)
    # what the agent reports under the hold does not end it
    for seq, status in enumerate((Status.DRAINING, Status.ALIVE, Status.DRAINING), 3):
        receipt = await registry.set_status(iid(1), status, seq)
        assert (receipt.status, receipt.durable) == (Status.DRAINING, True)
    row = (await registry.get_instance(iid(1))).value
    assert (row.reported_status, row.cause) == (Status.DRAINING, UPKEEP)
    held = row.hold(HoldKind.OPERATOR)
    assert held is not None
    assert (held.reason, held.by, held.expires_at) == ("upkeep", "ada", held.since + timedelta(seconds=60))
    [released] = await registry.undrain(["agent-1"], "done", "ada")
    assert (released.status, released.durable) == (Status.DRAINING, True)
    assert released.why == "the agent itself reports draining, until it reports alive"
    assert (await registry.get_instance(iid(1))).value.holds == ()
    await registry.set_status(iid(1), Status.ALIVE, 6)
    await registry.drain(["agent-1"])
    [released] = await registry.undrain(["agent-1"])
    assert (released.status, released.durable, released.why) == (Status.ALIVE, True, None)


async def test_a_hold_that_is_placed_again_is_committed_when_it_is_acknowledged(registry: LocalRegistry) -> None:
    await registry.register(joins(1, "agent-1").registration)
    for again in await asyncio.gather(*(registry.drain(["agent-1"], "upkeep") for _ in range(3))):
        assert [(result.status, result.durable, result.why) for result in again] == [(Status.DRAINING, True, None)]
    assert len(await registry.transitions("agent-1")) == 2
    # with another reason, or another end, it is another hold
    await registry.drain(["agent-1"], "repair")
    await registry.drain(["agent-1"], "repair", duration_s=5.0)
    assert [step.cause and step.cause.detail for step in await registry.transitions("agent-1")] == [
        "repair",
        "repair",
        "upkeep",
        None,
    ]


async def test_an_operators_hold_is_placed_by_operations_alone(registry: LocalRegistry) -> None:
    await registry.register(joins(1, "agent-1").registration)
    for seq in (None, 7):
        with pytest.raises(InvalidInputError, match="must be one that an agent changes"):
            await registry.take(SequencedChange(replace(holds(1), seq=seq)))
    assert registry.members.index.by_id[iid(1)].holds == ()
    for refused in ({"reason": "x" * 513}, {"reason": "a\nb"}, {"by": "x" * 256}, {"by": ""}, {"duration_s": 0}):
        arguments: Any = refused
        with pytest.raises(InvalidInputError):
            await registry.drain(["agent-1"], **arguments)


async def test_a_change_without_its_agents_number_is_refused(registry: LocalRegistry) -> None:
    await registry.register(joins(1, "agent-1").registration)
    with pytest.raises(InvalidInputError, match="number"):
        await registry.take(SequencedChange(StatusChange(iid(1), Status.ALIVE)))
