"""What is answered ahead of the routes, and what is kept for it: the same answers, and true ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import httpx

from seedcore.core.answers import Answer, Listing, Origin, Resolution
from seedcore.core.instances import Instance, Verdict
from seedcore.discovery.pages import page_json, resolve_json
from seedcore.discovery.rendered import RenderedInstances
from seedcore.discovery.rendering import copied_out, page_of
from tests.builders import iid
from tests.unit.callers import AGENTS, World, world_of
from tests.unit.test_rewording import OUTAGES, TIMES, served
from tests.unit.test_traffic import NOW, instances
from tests.waiting import eventually

PATHS = (
    "/v1/instances",
    "/v1/instances?status=draining&limit=1",
    "/v1/instances?limit=0",
    *(f"/v1/{what}/{agent}" for what in ("resolve", "agents") for agent in AGENTS),
    *(f"/v1/{what}/{agent}" for what in ("resolve", "agents") for agent in ("", "a%2Fb", "%00", "x" * 300)),
    "/v1/resolve/alive?allow_late=true",
    "/v1/resolve/alive?allow_late=soon",
    "/v1/resolve/alive?unknown=1",
    "/v1/agents/alive?unknown=1",
)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key not in TIMES}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def shown(answer: httpx.Response) -> tuple[int, dict[str, str], Any]:
    headers = {name: text for name, text in answer.headers.items() if name not in {"content-length", "etag"}}
    return answer.status_code, headers, without_times(answer.json())


async def test_an_answer_ahead_of_the_routes_is_that_of_the_route() -> None:
    async with world_of() as world:
        with served(world) as direct, served(world, is_direct=False) as routed:
            for outage in OUTAGES:
                world.take_away(*outage)
                for path in PATHS:
                    assert shown(await direct.get(path)) == shown(await routed.get(path)), (outage, path)


async def test_one_agent_is_resolved_as_by_post_or_the_reason_is_a_problem() -> None:
    async with world_of() as world:
        with served(world) as client:
            for outage in OUTAGES:
                world.take_away(*outage)
                for agent in AGENTS:
                    posted = await client.post("/v1/resolve", json={"logical_ids": [agent]})
                    one = await client.get(f"/v1/resolve/{agent}")
                    if posted.status_code != 200:
                        assert one.status_code == posted.status_code == 503, (outage, agent)
                        continue
                    [found] = posted.json()["results"]
                    if found["instance"] is not None:
                        assert shown(one) == shown(posted), (outage, agent)
                        continue
                    expected = (503, "cannot_know") if found["reason"] is None else (404, "not_resolvable")
                    assert (one.status_code, one.json()["code"]) == expected, (outage, agent)
                    assert one.json()["reason"] == found["reason"]
                    assert one.headers["content-type"] == "application/problem+json"


async def copied(client: httpx.AsyncClient) -> Mapping[str, Any]:
    """A page of the local copy."""

    async def is_copied() -> Any:
        page = (await client.get("/v1/instances")).json()
        return page if page["source"] == "snapshot" else None

    return await eventually(is_copied)


async def test_a_kept_page_is_that_of_the_copy_as_the_registry_last_confirmed_it() -> None:
    async with world_of(follows=True) as world:
        with served(world) as direct, served(world, is_direct=False) as routed:
            await copied(direct)
            compared = 0
            for number in range(20):
                await changed(world, number)
                for path in ("/v1/instances", "/v1/instances?status=draining"):
                    for _ in range(3):
                        before = state_of(world)
                        first, second = await routed.get(path), await direct.get(path)
                        page = second.json()
                        assert (page["source"], page["complete"]) == ("snapshot", True)
                        if before == state_of(world):
                            assert (page["version"], datetime.fromisoformat(page["as_of"])) == before
                            assert (first.content, first.headers) == (second.content, second.headers)
                            compared += 1
            assert compared > 60
            kept = (await direct.get("/v1/instances")).headers["etag"]
            unchanged = await direct.get("/v1/instances", headers={"If-None-Match": kept})
            assert (unchanged.status_code, unchanged.content) == (304, b"")
            # what the registry does not confirm any more is not the answer
            world.take_away("connection")

            async def is_of_the_database() -> bool:
                sources = {(await client.get("/v1/instances")).json()["source"] for client in (direct, routed)}
                return sources == {"postgres"}

            await eventually(is_of_the_database)


def state_of(world: World) -> tuple[int, datetime | None]:
    """The version of the copy, and when the registry last confirmed it."""
    view = world.reader.view()
    assert view is not None
    return view.version, view.as_of


async def changed(world: World, number: int) -> None:
    """Until the copy has another change."""
    version, _ = state_of(world)
    await (world.registry.undrain(["alive"]) if number % 2 else world.registry.drain(["alive"], None, None, None))

    async def is_there() -> bool:
        return state_of(world)[0] > version

    await eventually(is_there)


async def test_a_copy_answers_a_resolution_with_its_verdict_and_without_the_time_of_a_beat() -> None:
    async with world_of(follows=True) as world:
        with served(world) as client:
            await copied(client)
            one = (await client.get("/v1/resolve/alive")).json()
            assert one["source"] == "snapshot"
            [found] = one["results"]
            assert (found["instance"]["verdict"], found["instance"]["last_heartbeat"]) == ("fresh", None)
            # what the copy cannot know the registry answers
            problem = (await client.get("/v1/resolve/held")).json()
            assert (problem["status"], problem["reason"]) == (404, "draining")
            await world.registry.drain(["alive"], "a new disk", None, None)

            async def is_refused() -> bool:
                return (await client.get("/v1/resolve/alive")).status_code == 404

            await eventually(is_refused)


# The JSON of instances


def listing(rows: list[Instance], **verdicts: Verdict) -> Listing:
    return Listing(tuple(rows), Origin.SNAPSHOT, NOW, 7, True, None, "stream", verdicts)


def test_what_is_rendered_once_is_what_would_be_rendered_now() -> None:
    rendered = RenderedInstances()
    rows = instances(5, 100)
    late = {rows[1].instance_id: Verdict.LATE}
    for page in (listing(rows), listing(rows, **late), listing(rows[1:], **late), listing(rows)):
        assert json.loads(page_json(page, rendered=rendered)) == json.loads(page_of(page).model_dump_json())
    # another value of the same instance
    rows[2] = replace(rows[2], organ_id="other")
    page = listing(rows)
    assert json.loads(page_json(page, rendered=rendered)) == json.loads(page_of(page).model_dump_json())
    resolutions = [Resolution(row.logical_id, row, verdict=Verdict.FRESH) for row in rows]
    resolutions.append(Resolution('"instance":null', rows[0], verdict=Verdict.LATE))
    answer = Answer(resolutions, Origin.SNAPSHOT, NOW, 7, True)
    ids = [one.logical_id for one in resolutions]
    assert resolve_json(ids, answer, rendered=rendered) == resolve_json(ids, answer)


def test_rendered_instances_are_made_once_for_a_state_and_are_bounded_by_their_bytes() -> None:
    made: list[str] = []

    def render(row: Instance, verdict: Verdict) -> bytes:
        made.append(row.logical_id)
        return copied_out(row, verdict).model_dump_json().encode()

    rendered = RenderedInstances(20_000)
    rows = instances(100)
    for row in (*rows[:5], *rows[:5]):
        rendered.json_of(row, Verdict.FRESH, render)
    assert made == [row.logical_id for row in rows[:5]]
    rendered.forget(rows[0].logical_id)
    rendered.json_of(rows[0], Verdict.FRESH, render)
    rendered.json_of(rows[1], Verdict.SUSPECT, render)
    assert made[5:] == [rows[0].logical_id, rows[1].logical_id]
    before = rendered.bytes
    rendered.json_of(replace(rows[1], instance_id=iid(7)), Verdict.SUSPECT, render)
    assert rendered.bytes > before
    for row in rows:
        rendered.json_of(row, Verdict.FRESH, render)
        assert 0 < rendered.bytes <= 20_000
    assert len(made) < 200
    for row in rows:
        rendered.forget(row.logical_id)
    assert rendered.bytes == 0
    # one that is longer than all of it is not kept
    rendered.json_of(instances(1, 40_000)[0], Verdict.FRESH, render)
    assert rendered.bytes == 0
