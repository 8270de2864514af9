"""Why an agent died: its history has the kind of the cause, and words for people."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayError

from seedcore.cli.why import Reason, reason_of
from seedcore.core.causes import CauseKind
from seedcore.core.holds import HoldKind
from seedcore.discovery.api import CauseOut
from seedcore.discovery.rendering import agent_answer
from seedcore.registry import ThreadReporter
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.ray_support.lookup import ray_remembers
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from tests.children import run
from tests.cluster.agents import Blocking, Unmakeable, Worker
from tests.waiting import eventually

PROGRAM = Path(sys.executable).parent / "seedcore"


class Raises:
    """Reports that it lives, and then finds that it cannot."""

    def __init__(self, agent_id: str, settings: Settings) -> None:
        self.reporter = ThreadReporter(agent_id, settings=settings)
        self.reporter.start()
        raise ValueError("no such model: \x1b[31mgpt\x1b[0m\nand a second line")


async def why(registry: RegistryConnection, agent_id: str) -> Reason:
    return reason_of(agent_answer(await registry.describe(agent_id)))


async def until_dead(registry: RegistryConnection, agent_id: str, kind: CauseKind, pattern: str = "") -> Reason:
    """Its reason, once it is dead and more is known than that its process is gone."""

    async def reason() -> Reason:
        found = await why(registry, agent_id)
        assert found.state == "dead", found
        assert found.cause is not None
        assert found.cause.kind is kind, found
        assert re.search(pattern, found.cause.detail or ""), found
        return found

    return await eventually(reason)


async def create(manager: Tier0MemoryManager, settings: Settings, name: str) -> Any:
    """One whose process is watched."""

    async def is_watched() -> bool:
        health = await manager.connection.health()
        return health.watched == sum(health.instances.values())

    handle = await _created(manager, settings, name)
    await eventually(is_watched)
    return handle


async def _created(manager: Tier0MemoryManager, settings: Settings, name: str) -> Any:
    return await manager.create_agent(name, agent_class=Worker, arguments={"settings": settings}, max_restarts=0)


async def test_a_signal_and_an_exit_code_are_named(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    for name, number in (("killed", signal.SIGKILL), ("crashed", signal.SIGSEGV)):
        handle = await create(manager, settings, name)
        pid = await handle.execute_task.remote("pid")
        os.kill(pid, number)
        reason = await until_dead(registry, name, CauseKind.PROCESS_KILLED, f"^{number.name} \\(pid {pid}\\)$")
        assert reason.advice is not None
    handle = await create(manager, settings, "quits")
    pid = await handle.execute_task.remote("pid")
    handle.execute_task.remote("die")
    await until_dead(registry, "quits", CauseKind.PROCESS_EXITED, f"^exit code 1 \\(pid {pid}\\)$")


async def test_what_its_constructor_raised_is_named(registry: RegistryConnection, settings: Settings) -> None:
    actor_class: Any = ray.remote(Raises)
    handle = actor_class.options(name="raises", namespace=settings.namespace, num_cpus=0).remote("raises", settings)
    with pytest.raises(RayError):
        await handle.__ray_ready__.remote()
    reason = await until_dead(registry, "raises", CauseKind.START_FAILED, "^ValueError: no such model: gpt")
    assert "\x1b" not in reason.why
    [last, *_] = await registry.transitions("raises", 5)
    assert str(last.cause) == reason.why


async def command(settings: Settings, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "SEEDCORE_NS": settings.namespace}
    return await asyncio.to_thread(run, PROGRAM, *words, env={**os.environ, **environment}, timeout_s=90)


async def test_who_drains_is_named_when_a_fleet_is_brought_up_again(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings, tmp_path: Path
) -> None:
    for name in ("grazes", "rests"):
        await create(manager, settings, name)
    await registry.drain(["rests"])
    file = tmp_path / "fleet.yaml"
    file.write_text("agents: [{ids: [grazes, rests]}]")
    answer = await command(settings, "fleet", "up", str(file))
    assert answer.stdout.splitlines() == ["2 of 2 agents are up", "draining, so not routed to: rests"], answer


async def test_one_that_never_came_to_register_is_found_in_rays_memory(
    registry: RegistryConnection, settings: Settings
) -> None:
    actor_class: Any = ray.remote(Unmakeable)
    handle = actor_class.options(name="unmakeable", namespace=settings.namespace, num_cpus=0).remote()
    with pytest.raises(RayError):
        await handle.__ray_ready__.remote()
    remembered = await ray_remembers("unmakeable", settings.namespace, 5.0)
    assert "which has died: start failed: ValueError: not like this" in remembered
    answer = await command(settings, "why", "unmakeable")
    assert answer.returncode == 3, answer
    assert "ValueError: not like this" in answer.stderr
    assert "Traceback" not in answer.stderr


async def test_what_ray_reports_of_an_end_is_added_to_its_cause(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    handle = await create(manager, settings, "ended")
    await handle.execute_task.remote("pid")
    ray.kill(handle, no_restart=True)

    async def is_explained() -> bool:
        cause = (await why(registry, "ended")).cause
        assert cause is not None
        assert cause.kind in {CauseKind.PROCESS_EXITED, CauseKind.PROCESS_KILLED}
        return re.search(r"Ray reports: .*kill.*; .*pid \d+", cause.detail or "") is not None

    await eventually(is_explained)


async def test_draining_stopping_and_an_old_epoch_are_named(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    handle = await create(manager, settings, "drains")
    await handle.drain.remote("makes room")
    drains = await why(registry, "drains")
    assert (drains.state, drains.cause) == ("draining", CauseOut(kind=CauseKind.AGENT, detail="makes room", by=None))
    await registry.drain(["drains"], "upkeep", "ada", duration_s=60)
    [hold] = (await why(registry, "drains")).holds
    assert (hold.kind, hold.reason, hold.by, hold.expires_at is None) == (HoldKind.OPERATOR, "upkeep", "ada", False)
    actor_class: Any = ray.remote(Blocking)
    blocking = actor_class.options(name="stops", namespace=settings.namespace, num_cpus=0).remote("stops", settings)
    await blocking.finish.remote()
    await until_dead(registry, "stops", CauseKind.AGENT, "^done$")
    await create(manager, settings, "old")
    await registry.set_current_epoch("green")
    await until_dead(registry, "old", CauseKind.EPOCH_RETIRED)


async def test_one_that_hangs_is_late_then_dead_by_its_lease(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    handle = await create(manager, settings, "hangs")
    # among others, or so much silence would freeze expiry
    for number in range(4):
        await create(manager, settings, f"goes-on-{number}")
    pid = await handle.execute_task.remote("pid")
    os.kill(pid, signal.SIGSTOP)
    try:

        async def is_late() -> bool:
            reason = await why(registry, "hangs")
            return reason.state in {"late", "suspect"} and "silent for" in reason.why

        await eventually(is_late)
        await until_dead(registry, "hangs", CauseKind.LEASE_EXPIRED, r"^no beat for \d+ s$")
    finally:
        os.kill(pid, signal.SIGKILL)
