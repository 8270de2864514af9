"""Waits and watches of a manager, against real agents."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from seedcore.core.causes import CauseKind
from seedcore.core.errors import CannotKnowError
from seedcore.core.events import AgentEvent, EventKind
from seedcore.core.lifecycle import Status
from seedcore.core.not_ready import NotReady, NotReadyError
from seedcore.core.timeouts import within
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.caller.watching import Watch
from seedcore.registry.ray_support.lookup import actor_id_of
from seedcore.settings import Mode, Settings
from seedcore.tier0 import Tier0MemoryManager
from tests.cluster.agents import Worker
from tests.waiting import eventually

pytestmark = pytest.mark.usefixtures("registry")

LONG_S = 60.0


@pytest_asyncio.fixture
async def caller(settings: Settings) -> AsyncIterator[Tier0MemoryManager]:
    """A manager that made none of the agents."""
    caller = Tier0MemoryManager(settings)
    yield caller
    await caller.close()


async def create(manager: Tier0MemoryManager, settings: Settings, name: str, **options: Any) -> int:
    await manager.create_agent(name, agent_class=Worker, arguments={"settings": settings}, **options)
    pid: int = await manager.execute_task_on_agent(name, "pid")
    return pid


async def test_wait_returns_the_handles_of_agents_that_start_meanwhile(
    manager: Tier0MemoryManager, caller: Tier0MemoryManager, settings: Settings
) -> None:
    names = ["w0", "w1", "w2"]
    by_ids = asyncio.create_task(caller.wait_for(ids=names, timeout_s=LONG_S))
    by_organ = asyncio.create_task(caller.wait_for(organ_id="vision", count=2, timeout_s=LONG_S))
    for name in names:
        assert not by_ids.done()
        await create(manager, settings, name, organ_id="vision")
    handles = await by_ids
    assert [await handle.execute_task.remote("a task") for handle in handles] == ["a task"] * 3
    found = {actor_id_of(handle) for handle in await by_organ}
    assert len(found) == 2
    assert found <= {actor_id_of(handle) for handle in handles}


async def test_deadline_names_every_missing_agent_and_why(
    manager: Tier0MemoryManager, caller: Tier0MemoryManager, settings: Settings
) -> None:
    await create(manager, settings, "ready", organ_id="vision")
    pid = await create(manager, settings, "killed", organ_id="vision", max_restarts=0)
    await create(manager, settings, "drained", organ_id="vision")
    await caller.connection.drain(["drained"], "a new disk", "ann")
    starting = RegistryClient(logical_id="starting", organ_id="vision", settings=settings)
    await starting.register()
    os.kill(pid, signal.SIGKILL)

    async def is_dead() -> bool:
        return any(row.logical_id == "killed" for row in await caller.connection.deaths())

    await eventually(is_dead)
    ids = ["ready", "killed", "drained", "starting", "never"]
    with pytest.raises(NotReadyError) as refused:
        await caller.wait_for(ids=ids, timeout_s=0.5)
    assert re.sub(r"\d+(\.\d+)? s\b", "N s", re.sub(r"pid \d+", "pid N", str(refused.value))) == (
        "1 of 5 agents ready after N s: 'killed' died N s ago: process killed: SIGKILL (pid N); "
        "'drained' has been drained by ann for N s: a new disk; 'starting' has been starting for N s; "
        "'never' has never registered"
    )
    assert [one.reason for one in refused.value.missing] == [
        NotReady.DEAD,
        NotReady.DRAINING,
        NotReady.STARTING,
        NotReady.NEVER_REGISTERED,
    ]
    with pytest.raises(NotReadyError) as refused:
        await caller.wait_for(organ_id="vision", count=5, timeout_s=0.5)
    assert {(one.logical_id, one.reason) for one in refused.value.missing} == {
        ("killed", NotReady.DEAD),
        ("drained", NotReady.DRAINING),
        ("starting", NotReady.STARTING),
        (None, NotReady.NEVER_REGISTERED),
    }
    await starting.set_status(Status.DEAD, "enough")


async def test_agent_that_does_not_report_is_waited_for_by_its_name(
    manager: Tier0MemoryManager, caller: Tier0MemoryManager, settings: Settings
) -> None:
    silent = settings.model_copy(update={"registry_enabled": False})
    waiting = asyncio.create_task(Tier0MemoryManager(settings, mode=Mode.RAY).wait_for(ids=["quiet"], timeout_s=LONG_S))
    await manager.create_agent("quiet", agent_class=Worker, arguments={"settings": silent})
    [handle] = await waiting
    assert await handle.execute_task.remote("a task") == "a task"
    # the registry does not know it: Ray's listing does
    assert len(await caller.wait_for(ids=["quiet"], timeout_s=LONG_S)) == 1


async def next_of(watch: Watch, *kinds: EventKind) -> AgentEvent:
    while True:
        event = await within(anext(watch), LONG_S)
        if event.kind in kinds:
            return event


async def test_watch_sees_an_agent_join_change_and_die_with_its_cause(
    manager: Tier0MemoryManager, caller: Tier0MemoryManager, settings: Settings
) -> None:
    async with caller.watch(ids=["seen"]) as watch:
        pid = await create(manager, settings, "seen", max_restarts=0)
        joined = await next_of(watch, EventKind.JOINED)
        assert joined.logical_id == "seen"
        alive = await next_of(watch, EventKind.CHANGED)
        assert alive.is_ready
        await caller.connection.drain(["seen"], "a new disk", "ann")
        held = await next_of(watch, EventKind.NOT_READY)
        assert held.instance is not None
        assert [hold.reason for hold in held.instance.holds] == ["a new disk"]
        await caller.connection.undrain(["seen"])
        os.kill(pid, signal.SIGKILL)
        died = await next_of(watch, EventKind.DIED)
        assert died.cause is not None
        assert died.cause.kind is CauseKind.PROCESS_KILLED
        assert died.instance_id == alive.instance_id
    # another process, after the fact
    later = Tier0MemoryManager(settings)
    async with later.watch(ids=["seen"], since=held.position) as watch:
        assert (await next_of(watch, EventKind.DIED)).position == died.position
    await later.close()
    with pytest.raises(StopAsyncIteration):
        await anext(watch)


async def test_watch_without_a_registry_to_follow_is_refused(settings: Settings) -> None:
    with pytest.raises(CannotKnowError, match="follows no registry"):
        Tier0MemoryManager(settings, mode=Mode.RAY).watch()


@pytest.mark.slow
async def test_wait_returns_within_50_ms_of_the_last_agent_being_ready(
    manager: Tier0MemoryManager, caller: Tier0MemoryManager, settings: Settings
) -> None:
    """200 trials: from the call that makes the agent ready to the handle, beside a poll every second."""
    await create(manager, settings, "flips")
    [handle] = await caller.wait_for(ids=["flips"], timeout_s=LONG_S)
    assert caller.follower is not None
    waits_s, polls_s, since_call_s = [], [], []

    async def poll() -> float:
        await eventually(lambda: caller.get_agent("flips"), every_s=1.0)
        return time.perf_counter()

    async def waited() -> float:
        [found] = await caller.wait_for(ids=["flips"], timeout_s=LONG_S)
        assert actor_id_of(found) == actor_id_of(handle)
        return time.perf_counter()

    async def is_refused() -> bool:
        return await caller.get_agent("flips") is None

    for trial in range(200):
        await caller.connection.drain(["flips"])
        await eventually(is_refused, every_s=0.001)
        waiting = asyncio.create_task(waited())
        polling = asyncio.create_task(poll()) if trial % 10 == 0 else None
        await asyncio.sleep(0.02)
        called_s = time.perf_counter()
        await caller.connection.undrain(["flips"])
        ready_s = time.perf_counter()
        returned_s = await waiting
        waits_s.append(returned_s - ready_s)
        since_call_s.append(returned_s - called_s)
        if polling is not None:
            polls_s.append(await polling - ready_s)
    p99_ms = statistics.quantiles(waits_s, n=100)[98] * 1000
    figures = (
        f"wait: p50 {statistics.median(waits_s) * 1000:.1f} ms, p99 {p99_ms:.1f} ms of {len(waits_s)}, "
        f"since the call that made it ready p99 {statistics.quantiles(since_call_s, n=100)[98] * 1000:.1f} ms; "
        f"poll: p50 {statistics.median(polls_s) * 1000:.0f} ms of {len(polls_s)}"
    )
    sys.stderr.write(f"\n{figures}\n")
    assert p99_ms < 50, figures
    assert p99_ms < statistics.median(polls_s) * 1000
