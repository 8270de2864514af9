"""The public interface runs as it is published; the README's scripts are run by test_quickstart.py."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
import ray

import seedcore.registry
import seedcore.settings
import seedcore.tier0
from seedcore.registry import RegistryConnection
from seedcore.registry.ray_support.lookup import actor_id_of
from seedcore.settings import Settings
from tests.cluster.agents import Worker

PUBLIC_INTERFACE = """
from seedcore.agents import RayAgent
from seedcore.tier0 import get_tier0_manager

agent = RayAgent(agent_id="my_agent", organ_id="vision_organ")   # plain class: subclass it, use it in process, or as an actor
await agent.start()                                              # registers, alive, beats; works with no database at all
manager = get_tier0_manager()
await manager.discover_from_registry()                           # registry first
await manager.discover_and_refresh_agents()                      # registry, then Ray's listing
handle = await manager.resolve("my_agent")                       # a live, proven ActorHandle

from seedcore.registry import RegistryClient, list_active_instances
instances = await list_active_instances()
client = RegistryClient(logical_id="my_agent", actor_name="my_agent_actor", cluster_epoch="epoch_123")
await client.register(); await client.set_status("alive"); await client.beat()
"""  # noqa: E501 - as the interface is published


@pytest.fixture
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's settings, as a user sets them: in the environment."""
    assert settings.pg_dsn is not None
    monkeypatch.setenv("SEEDCORE_NS", settings.namespace)
    monkeypatch.setenv("SEEDCORE_PG_DSN", settings.pg_dsn.get_secret_value())
    monkeypatch.setenv("REGISTRY_BEAT_SEC", "0.5")
    seedcore.settings.get_settings.cache_clear()
    seedcore.tier0.get_tier0_manager.cache_clear()


async def run_block(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    wrapped = f"async def block():\n{textwrap.indent(code, '    ')}\n    return locals()\n"
    exec(compile(wrapped, "<published>", "exec"), names)
    return dict(await names["block"]())


async def test_the_published_interface_runs_as_written(
    registry: RegistryConnection, settings: Settings, environment: None
) -> None:
    # the block's own agent runs in this process and has no handle: the one to call is its twin, an actor
    actor: Any = ray.remote(Worker)
    handle = actor.options(name="my_agent", namespace=settings.namespace, num_cpus=0).remote(
        "my_agent", organ_id="vision_organ", settings=settings
    )
    await handle.start.remote()
    names = await run_block(PUBLIC_INTERFACE)
    assert await names["handle"].get_id.remote() == "my_agent"
    assert actor_id_of(names["handle"]) == actor_id_of(handle)
    assert {row.logical_id for row in names["instances"]} == {"my_agent"}
    assert names["client"].pending == 0
    assert len((await registry.describe("my_agent")).live) == 3
    await names["agent"].stop()
    ray.kill(handle)
