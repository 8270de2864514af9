"""What Prometheus reads of a running registry and of those who ask it."""

from __future__ import annotations

import re

import httpx
import pytest
import ray

from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from tests.cluster.agents import Worker
from tests.waiting import eventually


@pytest.fixture(scope="module")
def ray_cluster(own_cluster: None) -> None:
    """One whose endpoint knows of no other registry."""


SAMPLE = re.compile(r"^ray_seedcore_(\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)


async def samples() -> list[tuple[str, dict[str, str], float]]:
    """Every sample of ours: name, labels, value."""
    (node,) = ray.nodes()
    async with httpx.AsyncClient(timeout=10) as client:
        text = (await client.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics")).text
    return [
        (name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value))
        for name, labels, value in SAMPLE.findall(text)
    ]


async def test_state_work_and_callers_are_in_rays_endpoint_without_a_label_of_an_agent(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("measured", agent_class=Worker, arguments={"settings": settings})
    caller = Tier0MemoryManager(settings)

    async def are_there() -> bool:
        await caller.resolve("measured")
        found = await samples()
        alive = [
            value
            for name, labels, value in found
            if name == "instances" and (labels["status"], labels["verdict"]) == ("alive", "fresh")
        ]
        assert alive == [1.0], found
        by_name = {name: value for name, _, value in found}
        for name in ("database_up", "term", "changes_committed_total", "flush_seconds_count", "watched_instances"):
            assert by_name.get(name, 0) > 0, (name, sorted(by_name))
        for name in ("expiry_frozen", "fenced", "backlog", "pool_connections", "feed_lag_seconds"):
            assert name in by_name, (name, sorted(by_name))
        beats = {labels["outcome"]: value for name, labels, value in found if name == "beats_total"}
        assert beats["committed"] > 0
        # told before there is one, or the first would not be seen to have come
        assert 0 <= beats["dropped"] < 1
        assert by_name["deaths_declared_total"] < 1
        sources = {labels["source"] for name, labels, _ in found if name == "resolves_total"}
        assert "snapshot" in sources, sources
        assert not any("measured" in labels.values() for _, labels, _ in found)
        return True

    await eventually(are_there, within_s=60, every_s=1.0)
    await caller.close()
