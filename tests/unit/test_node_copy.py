"""A relay serves followers from its copy: with the registry's stream and versions, and never as newer than it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from seedcore.core.answers import InstanceFilter, Listing
from seedcore.core.clock import Clock
from seedcore.core.errors import FollowersFullError
from seedcore.core.feed import Feed, FeedBatch
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.lifecycle import Status
from seedcore.core.paging import decode_cursor
from seedcore.core.timeouts import within
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.nearby import Nearby
from seedcore.registry.following.serving import FeedBounds, FeedServer
from seedcore.registry.following.times import FollowTimes
from seedcore.registry.node.copy import NodeCopy
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.memory import Tables
from tests.builders import START, iid, instance, joins
from tests.local import LocalRegistry
from tests.unit.registries import joined_registry
from tests.waiting import eventually

ALL = InstanceFilter(statuses=None, fresh_only=False)
TIMES = FollowTimes(wait_s=0.02, retry_s=0.001, retry_longest_s=0.01)
NODE, RELAY = "node", "relay"
FULL = FollowersFullError(1)
CONFIG = RegistryConfig("cluster", flush_interval_s=0.01, linger_s=0.0, feed_capacity=5, direct_followers=0)


class Wire:
    """A connection to a registry, and to a relay of this node, of which the registry may be silent."""

    is_by_relay = True

    def __init__(self, registry: Any, copy: NodeCopy | None = None) -> None:
        self.registry = registry
        self.copy = copy
        self.is_there = asyncio.Event()
        self.is_there.set()
        self.used: str | None = None
        self.asked: list[str] = []

    async def changes(self, question: FeedQuestion) -> FeedBatch:
        self.asked.append("registry")
        await self.is_there.wait()
        batch: FeedBatch = await self.registry.changes(question)
        return batch

    async def page(self, *args: Any, **options: Any) -> Listing:
        self.asked.append("page")
        await self.is_there.wait()
        listing: Listing = await self.registry.page(*args, **options)
        return listing

    async def ask_relay(self, method: str, *args: Any, waits_s: float = 0.0) -> Any:
        if self.copy is None or self.used is None:
            return None
        self.asked.append(f"relay: {method}")
        return await getattr(self.copy, method)(*args)

    async def use_relay(self, name: str) -> None:
        self.used = name

    def nearby(self, clock: Clock | None = None) -> Nearby:
        """What a process of this node asks."""
        connection: Any = self
        return Nearby(connection, lambda: NODE, clock)


@pytest.fixture
async def registry() -> AsyncIterator[LocalRegistry]:
    async with joined_registry(CONFIG, Tables(START)) as registry:
        with mock.patch.object(registry.expiry.watch, "relay_of", {NODE: RELAY}.get):
            yield registry


@pytest.fixture
async def upstream(registry: LocalRegistry) -> Wire:
    return Wire(registry)


@pytest.fixture
async def copy(upstream: Wire) -> AsyncIterator[NodeCopy]:
    copy = NodeCopy(upstream, times=TIMES, ready_s=0.2)
    yield copy
    await copy.close()


def held(follower: Follower) -> list[str]:
    rows, _ = follower.view.page(ALL, decode_cursor(None), 1000)
    return [row.instance_id for row in rows]


async def test_processes_of_a_node_follow_its_relay_and_the_relay_the_registry(
    registry: LocalRegistry, copy: NodeCopy
) -> None:
    wires = [Wire(registry, copy) for _ in range(5)]
    followers = [Follower(wire.nearby(), times=TIMES) for wire in wires]
    for follower in followers:
        follower.start()
    for number in range(1, 30):
        await registry.register(joins(number, f"agent-{number}").registration)
    await eventually(lambda: all(len(held(one)) == 29 and one.is_current for one in followers), every_s=0.001)
    for wire in wires:
        # the registry named the relay in its first answer, and is asked no more once the relay has its copy
        assert wire.asked[0] == "registry"
        await eventually(lambda wire=wire: wire.asked[-9:] == ["relay: changes"] * 9, every_s=0.001)  # type: ignore[misc]
    # only the relay has a place
    assert registry.feed_server.followers == 1
    versions = {(one.view.stream, one.view.version) for one in followers}
    assert versions == {(registry.members.feed.stream, registry.members.feed.version)}
    assert {one.resets for one in followers} == {1}
    for follower in followers:
        await follower.stop()


async def test_an_answer_of_a_relay_is_as_old_as_what_the_relay_knows(upstream: Wire, registry: LocalRegistry) -> None:
    now_s = 0.0
    copy = NodeCopy(upstream, Clock(lambda: now_s), replace(TIMES, max_age_s=4.0), ready_s=0.05)
    await registry.register(joins(1, "agent-1").registration)
    clock = Clock(lambda: now_s)
    wire = Wire(registry, copy)
    follower = Follower(wire.nearby(clock), times=TIMES, clock=clock)
    follower.start()
    await eventually(
        lambda: held(follower) == [iid(1)] and follower.is_current and "relay: changes" in wire.asked, every_s=0.001
    )
    # the registry is away from both, and the relay goes on answering
    upstream.is_there.clear()
    wire.is_there.clear()
    version = follower.view.version
    now_s = 3.9
    batch = await copy.changes(FeedQuestion(ALL, follower.view.stream, version))
    assert batch.complete
    assert batch.age_s == pytest.approx(3.9, abs=0.1)
    now_s = 4.1
    assert not (await copy.changes(FeedQuestion(ALL, follower.view.stream, version))).complete
    assert not follower.is_current
    await follower.stop()
    await copy.close()


async def test_a_relay_that_is_behind_or_without_a_copy_leaves_the_answer_to_the_registry(
    upstream: Wire, copy: NodeCopy, registry: LocalRegistry
) -> None:
    upstream.is_there.clear()
    assert not (await copy.changes(FeedQuestion(ALL))).complete
    assert not (await copy.page(ALL)).complete
    upstream.is_there.set()
    await eventually(lambda: copy.is_kept, every_s=0.001)
    stream = registry.members.feed.stream
    assert (await copy.changes(FeedQuestion(ALL, stream, 0))).complete
    ahead = await copy.changes(FeedQuestion(ALL, stream, registry.members.feed.version + 5))
    assert (ahead.complete, ahead.is_reset) == (False, False)
    # another epoch is not in the copy
    assert not (await copy.page(replace(ALL, epoch="another"))).complete


async def test_a_registry_with_many_followers_names_the_relay_of_their_node_and_keeps_no_place_for_them() -> None:
    config = replace(CONFIG, direct_followers=1, max_followers=2, max_relays=1)
    async with joined_registry(config, Tables(START)) as registry:

        async def ask(name: str, node_id: str | None = "north", **more: Any) -> FeedBatch:
            at = registry.members.feed.stream, registry.members.feed.version
            return await registry.changes(FeedQuestion(ALL, *at, follower=name, node_id=node_id, **more))

        with mock.patch.object(registry.expiry.watch, "relay_of", {"north": "its relay"}.get):
            assert [(await ask(str(n))).relay for n in range(3)] == [None, "its relay", "its relay"]
            # without a place it does not wait
            assert (await within(ask("waiting", wait_s=30.0), 5.0)).complete
            assert registry.feed_server.followers == 1
            # the places are kept from question to question
            assert [(await ask(name)).relay for name in ("0", "1")] == [None, "its relay"]
            # one whose node has no relay gets a place, as long as there are any
            assert (await ask("south 1", "south")).relay is None
            with pytest.raises(FollowersFullError, match="2 followers"):
                await ask("south 2", "south")
            # processes take no place of a relay
            assert (await ask("relay 1", None, is_relay=True)).complete
            with pytest.raises(FollowersFullError, match="1 followers"):
                await ask("relay 2", None, is_relay=True)
            assert registry.feed_server.followers == 3
        # a relay that is there again takes back what follows the registry meanwhile, beyond the first ones
        with mock.patch.object(registry.expiry.watch, "relay_of", {"south": "another"}.get):
            assert [(await ask(name, "south")).relay for name in ("south 1", "south 1", "0")] == [
                "another",
                "another",
                None,
            ]
            assert registry.feed_server.followers == 2


async def test_a_process_whose_relay_has_no_copy_trusts_its_own_all_the_time(
    registry: LocalRegistry, upstream: Wire, copy: NodeCopy
) -> None:
    upstream.is_there.clear()
    wire = Wire(registry, copy)
    follower = Follower(wire.nearby(), times=replace(TIMES, wait_s=0.05, max_age_s=1.0))
    follower.start()
    assert await follower.until_current(5.0)
    for number in range(1, 40):
        await registry.register(joins(number, f"agent-{number}").registration)
        await eventually(lambda count=number: len(held(follower)) == count, every_s=0.001)  # type: ignore[misc]
        assert follower.is_current
    assert wire.asked.count("relay: changes") > 1
    assert registry.feed_server.followers == 0
    await follower.stop()


async def test_a_relay_of_an_earlier_registry_takes_no_process_back(registry: LocalRegistry, copy: NodeCopy) -> None:
    wire = Wire(registry, copy)
    nearby, at = wire.nearby(), FeedQuestion(ALL)
    async with joined_registry(CONFIG, Tables(START)) as later:
        assert (await nearby.changes(at)).stream == registry.members.feed.stream
        assert await eventually(lambda: nearby.uses_relay)
        # the process has read the later registry, and its relay has not
        wire.registry = later
        with mock.patch.object(later.expiry.watch, "relay_of", {NODE: RELAY}.get):
            at = FeedQuestion(ALL, later.members.feed.stream, later.members.feed.version)
            batch = await nearby.changes(at)
    assert "relay: changes" in wire.asked
    assert (batch.stream, batch.is_reset) == (at.stream, False)


async def test_a_new_listing_comes_from_the_relay_where_that_follows_the_same_registry(
    registry: LocalRegistry, copy: NodeCopy
) -> None:
    await registry.register(joins(1, "agent-1").registration)
    wire = Wire(registry, copy)
    nearby = wire.nearby()
    await nearby.changes(FeedQuestion(ALL))
    batch = await nearby.changes(FeedQuestion(ALL, "an earlier one", 7))
    assert (batch.is_reset, batch.stream) == (True, registry.members.feed.stream)
    assert [row.instance_id for row in (await nearby.page(ALL)).items] == [iid(1)]
    assert wire.asked[-3:] == ["relay: changes", "registry", "relay: page"]


async def test_a_relay_that_is_older_than_a_listing_confirms_none(
    registry: LocalRegistry, upstream: Wire, copy: NodeCopy
) -> None:
    await registry.register(joins(1, "agent-1").registration)
    assert (await copy.changes(FeedQuestion(ALL))).complete
    stream = registry.members.feed.stream
    wire = Wire(registry, copy)
    list_now = wire.page
    changed: list[str] = []

    async def list_later(*args: Any, **options: Any) -> Listing:
        await registry.set_status(iid(1), Status.ALIVE, 2)
        relayed = FeedQuestion(ALL, stream, registry.members.feed.version)
        assert await eventually(lambda: is_complete(copy, relayed), every_s=0.001)
        # from here on the relay hears nothing, and has answers for its processes
        asked = len(upstream.asked)
        upstream.is_there.clear()
        await eventually(lambda: len(upstream.asked) > asked, every_s=0.001)
        await registry.deregister(["agent-1"], "its end")
        return await list_now(*args, **options)

    with mock.patch.object(wire, "page", list_later):
        follower = Follower(wire.nearby(), times=TIMES, on_change=changed.append)
        follower.start()
        assert await eventually(lambda: wire.asked.count("relay: changes") > 2, every_s=0.001)
        # the instance is dead, and the relay, which has not heard of it, does not bring it back
        assert (changed, held(follower), follower.is_current) == ([], [], False)
        upstream.is_there.set()
        assert await follower.until_current(5.0)
    at_last = held(follower), follower.view.version, follower.resets
    assert at_last == ([], registry.members.feed.version, 1)
    await follower.stop()


async def is_complete(copy: NodeCopy, question: FeedQuestion) -> bool:
    return (await copy.changes(question)).complete


async def test_what_the_registry_has_more_of_is_read_from_it(registry: LocalRegistry, copy: NodeCopy) -> None:
    wire = Wire(registry, copy)
    nearby = wire.nearby()
    await nearby.changes(FeedQuestion(ALL))
    asked = registry.changes

    async def in_parts(question: FeedQuestion) -> FeedBatch:
        return replace(await asked(question), has_more=wire.asked.count("registry") < 3)

    with mock.patch.object(registry, "changes", in_parts), mock.patch.object(copy, "changes", side_effect=FULL):
        at = FeedQuestion(ALL, registry.members.feed.stream, registry.members.feed.version)
        for _ in range(2):
            # a relay that has no place for the process leaves the answer to the registry
            assert (await nearby.changes(at)).complete
    assert wire.asked == ["registry", "relay: changes", "registry", "registry"]


async def test_a_relay_sends_the_loads_that_it_has_received_under_the_registrys_numbers(
    registry: LocalRegistry, copy: NodeCopy
) -> None:
    for number in (1, 2):
        await registry.register(joins(number, "several").registration)
    await registry.beat_many([iid(1), iid(2)], {iid(1): 1.0, iid(2): 2.0})
    wire = Wire(registry, copy)
    follower = Follower(wire.nearby(), times=replace(TIMES, loads_s=0.01))
    follower.start()
    follower.want_loads()
    await eventually(lambda: follower.view.loads == {iid(1): 1.0, iid(2): 2.0}, every_s=0.001)
    await eventually(lambda: "relay: changes" in wire.asked, every_s=0.001)
    asked = wire.asked.count("registry")
    await registry.beat_many([iid(2)], {iid(2): 3.0})
    await eventually(lambda: follower.view.loads == {iid(1): 1.0, iid(2): 3.0}, every_s=0.001)
    assert follower.view.loads_number == registry.members.loads.number
    assert wire.asked.count("registry") == asked
    await follower.stop()


async def test_a_copy_that_nobody_asks_for_is_given_up(registry: LocalRegistry, upstream: Wire) -> None:
    await registry.register(joins(1, "agent-1").registration)
    copy = NodeCopy(upstream, times=TIMES, ready_s=5.0, kept_s=0.05)
    assert (await copy.page(ALL)).packed
    await eventually(lambda: not copy.is_kept, every_s=0.001)
    assert copy.instances == 0
    # and made again
    assert (await copy.changes(FeedQuestion(ALL))).complete
    assert copy.instances == 1
    await copy.close()


def test_a_copy_repeats_the_end_of_an_instance_that_it_never_had() -> None:
    registry = Feed("here", 100)
    registry.epoch = "epoch-1"
    row = instance(1)
    registry.append(None, row)
    reset = registry.since(None, 0, ALL)
    registry.append(row, None)
    # the copy lists after the end, so that it has no such instance, and then gets what happened since the reset
    copy = Feed("here", 100, compacts=True)
    copy.become(reset.stream, reset.version, reset.epoch)
    copy.repeat(registry.since("here", reset.version, ALL), lambda _: None, listed_at=registry.version)
    (change,) = copy.since("here", reset.version, replace(ALL, organ_id="any")).changes
    assert (change.instance_id, change.logical_id, change.instance, change.is_end) == (iid(1), "agent", None, True)


def test_a_copy_that_compacts_serves_followers_from_before_compacted_changes() -> None:
    registry, copy = (Feed("here", 5, compacts=True) for _ in range(2))
    rows = {number: instance(number) for number in range(1, 40)}
    state: dict[str, Any] = {}

    def repeat() -> None:
        while True:
            batch = registry.since("here", copy.version, ALL, may_compact=True, most=7)
            copy.repeat(batch, state.get)
            for change in batch.changes:
                state[change.instance_id] = change.instance
            if not batch.has_more:
                return

    for feed in (registry, copy):
        feed.become("here", 0, "epoch-1")
    for row in list(rows.values())[:3]:
        registry.append(None, row)
    repeat()
    behind = copy.version
    for row in list(rows.values())[3:]:
        registry.append(None, row)
    registry.append(rows[1], None)
    repeat()
    assert copy.version == registry.version
    batch = copy.since("here", behind, ALL, may_compact=True)
    assert (batch.is_reset, batch.is_compacted, batch.version) == (False, True, registry.version)
    assert {change.instance_id: change.instance for change in batch.changes} == {
        row.instance_id: None if number == 1 else row for number, row in rows.items() if number > 3 or number == 1
    }
    assert copy.since("here", behind, ALL).is_reset


async def test_a_server_of_a_feed_has_a_bounded_number_of_places() -> None:
    server = FeedServer(Feed("here", 5), FeedBounds(1), lambda number, _: ({}, number), Clock())
    await server.changes(FeedQuestion(ALL, follower="first"))
    assert server.followers == 1
