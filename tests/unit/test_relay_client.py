"""A process calls the relay of its node, and the registry itself while the relay is silent."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from seedcore.core.answers import BeatAnswer, Receipt
from seedcore.core.changes import SequencedChange
from seedcore.core.clock import Clock
from seedcore.core.errors import (
    DirectoryUnavailableError,
    InstanceDeadError,
    RegistryError,
    RegistryReplacedError,
    RegistryUnavailableError,
)
from seedcore.core.lifecycle import Status
from seedcore.registry.node.relay import Relay
from seedcore.registry.protocol.connection import REGISTRY_NAME, ConnectionTimes, RegistryConnection
from seedcore.registry.protocol.messages import PROTOCOL, Hello
from seedcore.registry.protocol.relay_client import RelayTimes
from tests.builders import START, iid, joins
from tests.waiting import eventually

TIMES = ConnectionTimes(relay=RelayTimes(patience_s=0.05, rest_s=5.0, longest_rest_s=60.0))


class Actor:
    """Called like an actor's handle: its methods raise as Ray raises."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.is_hung = False
        self.is_dead = False
        self.calls: list[str] = []

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_") and method != "__ray_ready__":
            raise AttributeError(method)

        async def call(*arguments: Any, **details: Any) -> Any:
            self.calls.append(method)
            if self.is_dead:
                raise ActorDiedError
            if self.is_hung:
                await asyncio.Event().wait()
            if method == "__ray_ready__":
                return None
            try:
                return await getattr(self.inner, method)(*arguments, **details)
            except RegistryError as error:
                raise RayTaskError(method, "", error) from error

        class Method:
            remote = staticmethod(call)

        return Method

    def count(self, method: str) -> int:
        return self.calls.count(method)


class Registry:
    """The registry actor, as far as agents see it."""

    async def hello(self) -> Hello:
        return Hello(PROTOCOL, "test", 1, "node", START)

    def __init__(self) -> None:
        self.relay: str | None = "the-relay"
        self.error: RegistryError | None = None
        self.is_slow = asyncio.Event()
        self.is_slow.set()

    async def beat_many(self, instance_ids: Sequence[str], loads: Mapping[str, float] | None = None) -> BeatAnswer:
        if self.error is not None:
            raise self.error
        return BeatAnswer(relay=self.relay, beat_interval_s=0.4, dead=tuple(i for i in instance_ids if i == iid(9)))

    async def deliver(self, changes: Sequence[SequencedChange]) -> list[Receipt | RegistryError]:
        await self.is_slow.wait()
        if self.error is not None:
            raise self.error
        return [
            InstanceDeadError(change.change.instance_id, None)
            if change.change.instance_id == iid(9)
            else Receipt(change.change.instance_id, Status.STARTING, 1, durable=True)
            for change in changes
        ]


class World:
    """A registry, the relay of this node, and a process that calls them; `pass_s` moves its clock."""

    def __init__(self) -> None:
        self.inner = Registry()
        self.registry = Actor(self.inner)
        self.relay = Actor(Relay((), RegistryConnection("nowhere", 1.0, find=self.find), gather_s=0.001))
        self.named: list[str] = []
        self.is_directory_away = False
        self._now_s = 0.0
        self.connection = RegistryConnection(
            "nowhere", 1.0, by_relay=True, clock=Clock(lambda: self._now_s), times=TIMES, find=self.find
        )

    async def find(self, name: str, namespace: str, timeout_s: float) -> Any:
        if self.is_directory_away:
            raise DirectoryUnavailableError("for the test")
        if name == REGISTRY_NAME:
            return self.registry
        self.named.append(name)
        if name == "unknown":
            raise DirectoryUnavailableError("for the test")
        return self.relay if name == "the-relay" else None

    def was_looked_up(self, name: str, times: int) -> bool:
        return self.named.count(name) == times

    def pass_s(self, seconds: float) -> None:
        self._now_s += seconds

    async def use_relay(self) -> None:
        await self.connection.beat_many([iid(1)])
        await eventually(lambda: self.connection.uses_relay, every_s=0.001)


@pytest.fixture
def world(connected: None) -> World:
    return World()


async def test_the_relay_that_the_registry_names_gathers_from_then_on(world: World) -> None:
    await world.use_relay()
    assert (world.registry.count("beat_many"), world.relay.count("beat_many")) == (1, 0)
    answers = await asyncio.gather(*(world.connection.beat_many([iid(number)]) for number in (1, 2, 9)))
    assert [answer.dead for answer in answers] == [(), (), (iid(9),)]
    assert (world.registry.count("beat_many"), world.relay.count("beat_many")) == (2, 3)
    registered = await asyncio.gather(
        *(world.connection.register(joins(number).registration) for number in (1, 2, 9)), return_exceptions=True
    )
    assert [type(answer) for answer in registered] == [Receipt, Receipt, InstanceDeadError]
    # three callers, one message to the relay, one from there
    assert (world.relay.count("deliver"), world.registry.count("deliver")) == (1, 1)
    assert world.named == ["the-relay"]


@pytest.mark.parametrize("trouble", ["is_dead", "is_hung"])
async def test_while_the_relay_is_silent_the_registry_is_called_and_the_relay_rests_longer_each_time(
    world: World, trouble: str
) -> None:
    await world.use_relay()
    setattr(world.relay, trouble, True)
    assert (await world.connection.beat_many([iid(1)])).dead == ()
    assert not world.connection.uses_relay
    await world.connection.beat_many([iid(1)])
    assert world.named == ["the-relay"]
    world.pass_s(TIMES.relay.rest_s)
    assert world.connection.uses_relay
    assert (await world.connection.register(joins(1).registration)).durable
    # no more than a random share of two thirds is left out
    world.pass_s(TIMES.relay.rest_s * 2 / 3 - 0.1)
    assert not world.connection.uses_relay
    world.pass_s(2 * TIMES.relay.rest_s)
    setattr(world.relay, trouble, False)
    calls = world.relay.count("beat_many")
    await world.use_relay()
    assert world.relay.count("beat_many") == calls + 1


async def test_a_slow_database_is_waited_for_while_the_relay_itself_answers(world: World) -> None:
    await world.use_relay()
    world.inner.is_slow.clear()
    waiting = asyncio.create_task(world.connection.register(joins(1).registration))
    await eventually(lambda: world.relay.count("__ray_ready__"), every_s=0.001)
    world.inner.is_slow.set()
    assert (await waiting).durable
    assert world.registry.count("deliver") == 1


async def test_a_registry_that_is_away_is_asked_once_more_by_the_agent_itself(world: World) -> None:
    await world.use_relay()
    world.inner.error = RegistryUnavailableError("away for the test")
    with pytest.raises(RegistryUnavailableError, match="away for the test"):
        await world.connection.beat_many([iid(1)])
    assert world.registry.count("beat_many") == 3


async def test_a_relay_that_rests_is_called_where_the_registry_is_not_found(world: World) -> None:
    await world.use_relay()
    # another registry takes the name: the relay finds it, and this process does not before Ray's tables are away
    world.registry.is_dead = True
    world.registry = Actor(world.inner)
    await world.connection.beat_many([iid(1)])
    world.is_directory_away = world.relay.is_hung = True
    with pytest.raises(RegistryUnavailableError, match="for the test"):
        await world.connection.beat_many([iid(1)])
    assert not world.connection.uses_relay
    world.relay.is_hung = False
    calls = world.registry.count("beat_many")
    assert (await world.connection.beat_many([iid(1)])).dead == ()
    assert world.registry.count("beat_many") == calls + 1
    # it has answered
    assert world.connection.uses_relay


async def test_a_change_that_needs_the_registry_before_it_is_not_sent_to_another(world: World) -> None:
    await world.use_relay()
    world.inner.error = RegistryReplacedError("for the test")
    with pytest.raises(RegistryReplacedError):
        await world.connection.set_status(iid(1), Status.ALIVE, 2, None, after="the one before")
    # by the relay alone
    assert (world.relay.count("deliver"), world.registry.count("deliver")) == (1, 1)


async def test_a_relay_that_is_not_found_is_not_used_and_none_means_none(world: World) -> None:
    for name in ("gone", "unknown"):
        world.inner.relay = name
        await world.connection.beat_many([iid(1)])
        await eventually(partial(world.was_looked_up, name, 1), every_s=0.001)
        # it is named, and looked up, again
        await world.connection.beat_many([iid(1)])
        await eventually(partial(world.was_looked_up, name, 2), every_s=0.001)
        assert not world.connection.uses_relay
    world.inner.relay = "the-relay"
    await world.use_relay()
    world.relay.is_dead = True
    world.inner.relay = None
    await world.connection.beat_many([iid(1)])
    world.pass_s(10 * TIMES.relay.longest_rest_s)
    assert not world.connection.uses_relay


async def test_a_relay_that_only_watches_passes_nothing_on() -> None:
    relay = Relay(())
    with pytest.raises(RegistryUnavailableError, match="only watches"):
        await relay.beat_many([iid(1)])
    [answer] = await relay.deliver([SequencedChange(joins(1), None)])
    assert isinstance(answer, RegistryUnavailableError)
