"""The same API with the same rights whichever way requests come in: by Serve's proxy, at the replica, by HAProxy."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from seedcore.bench.own_haproxy import haproxy_folder
from seedcore.core.lifecycle import Status
from seedcore.discovery.access import is_behind_haproxy
from seedcore.settings import Settings
from tests.servers import PostgresServer
from tests.serving import Tokens, World, deployed, direct_ingress, free_port, haproxy
from tests.waiting import eventually
from tests.web.routes import check_every_route

INGRESSES = ("proxy", "replica", "haproxy")


@pytest.fixture(scope="module", params=INGRESSES)
def deployment(
    request: pytest.FixtureRequest, server: PostgresServer, tokens: Tokens
) -> Iterator[tuple[Settings, str]]:
    """One that may not even be read without a token; by its proxies, a trusted one must name itself."""
    ingress: str = request.param
    with haproxy_folder() as folder:
        port = free_port()
        environment = {"proxy": {}, "replica": direct_ingress(port), "haproxy": haproxy(folder)}[ingress]
        trusted: dict[str, Any] = {} if ingress == "haproxy" else {"http_trusted_proxies": "127.0.0.0/8"}
        with deployed(
            server, f"by-{ingress}", tokens=tokens, environment=environment, http_anonymous="none", **trusted
        ) as (settings, url):
            assert is_behind_haproxy() is (ingress == "haproxy")
            found = f"http://127.0.0.1:{port}" if ingress == "replica" else url
            asyncio.run(eventually(lambda: _answers(found), within_s=40))
            yield settings, found


async def _answers(url: str) -> bool:
    async with httpx.AsyncClient(timeout=30) as client:
        return (await client.get(f"{url}/v1/access")).status_code == 200


async def test_every_route_gives_each_caller_what_was_granted_and_no_more(world: World) -> None:
    await check_every_route(world)


async def resolved(world: World, logical_id: str, query: str = "") -> httpx.Response:
    return await world.ask("GET", f"/v1/resolve/{quote(logical_id, safe='')}{query}")


async def posted(world: World, logical_id: str, **more: Any) -> Mapping[str, Any]:
    answer = await world.ask("POST", "/v1/resolve", json={"logical_ids": [logical_id], **more})
    answer.raise_for_status()
    return dict(answer.json())


async def test_one_agent_is_resolved_as_by_post(world: World) -> None:
    client = await world.join("a/b ü", labels={"tier": "a"})

    async def is_copied() -> bool:
        await client.beat()
        answers = [await posted(world, logical_id) for logical_id in ("ant", "a/b ü")]
        return all(one["source"] == "snapshot" and one["results"][0]["instance"] for one in answers)

    await eventually(is_copied)
    for logical_id in ("ant", "a/b ü"):
        for query in ("", "?allow_late=true", "?allow_late=false"):
            await client.beat()
            expected, answer = await posted(world, logical_id), await resolved(world, logical_id, query)
            assert answer.status_code == 200, answer.text
            one = answer.json()
            assert (one["source"], one["complete"], one["results"]) == ("snapshot", True, expected["results"])
            assert one["as_of"] >= expected["as_of"]
            [found] = one["results"]
            assert (found["logical_id"], found["instance"]["verdict"], found["reason"]) == (logical_id, "fresh", None)


async def test_an_agent_that_does_not_resolve_is_a_problem_with_its_reason(world: World) -> None:
    client = await world.join("refused")
    await client.set_status(Status.DRAINING, "a new disk")

    async def is_refused() -> bool:
        return bool((await posted(world, "refused"))["results"][0]["reason"] == "draining")

    await eventually(is_refused)
    for logical_id, reason in (("refused", "draining"), ("never-was", "not_registered")):
        answer = await resolved(world, logical_id)
        problem = answer.json()
        assert answer.headers["content-type"] == "application/problem+json"
        assert (answer.status_code, problem["code"], problem["reason"]) == (404, "not_resolvable", reason)
        assert (await posted(world, logical_id))["results"][0]["reason"] == reason
    for query, field in (("?allow_late=soon", "allow_late"), ("?late=true", "late")):
        answer = await resolved(world, "ant", query)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_input")
        assert field in answer.json()["detail"]
    assert (await resolved(world, "x" * 300)).status_code == 422
    head = await world.ask("HEAD", "/v1/resolve/ant")
    assert (head.status_code, head.content) == (200, b"")


async def test_a_page_that_is_answered_again_names_the_version_that_it_is_of(world: World) -> None:
    async def page() -> httpx.Response:
        answer = await world.ask("GET", "/v1/instances?status=alive")
        answer.raise_for_status()
        return answer

    async def is_copied() -> bool:
        return bool((await page()).json()["source"] == "snapshot")

    await eventually(is_copied)
    earlier = (await page()).headers["etag"]
    client = await world.join("newcomer")
    seen: dict[str, list[str]] = {}

    async def has_it() -> bool:
        await client.beat()
        answer = await page()
        body = answer.json()
        if body["source"] != "snapshot":
            return False
        assert answer.headers["etag"] == f'W/"{body["stream"]}:{body["version"]}"'
        names = [item["logical_id"] for item in body["items"]]
        # every answer about one version lists the same
        assert seen.setdefault(answer.headers["etag"], names) == names
        return "newcomer" in names

    await eventually(has_it)
    assert (await page()).headers["etag"] != earlier
