"""Agents on real Ray: they register, beat, drain, stop, die and come back."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from seedcore.agents import RayAgent
from seedcore.composition import start_registry
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.errors import InvalidInputError, NotAcceptingWorkError, RegistryUnavailableError, RetiredEpochError
from seedcore.core.lifecycle import Status
from seedcore.registry import RegistryConnection, Reporter, ThreadReporter
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from tests.cluster.agents import Async, Blocking, Grouped, Worker
from tests.waiting import eventually


async def best(registry: RegistryConnection, logical_id: str) -> Any:
    return (await registry.resolve([logical_id])).value[0].instance


async def test_an_agent_in_process_registers_beats_drains_and_stops(
    registry: RegistryConnection, settings: Settings
) -> None:
    agent = Worker("in-process", "desk", settings=settings, labels={"a": "b"})
    await agent.start()
    first = await best(registry, "in-process")
    assert (first.status, first.organ_id, first.labels) == (Status.ALIVE, "desk", {"a": "b"})
    assert first.pid == os.getpid()

    async def has_beaten() -> bool:
        return (await registry.health()).flush.beats_committed > 0

    await eventually(has_beaten)
    assert await agent.drain("enough", timeout_s=1)
    assert await best(registry, "in-process") is None
    await agent.stop("the end")
    described = await registry.describe("in-process")
    assert (described.live, described.instances[0].cause) == ((), word("the end"))


async def test_drain_waits_for_running_tasks_and_refuses_new_ones(
    registry: RegistryConnection, settings: Settings
) -> None:
    agent = Worker("busy", settings=settings)
    await agent.start()
    running = asyncio.create_task(agent.execute_task("sleep"))

    async def is_running() -> bool:
        return (await agent.get_heartbeat()).tasks_running == 1

    await eventually(is_running)
    assert not await agent.drain(timeout_s=0.05)
    with pytest.raises(NotAcceptingWorkError, match="draining"):
        await agent.execute_task("more")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert await agent.drain(timeout_s=1)
    await agent.stop()
    with pytest.raises(NotAcceptingWorkError):
        await agent.start()


def word(detail: str) -> Cause:
    """The cause that the agent itself reports."""
    return Cause(CauseKind.AGENT, detail)


async def live(registry: RegistryConnection, logical_id: str) -> list[tuple[Status, Cause | None]]:
    """Status and cause of each live instance, as the registry knows them."""
    return [(row.instance.status, row.instance.cause) for row in (await registry.describe(logical_id)).live]


async def test_an_agent_drained_before_its_start_reports_it_when_it_starts(
    registry: RegistryConnection, settings: Settings
) -> None:
    agent = Worker("early-drain", settings=settings)
    assert await agent.drain("not yet")
    await agent.start()
    assert agent.status is Status.DRAINING
    assert await live(registry, "early-drain") == [(Status.DRAINING, word("not yet"))]
    await agent.stop()


async def test_a_cause_beyond_its_limits_changes_neither_agent_nor_registry(
    registry: RegistryConnection, settings: Settings
) -> None:
    agent = Worker("wordy", settings=settings)
    await agent.start()
    for refused in (agent.drain("x" * 2000), agent.stop("x" * 2000), agent.drain("fine", timeout_s=-1.0)):
        with pytest.raises(InvalidInputError):
            await refused
    assert agent.status is Status.ALIVE
    assert await live(registry, "wordy") == [(Status.ALIVE, None)]
    assert await agent.drain("enough")
    assert await live(registry, "wordy") == [(Status.DRAINING, word("enough"))]
    await agent.stop("the end")
    assert (await registry.describe("wordy")).instances[0].cause == word("the end")


async def test_a_drain_that_could_not_be_said_is_said_by_the_next(
    registry: RegistryConnection, settings: Settings
) -> None:
    agent = Worker("again", settings=settings)
    await agent.start()
    client = agent._reporter.client
    async with client._calls:
        # a beat is under way, so the client has not taken it when its caller gives up
        draining = asyncio.create_task(agent.drain("first"))
        await asyncio.sleep(0)
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
    with pytest.raises(NotAcceptingWorkError):
        await agent.execute_task("more")
    assert await agent.drain("second")
    assert await live(registry, "again") == [(Status.DRAINING, word("second"))]
    await agent.stop()


async def test_an_agent_that_the_registry_refuses_has_not_started(
    registry: RegistryConnection, settings: Settings
) -> None:
    for epoch in ("one", "two"):
        await registry.set_current_epoch(epoch)
    agent = Worker("outdated", settings=settings.model_copy(update={"cluster_epoch": "one"}))
    for _ in range(2):
        with pytest.raises(RetiredEpochError):
            await agent.start()
        assert agent.status is Status.STARTING
        with pytest.raises(NotAcceptingWorkError, match="starting"):
            await agent.execute_task("work")


@pytest.mark.parametrize("timeout_s", ["x", float("nan"), -0.1, True, [1.0]])
async def test_a_drain_waits_for_seconds_only(settings: Settings, timeout_s: Any) -> None:
    agent = Worker("bounded", settings=settings.model_copy(update={"registry_enabled": False}))
    await agent.start()
    with pytest.raises(InvalidInputError, match="timeout_s"):
        await agent.drain(timeout_s=timeout_s)
    assert agent.status is Status.ALIVE
    await agent.stop()


async def test_a_thread_reporter_is_stopped_by_many_at_once(registry: RegistryConnection, settings: Settings) -> None:
    reporter = ThreadReporter("shared", settings=settings)
    with ThreadPoolExecutor(4) as pool:

        async def at_once(step: Any) -> list[Any]:
            loop = asyncio.get_running_loop()
            return await asyncio.gather(*(loop.run_in_executor(pool, step) for _ in range(4)))

        await at_once(reporter.start)
        assert await live(registry, "shared") == [(Status.ALIVE, None)]
        await at_once(reporter.drain)
        await at_once(reporter.undrain)
        assert [status for status, _ in await live(registry, "shared")] == [Status.ALIVE]
        began_s = time.monotonic()
        receipts = await at_once(reporter.stop)
        assert time.monotonic() - began_s < 10
    assert [receipt.status for receipt in receipts if receipt is not None] == [Status.DEAD]
    assert await live(registry, "shared") == []
    assert not any(thread.name == "seedcore-loop" for thread in threading.enumerate())


async def test_the_base_class_names_what_to_override(settings: Settings) -> None:
    agent = RayAgent("bare", settings=settings.model_copy(update={"registry_enabled": False}))
    await agent.start()
    with pytest.raises(InvalidInputError, match="override handle_task"):
        await agent.execute_task("anything")
    stats = await agent.get_summary_stats()
    assert (stats.tasks_failed, stats.tasks_running, stats.is_reported) == (1, 0, False)
    await agent.stop()


async def test_a_disabled_registry_means_not_one_connection(
    registry: RegistryConnection, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await registry.health()

    def refuse(*_arguments: object) -> None:
        raise AssertionError("a connection was tried")

    disabled = settings.model_copy(update={"registry_enabled": False})
    agent = Worker("disabled", settings=disabled)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    await agent.start()
    assert await agent.execute_task("echo") == "echo"
    await agent.drain(timeout_s=1)
    await agent.stop()
    monkeypatch.undo()
    after = await registry.health()
    assert (after.instances, after.flush.beats_offered) == (before.instances, before.flush.beats_offered)


async def test_an_agent_started_without_a_registry_reports_once_there_is_one(
    ray_cluster: None, settings: Settings
) -> None:
    agent = Worker("early", settings=settings)
    await agent.start()
    assert await agent.execute_task("works") == "works"
    assert "the registry is away" in str((await agent.get_summary_stats()).report_problem)
    await start_registry(settings)
    registry = RegistryConnection(settings.namespace, settings.call_timeout_s)

    async def is_registered() -> bool:
        return (await best(registry, "early")) is not None

    await eventually(is_registered)
    await agent.stop()
    await stop_registry(settings.namespace)


async def test_a_blocking_class_owns_a_reporter_in_two_lines(registry: RegistryConnection, settings: Settings) -> None:
    actor: Any = ray.remote(Blocking)
    handle = actor.options(name="old-one", namespace=settings.namespace, num_cpus=0).remote("old-one", settings)
    pid = await handle.pid.remote()
    instance = await best(registry, "old-one")
    assert (instance.pid, instance.organ_id, instance.actor_name) == (pid, "blocking", "old-one")
    await handle.finish.remote()
    assert (await registry.describe("old-one")).instances[0].cause == word("done")
    ray.kill(handle)


async def test_an_async_class_owns_a_reporter_in_two_lines(
    registry: RegistryConnection, settings: Settings, manager: Tier0MemoryManager
) -> None:
    actor: Any = ray.remote(Async)
    handle = actor.options(name="own-name", namespace=settings.namespace, num_cpus=0).remote("logical", settings)
    instance_id = await handle.begin.remote()
    instance = await best(registry, "logical")
    assert (instance.instance_id, instance.actor_name) == (instance_id, "own-name")
    resolved = await manager.resolve("logical")
    assert await resolved.pid.remote() == await handle.pid.remote()
    ray.kill(handle)


async def test_a_restarted_actor_is_a_new_instance_and_the_old_one_is_dead(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    handle = await manager.create_agent("cat", agent_class=Worker, arguments={"settings": settings})
    first = await best(registry, "cat")
    os.kill(first.pid, signal.SIGKILL)

    async def replaced() -> Any:
        now = await best(registry, "cat")
        return now if now is not None and now.instance_id != first.instance_id else None

    second = await eventually(replaced)
    assert second.actor_id == first.actor_id

    async def cause_of_death() -> Cause | None:
        instances = {row.instance_id: row for row in (await registry.describe("cat")).instances}
        return instances[first.instance_id].cause

    # by the relay, which knows the signal where it watched the process; where it had no time yet, by the lease
    cause = await eventually(cause_of_death)
    assert cause is not None
    assert cause.kind in {CauseKind.PROCESS_KILLED, CauseKind.PROCESS_EXITED, CauseKind.LEASE_EXPIRED}
    assert await handle.get_id.remote() == "cat"


async def test_a_stopped_process_turns_late_and_is_back_without_a_new_registration(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("sleeper", agent_class=Worker, arguments={"settings": settings})
    first = await best(registry, "sleeper")

    async def verdict() -> str:
        return (await registry.describe("sleeper")).live[0].verdict.value

    async def is_late() -> bool:
        return await verdict() == "late"

    async def is_fresh() -> bool:
        return await verdict() == "fresh"

    os.kill(first.pid, signal.SIGSTOP)
    try:
        await eventually(is_late)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    await eventually(is_fresh)
    assert (await best(registry, "sleeper")).instance_id == first.instance_id


async def test_drain_in_one_concurrency_group_ends_with_the_task_of_another(
    registry: RegistryConnection, settings: Settings, tmp_path: Path
) -> None:
    actor: Any = ray.remote(concurrency_groups={"work": 2, "control": 2})(Grouped)
    options = {"name": "grouped", "namespace": settings.namespace, "num_cpus": 0}
    handle = actor.options(**options).remote("grouped", settings=settings)
    await handle.start.remote()
    running = handle.execute_task.remote(str(tmp_path / "works"))
    await eventually((tmp_path / "works").exists)
    draining = handle.drain.options(concurrency_group="control").remote("enough", timeout_s=3600)

    async def is_draining() -> bool:
        return await live(registry, "grouped") == [(Status.DRAINING, word("enough"))]

    await eventually(is_draining)
    (tmp_path / "works").unlink()
    assert await running == "done"
    assert await draining
    await handle.stop.options(concurrency_group="work").remote("the end")
    assert (await registry.describe("grouped")).instances[0].cause == word("the end")
    ray.kill(handle)


async def test_calls_of_agents_are_bounded_by_the_registry_and_not_by_their_environment(
    ray_cluster: None, settings: Settings
) -> None:
    hello = await start_registry(settings.model_copy(update={"call_timeout_s": 0.5, "durable_wait_s": 0.1}))
    patient = RegistryConnection(settings.namespace, 3600.0)
    await patient.beat_many([])
    os.kill(hello.pid, signal.SIGSTOP)
    try:
        with pytest.raises(RegistryUnavailableError, match="no answer to beat_many"):
            await patient.beat_many([])
    finally:
        os.kill(hello.pid, signal.SIGCONT)
    await stop_registry(settings.namespace)


@pytest.mark.parametrize(
    "details",
    [
        {"logical_id": ""},
        {"logical_id": "x" * 256},
        {"logical_id": "a\x00"},
        {"logical_id": "a", "labels": {f"k{n}": "" for n in range(10_000)}},
        {"logical_id": "a", "metadata": {"n": float("nan")}},
        {"logical_id": "a", "organ_id": ""},
    ],
)
def test_a_reporter_refuses_bad_input_before_anything_is_sent(settings: Settings, details: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        Reporter(settings=settings, **details)
