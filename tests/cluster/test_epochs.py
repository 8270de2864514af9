"""Blue and green on a real cluster: who ended with its epoch comes back in no other."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from pydantic import SecretStr
from ray.exceptions import ActorDiedError

from seedcore.composition import start_registry
from seedcore.core.causes import CauseKind
from seedcore.core.errors import NotAcceptingWorkError, RetiredEpochError
from seedcore.core.lifecycle import Status
from seedcore.registry import RegistryConnection
from seedcore.registry.ray_support.directory import RayDirectory
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec
from tests.cluster.agents import Blocking, Patient, Stays, Worker
from tests.servers import PostgresServer
from tests.waiting import eventually

PAGE = "docs/how-to/epochs.md"
FLIP = "seedcore epoch flip green"
RESOLUTIONS = 100
RETIRED = ("epoch-1", Status.DEAD, CauseKind.EPOCH_RETIRED)


@pytest.fixture
def as_installed(postgres18: PostgresServer) -> Iterator[Settings]:
    """The settings of what the command makes, with nothing in the environment."""
    database = postgres18.create_database()
    yield Settings(namespace="seedcore", pg_dsn=SecretStr(postgres18.dsn(database)))
    postgres18.drop_database(database)


async def type_in(folder: Path, commands: list[str]) -> None:
    """Type these into a shell."""
    seedcore = f"seedcore() {{ {sys.executable} -c 'from seedcore.cli import main; main()' \"$@\"; }}"
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", "\n".join(["set -e", seedcore, *commands])),
        cwd=folder,
        # the page's scripts use a token, which this cluster does not ask for
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_TOKEN": "of this test"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    wrote, _ = await process.communicate()
    assert process.returncode == 0, wrote.decode()


async def instances_of(registry: RegistryConnection, logical_id: str) -> list[tuple[str, Status, CauseKind | None]]:
    return sorted(
        (row.cluster_epoch, row.status, row.cause.kind if row.cause and row.status is Status.DEAD else None)
        for row in (await registry.describe(logical_id)).instances
    )


async def is_retired(registry: RegistryConnection, logical_id: str) -> bool:
    return await instances_of(registry, logical_id) == [RETIRED]


async def are_gone(settings: Settings, *names: str) -> bool:
    return not set(names) & set(await RayDirectory(settings.namespace).names())


@pytest.mark.slow
async def test_the_page_as_it_is_written_leads_every_caller_to_green(
    ray_cluster: None, as_installed: Settings, tmp_path: Path
) -> None:
    # here: it imports Ray Serve, which no other test of this file needs
    from tests.docs.test_docs import FILE_NAME, blocks_of, commands_of

    blocks = blocks_of(PAGE)
    for block in blocks:
        file = FILE_NAME.match(block.text)
        if file is not None:
            (tmp_path / file[1]).write_text(block.text)
    commands = [command for command in commands_of(blocks) if not command.startswith(("seedcore ls", "seedcore why"))]
    await start_registry(as_installed)
    registry = RegistryConnection("seedcore", as_installed.call_timeout_s)
    following = Tier0MemoryManager(as_installed)
    asking = Tier0MemoryManager(as_installed.model_copy(update={"follow": False}))
    try:
        await type_in(tmp_path, commands[: commands.index(FLIP)])
        blue = {name: (await following.locate(name)) for name in ("eye-1", "eye-2")}
        assert {one.instance.cluster_epoch for one in blue.values() if one.instance} == {"epoch-1"}
        await type_in(tmp_path, [FLIP])
        epochs: Counter[str] = Counter()
        for number in range(RESOLUTIONS):
            for manager in (following, asking):
                located = await manager.locate(f"eye-{1 + number % 2}")
                assert await located.handle.get_id.remote() == located.logical_id
                epochs[located.instance.cluster_epoch if located.instance is not None else "?"] += 1
            # two intervals of beats in all: blue has learned of it, and would have come back
            await asyncio.sleep(2 * as_installed.beat_interval_s / RESOLUTIONS)
        assert epochs == {"green": 2 * RESOLUTIONS}
        # and blue's actors end, for good
        await eventually(partial(are_gone, as_installed, "eye-1", "eye-2"))
        assert await instances_of(registry, "eye-1") == [RETIRED, ("green", Status.ALIVE, None)]
        # the file of blue, applied once more, does not take green's callers
        await type_in(tmp_path, ["! seedcore fleet up blue.yaml"])
        assert await instances_of(registry, "eye-1") == [RETIRED, ("green", Status.ALIVE, None)]
        # the rest of the page: a third epoch, in actors of one's own
        await type_in(tmp_path, commands[commands.index(FLIP) + 1 :])
        await eventually(partial(are_gone, as_installed, "eye-1@green", "eye-2@green"))
        for number in range(10):
            third = await following.locate(f"eye-{1 + number % 2}")
            assert third.instance is not None
            assert third.instance.cluster_epoch == "teal"
    finally:
        for agent in await RayDirectory("seedcore").names():
            ray.kill(ray.get_actor(agent, namespace="seedcore"))
        for manager in (following, asking):
            await manager.close()
        await stop_registry("seedcore")


@pytest.mark.parametrize("kind", ["made by the manager", "of one's own"])
async def test_an_actor_of_a_retired_epoch_that_ray_restarts_does_not_come_back_in_the_next(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings, kind: str
) -> None:
    # it must not learn of the flip before it is killed
    slow = settings.model_copy(update={"beat_interval_s": 5.0, "lease_s": 15.0})
    actor: Any
    if kind == "of one's own":
        actor_class: Any = ray.remote(Blocking)
        options = {"name": "blue", "namespace": settings.namespace, "num_cpus": 0, "max_restarts": -1}
        actor = actor_class.options(**options).remote("blue", slow)
        pid = await actor.pid.remote()
    else:
        actor = await manager.create_agent("blue", agent_class=Worker, arguments={"settings": slow})
        pid = await actor.execute_task.remote("pid")
    await eventually(partial(_is_alive, registry, "blue"))
    await registry.set_current_epoch("green")
    os.kill(pid, signal.SIGKILL)

    async def has_ended() -> bool:
        try:
            await actor.pid.remote() if kind == "of one's own" else await actor.ping.remote()
        except ActorDiedError:
            return True
        return False

    # Ray starts its process again, which is refused, and ends
    await eventually(has_ended)

    async def has_died_once() -> bool:
        ((epoch, status, cause),) = await instances_of(registry, "blue")
        ends = {CauseKind.EPOCH_RETIRED, CauseKind.PROCESS_EXITED, CauseKind.PROCESS_KILLED, CauseKind.ACTOR_DIED}
        assert cause in ends, status
        return (epoch, status) == ("epoch-1", Status.DEAD)

    await eventually(has_died_once)
    assert len(await registry.list_active(None)) == 0


async def _is_alive(registry: RegistryConnection, logical_id: str) -> bool:
    return [row.logical_id for row in await registry.list_active()] == [logical_id]


async def test_a_retired_agent_finishes_what_runs_and_takes_nothing_new(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings, tmp_path: Path
) -> None:
    handle = await manager.create_agent("busy", agent_class=Patient, arguments={"settings": settings})
    done = tmp_path / "done"
    work = handle.execute_task.remote(str(done))
    await registry.set_current_epoch("green")

    async def is_told() -> bool:
        return (await handle.get_heartbeat.remote()).status is Status.DEAD

    await eventually(is_told)
    with pytest.raises(NotAcceptingWorkError):
        await handle.execute_task.remote(str(done))
    assert not await are_gone(settings, "busy")
    done.touch()
    assert await work == "finished"
    await eventually(partial(are_gone, settings, "busy"))
    assert await is_retired(registry, "busy")


async def test_an_agent_decides_what_it_does_when_its_epoch_is_retired(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    handle = await manager.create_agent("stays", agent_class=Stays, arguments={"settings": settings})
    await registry.set_current_epoch("green")

    async def is_told() -> bool:
        return bool(await handle.execute_task.remote("") == "epoch-1")

    await eventually(is_told)
    assert "retired" in (await handle.get_summary_stats.remote()).report_problem
    assert await is_retired(registry, "stays")


async def test_an_agent_in_this_process_stops_and_the_process_goes_on(
    registry: RegistryConnection, settings: Settings
) -> None:
    agent = Worker("local", settings=settings)
    await agent.start()
    await registry.set_current_epoch("green")
    await eventually(lambda: agent.status is Status.DEAD)
    with pytest.raises(NotAcceptingWorkError):
        await agent.execute_task("")
    assert await is_retired(registry, "local")
    await agent.stop()


async def test_agents_are_made_for_the_epoch_that_was_current_when_the_making_began(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await registry.set_current_epoch("green")
    late = AgentSpec("late", None, Worker, arguments={"settings": settings}, started_epoch="epoch-1")
    made = await manager.create_agents_batch([late])
    assert "epoch 'epoch-1' is retired" in made.failures["late"]
    assert await are_gone(settings, "late")
    with pytest.raises(RetiredEpochError):
        await manager.create_agent("late", agent_class=Worker, arguments={"settings": settings}, epoch="epoch-1")
    await manager.create_agent("in-time", agent_class=Worker, arguments={"settings": settings}, epoch="teal")
    rows = await registry.list_active(epoch="teal")
    assert [(row.logical_id, row.actor_name) for row in rows] == [("in-time", "in-time@teal")]
    # what stands for another epoch is left alone
    await manager.shutdown_agents_batch([AgentSpec("in-time")])
    assert not await are_gone(settings, "in-time@teal")
    await manager.shutdown_agents_batch([AgentSpec("in-time", epoch="teal")])
    assert await are_gone(settings, "in-time@teal")
