"""Memory behind Serve's HAProxy: readers that do not read hold what one caller may, and HAProxy holds its buffers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import psutil
import pytest
import pytest_asyncio

from seedcore.bench.own_haproxy import haproxy_folder
from seedcore.discovery.traffic import MAX_UNREAD_BYTES
from seedcore.settings import Settings
from tests.servers import PostgresServer
from tests.serving import deployed, following, haproxy
from tests.waiting import eventually
from tests.web.test_memory import AGENTS, MIB, REPLICA, mute, register, resident_mib

MUTE = 150
PATH = "/v1/instances?status=starting&limit=1000"


@pytest.fixture(scope="module")
def deployment(postgres18: PostgresServer) -> Iterator[tuple[Settings, str, str]]:
    """Of agents that nobody needs to run; and the folder of its HAProxy."""
    dsn = postgres18.dsn(postgres18.create_database())
    asyncio.run(register(dsn))
    with (
        haproxy_folder() as folder,
        deployed(
            postgres18,
            "haproxy-memory",
            dsn=dsn,
            lease_s=3600.0,
            environment=haproxy(folder),
            http_max_requests_per_s=10_000,
        ) as (settings, url),
    ):
        yield settings, url, folder


@pytest_asyncio.fixture
async def url(deployment: tuple[Settings, str, str]) -> str:
    settings, url, _ = deployment
    await eventually(lambda: is_answered(url, "/v1/access"), within_s=60)
    await following(settings, url, AGENTS)
    return url


async def is_answered(url: str, path: str) -> bool:
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        return (await client.get(path)).status_code == 200


def haproxy_mib(folder: str) -> float:
    """Of all processes of this HAProxy."""
    ours = [
        one
        for one in psutil.process_iter(["name", "cmdline"])
        if one.info["name"] == "haproxy" and any(folder in word for word in one.info["cmdline"] or ())
    ]
    assert ours
    return sum(float(one.memory_info().rss) for one in ours) / MIB


async def test_readers_that_do_not_read_hold_what_one_caller_may_and_then_nothing(
    url: str, deployment: tuple[Settings, str, str]
) -> None:
    # the page is made once
    assert await is_answered(url, PATH)
    before_proxy, before_replica = haproxy_mib(deployment[2]), resident_mib(REPLICA)
    async with mute(url, PATH, MUTE) as begun:
        refused = sum(answer.endswith(b"429") for answer in begun)
        proxy, replica = haproxy_mib(deployment[2]) - before_proxy, resident_mib(REPLICA) - before_replica
        print(f"\n{MUTE} mute readers, {refused} refused: HAProxy +{proxy:.0f} MiB, replica +{replica:.0f} MiB")  # noqa: T201
        # what is short is still answered, also to the same machine
        assert await is_answered(url, "/healthz")
        assert await is_answered(url, "/v1/instances?status=starting&limit=2")
    # what the kernel holds of them is not theirs
    assert proxy < (MAX_UNREAD_BYTES / 2) / MIB
    assert replica < 4 * (MAX_UNREAD_BYTES / 2) / MIB
    # those that are gone hold nothing
    await eventually(lambda: is_answered(url, PATH), within_s=30)
