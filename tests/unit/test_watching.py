"""A watch brings every change in order, and says so where it cannot."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from seedcore.core.causes import Cause, CauseKind
from seedcore.core.errors import CannotKnowError, InvalidInputError, RegistryUnavailableError
from seedcore.core.events import AgentEvent, EventKind, WatchEndedError, kind_of
from seedcore.core.feed import FeedChange, Position
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.core.timeouts import within
from seedcore.core.verdict import Death
from seedcore.registry.caller.watching import Watch, WatchTimes, watched
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.times import FollowTimes
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.memory import Tables
from tests.builders import START, iid, instance, joins
from tests.local import LocalRegistry as Registry
from tests.unit.callers import Plain
from tests.unit.registries import joined_registry
from tests.waiting import eventually

CONFIG = RegistryConfig(
    "cluster", beat_interval_s=3600.0, lease_s=86_400.0, flush_interval_s=0.01, linger_s=0.0, epoch_check_s=0.01
)
FOLLOW = FollowTimes(wait_s=0.05, retry_s=0.001, retry_longest_s=0.01)
TIMES = WatchTimes(start_s=10.0, tick_s=0.02)
SHORT = WatchTimes(start_s=0.05, tick_s=0.02)
LONG_S = 30.0


class Watched:
    """A registry, and a caller that watches its agents."""

    def __init__(self, registry: Registry, connection: Any) -> None:
        self.registry = registry
        self.connection = connection
        self.follower = Follower(connection, times=FOLLOW)

    def watch(
        self,
        ids: Sequence[str] | None = None,
        organ_id: str | None = None,
        selector: str | None = None,
        since: str | None = None,
        times: WatchTimes = TIMES,
        endpoint: str | None = None,
        **options: Any,
    ) -> Watch:
        of = watched(ids, organ_id, selector, endpoint)
        return Watch(self.follower, self.connection, of, since, times=times, **options)

    async def join(self, number: int, logical_id: str, **details: Any) -> None:
        await self.registry.register(joins(number, logical_id, **details).registration)
        await self.registry.set_status(iid(number), Status.ALIVE, 2)


@pytest.fixture
async def fleet() -> AsyncIterator[Watched]:
    async with joined_registry(CONFIG, Tables(START)) as registry:
        fleet = Watched(registry, Plain(registry, RegistryUnavailableError, is_reworded=False))
        yield fleet
        await fleet.follower.stop()


async def events(watch: Watch, count: int) -> list[AgentEvent]:
    return [await within(anext(watch), LONG_S) for _ in range(count)]


def brief(found: Sequence[AgentEvent]) -> list[tuple[str, str | None]]:
    return [(event.kind.value, event.logical_id) for event in found]


async def test_watch_brings_each_change_in_order_from_now_on(fleet: Watched) -> None:
    await fleet.join(1, "before")
    async with fleet.watch() as watch:
        await fleet.join(2, "a")
        await fleet.registry.drain(["a"], "a new disk", "ann")
        await fleet.registry.undrain(["a"])
        fleet.registry.expiry.declare_dead(iid(2), Death.PROCESS, Cause(CauseKind.PROCESS_KILLED, "SIGKILL"))
        await fleet.registry.deregister(["before"], "broken", "ann")
        found = await events(watch, 6)
    assert brief(found) == [
        ("joined", "a"),
        ("changed", "a"),
        ("not_ready", "a"),
        ("changed", "a"),
        ("died", "a"),
        ("left", "before"),
    ]
    assert [event.is_ready for event in found] == [False, True, False, True, False, False]
    drained = found[2].instance
    assert drained is not None
    held = drained.hold(HoldKind.OPERATOR)
    assert held is not None
    assert (held.reason, held.by) == ("a new disk", "ann")
    assert found[4].cause == Cause(CauseKind.PROCESS_KILLED, "SIGKILL")
    assert found[4].instance is None
    assert found[5].cause is not None
    assert found[5].cause.kind is CauseKind.OPERATOR
    assert [Position.parsed(event.position).version for event in found] == sorted(
        Position.parsed(event.position).version for event in found
    )


async def test_watch_of_ids_or_a_filter_brings_no_other_agent(fleet: Watched) -> None:
    by_id, by_ids = fleet.watch(["a"]), fleet.watch(["a", "b"])
    by_filter = fleet.watch(organ_id="eye", selector="!spot")
    for watch in (by_id, by_ids, by_filter):
        await watch.begin()
    await fleet.join(1, "x")
    await fleet.join(2, "a", organ_id="eye")
    await fleet.join(3, "b", organ_id="eye", labels={"spot": "yes"})
    await fleet.join(4, "y", organ_id="eye")
    assert {event.logical_id for event in await events(by_id, 2)} == {"a"}
    assert [event.logical_id for event in await events(by_ids, 4)] == ["a", "a", "b", "b"]
    assert [event.logical_id for event in await events(by_filter, 4)] == ["a", "a", "y", "y"]


async def test_watch_of_an_endpoint_begins_with_the_event_that_brings_it(fleet: Watched) -> None:
    await fleet.join(1, "a")
    async with fleet.watch(endpoint="http") as watch:
        await fleet.join(2, "b")
        at = {"http": "http://10.0.0.1:8000"}
        await fleet.registry.register(joins(1, "a", endpoints=at).registration, 3)
        [event] = await events(watch, 1)
    assert (event.logical_id, event.instance and event.instance.endpoints) == ("a", at)


async def test_watch_with_the_state_begins_with_it(fleet: Watched) -> None:
    await fleet.join(1, "a", organ_id="eye")
    await fleet.join(2, "b")
    watch = fleet.watch(organ_id="eye", since="start")
    [state] = await events(watch, 1)
    assert state.kind is EventKind.STATE
    assert state.is_whole
    assert [row.logical_id for row in state.instances] == ["a"]
    await fleet.registry.drain(["a"])
    assert brief(await events(watch, 1)) == [("not_ready", "a")]


async def test_watch_resumes_after_the_position_of_an_event(fleet: Watched) -> None:
    watch = fleet.watch()
    await watch.begin()
    for number, name in enumerate("abc"):
        await fleet.join(number, name)
    found = await events(watch, 2)
    assert watch.position == found[-1].position
    resumed = fleet.watch(since=watch.position)
    assert resumed.position == watch.position
    assert brief(await events(resumed, 4)) == brief(await events(watch, 4))


async def test_watch_of_another_process_resumes_by_the_feed_of_the_registry(fleet: Watched) -> None:
    first = fleet.watch()
    await first.begin()
    await fleet.join(1, "a")
    position = (await events(first, 2))[-1].position
    await fleet.registry.drain(["a"])
    await fleet.join(2, "b")
    other = Watched(fleet.registry, fleet.connection)
    watch = other.watch(since=position)
    found = await events(watch, 3)
    assert brief(found) == [("not_ready", "a"), ("joined", "b"), ("changed", "b")]
    await fleet.registry.undrain(["a"])
    assert brief(await events(watch, 1)) == [("changed", "a")]
    await other.follower.stop()


@pytest.mark.parametrize("position", ["another:3", "{stream}:999999999"])
async def test_watch_from_an_unknown_position_begins_with_a_gap(fleet: Watched, position: str) -> None:
    await fleet.join(1, "a")
    probe = fleet.watch()
    await probe.begin()
    stream = Position.parsed(probe.position or "").stream
    watch = fleet.watch(since=position.format(stream=stream))
    [gap] = await events(watch, 1)
    assert gap.kind is EventKind.GAP
    assert gap.why is not None
    assert [row.logical_id for row in gap.instances] == ["a"]
    await fleet.join(2, "b")
    assert brief(await events(watch, 2)) == [("joined", "b"), ("changed", "b")]


async def test_slow_consumer_gets_a_gap_with_the_state_and_goes_on() -> None:
    async with joined_registry(replace(CONFIG, feed_capacity=8), Tables(START)) as registry:
        fleet = Watched(registry, registry)
        watch = fleet.watch(capacity=5)
        await watch.begin()
        for number in range(20):
            await fleet.join(number, f"agent-{number}")
        feed = registry.members.feed
        await eventually(
            lambda: fleet.follower.is_current and fleet.follower.view.version == feed.version, every_s=0.001
        )
        [gap] = await events(watch, 1)
        assert gap.kind is EventKind.GAP
        assert len(gap.instances) == 20
        await registry.drain(["agent-3"])
        assert brief(await events(watch, 1)) == [("not_ready", "agent-3")]
        await fleet.follower.stop()


async def test_slow_consumer_of_a_short_memory_loses_nothing_that_the_registry_remembers(fleet: Watched) -> None:
    watch = fleet.watch(capacity=5)
    await watch.begin()
    for number in range(20):
        await fleet.join(number, f"agent-{number}")
    await eventually(lambda: fleet.follower.is_current and len(fleet.follower.view) == 20, every_s=0.001)
    assert [kind for kind, _ in brief(await events(watch, 40))] == ["joined", "changed"] * 20


async def test_state_of_a_flipped_epoch_comes_with_a_gap(fleet: Watched) -> None:
    await fleet.join(1, "a")
    await fleet.join(2, "b", cluster_epoch="later")
    watch = fleet.watch()
    await watch.begin()
    await fleet.registry.set_current_epoch("later")
    [gap, *_] = await events(watch, 1)
    assert gap.kind is EventKind.GAP
    assert [row.logical_id for row in gap.instances] == ["b"]


async def test_state_replayed_from_the_events_is_that_of_the_registry(fleet: Watched) -> None:
    watch = fleet.watch(since="start")
    for number in range(30):
        await fleet.join(number, f"agent-{number % 7}")
        if number % 3 == 0:
            await fleet.registry.drain([f"agent-{number % 7}"])
        if number % 4 == 0:
            await fleet.registry.deregister(instance_ids=[iid(number - number // 2)])
    listing = await fleet.registry.list_active(None, limit=MAX_PAGE)
    state: dict[str, Instance] = {}
    while Position.parsed(watch.position or ":0").version < listing.version:
        event = await within(anext(watch), LONG_S)
        if event.is_whole:
            state = {row.instance_id: row for row in event.instances}
        elif event.instance is not None:
            state[event.instance.instance_id] = event.instance
        else:
            state.pop(event.instance_id or "", None)
    assert {(key, row.status) for key, row in state.items()} == {(row.instance_id, row.status) for row in listing}


async def test_watch_outlives_an_outage_of_the_registry(fleet: Watched) -> None:
    watch = fleet.watch()
    await watch.begin()
    fleet.connection.is_away = True
    await fleet.join(1, "a")
    fleet.connection.is_away = False
    assert brief(await events(watch, 2)) == [("joined", "a"), ("changed", "a")]


async def test_without_a_registry_the_start_fails_and_says_why(fleet: Watched) -> None:
    fleet.connection.is_away = True
    watch = fleet.watch(times=SHORT)
    with pytest.raises(CannotKnowError, match=r"was not read within 0\.05 s: the registry is away"):
        await anext(watch)
    with pytest.raises(CannotKnowError):
        async with watch:
            pass


async def test_cancelled_reading_loses_no_event(fleet: Watched) -> None:
    watch = fleet.watch(times=WatchTimes())
    await watch.begin()
    for _ in range(5):
        reading = asyncio.create_task(anext(watch))
        await asyncio.sleep(0.001)
        reading.cancel()
    await fleet.join(1, "a")
    assert brief(await events(watch, 2)) == [("joined", "a"), ("changed", "a")]


async def test_close_ends_the_iteration_at_once(fleet: Watched) -> None:
    watch = fleet.watch(times=WatchTimes(tick_s=LONG_S))
    await watch.begin()

    async def read() -> list[AgentEvent]:
        return [event async for event in watch]

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    await watch.close()
    assert await within(reading, 5.0) == []
    with pytest.raises(StopAsyncIteration):
        await anext(watch)
    await watch.close()


async def test_watch_that_is_not_closed_is_freed_and_is_no_longer_subscribed(fleet: Watched) -> None:
    watch = fleet.watch()
    await watch.begin()
    await fleet.join(1, "a")
    await events(watch, 2)
    assert fleet.follower.feed is not None
    assert fleet.follower.feed.followers == 0
    freed = weakref.ref(watch)
    del watch
    gc.collect()
    assert freed() is None


async def test_second_reader_at_once_is_refused(fleet: Watched) -> None:
    watch = fleet.watch(times=WatchTimes())
    await watch.begin()
    reading = asyncio.create_task(anext(watch))
    await asyncio.sleep(0.001)
    with pytest.raises(WatchEndedError, match="another task reads it"):
        await anext(watch)
    reading.cancel()


async def test_watch_in_another_loop_than_the_follower_gets_the_events(fleet: Watched) -> None:
    fleet.follower.start()
    assert await fleet.follower.until_current(LONG_S)
    found: list[tuple[str, str | None]] = []
    has_begun = threading.Event()

    def other() -> None:
        async def read() -> None:
            watch = fleet.watch()
            await watch.begin()
            has_begun.set()
            found.extend(brief(await events(watch, 2)))

        asyncio.run(read())

    thread = threading.Thread(target=other)
    thread.start()
    await eventually(has_begun.is_set, every_s=0.001)
    await fleet.join(1, "a")
    await asyncio.to_thread(thread.join)
    assert found == [("joined", "a"), ("changed", "a")]


async def test_watch_of_a_loop_that_has_ended_is_refused_in_the_next_one(fleet: Watched) -> None:
    fleet.follower.start()
    assert await fleet.follower.until_current(LONG_S)
    watch = fleet.watch()
    await asyncio.to_thread(lambda: asyncio.run(watch.begin()))
    with pytest.raises(WatchEndedError, match="it belongs to another event loop"):
        await anext(watch)


@pytest.mark.parametrize("since", ["", "junk", "a:-1", "a:b", "a:99999999999999999999"])
def test_since_that_is_no_position_is_refused(since: str) -> None:
    unused: Any = None
    with pytest.raises(InvalidInputError, match="since: must be STREAM:VERSION"):
        Watch(unused, unused, watched(None, None, None), since)


def test_bad_input_of_a_watch_is_refused_by_field() -> None:
    for arguments, message in (
        ((["a", "a"], None, None), "ids: name each agent once"),
        (([], None, None), "ids: must be 1 to 1000 ids, not 0"),
        ((["a"], "eye", None), "ids: give ids, or organ_id, selector and endpoint, not both"),
        ((None, None, "a in ("), "selector: cannot be read"),
        ((None, "x" * 300, None), "organ_id: "),
    ):
        with pytest.raises(InvalidInputError) as refused:
            watched(*arguments)
        assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (FeedChange(1, iid(1), "a", instance(), is_new=True), EventKind.JOINED),
        (FeedChange(1, iid(1), "a", instance()), EventKind.CHANGED),
        (FeedChange(1, iid(1), "a", instance(), Verdict.LATE), EventKind.CHANGED),
        (FeedChange(1, iid(1), "a", instance(), Verdict.SUSPECT), EventKind.NOT_READY),
        (FeedChange(1, iid(1), "a", instance(status=Status.DRAINING)), EventKind.NOT_READY),
        (FeedChange(1, iid(1), "a", None), EventKind.LEFT),
        (FeedChange(1, iid(1), "a", None, is_end=True), EventKind.DIED),
        (FeedChange(1, iid(1), "a", None, cause=Cause(CauseKind.NODE_DIED)), EventKind.DIED),
        (FeedChange(1, iid(1), "a", None, cause=Cause(CauseKind.DRAIN_ENDED), is_end=True), EventKind.LEFT),
    ],
)
def test_kind_of_an_event_follows_from_the_change_alone(change: FeedChange, kind: EventKind) -> None:
    assert kind_of(change) is kind
