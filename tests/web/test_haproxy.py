"""Behind the HAProxy of Ray Serve: a peer's address identifies no caller there, and grants nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from seedcore.bench.own_haproxy import haproxy_folder
from seedcore.core.errors import ConfigurationError
from seedcore.discovery.access import is_behind_haproxy
from seedcore.discovery.app import Discovery
from seedcore.discovery.builder import DiscoveryArgs, build
from seedcore.discovery.exposure import exposures
from seedcore.discovery.routes import api
from seedcore.settings import Settings
from tests.servers import PostgresServer
from tests.serving import Tokens, deployed, haproxy
from tests.waiting import eventually

ANOTHER = "127.0.0.2"
REFUSED = "SEEDCORE_HTTP_TRUSTED_PROXIES: must be empty where Serve runs HAProxy"


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of nodes whose HAProxy keeps its files and ports to itself, as docs/security.md says."""
    with haproxy_folder() as folder:
        yield {"RAY_TMPDIR": folder, **haproxy(folder)}


@pytest.fixture(scope="module")
def deployment(server: PostgresServer, tokens: Tokens, environment: dict[str, str]) -> Iterator[tuple[Settings, str]]:
    """One that may be read by this machine, and lets a caller ask five times per second."""
    with deployed(server, "haproxy", tokens=tokens, environment=environment, http_max_requests_per_s=5) as made:
        yield made


@pytest.fixture
def url(deployment: tuple[Settings, str]) -> str:
    return deployment[1]


def caller(url: str, address: str, **headers: str) -> httpx.AsyncClient:
    """A client with an address of this machine."""
    transport = httpx.AsyncHTTPTransport(local_address=address)
    return httpx.AsyncClient(base_url=url, timeout=30, transport=transport, headers=headers)


async def answering(client: httpx.AsyncClient) -> None:
    """Until HAProxy has learnt where the replica is, and the caller may ask again."""

    async def is_there() -> bool:
        return (await client.get("/v1/access")).status_code == 200

    await eventually(is_there, within_s=40)


async def test_trusted_proxies_are_refused_at_the_start_in_one_line(
    deployment: tuple[Settings, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings, _ = deployment
    # the node that builds the application need not be one whose environment says so
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    assert is_behind_haproxy()
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "none")
    monkeypatch.setenv("SEEDCORE_HTTP_TRUSTED_PROXIES", "127.0.0.0/8")
    monkeypatch.setenv("SEEDCORE_DATA_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError) as refused:
        await asyncio.to_thread(build, DiscoveryArgs())
    assert str(refused.value).startswith(REFUSED)
    assert "RAY_SERVE_ENABLE_HA_PROXY=1" in str(refused.value)
    assert "\n" not in str(refused.value)
    # nor does a replica start with such settings
    trusting = settings.model_copy(update={"http_trusted_proxies": "127.0.0.0/8"})
    other: Any = serve.deployment(name="Other", ray_actor_options={"num_cpus": 0})(serve.ingress(api)(Discovery))
    with pytest.raises(RuntimeError):
        await asyncio.to_thread(serve.run, other.bind(trusting, False), name="other", route_prefix="/other")
    status = await asyncio.to_thread(serve.status)
    (failed,) = status.applications["other"].deployments.values()
    assert REFUSED in failed.message
    await asyncio.to_thread(serve.delete, "other")


async def test_no_header_grants_a_right_from_any_address(url: str) -> None:
    for address in ("127.0.0.1", ANOTHER):
        async with caller(url, address, **{"X-SeedCore-Right": "write"}) as client:
            await answering(client)
            assert (await client.get("/v1/access")).json()["right"] == "read"
            assert (await client.post("/v1/agents/nobody/drain", json={})).status_code == 401


async def test_only_this_machines_names_may_be_read_without_a_token(url: str, tokens: Tokens) -> None:
    async with caller(url, ANOTHER) as client:
        await answering(client)
        assert (await client.get("/v1/deaths")).status_code in {200, 503}
        rebound = await client.get("/v1/deaths", headers={"Host": "evil.example"})
        assert (rebound.status_code, "SEEDCORE_HTTP_ALLOWED_HOSTS" in rebound.text) == (401, True)
        shown = {"Host": "evil.example", "Authorization": f"Bearer {tokens.read}"}
        assert (await client.get("/v1/deaths", headers=shown)).status_code in {200, 503}


async def test_a_flood_without_a_token_leaves_the_callers_with_one_alone(url: str, tokens: Tokens) -> None:
    async with (
        caller(url, ANOTHER) as flood,
        caller(url, "127.0.0.1", Authorization=f"Bearer {tokens.read}") as reader,
        caller(url, "127.0.0.1", Authorization=f"Bearer {tokens.write}") as writer,
    ):
        await answering(flood)
        answers = await asyncio.gather(*(flood.get("/v1/access") for _ in range(60)))
        assert {answer.status_code for answer in answers} == {200, 429}
        for client in (reader, writer):
            assert (await client.get("/v1/access")).status_code == 200
        # and one with a token floods itself alone
        answers = await asyncio.gather(*(reader.get("/v1/access") for _ in range(60)))
        assert {answer.status_code for answer in answers} == {200, 429}
        assert (await writer.get("/v1/access")).status_code == 200


async def test_what_serve_leaves_open_to_other_users_is_named_with_its_remedy(
    url: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with caller(url, ANOTHER) as client:
        await answering(client)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # Ray opens its session and HAProxy its socket to everybody, in a folder of this user alone
    ports = sorted(environment[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("STATS", "METRICS"))
    assert sorted(remedies_with(environment["RAY_TMPDIR"], 0o700)) == [
        f"block port {port} by the firewall of this machine" for port in ports
    ]
    opened = remedies_with(environment["RAY_TMPDIR"], 0o711)
    assert "start Ray with RAY_TMPDIR set to a folder of mode 0700" in opened
    assert "set RAY_SERVE_HAPROXY_SOCKET_PATH to a file in a folder of mode 0700" in opened


def remedies_with(folder: str, mode: int) -> list[str]:
    """What helps while the folder has a mode."""
    os.chmod(folder, mode)
    try:
        return [one.remedy for one in exposures()]
    finally:
        os.chmod(folder, 0o700)
