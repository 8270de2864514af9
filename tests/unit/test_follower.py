"""A follower trusts its cache exactly as long as the registry confirms it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest

from seedcore.core.answers import InstanceFilter, Listing, Origin
from seedcore.core.clock import Clock
from seedcore.core.errors import InvalidInputError, RegistryUnavailableError
from seedcore.core.feed import FeedBatch
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.loads import Loads
from seedcore.core.paging import decode_cursor
from seedcore.core.view import LiveView
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.learning import Learner
from seedcore.registry.following.times import FollowTimes
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START, iid, joins
from tests.local import LocalRegistry as Registry
from tests.unit.conftest import Membership
from tests.unit.registries import joined_registry
from tests.waiting import eventually

TIMES = FollowTimes(wait_s=0.05, retry_s=0.001, retry_longest_s=0.01)
CONFIG = RegistryConfig("cluster", flush_interval_s=0.01, linger_s=0.0, epoch_check_s=0.01, feed_capacity=5)


@pytest.fixture
def tables() -> Tables:
    return Tables(START)


@pytest.fixture
async def registry(tables: Tables) -> AsyncIterator[Registry]:
    async with joined_registry(CONFIG, tables) as registry:
        yield registry


@dataclass
class Seen:
    """The callbacks of a follower."""

    changes: list[str] = field(default_factory=list)
    resets: int = 0

    def reset(self) -> None:
        self.resets += 1


class Stalled:
    """A connection whose answers this process reads late: its clock advances while it waits."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.stall_s = 0.0
        self.advanced_s = 0.0
        self.answers = 0

    def now_s(self) -> float:
        return time.monotonic() + self.advanced_s

    async def changes(self, question: FeedQuestion) -> FeedBatch:
        batch = await self._registry.changes(question)
        self.advanced_s += self.stall_s
        self.answers += 1
        return batch

    async def page(self, *args: Any, **options: Any) -> Listing:
        return await self._registry.page(*args, **options)


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
async def follower(registry: Registry, seen: Seen) -> AsyncIterator[Follower]:
    connection: Any = registry
    follower = Follower(connection, on_change=seen.changes.append, on_reset=seen.reset, times=TIMES)
    follower.start()
    assert await follower.until_current(10.0)
    yield follower
    await follower.stop()
    assert not follower.is_current


def held(follower: Follower) -> list[str]:
    rows, _ = follower.view.page(InstanceFilter(statuses=None), decode_cursor(None), 1000)
    return [row.instance_id for row in rows]


async def test_follower_reports_each_changed_agent(registry: Registry, follower: Follower, seen: Seen) -> None:
    for number in (1, 2):
        await registry.register(joins(number, f"agent-{number}", organ_id=f"organ-{number}").registration)
    await eventually(lambda: held(follower) == [iid(1), iid(2)], every_s=0.001)
    await registry.deregister(instance_ids=[iid(1)])
    await eventually(lambda: held(follower) == [iid(2)], every_s=0.001)
    assert set(seen.changes) == {"agent-1", "agent-2"}
    assert seen.changes.count("agent-1") >= 2


@pytest.mark.parametrize("most", [3, 1000])
async def test_follower_that_is_behind_the_feed_gets_the_last_change_of_each_instance(
    registry: Registry, follower: Follower, seen: Seen, most: int
) -> None:
    feed = registry.members.feed
    copy = follower.keep_feed(100)
    feed.since = partial(feed.since, most=most)  # type: ignore[method-assign]
    changes = [registry.register(joins(number, f"agent-{number}").registration) for number in range(1, 40)]
    await asyncio.gather(*changes)
    await eventually(lambda: len(held(follower)) == 39 and follower.is_current, every_s=0.001)
    # it has not listed again, and has each agent as changed
    assert (seen.resets, follower.resets) == (1, 1)
    assert set(seen.changes) == {f"agent-{number}" for number in range(1, 40)}
    # a watch of the copy has missed changes
    assert copy.version == follower.view.version
    assert copy.since(feed.stream, 0, InstanceFilter(statuses=None)).is_reset


async def test_follower_that_is_behind_a_feed_of_another_epoch_lists_again(
    registry: Registry, follower: Follower, seen: Seen
) -> None:
    await registry.register(joins(1).registration)
    await registry.set_current_epoch("green")
    await eventually(lambda: follower.resets == 2 and follower.is_current, every_s=0.001)
    assert held(follower) == []


async def test_cache_of_a_superseded_registry_is_not_trusted(
    registry: Registry, follower: Follower, tables: Tables
) -> None:
    await registry.register(joins(1).registration)
    await eventually(lambda: held(follower) == [iid(1)], every_s=0.001)
    rival = MemoryStore(lambda: START, tables)
    await rival.begin("cluster", None, 15.0)
    await eventually(lambda: not follower.is_current, every_s=0.001)
    # and stays so, however often it asks
    resets, failures = follower.resets, follower.failures
    await eventually(lambda: follower.failures >= failures + 5, every_s=0.001)
    assert not follower.is_current
    assert follower.resets == resets


async def test_cache_of_one_ray_session_is_not_trusted_in_the_next_before_a_new_listing(
    connected: Membership, registry: Registry, follower: Follower, seen: Seen
) -> None:
    before = seen.resets
    for change in (connected.leave, connected.join):
        assert follower.is_current
        change()
        assert not follower.is_current
        await eventually(lambda: follower.is_current, every_s=0.001)
    # so the handles that are cached with it are dropped: when it enters the session, and after the listing there
    assert seen.resets == before + 4


async def test_answer_that_is_read_late_is_trusted_from_the_time_it_was_sent(registry: Registry) -> None:
    stalled: Any = Stalled(registry)
    follower = Follower(stalled, times=TIMES, clock=Clock(monotonic=stalled.now_s))
    follower.start()
    assert await follower.until_current(10.0)
    # this process is stopped between each question and its answer, for a little longer than it may trust one
    stalled.stall_s = TIMES.max_age_s + TIMES.wait_s + 0.5
    answers = stalled.answers
    await eventually(lambda: stalled.answers >= answers + 3, every_s=0.001)
    assert not follower.is_current
    await follower.stop()


async def test_follower_survives_an_unexpected_error_of_its_callback(registry: Registry) -> None:
    failed: list[str] = []

    def fails_once(logical_id: str) -> None:
        failed.append(logical_id)
        if len(failed) == 1:
            raise ZeroDivisionError

    connection: Any = registry
    follower = Follower(connection, on_change=fails_once, times=TIMES)
    follower.start()
    assert await follower.until_current(10.0)
    await registry.register(joins(1).registration)
    await eventually(lambda: failed and follower.is_current and held(follower) == [iid(1)], every_s=0.001)
    assert follower.failures == 1
    await follower.stop()


async def test_above_the_bound_followers_with_a_place_keep_it_and_the_others_wait(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = FollowTimes(wait_s=0.02, full_s=0.05, full_longest_s=0.1)
    async with joined_registry(
        replace(CONFIG, max_followers=2, place_kept_s=0.5, feed_capacity=1000), tables
    ) as registry:
        connection: Any = registry
        followers = [Follower(connection, times=times) for _ in range(6)]
        for follower in followers:
            follower.start()

        def current() -> list[Follower]:
            return [follower for follower in followers if follower.is_current]

        await eventually(lambda: len(current()) == 2)
        first = current()
        lists = [follower.resets for follower in followers]
        for number in range(40):
            await registry.register(joins(number, f"agent-{number}").registration)
            await asyncio.sleep(0.01)
            assert current() == first
        assert (await registry.health()).followers == 2
        # a follower without a place causes no listing
        assert [follower.resets for follower in followers] == lists
        assert sum(lists) == 2
        await first[0].stop()
        await eventually(lambda: len(current()) == 2)
        assert first[1].is_current
        for follower in followers:
            await follower.stop()


# Loads


async def several(registry: Registry) -> None:
    """Three instances of one agent, and one of another, each with a load."""
    for number, name in ((1, "many"), (2, "many"), (3, "many"), (4, "single")):
        await registry.register(joins(number, name).registration)
    loads = {iid(number): number / 4 for number in range(1, 5)}
    await registry.beat_many(list(loads), loads)


def load_of(follower: Follower, number: int) -> float | None:
    return None if follower.view.loads is None else follower.view.loads.get(iid(number))


async def test_loads_are_followed_once_they_are_wanted_and_only_where_there_is_a_choice(
    registry: Registry, follower: Follower
) -> None:
    await several(registry)
    await eventually(lambda: len(held(follower)) == 4, every_s=0.001)
    assert follower.view.loads is None
    follower.want_loads()
    await eventually(lambda: follower.view.loads == {iid(1): 0.25, iid(2): 0.5, iid(3): 0.75}, every_s=0.001)
    # a load is no change
    version = follower.view.version
    await registry.beat_many([iid(2)], {iid(2): 9.0})
    await eventually(lambda: load_of(follower, 2) == 9.0, every_s=0.001)
    assert follower.view.version == version
    await registry.deregister(instance_ids=[iid(3)])
    await eventually(lambda: set(follower.view.loads or ()) == {iid(1), iid(2)}, every_s=0.001)
    # the one that was alone is not alone any more
    await registry.register(joins(5, "single").registration)
    await eventually(lambda: load_of(follower, 4) == 1.0, every_s=0.001)


async def test_loads_are_asked_for_at_a_bounded_rate_and_no_longer_than_they_are_wanted(registry: Registry) -> None:
    now_s = 0.0
    asked: list[int | None] = []

    class Counting:
        """A connection that notes which loads are asked for."""

        async def changes(self, question: FeedQuestion) -> FeedBatch:
            asked.append(question.loads_after)
            return await registry.changes(question)

        async def page(self, *args: Any, **options: Any) -> Listing:
            return await registry.page(*args, **options)

    connection: Any = Counting()
    times = replace(TIMES, wait_s=0.005, loads_s=1.0)
    follower = Follower(connection, times=times, clock=Clock(lambda: now_s))
    await several(registry)
    follower.start()
    await eventually(lambda: len(asked) > 5, every_s=0.001)
    assert set(asked) == {None}
    follower.want_loads()
    await eventually(lambda: follower.view.loads, every_s=0.001)
    # no second time within the same second, however often it asks for changes
    seen = len(asked)
    await eventually(lambda: len(asked) > seen + 5, every_s=0.001)
    assert [one for one in asked if one is not None] == [0]
    now_s += 1.1
    await eventually(lambda: len([one for one in asked if one is not None]) == 2, every_s=0.001)
    assert follower.view.loads
    now_s += 100.0
    await eventually(lambda: follower.view.loads is None, every_s=0.001)
    await follower.stop()


async def test_loads_of_a_large_fleet_arrive_in_bounded_answers(registry: Registry) -> None:
    loads = Loads()
    for number in range(25):
        loads.note(iid(number), float(number), is_sent=True)
    number, found, answers = 0, dict[str, float](), 0
    while number < loads.number:
        part, number = loads.since(number, lambda _: True, limit=10)
        assert len(part) <= 10
        found |= part
        answers += 1
    assert (answers, found) == (3, {iid(number): float(number) for number in range(25)})
    assert loads.since(number, lambda _: True) == ({}, number)
    loads.note(iid(3), 3.0, is_sent=True)
    assert loads.since(number, lambda _: True) == ({}, number)
    loads.note(iid(3), 4.0, is_sent=True)
    assert loads.since(number, lambda _: True)[0] == {iid(3): 4.0}


@pytest.mark.parametrize("bad", [-1, 1.5, "0", True])
async def test_number_of_loads_that_is_none_is_refused(registry: Registry, bad: Any) -> None:
    with pytest.raises(InvalidInputError, match="loads_after"):
        await registry.changes(FeedQuestion(InstanceFilter(), loads_after=bad))


@pytest.fixture
async def fleet(registry: Registry) -> Registry:
    """Of five agents, more than the follower of a part keeps."""
    for number in range(1, 6):
        await registry.register(joins(number, f"agent-{number}").registration)
    return registry


@pytest.fixture
async def part(fleet: Registry, seen: Seen) -> AsyncIterator[Follower]:
    connection: Any = fleet
    follower = Follower(connection, on_change=seen.changes.append, on_reset=seen.reset, times=TIMES, most_agents=2)
    follower.start()
    assert await follower.until_current(10.0)
    yield follower
    await follower.stop()


async def test_of_a_larger_fleet_a_follower_keeps_the_agents_that_it_has_learned(
    fleet: Registry, part: Follower, seen: Seen
) -> None:
    assert (held(part), part.view.is_whole, part.view.knows(InstanceFilter(statuses=None))) == ([], False, False)
    assert await part.learn("agent-1")
    assert held(part) == [iid(1)]
    # also that there is none
    assert await part.learn("agent-7")
    await fleet.register(joins(7, "agent-7").registration)
    await fleet.register(joins(8, "agent-8").registration)
    await fleet.deregister(instance_ids=[iid(1)])
    await eventually(lambda: held(part) == [iid(7)] and part.is_current, every_s=0.001)
    # of the others it tells and keeps nothing
    assert set(seen.changes) == {"agent-1", "agent-7"}
    seen.changes.clear()
    assert await part.learn("agent-2")
    # at most two: the oldest one is forgotten, and what was made of it must be too
    assert seen.changes == ["agent-1"]
    assert held(part) == [iid(2), iid(7)]


async def test_agents_that_are_learned_at_once_are_asked_for_once(fleet: Registry, part: Follower) -> None:
    asked: list[str | None] = []
    page: Any = fleet.page

    async def counted(wanted: InstanceFilter, *args: Any, **options: Any) -> Listing:
        asked.append(wanted.logical_id)
        listed: Listing = await page(wanted, *args, **options)
        return listed

    with mock.patch.object(fleet, "page", counted):
        assert all(await asyncio.gather(*(part.learn("agent-1") for _ in range(20))))
    assert asked == ["agent-1"]


async def test_agent_whose_listing_is_of_an_earlier_version_is_not_learned(fleet: Registry, part: Follower) -> None:
    page: Any = fleet.page

    async def late(*args: Any, **options: Any) -> Listing:
        listed: Listing = await page(*args, **options)
        return replace(listed, version=0)

    with mock.patch.object(fleet, "page", late):
        assert not await part.learn("agent-1")
    with mock.patch.object(fleet, "page", mock.AsyncMock(side_effect=RegistryUnavailableError("away"))):
        assert not await part.learn("agent-1")
    assert held(part) == []
    assert await part.learn("agent-1")


async def test_agent_is_not_learned_by_a_listing_of_another_epoch(fleet: Registry, part: Follower) -> None:
    page: Any = fleet.page

    async def after_a_flip(*args: Any, **options: Any) -> Listing:
        listed: Listing = (await page(*args, **options)).unpacked()
        return replace(listed, items=tuple(replace(row, cluster_epoch="green") for row in listed.items))

    with mock.patch.object(fleet, "page", after_a_flip):
        assert not await part.learn("agent-1")
    assert held(part) == []


async def test_an_unexpected_error_of_a_listing_ends_no_resolution(fleet: Registry, part: Follower) -> None:
    with mock.patch.object(fleet, "page", mock.AsyncMock(side_effect=ZeroDivisionError)):
        assert not await part.learn("agent-1")
    assert await part.learn("agent-1")


async def test_who_learns_an_agent_is_not_cancelled_by_another_caller_or_by_the_end(
    fleet: Registry, part: Follower
) -> None:
    asked = asyncio.Event()

    async def hangs(*args: Any, **options: Any) -> Listing:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    with mock.patch.object(fleet, "page", hangs):
        first, second = (asyncio.create_task(part.learn("agent-1")) for _ in range(2))
        await asked.wait()
        first.cancel()
        await asyncio.wait({first})
        assert (first.cancelled(), second.done()) == (True, False)
        await part.stop()
    assert await second is False


def test_a_later_event_loop_asks_again_for_what_the_one_before_had_not_learned() -> None:
    source, view = mock.Mock(), LiveView()
    learner = Learner(source, InstanceFilter(statuses=None), 2, None, None)
    reset = FeedBatch("here", 0, 1, "green", (), is_reset=True)

    async def begun() -> asyncio.Task[bool]:
        source.page = mock.AsyncMock(side_effect=asyncio.Event().wait)
        learner.begin()
        view.keep_only_learned(reset)
        asked = asyncio.create_task(learner.learn(view, "agent-1"))
        await eventually(lambda: source.page.called, every_s=0.001)
        return asked

    async def learned() -> bool:
        source.page = mock.AsyncMock(return_value=Listing((), Origin.REGISTRY, START, 1, complete=True, stream="here"))
        learner.begin()
        view.keep_only_learned(reset)
        return await learner.learn(view, "agent-1")

    ended = asyncio.new_event_loop()
    asked = ended.run_until_complete(begun())
    assert asyncio.run(learned())
    for task in asyncio.all_tasks(ended):
        task.cancel()
    ended.run_until_complete(asyncio.wait({asked}))
    ended.close()


async def test_a_fleet_that_grows_beyond_the_bound_is_no_longer_copied(registry: Registry, seen: Seen) -> None:
    connection: Any = registry
    follower = Follower(connection, on_reset=seen.reset, times=TIMES, most_agents=2)
    follower.start()
    assert await follower.until_current(10.0)
    for number in (1, 2):
        await registry.register(joins(number, f"agent-{number}").registration)
    await eventually(lambda: held(follower) == [iid(1), iid(2)], every_s=0.001)
    assert (follower.view.is_whole, seen.resets) == (True, 1)
    await registry.register(joins(3, "agent-3").registration)
    await eventually(lambda: follower.is_current and not follower.view.is_whole, every_s=0.001)
    # the handles of agents that it has no more are dropped
    assert (held(follower), seen.resets) == ([], 2)
    await follower.stop()


async def test_who_needs_all_agents_gets_them(fleet: Registry, part: Follower, seen: Seen) -> None:
    assert await part.learn("agent-1")
    part.keep_whole()
    # what it had is not trusted as all agents
    assert not part.is_current
    await eventually(lambda: part.is_current, every_s=0.001)
    assert (len(held(part)), part.view.is_whole, seen.resets) == (5, True, 2)
    # also of a fleet that grows
    await fleet.register(joins(6, "agent-6").registration)
    await eventually(lambda: len(held(part)) == 6 and part.is_current, every_s=0.001)
    assert part.resets == 2
