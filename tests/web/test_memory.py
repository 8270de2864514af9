"""Memory of a real deployment, whatever its callers ask for and however slowly they read.

The bounds are those that docs/security.md names; Python and Serve hold a body more than once on its way.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import pytest_asyncio
import ray

from seedcore.core.changes import RegisterChange, Registration, new_instance_id
from seedcore.core.lifecycle import Status
from seedcore.discovery.pages import MAX_CACHE_BYTES
from seedcore.discovery.traffic import MAX_UNREAD_BYTES
from seedcore.discovery.watch import MAX_FEED_BYTES
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.settings import Settings
from seedcore.store.postgres import PostgresStore
from tests.servers import PostgresServer
from tests.serving import deployed, following
from tests.waiting import eventually

AGENTS = 1000
IDS = [new_instance_id() for _ in range(AGENTS)]
# half of what `deployed` allows
WATCHERS = 4
METADATA_BYTES = 15 * 1024
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def deployment(postgres18: PostgresServer) -> Iterator[tuple[Settings, str]]:
    """Of agents that nobody needs to run: their lease outlasts the tests."""
    dsn = postgres18.dsn(postgres18.create_database())
    asyncio.run(register(dsn))
    with deployed(postgres18, "memory", dsn=dsn, lease_s=3600.0, http_max_requests_per_s=10_000) as made:
        yield made


async def register(dsn: str) -> None:
    """Agents with much metadata, in the database."""
    store = PostgresStore(dsn)
    await store.open()
    metadata = {"note": "x" * METADATA_BYTES}
    registrations = [Registration(one, f"agent-{n:04}", metadata=metadata) for n, one in enumerate(IDS)]
    for start in range(0, AGENTS, 100):
        await store.register_many([RegisterChange(one, 1) for one in registrations[start : start + 100]])
    await store.close()


@pytest_asyncio.fixture
async def url(deployment: tuple[Settings, str]) -> str:
    settings, url = deployment
    await following(settings, url, AGENTS)
    return url


def resident_mib(title: str) -> float:
    """Of the process of this cluster with a title: others run beside."""
    session = ray.get_runtime_context().get_session_name()

    def is_ours(child: psutil.Process) -> bool:
        raylet = child.parent()
        return raylet is not None and any(session in word for word in raylet.cmdline())

    (process,) = [
        child
        for child in psutil.process_iter(["cmdline"])
        if any(title in word for word in child.info["cmdline"] or [])
        and child.status() != psutil.STATUS_ZOMBIE
        and is_ours(child)
    ]
    return process.memory_info().rss / MIB


REPLICA, PROXY = "ray::ServeReplica", "ray::ProxyActor"


async def test_a_replica_keeps_no_more_answers_than_its_cache_may_hold(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        path = "/v1/instances?status=starting&limit=1000&selector=!none-"
        for number in range(5):
            await client.get(f"{path}warm-{number}")
        before = resident_mib(REPLICA)
        for number in range(150):
            answer = await client.get(f"{path}{number}")
            assert answer.status_code == 200
            assert answer.json()["next_cursor"] is not None
        grown = resident_mib(REPLICA) - before
    print(f"\nthe replica: {before:.0f} MiB, and {grown:.0f} more after 150 selectors")  # noqa: T201
    assert grown < 6 * MAX_CACHE_BYTES / MIB


async def test_every_agent_is_listed_once_by_pages_that_end_early(url: str) -> None:
    names: list[str] = []
    cursor: str | None = ""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for source in ("", "&consistent=true"):
            names, cursor = [], ""
            while cursor is not None:
                place = f"&cursor={cursor}" if cursor else ""
                page = (await client.get(f"/v1/instances?status=starting&limit=1000{source}{place}")).json()
                names += [item["logical_id"] for item in page["items"]]
                cursor = page["next_cursor"]
            assert names == [f"agent-{number:04}" for number in range(AGENTS)]


@asynccontextmanager
async def mute(url: str, path: str, connections: int, address: str = "127.0.0.1") -> AsyncIterator[list[bytes]]:
    """Connections that ask and read nothing but the beginning of what they are answered."""
    host = urlsplit(url)
    opened: list[socket.socket] = []
    begun: list[bytes] = []
    loop = asyncio.get_running_loop()
    try:
        for _ in range(connections):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            connection.bind((address, 0))
            await loop.sock_connect(connection, (host.hostname, host.port))
            request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            await loop.sock_sendall(connection, request.encode())
            opened.append(connection)
        for connection in opened:
            begun.append(await loop.sock_recv(connection, 12))
        yield begun
    finally:
        for connection in opened:
            connection.close()


async def test_readers_that_do_not_read_hold_what_one_caller_may_and_then_nothing(url: str) -> None:
    before_proxy, before_replica = resident_mib(PROXY), resident_mib(REPLICA)
    path = "/v1/instances?status=starting&limit=1000"
    async with mute(url, path, 60) as begun, httpx.AsyncClient(base_url=url, timeout=30) as client:
        refused = sum(answer.endswith(b"429") for answer in begun)
        proxy, replica = resident_mib(PROXY) - before_proxy, resident_mib(REPLICA) - before_replica
        print(f"\n60 mute readers, {refused} refused: proxy +{proxy:.0f} MiB, replica +{replica:.0f} MiB")  # noqa: T201
        assert refused > 0
        # what is short is still answered, also to the same machine
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/v1/instances?status=starting&limit=2")).status_code == 200
    assert proxy < 4 * (MAX_UNREAD_BYTES / 2) / MIB
    assert replica < 4 * (MAX_UNREAD_BYTES / 2) / MIB

    async def is_free() -> bool:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            return (await client.get(path)).status_code == 200

    # those that are gone hold nothing
    await eventually(is_free, within_s=30)


async def test_a_watcher_that_does_not_read_holds_one_feeds_bound(url: str, deployment: tuple[Settings, str]) -> None:
    registry = RegistryConnection(deployment[0].namespace, 30.0)
    async with mute(url, "/v1/watch", WATCHERS) as begun:
        assert all(answer.endswith(b"200") for answer in begun)
        before = resident_mib(PROXY)
        for seq, status in enumerate((Status.ALIVE, Status.DRAINING, Status.ALIVE), 2):
            for start in range(0, AGENTS, 100):
                await asyncio.gather(*(registry.set_status(one, status, seq) for one in IDS[start : start + 100]))
        grown = resident_mib(PROXY) - before
        told = 3 * AGENTS * METADATA_BYTES / MIB
        print(f"\n{WATCHERS} mute watchers of {told:.0f} MiB of changes: proxy +{grown:.0f} MiB")  # noqa: T201
    assert grown < WATCHERS * 4 * MAX_FEED_BYTES / MIB + 10
