"""Picks: the instances of an agent are chosen in memory, and only routable ones."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from seedcore.core.answers import Origin
from seedcore.core.changes import Registration
from seedcore.core.errors import InvalidInputError, NotResolvableError, RegistryUnavailableError
from seedcore.core.lifecycle import Status
from seedcore.core.selection import Policy
from seedcore.registry.caller.fallback_sources import RayListing
from seedcore.registry.caller.handle_cache import HandleCache
from seedcore.registry.caller.live_sources import RegistrySource, SnapshotSource
from seedcore.registry.caller.locator import Locator
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.registry.caller.picks import Outstanding, Picks
from seedcore.registry.caller.resolver import Resolver
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.times import FollowTimes
from seedcore.store.memory import Tables
from tests.builders import START, iid
from tests.local import LocalRegistry as Registry
from tests.unit.callers import CONFIG, Actors, Plain
from tests.unit.registries import joined_registry
from tests.waiting import eventually

REPLICAS = range(1, 5)


@dataclass
class World:
    """A registry with an agent of four instances, and a caller. `looked_up`: how often Ray's table was asked."""

    registry: Registry
    connection: Any
    actors: Actors
    follower: Follower
    locator: Locator
    picks: Picks
    looked_up: Counter[str]

    async def pick(self, policy: Policy, key: str = "") -> str | None:
        return (await self.picks.find("many", policy, key))[1]


class Handle:
    """A handle of an actor."""

    def __init__(self, name: str) -> None:
        self._actor_id = name.encode()


@pytest.fixture
async def world(connected: object) -> AsyncIterator[World]:
    async with joined_registry(CONFIG, Tables(START)) as registry:
        actors, looked_up = Actors(), Counter[str]()
        for number in REPLICAS:
            name = f"many-{number}"
            actors.states[name] = "alive"
            await registry.register(Registration(iid(number), "many", actor_name=name))
            await registry.set_status(iid(number), Status.ALIVE, 2)
        connection: Any = Plain(registry, RegistryUnavailableError, is_reworded=False)
        cache, metrics = HandleCache(0.01, max_proofs=0), CallerMetrics("manager")
        times = FollowTimes(wait_s=0.02, loads_s=0.01)
        follower = Follower(connection, on_change=cache.evict, on_reset=cache.clear, times=times)
        resolver = Resolver(
            snapshot=SnapshotSource(follower), records=[RegistrySource(connection)], listing=RayListing(_any(actors))
        )
        locator = Locator(resolver, _any(Finder(actors, looked_up)), cache, metrics)
        picks = Picks(follower, cache, locator, metrics, lambda: None)
        follower.start()
        assert await follower.until_current(10.0)
        yield World(registry, connection, actors, follower, locator, picks, looked_up)
        await follower.stop()


class Finder:
    """The actors in place of HandleFinder, with handles that a cache takes."""

    def __init__(self, actors: Actors, looked_up: Counter[str]) -> None:
        self._actors = actors
        self._looked_up = looked_up
        self.namespace, self.probe_timeout_s = actors.namespace, actors.probe_timeout_s

    async def of_instance(self, instance: Any, **options: Any) -> Handle:
        self._looked_up[instance.instance_id] += 1
        return Handle(await self._actors.of_instance(instance, **options))

    vouched = of_instance


def _any(value: object) -> Any:
    return value


async def test_a_pick_looks_each_instance_up_once_and_asks_no_registry(world: World) -> None:
    for policy in (Policy.ROUND_ROBIN, Policy.LEAST_OUTSTANDING):
        for _ in range(100):
            await world.pick(policy)
    assert world.looked_up == {iid(number): 1 for number in REPLICAS}
    # as long as the cache is trusted
    world.connection.is_away = True
    assert await world.pick(Policy.LEAST_OUTSTANDING) is not None


async def test_calls_under_way_decide_and_end_with_the_call(world: World) -> None:
    outstanding = world.picks.outstanding
    with outstanding.call(iid(1)), outstanding.call(iid(2)), outstanding.call(iid(3)), outstanding.call(None):
        assert {await world.pick(Policy.LEAST_OUTSTANDING) for _ in range(20)} == {iid(4)}
        with outstanding.call(iid(4)), outstanding.call(iid(4)):
            assert iid(4) not in {await world.pick(Policy.LEAST_OUTSTANDING) for _ in range(20)}
    assert outstanding.counts == {}
    with pytest.raises(ZeroDivisionError), outstanding.call(iid(1)):
        raise ZeroDivisionError
    assert outstanding.counts == {}


async def test_a_policy_is_known_by_its_value_and_no_other_one_is_taken_for_the_default(world: World) -> None:
    wrong: Any
    for value in Policy:
        assert world.picks.choice("many", _any(value.value)).policy is value
    for wrong in ("foo", None, 3, "NEWEST"):
        with pytest.raises(InvalidInputError, match="policy: must be one of newest, same_node, "):
            await world.picks.find("many", wrong)


def test_calls_of_many_threads_are_all_counted() -> None:
    outstanding = Outstanding()
    together = threading.Barrier(4)

    def call_often() -> None:
        together.wait()
        for _ in range(2000):
            with outstanding.call("one"), outstanding.call("one"):
                assert outstanding.counts["one"] >= 2

    threads = [threading.Thread(target=call_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outstanding.counts == {}


async def test_the_registry_is_asked_for_loads_until_the_cache_has_them(world: World) -> None:
    loads = {iid(number): float(number) for number in REPLICAS}
    await world.registry.beat_many(list(loads), loads)
    located = await world.locator.locate("many", world.picks.choice("many", Policy.LEAST_LOADED))
    assert located.source is Origin.REGISTRY
    await eventually(lambda: world.follower.view.loads == loads, every_s=0.001)
    located = await world.locator.locate("many", world.picks.choice("many", Policy.LEAST_LOADED))
    assert located.source is Origin.SNAPSHOT
    found = Counter([await world.pick(Policy.LEAST_LOADED) for _ in range(300)])
    assert iid(4) not in found
    assert found[iid(1)] > found[iid(2)] > found[iid(3)] > 0


@pytest.mark.parametrize("policy", Policy)
async def test_an_instance_that_leaves_is_picked_no_more(world: World, policy: Policy) -> None:
    follower = world.follower
    for gone in (4, 3, 2):
        for _ in range(20):
            await world.pick(policy, "key")
        await world.registry.drain(instance_ids=[iid(gone)])
        await eventually(lambda: len(follower.view.candidates("many")) == gone - 1, every_s=0.001)  # noqa: B023
        found = {await world.pick(policy, "key") for _ in range(50)}
        assert found <= {iid(number) for number in range(1, gone)}
    await world.registry.drain(instance_ids=[iid(1)])
    await eventually(lambda: not follower.view.candidates("many"), every_s=0.001)
    with pytest.raises(NotResolvableError):
        await world.pick(policy, "key")


async def test_any_thread_may_pick_while_the_cache_changes(world: World) -> None:
    world.follower.want_loads()
    await eventually(lambda: world.follower.view.loads is not None, every_s=0.001)
    for _ in range(50):
        await world.pick(Policy.LEAST_LOADED)
    failures: list[BaseException] = []
    hits = Counter[str | None]()
    is_over = threading.Event()

    def pick_for_ever() -> None:
        try:
            while not is_over.is_set():
                for policy in Policy:
                    hit = world.picks.hit("many", world.picks.choice("many", policy))
                    hits[None if hit is None else hit[1]] += 1
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    thread = threading.Thread(target=pick_for_ever)
    thread.start()
    for turn in range(30):
        await world.registry.register(Registration(iid(10 + turn), "many", actor_name="many-1"))
        await world.registry.set_status(iid(10 + turn), Status.ALIVE, 2)
        await world.registry.beat_many([iid(10 + turn)], {iid(10 + turn): 1.0})
        await world.registry.deregister(instance_ids=[iid(10 + turn)])
    is_over.set()
    thread.join()
    assert failures == []
    assert sum(hits.values()) > hits[None]


async def test_a_copy_of_a_part_picks_by_load_and_keeps_the_agents_that_are_picked(world: World) -> None:
    for name in ("few", "one"):
        for number in (1, 2) if name == "few" else (3,):
            instance_id = iid(10 + number)
            world.actors.states[f"{name}-{number}"] = "alive"
            await world.registry.register(Registration(instance_id, name, actor_name=f"{name}-{number}"))
            await world.registry.set_status(instance_id, Status.ALIVE, 2)
    cache, metrics = HandleCache(0.01, max_proofs=0), CallerMetrics("manager")
    follower = Follower(
        world.connection,
        on_change=cache.evict,
        on_reset=cache.clear,
        times=FollowTimes(wait_s=0.02, loads_s=0.01),
        most_agents=4,
        was_used=cache.take_use,
    )
    resolver = Resolver(snapshot=SnapshotSource(follower), records=[RegistrySource(world.connection)])
    locator = Locator(resolver, _any(Finder(world.actors, world.looked_up)), cache, metrics)
    picks = Picks(follower, cache, locator, metrics, lambda: None)
    follower.start()
    assert await follower.until_current(10.0)
    assert not follower.view.is_whole
    await picks.find("many", Policy.NEWEST)
    world.registry.members.note_loads({iid(11): 2.0, iid(12): 1.0})
    follower.want_loads()
    await eventually(lambda: follower.view.loads and iid(12) in follower.view.loads, every_s=0.001)
    # its loads arrived before it was learned
    assert (await picks.find("few", Policy.LEAST_LOADED))[1] == iid(12)
    # the two have more instances than the bound: the other one was forgotten
    assert (follower.view.has("many"), len(follower.view)) == (False, 2)
    # one that is picked from memory is used
    for name in ("one", "many"):
        assert picks.hit("few", picks.choice("few", Policy.LEAST_LOADED)) is not None
        await picks.find(name, Policy.NEWEST)
        assert (follower.view.has(name), follower.view.has("few")) == (True, name == "one")
    await follower.stop()
