"""A router and Prometheus are in step with the endpoints of agents, by a real HTTP client against a real deployment."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from seedcore.cli.app import app
from seedcore.composition import start_registry
from seedcore.core.lifecycle import Status
from seedcore.registry.server.actor import stop_registry
from tests.children import started
from tests.cluster.agents import Worker
from tests.prometheus import of_prometheus
from tests.serving import World, free_port
from tests.waiting import eventually

OLD, NEW = {"http": "http://10.0.0.3:8000"}, {"http": "http://10.0.0.3:9000/v1"}
LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class Router:
    """A client that polls as the how-to has it: it sends the ETag, and keeps its list where nothing has changed."""

    def __init__(self, world: World, query: str = "name=http") -> None:
        self._world = world
        self._path = f"/v1/endpoints?{query}"
        self._etag: str | None = None
        self.urls: dict[str, str] = {}
        self.unchanged = 0
        self.source = ""

    async def poll(self) -> Mapping[str, str]:
        headers = {} if self._etag is None else {"If-None-Match": self._etag}
        answer = await self._world.ask("GET", self._path, headers=headers)
        if answer.status_code == 304:
            self.unchanged += 1
            return self.urls
        answer.raise_for_status()
        body = answer.json()
        self._etag, self.source = answer.headers.get("ETag"), body["source"]
        if body["complete"]:
            self.urls = {item["logical_id"]: item["url"] for item in body["items"]}
        return self.urls

    async def shows(self, **urls: str) -> bool:
        return await self.poll() == urls


async def groups(world: World, query: str = "name=http") -> list[dict[str, Any]]:
    """The target groups, which have the documented shape."""
    answer = await world.ask("GET", f"/v1/sd/prometheus?{query}")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    found: list[dict[str, Any]] = answer.json()
    for group in found:
        assert group.keys() == {"targets", "labels"}
        assert all(isinstance(target, str) and "/" not in target for target in group["targets"])
        assert all(LABEL.fullmatch(name) and isinstance(text, str) for name, text in group["labels"].items())
    return found


async def test_a_router_follows_an_agent_from_its_registration_to_its_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, hot = Router(world), Router(world, "name=http&organ=eye&selector=tier=hot")
    assert await router.poll() == {}
    agent = await world.join("router-1", endpoints=OLD, organ_id="eye", labels={"tier": "hot"})

    async def is_followed(url: str | None) -> bool:
        # no other program beats for it
        if url is not None:
            await agent.beat()
        wanted = {} if url is None else {"router-1": url}
        return (await router.poll(), await hot.poll()) == (wanted, wanted)

    await eventually(lambda: is_followed(OLD["http"]))
    await agent.set_endpoints(NEW)
    await eventually(lambda: is_followed(NEW["http"]))
    [group] = await groups(world)
    assert (group["targets"], group["labels"]["__metrics_path__"]) == (["10.0.0.3:9000"], "/v1")
    assert group["labels"]["__meta_seedcore_label_tier"] == "hot"
    assert await groups(world, "name=none") == []
    listed = await world.get("/v1/instances?endpoint=http")
    assert [item["endpoints"] for item in listed["items"]] == [NEW]
    monkeypatch.setenv("SEEDCORE_URL", world.url)
    monkeypatch.setenv("SEEDCORE_HTTP_TOKEN", world.tokens.read)
    shown = await asyncio.to_thread(CliRunner().invoke, app, ["ls", "--endpoint", "http", "--all", "--json"])
    assert [item["endpoints"] for item in json.loads(shown.output)["items"]] == [NEW]
    for words in ("why", "get"):
        shown = await asyncio.to_thread(CliRunner().invoke, app, [words, "router-1"])
        assert NEW["http"] in shown.output
    assert (await world.ask("POST", "/v1/agents/router-1/drain", json={})).status_code == 200
    await eventually(lambda: is_followed(None))
    await world.ask("POST", "/v1/agents/router-1/undrain", json={})
    await eventually(lambda: is_followed(NEW["http"]))
    await agent.set_status(Status.DEAD)
    await eventually(lambda: is_followed(None))
    # what happens to others is not sent
    before = router.unchanged
    await (await world.join("another")).set_status(Status.DEAD)
    await router.poll()
    assert router.unchanged == before + 1


async def test_actors_change_their_endpoints_themselves_and_rows_of_other_programs_break_no_list(world: World) -> None:
    router = Router(world)
    handle = await world.manager.create_agent(
        "serving", agent_class=Worker, arguments={"settings": world.settings, "endpoints": OLD}
    )
    await eventually(lambda: router.shows(serving=OLD["http"]))
    await handle.set_endpoints.remote(NEW)
    await eventually(lambda: router.shows(serving=NEW["http"]))
    world.rows(
        'update registry_instance set endpoints = \'{"http": 5, "a": "no URL"}\' where logical_id = \'ant\' returning 1'
    )
    # as the registry finds it, in its next comparison, and as its database lists it
    await stop_registry(world.settings.namespace)
    await eventually(lambda: _is_from(router, "postgres", serving=NEW["http"]))
    assert await groups(world, "name=a") == []
    world.server.stop()

    async def cannot_know() -> bool:
        answers = [await world.ask("GET", f"/v1/{path}?name=http") for path in ("endpoints", "sd/prometheus")]
        return [(one.status_code, one.json().get("code")) for one in answers] == [(503, "cannot_know")] * 2

    await eventually(cannot_know)
    world.server.start()
    await start_registry(world.settings)
    await eventually(lambda: _is_from(router, "snapshot", serving=NEW["http"]))
    assert (await world.get("/v1/agents/ant"))["instances"][0]["endpoints"] == {"a": "no URL"}
    await world.manager.shutdown_agents(["serving"])
    await eventually(lambda: router.shows())


async def _is_from(router: Router, source: str, **urls: str) -> bool:
    return await router.shows(**urls) and router.source == source


@pytest.mark.parametrize(
    "query", ["", "name=", "name=%00", "name=http&selector=tier+in", "name=http&organ=", "name=http&status=dead"]
)
async def test_a_query_that_is_wrong_is_refused(world: World, query: str) -> None:
    for path in ("endpoints", "sd/prometheus"):
        answer = await world.ask("GET", f"/v1/{path}?{query}")
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_input")


async def test_prometheus_finds_the_agents(world: World, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    prometheus = of_prometheus(request, "prometheus")
    agent = await world.join("scraped", endpoints={"metrics": "http://127.0.0.1:9/m"}, labels={"tier": "hot"})
    port = free_port()
    (tmp_path / "prometheus.yml").write_text(f"""
scrape_configs:
  - job_name: agents
    http_sd_configs:
      - url: {world.url}/v1/sd/prometheus?name=metrics
        refresh_interval: 1s
        authorization: {{type: Bearer, credentials: {world.tokens.read}}}
    relabel_configs:
      - {{source_labels: [__meta_seedcore_logical_id], target_label: agent}}
      - {{source_labels: [__meta_seedcore_label_tier], target_label: tier}}
""")
    options = ["--config.file", "prometheus.yml", "--storage.tsdb.path", "data"]

    async def is_scraped() -> bool:
        await agent.beat()
        async with httpx.AsyncClient() as client:
            answer = (await client.get(f"http://127.0.0.1:{port}/api/v1/targets")).json()
        [target] = answer["data"]["activeTargets"]
        assert target["scrapeUrl"] == "http://127.0.0.1:9/m"
        assert target["labels"] == {"agent": "scraped", "tier": "hot", "job": "agents", "instance": "127.0.0.1:9"}
        return True

    with started(prometheus, *options, f"--web.listen-address=127.0.0.1:{port}", cwd=tmp_path):
        await eventually(is_scraped)
