"""The HTTP API: what is asked for is what is answered, and what is done is done."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from typer.testing import CliRunner

from seedcore.cli.app import app
from seedcore.composition import start_registry
from seedcore.core.lifecycle import Status
from seedcore.core.text import first_unfit
from seedcore.registry.server.actor import stop_registry
from tests.serving import FLEET, WATCHERS, World
from tests.waiting import eventually


async def listed(world: World, query: str) -> list[str]:
    page = await world.get(f"/v1/instances?{query}")
    return [item["logical_id"] for item in page["items"]]


@asynccontextmanager
async def watching(
    world: World, query: str = "", address: str | None = None, **headers: str
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The events of /v1/watch, each with its name, id and data, asked from an address of this machine."""

    async def events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        event: dict[str, Any] = {}
        async for line in answer.aiter_lines():
            if not line:
                yield event
                event = {}
                continue
            field, _, value = line.partition(": ")
            event[field] = json.loads(value) if field == "data" else value

    async with (
        httpx.AsyncClient(timeout=30, transport=httpx.AsyncHTTPTransport(local_address=address)) as client,
        client.stream("GET", f"{world.url}/v1/watch?{query}", headers=headers) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield events(answer)


async def next_event(events: AsyncIterator[dict[str, Any]], *names: str) -> dict[str, Any]:
    async for event in events:
        if event["event"] in names:
            return event
    raise AssertionError("the stream has ended")


async def test_filters_select_by_every_property_of_an_instance(world: World) -> None:
    red = await world.join("red", organ_id="eye", labels={"tier": "a", "gpu": ""})
    blue = await world.join("blue", organ_id="ear", labels={"tier": "b"})
    await eventually(lambda: _is_listed(world, "red", "blue"))
    assert await listed(world, "organ=eye") == ["red"]
    assert await listed(world, "selector=" + quote("tier in (a, b), !gpu")) == ["blue"]
    assert await listed(world, "selector=tier!=a&organ=ear") == ["blue"]
    assert await listed(world, "label=tier=a") == ["red"]
    node = (await world.get("/v1/instances?logical_id=ant"))["items"][0]["node_id"]
    assert set(FLEET) <= set(await listed(world, f"node={node}"))
    assert await listed(world, "node=elsewhere") == []

    async def is_fresh(query: str) -> bool:
        # nobody beats for them
        await red.beat()
        await blue.beat()
        return await listed(world, f"{query}verdict=fresh&organ=eye") == ["red"]

    await eventually(lambda: is_fresh(""))
    await eventually(lambda: is_fresh("consistent=true&"))
    assert await listed(world, "verdict=suspect") == []
    for bad in ("selector=tier+in", "verdict=dead", "status=gone", "epoch=", "node=%00", "since=soon"):
        answer = await world.ask("GET", f"/v1/instances?{bad}")
        assert answer.status_code == 422, (bad, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"


async def _is_listed(world: World, *names: str) -> bool:
    page = await world.get("/v1/instances")
    return page["source"] == "snapshot" and set(names) <= {item["logical_id"] for item in page["items"]}


async def test_an_unchanged_list_costs_nothing(world: World) -> None:
    await eventually(lambda: _is_listed(world, *FLEET))
    first = await world.ask("GET", "/v1/instances?organ=none")
    etag = first.headers["etag"]
    page = first.json()
    assert etag == f'W/"{page["stream"]}:{page["version"]}"'
    again = await world.ask("GET", "/v1/instances?organ=none", headers={"If-None-Match": etag})
    assert (again.status_code, again.content) == (304, b"")
    newcomer = await world.join("newcomer")
    await eventually(lambda: _is_listed(world, "newcomer"))
    # what was not asked for changes nothing
    position = f"{page['stream']}:{page['version']}"
    assert (await world.ask("GET", f"/v1/instances?organ=none&since={position}")).status_code == 304
    changed = await world.ask("GET", "/v1/instances", headers={"If-None-Match": etag})
    assert changed.status_code == 200
    assert "newcomer" in [item["logical_id"] for item in changed.json()["items"]]
    assert changed.headers["etag"] != etag
    foreign = await world.ask("GET", "/v1/instances?organ=none", headers={"If-None-Match": '"of another service"'})
    assert foreign.status_code == 200
    await newcomer.set_status(Status.DEAD)


async def test_an_operators_drain_takes_an_agent_out_and_ends_by_itself(world: World) -> None:
    answer = await world.ask("POST", "/v1/agents/ant/drain", json={"reason": "a new disk", "duration_s": 1.5})
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    assert (result["status"], result["durable"]) == ("draining", True)
    agent = await world.get("/v1/agents/ant")
    (live,) = agent["live"]
    cause = {"kind": "operator", "detail": "a new disk", "by": "writer"}
    assert live["instance"]["cause"] == cause
    assert live["instance"]["reported_status"] == "alive"
    (hold,) = live["instance"]["holds"]
    assert (hold["kind"], hold["reason"], hold["by"]) == ("operator", "a new disk", "writer")
    assert hold["since"] < hold["expires_at"]
    resolution = await world.ask("POST", "/v1/resolve", json={"logical_ids": ["ant"]})
    if resolution.json()["source"] != "snapshot":
        assert resolution.json()["results"][0]["instance"] is None

    async def is_back() -> bool:
        return bool((await world.get("/v1/agents/ant"))["live"][0]["instance"]["status"] == "alive")

    await eventually(is_back)
    history = await world.get("/v1/history/ant?limit=2")
    ended, drained = history["transitions"]
    assert (ended["from_status"], ended["to_status"], ended["hold"], ended["expires_at"]) == (
        *("draining", "alive", "operator", None),
    )
    assert ended["cause"]["kind"] == "drain_ended"
    assert (drained["from_status"], drained["to_status"], drained["hold"]) == ("alive", "draining", "operator")
    assert (drained["cause"], drained["expires_at"]) == (cause, hold["expires_at"])


async def test_a_drain_survives_the_registry_and_can_be_lengthened_and_ended(world: World) -> None:
    await world.ask("POST", "/v1/agents/bee/drain", json={"duration_s": 3600})
    await stop_registry(world.settings.namespace)
    await start_registry(world.settings)

    async def instance() -> dict[str, Any]:
        # a registry that has not read the database yet knows only what agents have told it since
        assert (await world.registry.health()).is_ready
        agent = await world.get("/v1/agents/bee")
        assert agent["source"] == "registry"
        found: dict[str, Any] = agent["live"][0]["instance"]
        return found

    before = await eventually(instance)
    assert (before["status"], before["cause"]) == (
        "draining",
        {"kind": "operator", "detail": None, "by": "writer"},
    )
    longer = await world.ask("POST", "/v1/agents/bee/drain", json={"reason": "takes longer", "duration_s": 7200})
    assert longer.status_code == 200, longer.text
    after = await instance()
    assert after["holds"][0]["expires_at"] > before["holds"][0]["expires_at"]
    undrained = await world.ask("POST", "/v1/agents/bee/undrain", json={"reason": "done"})
    assert undrained.json()["results"][0]["status"] == "alive"
    again = await world.ask("POST", "/v1/agents/bee/undrain", json={})
    assert (again.status_code, again.json()["results"][0]["status"]) == (200, "alive")
    assert (await instance())["holds"] == []


async def test_what_cannot_be_done_is_refused_and_changes_nothing(world: World) -> None:
    version = (await world.get("/v1/instances?consistent=true"))["version"]
    for method, path, body, status, says in [
        ("POST", "/v1/agents/never-was/drain", {}, 404, "not_resolvable"),
        ("POST", "/v1/agents/ant/drain", {"duration_s": 0}, 422, "duration_s"),
        ("POST", "/v1/agents/ant/drain", {"duration_s": 1e300}, 422, "duration_s"),
        ("POST", "/v1/agents/ant/drain", {"duration_s": "soon"}, 422, "duration_s"),
        ("POST", "/v1/agents/ant/drain", {"reason": ""}, 422, "reason"),
        ("POST", "/v1/agents/ant/drain", {"reason": "a\x00b"}, 422, "reason"),
        ("POST", "/v1/agents/ant/drain", {"reason": "x" * 600}, 422, "reason"),
        ("POST", "/v1/agents/ant/drain", {"unknown": 1}, 422, "unknown"),
        ("POST", f"/v1/agents/{'x' * 300}/drain", {}, 422, "logical_id"),
        ("DELETE", "/v1/agents/never-was", None, 404, "not_resolvable"),
        ("DELETE", "/v1/instances/junk", None, 422, "instance_id"),
        ("DELETE", "/v1/instances/00000000-0000-4000-8000-000000000009", None, 404, "unknown_instance"),
        ("GET", "/v1/history/never-was", None, 404, "not_resolvable"),
        ("GET", "/v1/deaths?within_s=0", None, 422, "within_s"),
        ("GET", "/v1/deaths?cursor=junk", None, 422, "cursor"),
        ("GET", "/v1/instances?since=junk&consistent=true", None, 422, "since"),
    ]:
        answer = await world.ask(method, path, **({} if body is None else {"json": body}))
        assert answer.status_code == status, (path, body, answer.text)
        problem = answer.json()
        assert says in f"{problem['code']}: {problem['detail']}", (path, body, answer.text)
    form = await world.ask("POST", "/v1/agents/ant/drain", data={"reason": "a form of another site"})
    assert form.status_code == 422
    plain = await world.ask("POST", "/v1/agents/ant/drain", content=b"{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 422
    assert (await world.get("/v1/instances?consistent=true"))["version"] == version


async def test_a_deregistered_agent_is_gone_for_good_and_its_history_has_the_cause(world: World) -> None:
    client = await world.join("goner/with a slash")
    path, instance_id = quote("goner/with a slash", safe=""), client.instance_id
    answer = await world.ask("DELETE", f"/v1/agents/{path}?reason=no+longer+needed")
    assert answer.status_code == 200, answer.text
    agent = await world.get(f"/v1/agents/{path}")
    assert agent["live"] == []
    cause = {"kind": "operator", "detail": "no longer needed", "by": "writer"}
    assert agent["instances"][0]["cause"] == cause
    assert agent["transitions"][0]["to_status"] == "dead"
    last = (await world.get("/v1/deaths?limit=1&within_s=600"))["items"]
    assert [(row["instance_id"], row["cause"]) for row in last] == [(instance_id, cause)]
    other = await world.join("one of two")
    gone = await world.ask("DELETE", f"/v1/instances/{other.instance_id}")
    assert gone.json()["instance"]["status"] == "dead"
    assert (await client.beat()).dead == (instance_id,)
    # it has come back, as a new instance
    await client.set_status(Status.DEAD)


async def test_watchers_receive_what_they_filter_for_and_resume(world: World) -> None:
    await eventually(lambda: _is_listed(world, *FLEET))
    page = await world.get("/v1/instances?status=alive")
    at = f"{page['stream']}:{page['version']}"
    async with watching(world, f"since={at}&organ=eye") as events:
        assert (await next_event(events, "state"))["data"]["current"] is True
        other = await world.join("other", organ_id="ear")
        eye = await world.join("eye", organ_id="eye")
        event = await next_event(events, "change", "reset")
        assert event["event"] == "change"
        assert (event["data"]["logical_id"], event["data"]["instance"]["organ_id"]) == ("eye", "eye")
        while event["data"]["instance"]["status"] != "alive":
            event = await next_event(events, "change")
        position = event["id"]
    await eye.set_status(Status.DEAD)
    async with watching(world, "organ=eye", **{"Last-Event-ID": position}) as events:
        event = await next_event(events, "change", "reset")
        assert (event["event"], event["data"]["logical_id"], event["data"]["instance"]) == ("change", "eye", None)
    async with watching(world, "since=another:7") as events:
        event = await next_event(events, "change", "reset")
        assert event["event"] == "reset"
    assert (await world.ask("GET", "/v1/watch?since=junk")).status_code == 422
    await other.set_status(Status.DEAD)


async def test_watcher_gets_the_state_then_typed_changes_and_resumes_where_it_was_cut_off(world: World) -> None:
    await eventually(lambda: _is_listed(world, *FLEET))
    first = await world.join("first", organ_id="nose", labels={"tier": "a"})
    await eventually(lambda: _is_listed(world, "first"))
    query = "since=start&organ=nose&selector=tier"
    async with watching(world, query) as events:
        state = (await next_event(events, "change", "reset"))["data"]
        assert [(row["logical_id"], row["status"]) for row in state["instances"]] == [("first", "alive")]
        assert state["instances"][0]["verdict"] == "fresh"
        second = await world.join("second", organ_id="nose", labels={"tier": "b"})
        event = await next_event(events, "change", "reset")
        assert (event["data"]["kind"], event["data"]["logical_id"]) == ("joined", "second")
        position = event["id"]
    # the same request once more, as browsers repeat it: it goes on after the last event, without the state
    await first.set_status(Status.DRAINING)
    async with watching(world, query, **{"Last-Event-ID": position}) as events:
        seen = [(await next_event(events, "change", "reset"))["data"] for _ in range(2)]
        assert [(data["kind"], data["logical_id"]) for data in seen] == [("changed", "second"), ("not_ready", "first")]
        await second.set_status(Status.DEAD, "enough work")
        event = await next_event(events, "change")
        assert (event["data"]["kind"], event["data"]["cause"]["kind"]) == ("left", "agent")
    # a position that no feed has any more
    async with watching(world, "since=another:7&state=true&organ=nose") as events:
        gap = (await next_event(events, "change", "reset"))["data"]
        assert [row["logical_id"] for row in gap["instances"]] == ["first"]
    await first.set_status(Status.DEAD)


async def test_watchers_have_a_bound_and_leave_room_for_others(world: World) -> None:
    # held: one that nobody reads any more is closed with its last reference
    held = []
    async with AsyncExitStack() as stack:
        # one caller may have half of them: this machine without a token, by whichever of its addresses
        reader = {"Authorization": f"Bearer {world.tokens.read}"}
        for number in range(WATCHERS):
            address, shown = (f"127.0.0.{number + 1}", {}) if number < WATCHERS // 2 else (None, reader)
            held.append(await stack.enter_async_context(watching(world, address=address, **shown)))
            await next_event(held[-1], "state")
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(local_address="127.0.0.9")) as anonymous:
            assert (await anonymous.get(f"{world.url}/v1/watch")).status_code == 429
        refused = await world.ask("GET", "/v1/watch")
        assert (refused.status_code, refused.json()["code"]) == (503, "followers_full"), refused.text
        assert (await world.ask("GET", "/v1/overview")).status_code == 200

    async def is_accepted() -> bool:
        async with watching(world) as events:
            return bool(await next_event(events, "state"))

    await eventually(is_accepted)


@pytest.mark.parametrize("query", ["verdict=late", "status=dead", "epoch=green"])
async def test_what_changes_cannot_tell_is_no_filter_of_them(world: World, query: str) -> None:
    assert (await world.ask("GET", f"/v1/watch?{query}")).status_code == 422


async def test_a_registry_that_hangs_hides_neither_the_database_nor_the_list(world: World) -> None:
    await eventually(lambda: _is_listed(world, *FLEET))
    pid = (await world.registry.hello()).pid
    os.kill(pid, signal.SIGSTOP)
    try:
        seen = await world.get("/v1/overview")
        while seen["registry"] is not None:
            seen = await world.get("/v1/overview")
        assert (seen["sources"]["postgres"], seen["sources"]["ray"]) == ("ok", "ok")
        assert seen["registry_problem"]
        assert seen["instances"] == len(FLEET)
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_watchers_receive_that_the_registry_is_away_and_then_the_changes(world: World) -> None:
    await eventually(lambda: _is_listed(world, *FLEET))
    async with watching(world) as events:
        await stop_registry(world.settings.namespace)
        while (await next_event(events, "state"))["data"]["current"]:
            pass
        await start_registry(world.settings)
        # another registry's feed: what happened before is not remembered
        await next_event(events, "reset")
        while not (await next_event(events, "state"))["data"]["current"]:
            pass


async def test_the_overview_counts_the_fleet_and_shows_the_state_of_each_part(world: World) -> None:
    client = await world.join("counted", organ_id="heart")

    async def overview() -> dict[str, Any]:
        seen = await world.get("/v1/overview")
        assert seen["by_organ"].get("heart") == 1, seen
        assert seen["source"] == "snapshot", seen
        assert seen["registry"]["beats_per_s"] > 0, seen
        return seen

    seen = await eventually(overview)
    assert seen["instances"] == sum(seen["by_status"].values()) == sum(seen["by_verdict"].values())
    assert seen["sources"] == {"registry": "ok", "postgres": "ok", "ray": "ok"}
    assert seen["epoch"]["number"] >= 1
    assert seen["registry_problem"] is None
    await client.set_status(Status.DEAD)


async def test_the_overview_shows_what_is_away(world: World) -> None:
    await eventually(lambda: _is_listed(world, *FLEET))
    world.server.stop()

    async def without_database() -> bool:
        seen = await world.get("/v1/overview")
        return bool(seen["sources"]["postgres"] != "ok" and seen["registry"]["store_problem"])

    await eventually(without_database)
    world.server.start()
    await stop_registry(world.settings.namespace)

    async def without_registry() -> bool:
        seen = await world.get("/v1/overview")
        assert seen["as_of_registry"] is not None, seen
        return bool(seen["registry_problem"] and seen["source"] == "snapshot" and not seen["complete"])

    await eventually(without_registry)


async def test_many_looks_at_once_cost_one(world: World) -> None:
    answers = await asyncio.gather(*(world.get("/v1/overview") for _ in range(8)))
    assert len({answer["as_of_registry"] for answer in answers}) <= 2


@pytest.mark.parametrize("path", ["/page/nothing.js", "/page/..%2fapi.py", "/page/"])
async def test_what_is_no_part_of_the_page_is_not_there(world: World, path: str) -> None:
    assert (await world.ask("GET", path)).status_code == 404


async def test_an_older_row_commands_no_terminal_and_can_be_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SQL may have been told such a name, or an earlier version
    hostile = "owl\x9b2J\x9d0;owned\x9c\u202etxt.exe"
    await stop_registry(world.settings.namespace)
    query = "select register_instance(p_instance_id => gen_random_uuid(), p_logical_id => %s, p_organ_id => %s)"
    world.rows(query, hostile, hostile)
    await start_registry(world.settings)
    await eventually(lambda: _is_known(world, hostile))
    monkeypatch.setenv("SEEDCORE_URL", world.url)
    monkeypatch.setenv("SEEDCORE_HTTP_TOKEN", world.tokens.write)
    told = ""
    for words in (
        ["deregister", hostile, "--yes"],
        *(["get", hostile, *more] for more in ([], ["--json"])),
        *(["why", hostile, *more] for more in ([], ["--json"])),
        *(["deaths", *more] for more in ([], ["--json"])),
        ["ls", "--all"],
    ):
        ended = await asyncio.to_thread(CliRunner().invoke, app, words)
        assert ended.exit_code == 0, (words, ended.output, ended.exception)
        told += ended.output
    assert "owl\\u009b2J" in told
    assert first_unfit(told.replace("\n", "")) is None
    assert (await world.get(f"/v1/agents/{quote(hostile)}"))["live"] == []


async def _is_known(world: World, logical_id: str) -> bool:
    return bool((await world.get(f"/v1/agents/{quote(logical_id)}"))["live"])
