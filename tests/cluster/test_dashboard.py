"""Every query of the dashboard and of the alerts finds what it asks for in a scrape of a running registry."""

from __future__ import annotations

import re

import httpx
import pytest
import ray

from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from tests.cluster.agents import Worker
from tests.deploy.promql import OF_THE_SCRAPE, grouped_by, matches, queries, selectors
from tests.waiting import eventually


@pytest.fixture(scope="module")
def ray_cluster(own_cluster: None) -> None:
    """One whose endpoint knows of no other registry."""


SAMPLE = re.compile(r"^(ray_seedcore_\w+)\{([^}]*)\} ", re.MULTILINE)


async def series() -> dict[str, list[dict[str, str]]]:
    """The labels of every series of ours, by the name of its metric."""
    (node,) = ray.nodes()
    async with httpx.AsyncClient(timeout=10) as client:
        text = (await client.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics")).text
    found: dict[str, list[dict[str, str]]] = {}
    for name, labels in SAMPLE.findall(text):
        found.setdefault(name, []).append(dict(re.findall(r'(\w+)="([^"]*)"', labels)))
    return found


async def test_every_query_resolves_against_a_scrape(
    registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    await manager.create_agent("scraped", agent_class=Worker, arguments={"settings": settings})
    caller = Tier0MemoryManager(settings)

    async def is_all_there() -> bool:
        await caller.resolve("scraped")
        found = await series()
        for query in queries():
            labels: set[str] = set(OF_THE_SCRAPE)
            for asked in selectors(query):
                fitting = [one for one in found.get(asked.metric, []) if matches(asked, one)]
                assert fitting, (asked, sorted(found))
                labels.update(*fitting)
            assert set(grouped_by(query)) <= labels, query
        return True

    await eventually(is_all_there, within_s=60, every_s=1.0)
    await caller.close()
