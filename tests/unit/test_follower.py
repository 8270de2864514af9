"""A follower trusts its copy as long as the registry vouches for it, and not a moment longer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import RegistryUnavailableError
from seedcore.core.lifecycle import Status
from seedcore.core.paging import decode_cursor
from seedcore.registry.caller import follower as module
from seedcore.registry.caller.follower import Follower
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.registry import Registry
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START, iid, joins
from tests.unit.conftest import Membership
from tests.unit.registries import joined_registry
from tests.waiting import eventually

CONFIG = RegistryConfig("cluster", flush_interval_s=0.01, linger_s=0.0, epoch_check_s=0.01, feed_capacity=5)


@pytest.fixture
def tables() -> Tables:
    return Tables(START)


@pytest.fixture
async def registry(tables: Tables) -> AsyncIterator[Registry]:
    async with joined_registry(CONFIG, tables) as registry:
        yield registry


@pytest.fixture
async def follower(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Follower]:
    monkeypatch.setattr(module, "_WAIT_S", 0.05)
    connection: Any = registry
    follower = Follower(connection)
    follower.start()
    assert await follower.until_current(10.0)
    yield follower
    await follower.stop()
    assert not follower.is_current


def held(follower: Follower) -> list[str]:
    rows, _ = follower.view.page(InstanceFilter(statuses=None), decode_cursor(None), 1000)
    return [row.instance_id for row in rows]


async def test_it_hears_of_whom_it_concerns(registry: Registry, follower: Follower) -> None:
    told: list[str] = []
    follower._on_change = told.append
    for number in (1, 2):
        await registry.register(joins(number, f"agent-{number}", organ_id=f"organ-{number}").registration)
    await eventually(lambda: held(follower) == [iid(1), iid(2)], every_s=0.001)
    await registry.set_status(iid(1), Status.DEAD)
    await eventually(lambda: held(follower) == [iid(2)], every_s=0.001)
    assert set(told) == {"agent-1", "agent-2"}
    assert told.count("agent-1") >= 2


async def test_one_that_fell_behind_what_the_feed_remembers_begins_anew(registry: Registry, follower: Follower) -> None:
    resets: list[int] = []
    follower._on_reset = lambda: resets.append(1)
    await asyncio.gather(*(registry.register(joins(n, f"agent-{n}").registration) for n in range(1, 40)))
    await eventually(lambda: len(held(follower)) == 39 and follower.is_current, every_s=0.001)
    assert len(resets) == follower.resets - 1 >= 1


async def test_the_copy_of_a_superseded_registry_is_trusted_no_more(
    registry: Registry, follower: Follower, tables: Tables
) -> None:
    await registry.register(joins(1).registration)
    await eventually(lambda: held(follower) == [iid(1)], every_s=0.001)
    rival = MemoryStore(lambda: START, tables)
    await rival.begin("cluster", None, 15.0)
    await eventually(lambda: not follower.is_current, every_s=0.001)
    # and stays so, however often it asks
    before = follower.resets
    for _ in range(5):
        with pytest.raises(RegistryUnavailableError):
            await follower._step()
    assert not follower.is_current
    assert follower.resets == before


async def test_a_copy_of_one_ray_session_is_not_trusted_in_the_next_before_it_is_listed_again(
    connected: Membership, registry: Registry, follower: Follower
) -> None:
    resets: list[int] = []
    follower._on_reset = lambda: resets.append(1)
    for change in (connected.leave, connected.join):
        assert follower.is_current
        change()
        assert not follower.is_current
        await eventually(lambda: follower.is_current, every_s=0.001)
    # the handles that are kept with it are dropped
    assert len(resets) == 2


async def test_an_answer_that_was_read_late_is_trusted_from_when_it_was_given(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    await follower.stop()
    follower.start()
    assert await follower.until_current(10.0)
    real = time.monotonic
    # this process was stalled for a minute between question and answer
    moments = iter([real(), real() + 60.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(moments, real() + 60.0))
    await follower._step()
    assert not follower.is_current


async def test_above_the_bound_those_who_have_a_place_keep_it_and_the_others_wait(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WAIT_S", 0.02)
    monkeypatch.setattr(module, "_FULL_S", 0.05)
    monkeypatch.setattr(module, "_FULL_MAX_S", 0.1)
    async with joined_registry(
        replace(CONFIG, max_followers=2, place_kept_s=0.5, feed_capacity=1000), tables
    ) as registry:
        connection: Any = registry
        followers = [Follower(connection) for _ in range(6)]
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
        # who has no place costs the registry no listing
        assert [follower.resets for follower in followers] == lists
        assert sum(lists) == 2
        await first[0].stop()
        await eventually(lambda: len(current()) == 2)
        assert first[1].is_current
        for follower in followers:
            await follower.stop()
