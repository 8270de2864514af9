"""Replicas that listen themselves (RAY_SERVE_ENABLE_DIRECT_INGRESS=1): there and at the proxy a peer is who asks."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from seedcore.discovery.access import is_behind_haproxy
from seedcore.discovery.exposure import exposures
from seedcore.registry.ray_support import session
from tests.servers import PostgresServer
from tests.serving import Tokens, deployed, direct_ingress, free_port
from tests.waiting import eventually

PROXY, ANOTHER = "127.0.0.3", "127.0.0.2"


@pytest.fixture(scope="module")
def urls(server: PostgresServer, tokens: Tokens) -> Iterator[tuple[str, str]]:
    """Of Serve's proxy, and of the replica itself."""
    port = free_port()
    with deployed(
        server, "ingress", tokens=tokens, environment=direct_ingress(port), http_trusted_proxies=f"{PROXY}/32"
    ) as (
        _,
        url,
    ):
        yield url, f"http://127.0.0.1:{port}"


async def test_only_the_trusted_proxy_grants_rights_whichever_way_a_request_comes(urls: tuple[str, str]) -> None:
    assert not is_behind_haproxy()
    assert any("Ray's session" in one.what for one in exposures())
    folder = session.folder()
    assert folder is not None
    # and told where a replica starts
    assert any("Ray's session" in log.read_text() for log in folder.glob("logs/worker-*.err"))
    for url in urls:
        for address, right in ((PROXY, "write"), (ANOTHER, "read"), ("127.0.0.1", "read")):
            transport = httpx.AsyncHTTPTransport(local_address=address)
            headers = {"X-SeedCore-Right": "write", "X-Forwarded-For": PROXY}
            async with httpx.AsyncClient(base_url=url, timeout=30, transport=transport, headers=headers) as client:

                async def is_there(client: httpx.AsyncClient = client) -> bool:
                    return (await client.get("/v1/access")).status_code == 200

                await eventually(is_there, within_s=30)
                assert (await client.get("/v1/access")).json()["right"] == right, (url, address)
