"""A cluster with Serve, a database of its own that can be stopped, a fleet, and ways to ask over HTTP."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import psycopg
import pytest
import pytest_asyncio
import ray
from pydantic import SecretStr
from ray import serve

from seedcore.bench.own_haproxy import own_haproxy
from seedcore.composition import start_registry
from seedcore.core.errors import RegistryError
from seedcore.core.lifecycle import Status
from seedcore.discovery.app import Discovery
from seedcore.discovery.routes import api
from seedcore.discovery.tokens import Right, new_token
from seedcore.registry import RegistryClient
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec
from tests.cluster.agents import Worker
from tests.servers import PostgresServer, embedded_binaries, running_server
from tests.waiting import eventually

FLEET = ("ant", "bee", "cat")
WATCHERS = 8


@dataclass(frozen=True)
class Tokens:
    """Secrets of a deployment, by what they allow, and the file that has their hashes."""

    file: Path
    read: str
    write: str
    expired: str

    @classmethod
    def written(cls, folder: Path) -> Tokens:
        """New ones, the file in a folder."""
        past = datetime.now(UTC) - timedelta(seconds=1)
        made = [
            new_token("reader", Right.READ),
            new_token("writer", Right.WRITE),
            new_token("bygone", Right.WRITE, past),
        ]
        file = folder / "tokens"
        file.write_text("".join(f"{token.line()}\n" for _, token in made))
        return cls(file, *(secret for secret, _ in made))


@dataclass(frozen=True)
class World:
    """Everything a fault can hit."""

    server: PostgresServer
    settings: Settings
    registry: RegistryConnection
    manager: Tier0MemoryManager
    url: str
    tokens: Tokens
    joined: list[RegistryClient] = field(default_factory=list)

    async def join(self, logical_id: str, **details: Any) -> RegistryClient:
        """An instance beside the fleet, dead when the test has ended. The test sends its beats."""
        client = RegistryClient(logical_id, settings=self.settings, **details)
        self.joined.append(client)
        await client.set_status(Status.ALIVE)
        return client

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        assert self.settings.pg_dsn is not None
        with psycopg.connect(self.settings.pg_dsn.get_secret_value(), autocommit=True) as connection:
            return connection.execute(query, parameters).fetchall()

    async def get(self, path: str) -> dict[str, Any]:
        answer = await self.ask("GET", path)
        answer.raise_for_status()
        return dict(answer.json())

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """An answer to who may write, whatever its status."""
        options["headers"] = {"Authorization": f"Bearer {self.tokens.write}", **options.get("headers", {})}
        async with httpx.AsyncClient(timeout=30) as client:
            return await client.request(method, self.url + path, **options)

    async def names(self) -> tuple[str, list[str]]:
        """Who HTTP lists, and by whose word: an up-to-date copy of the registry's memory is the registry's."""
        page = await self.get("/v1/instances")
        return word_of(page), [item["logical_id"] for item in page["items"]]

    async def is_whole(self) -> bool:
        """Whether the registry runs, the database answers, and the whole fleet is listed."""
        health = await self.registry.health()
        assert health.is_ready, health
        source, names = await self.names()
        assert (source, set(FLEET) - set(names)) == ("registry", set()), (source, names)
        return True

    async def settle(self) -> None:
        """Until it is whole."""
        self.server.start()
        await start_registry(self.settings)
        await eventually(self.is_whole, within_s=40)

    async def is_as_new(self) -> bool:
        """Whether the next test may have the fleet and the registry of this one."""
        with suppress(RegistryError, AssertionError, httpx.HTTPError):
            # the registry's own, however old the copy is
            page = await self.get("/v1/instances?consistent=true")
            return await self.is_whole() and [item["logical_id"] for item in page["items"]] == list(FLEET)
        return False


def word_of(page: Mapping[str, Any]) -> str:
    """Whose word an answer is."""
    return "registry" if page["source"] == "snapshot" else str(page["source"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def haproxy(folder: str) -> dict[str, str]:
    """The environment of nodes with an HAProxy of their own, otherwise that of deploy/."""
    return {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", **own_haproxy(folder)}


def direct_ingress(port: int) -> dict[str, str]:
    """The environment of nodes whose replica listens on this port itself."""
    return {
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server that a test may stop."""
    with running_server(embedded_binaries()) as server:
        yield server


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """Secrets that the deployment takes."""
    return Tokens.written(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def deployment(
    request: pytest.FixtureRequest, server: PostgresServer, tokens: Tokens
) -> Iterator[tuple[Settings, str]]:
    """Settings and URL of a deployment in a namespace named like the tests' folder."""
    with deployed(server, request.path.parent.name, tokens=tokens) as (settings, url):
        yield settings, url


@pytest_asyncio.fixture
async def world(deployment: tuple[Settings, str], server: PostgresServer, tokens: Tokens) -> AsyncIterator[World]:
    """Everything up and the fleet listed."""
    async with fleet(server, *deployment, tokens) as world:
        yield world


@contextmanager
def deployed(
    server: PostgresServer,
    namespace: str,
    *,
    tokens: Tokens | None = None,
    dsn: str | None = None,
    lease_s: float | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
    **more: Any,
) -> Iterator[tuple[Settings, str]]:
    """Ray, Serve and discovery, which here does not restart the registry by itself. `environment` is of every node."""
    settings = Settings(
        namespace=namespace,
        pg_dsn=SecretStr(dsn if dsn is not None else server.dsn(server.create_database())),
        beat_interval_s=0.5,
        lease_s=lease_s,
        flush_interval_s=0.2,
        durable_wait_s=1.0,
        http_tokens_file=None if tokens is None else tokens.file,
        **more,
    )
    port = free_port()
    # modules of tests share one
    ray.shutdown()
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patched:
            if settings.proxy_networks:
                patched.setenv("FORWARDED_ALLOW_IPS", "none")
            for name, value in environment.items():
                patched.setenv(name, value)
            ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
            stack.callback(ray.shutdown)
            serve.start(http_options={"host": "127.0.0.1", "port": port})
        stack.callback(serve.shutdown)
        deployment: Any = serve.deployment(
            name="Discovery", max_ongoing_requests=100, ray_actor_options={"num_cpus": 0}
        )(serve.ingress(api)(Discovery))
        serve.run(deployment.bind(settings, False, WATCHERS), name="seedcore", route_prefix="/")
        yield settings, f"http://127.0.0.1:{port}"


async def following(settings: Settings, url: str, agents: int) -> None:
    """Start the registry, and wait until the deployment has a copy of so many agents."""
    await start_registry(settings)

    async def is_whole() -> bool:
        async with httpx.AsyncClient(timeout=30) as client:
            seen = (await client.get(f"{url}/v1/overview")).json()
        assert (seen["source"], seen["instances"]) == ("snapshot", agents), seen
        return True

    await eventually(is_whole, within_s=60)


@asynccontextmanager
async def fleet(server: PostgresServer, settings: Settings, url: str, tokens: Tokens) -> AsyncIterator[World]:
    """Everything up and the fleet listed; fleet and registry are those of the test before if it left them as new."""
    manager = Tier0MemoryManager(settings)
    registry = RegistryConnection(settings.namespace, settings.call_timeout_s)
    world = World(server, settings, registry, manager, url, tokens)
    server.start()
    await start_registry(settings)
    made = await manager.create_agents_batch(
        [AgentSpec(name, agent_class=Worker, arguments={"settings": settings}) for name in FLEET]
    )
    assert not made.failures
    await world.settle()
    try:
        yield world
    finally:
        server.start()
        # or the next test would find them
        for client in world.joined:
            with suppress(RegistryError):
                await client.set_status(Status.DEAD)
        if not await world.is_as_new():
            await manager.shutdown_agents(timeout_s=5)
            await stop_registry(settings.namespace)
        await manager.close()
