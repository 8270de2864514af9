"""A relay serves followers from its copy: with the registry's stream and versions, and never as newer than it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from seedcore.core.answers import InstanceFilter, Listing
from seedcore.core.clock import Clock
from seedcore.core.errors import FollowersFullError
from seedcore.core.feed import Feed, FeedBatch
from seedcore.core.paging import decode_cursor
from seedcore.registry.following.follower import Follower, FollowTimes
from seedcore.registry.following.nearby import Nearby
from seedcore.registry.following.serving import FeedQuestion, FeedServer
from seedcore.registry.node.copy import NodeCopy
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.memory import Tables
from tests.builders import START, iid, instance, joins
from tests.local import LocalRegistry
from tests.unit.registries import joined_registry
from tests.waiting import eventually

ALL = InstanceFilter(statuses=None, fresh_only=False)
TIMES = FollowTimes(wait_s=0.02, retry_s=0.001, retry_longest_s=0.01)
CONFIG = RegistryConfig("cluster", flush_interval_s=0.01, linger_s=0.0, feed_capacity=5, direct_followers=0)


class Wire:
    """A connection to a registry, and to a relay of this node, of which the registry may be silent."""

    def __init__(self, registry: Any, copy: NodeCopy | None = None, relay: str | None = "relay") -> None:
        self._registry = registry
        self._copy = copy
        self._relay = relay
        self.is_there = asyncio.Event()
        self.is_there.set()
        self.used: str | None = None
        self.asked: list[str] = []

    async def changes(self, *args: Any, **options: Any) -> FeedBatch:
        self.asked.append("registry")
        await self.is_there.wait()
        batch: FeedBatch = await self._registry.changes(*args, **options)
        return replace(batch, relay=self._relay)

    async def page(self, *args: Any, **options: Any) -> Listing:
        await self.is_there.wait()
        listing: Listing = await self._registry.page(*args, **options)
        return listing

    async def ask_relay(self, method: str, *args: Any, waits_s: float = 0.0) -> Any:
        if self._copy is None or self.used is None:
            return None
        self.asked.append("relay")
        return await getattr(self._copy, method)(*args)

    async def use_relay(self, name: str) -> None:
        self.used = name


@pytest.fixture
async def registry() -> AsyncIterator[LocalRegistry]:
    async with joined_registry(CONFIG, Tables(START)) as registry:
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
    sources: Any = [Nearby(wire, lambda: "node") for wire in wires]  # type: ignore[arg-type]
    followers = [Follower(source, times=TIMES) for source in sources]
    for follower in followers:
        follower.start()
    for number in range(1, 30):
        await registry.register(joins(number, f"agent-{number}").registration)
    await eventually(lambda: all(len(held(one)) == 29 and one.is_current for one in followers), every_s=0.001)
    for wire in wires:
        # the registry named the relay in its first answer, and was asked no more
        assert wire.asked[0] == "registry"
        assert wire.asked.count("relay") > wire.asked.count("registry")
    versions = {(one.view.stream, one.view.version) for one in followers}
    assert versions == {(registry.members.feed.stream, registry.members.feed.version)}
    assert {one.resets for one in followers} == {1}
    for follower in followers:
        await follower.stop()


async def test_an_answer_of_a_relay_is_as_old_as_what_the_relay_knows(upstream: Wire, registry: LocalRegistry) -> None:
    now_s = 0.0
    copy = NodeCopy(upstream, Clock(lambda: now_s), replace(TIMES, max_age_s=4.0), ready_s=0.05)
    await registry.register(joins(1, "agent-1").registration)
    wire: Any = Wire(registry, copy)
    follower = Follower(Nearby(wire, lambda: "node"), times=TIMES, clock=Clock(lambda: now_s))
    follower.start()
    await eventually(
        lambda: held(follower) == [iid(1)] and follower.is_current and "relay" in wire.asked, every_s=0.001
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
    assert not (await copy.changes(FeedQuestion(ALL, None, 0))).complete
    assert not (await copy.page(ALL)).complete
    upstream.is_there.set()
    await eventually(lambda: copy.is_kept, every_s=0.001)
    stream = registry.members.feed.stream
    assert (await copy.changes(FeedQuestion(ALL, stream, 0))).complete
    ahead = await copy.changes(FeedQuestion(ALL, stream, registry.members.feed.version + 5))
    assert (ahead.complete, ahead.is_reset) == (False, False)
    # another epoch is not in the copy
    assert not (await copy.page(replace(ALL, epoch="another"))).complete


async def test_a_registry_with_many_followers_names_the_relay_of_their_node(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, direct_followers=1, max_followers=3)
    async with joined_registry(config, Tables(START)) as registry:
        names = {"north": "its relay"}
        monkeypatch.setattr(registry.expiry.watch, "relay_of", names.get)
        answers = [await registry.changes(ALL, None, 0, follower=str(n), node_id="north") for n in range(3)]
        assert [answer.relay for answer in answers] == [None, None, "its relay"]
        # without a place, an answer that is not complete names it too
        refused = await registry.changes(ALL, answers[0].stream, 0, follower="more", node_id="north")
        assert (refused.complete, refused.relay, refused.is_reset) == (False, "its relay", False)
        with pytest.raises(FollowersFullError):
            await registry.changes(ALL, None, 0, follower="more", node_id="south")


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
    server = FeedServer(Feed("here", 5), 1, 10.0, Clock())
    await server.changes(FeedQuestion(ALL, None, 0, follower="first"))
    assert server.followers == 1
