"""Each source is taken away in turn: agents and callers keep working, and no acknowledged change is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import httpx
import pytest
from ray import serve

from seedcore.composition import start_registry
from seedcore.core.answers import Origin
from seedcore.core.errors import StoreUnavailableError
from seedcore.core.timeouts import end, within
from seedcore.registry import RegistryClient
from seedcore.registry.server.actor import stop_registry
from seedcore.tier0 import Tier0MemoryManager
from tests.serving import FLEET, World, word_of
from tests.waiting import eventually


async def instances(world: World) -> dict[str, str]:
    page = await world.get("/v1/instances")
    return {item["logical_id"]: item["instance_id"] for item in page["items"]}


async def test_everything_up_the_registry_answers_over_http_and_by_handle(world: World) -> None:
    page = await world.get("/v1/instances?limit=2")
    assert [item["logical_id"] for item in page["items"]] == ["ant", "bee"]
    assert (word_of(page), page["complete"]) == ("registry", True)
    page = await world.get(f"/v1/instances?limit=2&cursor={page['next_cursor']}")
    assert ([item["logical_id"] for item in page["items"]], page["next_cursor"]) == (["cat"], None)
    one = page["items"][0]
    assert (await world.get(f"/v1/instances/{one['instance_id']}"))["instance"]["logical_id"] == "cat"
    agent = await world.get("/v1/agents/cat")
    assert agent["live"][0]["verdict"] == "fresh"
    assert agent["instances"][0]["instance_id"] == one["instance_id"]
    assert (await world.get("/v1/epoch"))["epoch"] == "epoch-1"
    assert (await world.get("/healthz"))["registry"]["recovered"]
    assert (await world.get("/readyz"))["sources"] == {"registry": "ok", "postgres": "ok", "ray": "ok"}
    handle: Any = serve.get_deployment_handle("Discovery", "seedcore")
    agent_handle = await handle.resolve.remote("bee")
    assert await agent_handle.get_id.remote() == "bee"
    many = await handle.resolve_many.remote(["ant", "never-was"])
    assert await many["ant"].get_id.remote() == "ant"
    assert isinstance(many["never-was"], str)


BAD_REQUESTS = [
    ("/v1/instances?status=asleep", 422, "status"),
    ("/v1/instances?limit=0", 422, "limit"),
    ("/v1/instances?limit=1001", 422, "limit"),
    ("/v1/instances?cursor=junk", 422, "cursor"),
    ("/v1/instances?label=nokey", 422, "key=value"),
    ("/v1/instances?organ=%00", 422, "organ_id"),
    ("/v1/instances/not-a-uuid", 422, "UUID"),
    ("/v1/instances/00000000-0000-4000-8000-000000000000", 404, "unknown_instance"),
    ("/v1/agents/never-was", 404, "not_resolvable"),
    ("/v1/agents/" + "x" * 256, 422, "255"),
]


JSON_TYPE = {"content-type": "application/json"}
BAD_BODIES: list[tuple[bytes, dict[str, str], int, str]] = [
    (b"", JSON_TYPE, 422, "body: Field required"),
    (b"{'logical_ids': []}", JSON_TYPE, 422, "body: is not JSON: "),
    (b'{"logical_ids": ["ant"]}', {"content-type": "text/plain"}, 422, "application/json, not text/plain"),
    (b'{"logical_ids": 7}', JSON_TYPE, 422, "logical_ids: "),
    (b'{"logical_ids": ["ant", 7]}', JSON_TYPE, 422, "logical_ids.1: "),
    (b'{"logical_ids": []}', JSON_TYPE, 422, "logical_ids: "),
    (b"[" * 100_000, JSON_TYPE, 400, "unreadable_body"),
    (b'{"\xff": 1}', JSON_TYPE, 400, "unreadable_body"),
]
BAD_ROUTES = [
    ("GET", "/v2/instances", 404, "no_such_route"),
    ("DELETE", "/v1/instances", 405, "method_not_allowed"),
    ("POST", "/v1/agents/ant", 405, "method_not_allowed"),
]


def check_problem(answer: httpx.Response, status: int, expected: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert set(problem) == {"type", "code", "title", "status", "detail", "reason"}
    assert problem["status"] == status
    assert expected in f"{problem['code']}: {problem['detail']}"


async def test_bad_input_over_http_is_a_problem_of_its_kind(world: World) -> None:
    async with httpx.AsyncClient(timeout=30) as client:
        for path, status, expected in BAD_REQUESTS:
            check_problem(await client.get(world.url + path), status, expected)
        for body, headers, status, expected in BAD_BODIES:
            answer = await client.post(world.url + "/v1/resolve", content=body, headers=headers)
            check_problem(answer, status, expected)
        for method, path, status, expected in BAD_ROUTES:
            answer = await world.ask(method, path)
            check_problem(answer, status, expected)
            assert ("allow" in answer.headers) is (status == 405)


async def test_body_beyond_its_bound_is_refused_while_it_is_read(world: World) -> None:
    async with httpx.AsyncClient(timeout=30) as client:
        url = world.url + "/v1/resolve"
        widest = json.dumps({"logical_ids": ["\U0001f600" * 255] * 1000}, ensure_ascii=False).encode()
        assert (await client.post(url, content=widest, headers=JSON_TYPE)).status_code == 200
        too_long = await client.post(url, content=b" " * (1024 * 1024 + 1), headers=JSON_TYPE)
        check_problem(too_long, 413, "body_too_long")
    for how, starts in (("content-length: 209715200", b""), ("transfer-encoding: chunked", CHUNK * 17)):
        assert await answer_before_the_end(world.url, how, starts) == (413, "body_too_long")
    assert await world.get("/v1/instances")


CHUNK = b"10000\r\n" + b" " * 0x10000 + b"\r\n"


async def answer_before_the_end(url: str, how: str, starts: bytes) -> tuple[int, str]:
    """The status and code of the answer to a request whose body does not end."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/resolve HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n{how}\r\n\r\n"
    writer.write(head.encode() + starts)
    lines = await within(reader.readuntil(b"\r\n\r\n"), 20)
    fields = dict(line.lower().split(": ", 1) for line in lines.decode().split("\r\n")[1:] if line)
    body = json.loads(await within(reader.readexactly(int(fields["content-length"])), 20))
    writer.close()
    return int(lines.split()[1]), body["code"]


async def test_row_with_bad_labels_fails_no_answer(world: World) -> None:
    instance_id = "21111111-1111-4111-8111-111111111111"
    labels = '{"a": {"x": 1}, "b": 5, "c": null, "d": "text"}'
    shown = {"a": '{"x": 1}', "b": "5", "c": "null", "d": "text"}
    await stop_registry(world.settings.namespace)
    # into the table itself: the functions refuse such labels, and an older schema's did not
    world.rows(
        "insert into registry_instance (instance_id, logical_id, cluster_epoch, status, labels, metadata)"
        " select %s::uuid, 'live-hand', current_epoch, 'alive', %s::jsonb,"
        "        (repeat('{\"k\": ', 300) || '7' || repeat('}', 300))::jsonb from cluster_metadata returning 1",
        instance_id,
        labels,
    )

    async def is_shown(source: str) -> bool:
        if source == "registry":
            await world.registry.beat(instance_id)
        page = await world.get("/v1/instances?limit=100")
        by_name = {item["logical_id"]: item for item in page["items"]}
        assert (word_of(page), {*FLEET, "live-hand"} - set(by_name)) == (source, set())
        assert by_name["live-hand"]["labels"] == shown
        assert (await world.get(f"/v1/instances/{instance_id}"))["instance"]["labels"] == shown
        described = await world.get("/v1/agents/live-hand")
        assert described["instances"][0]["labels"] == shown
        async with httpx.AsyncClient(timeout=30) as client:
            answer = await client.post(world.url + "/v1/resolve", json={"logical_ids": ["live-hand"]})
        assert answer.json()["results"][0]["instance"]["labels"] == shown
        return True

    await eventually(lambda: is_shown("postgres"))
    await start_registry(world.settings)
    await eventually(lambda: is_shown("registry"))
    world.rows("select set_instance_status(%s, 'dead')", instance_id)
    dead = await world.get("/v1/instances?status=dead&logical_id=live-hand")
    assert [item["labels"] for item in dead["items"]] == [shown]

    async def is_gone() -> bool:
        return "live-hand" not in (await world.names())[1]

    await eventually(is_gone)


async def test_cache_answers_what_it_knows_and_the_registry_the_rest(world: World) -> None:
    async def is_followed() -> bool:
        return bool((await world.get("/v1/instances"))["source"] == "snapshot")

    await eventually(is_followed)
    copy, own = await world.get("/v1/instances"), await world.get("/v1/instances?consistent=true")
    assert own["source"] == "registry"
    assert [item["verdict"] for item in copy["items"]] == ["fresh"] * len(FLEET)
    # times of beats are not followed, and not made up
    assert [item.pop("last_heartbeat") for item in copy["items"]] == [None] * len(FLEET)
    assert None not in [item.pop("last_heartbeat") for item in own["items"]]
    assert copy["items"] == own["items"]
    async with httpx.AsyncClient(timeout=30) as client:
        answer = (await client.post(world.url + "/v1/resolve", json={"logical_ids": list(FLEET)})).json()
        assert (answer["source"], len(answer["results"])) == ("snapshot", len(FLEET))
        answer = (await client.post(world.url + "/v1/resolve", json={"logical_ids": ["ant", "never-was"]})).json()
        assert (answer["source"], answer["results"][1]["reason"]) == ("registry", "not_registered")
        one = (await client.get(world.url + "/v1/resolve/ant")).json()
        assert (one["source"], one["results"][0]["instance"]["logical_id"]) == ("snapshot", "ant")
        none = await client.get(world.url + "/v1/resolve/never-was")
        check_problem(none, 404, "not_resolvable")
        assert none.json()["reason"] == "not_registered"
    client_of_one = RegistryClient("gnat", settings=world.settings)
    await client_of_one.set_status("alive")

    async def is_listed() -> bool:
        page = await world.get("/v1/instances?logical_id=gnat")
        return bool(page["source"] == "snapshot" and len(page["items"]) == 1)

    await eventually(is_listed)
    await client_of_one.set_status("dead")

    async def is_gone() -> bool:
        return not (await world.get("/v1/instances?logical_id=gnat"))["items"]

    await eventually(is_gone)
    assert [item["logical_id"] for item in (await world.get("/v1/instances?status=dead&logical_id=gnat"))["items"]]


async def test_the_registry_is_killed_and_comes_back_with_every_agent(world: World) -> None:
    before = await instances(world)
    client = RegistryClient("dog", settings=world.settings)
    await client.set_status("alive")
    receipt = await client.set_status("draining", "acknowledged")
    assert receipt.durable
    killed = (await world.registry.hello()).pid
    sources: set[str] = set()
    os.kill(killed, signal.SIGKILL)

    async def is_back() -> bool:
        source, names = await world.names()
        sources.add(source)
        assert set(FLEET) <= set(names)
        return (await world.registry.hello()).pid != killed and source == "registry"

    await eventually(is_back)
    assert sources <= {"registry", "postgres"}
    assert await instances(world) == before
    assert world.rows("select status::text, cause_detail from registry_instance where logical_id = 'dog'") == [
        ("draining", "acknowledged")
    ]
    await client.set_status("dead")


async def test_without_the_registry_the_database_answers(world: World) -> None:
    before = await instances(world)
    await stop_registry(world.settings.namespace)

    async def is_noticed() -> bool:
        source, names = await world.names()
        assert set(names) == set(FLEET)
        return source == "postgres"

    await eventually(is_noticed)
    assert await instances(world) == before
    async with httpx.AsyncClient(timeout=30) as client:
        answer = (await client.post(world.url + "/v1/resolve", json={"logical_ids": ["ant", "x"]})).json()
        one = (await client.get(world.url + "/v1/resolve/ant")).json()
        assert (one["source"], one["results"]) == ("postgres", answer["results"][:1])
        check_problem(await client.get(world.url + "/v1/resolve/x"), 404, "not_resolvable")
    assert answer["source"] == "postgres"
    assert [found["instance"] is not None for found in answer["results"]] == [True, False]
    assert (await world.get("/v1/agents/ant"))["source"] == "postgres"
    assert (await world.get("/v1/epoch"))["source"] == "postgres"
    handle: Any = serve.get_deployment_handle("Discovery", "seedcore")
    assert await (await handle.resolve.remote("ant")).get_id.remote() == "ant"
    # also when the registry has been away for longer than a lease
    await asyncio.sleep(world.settings.effective_lease_s + 1)
    source, names = await world.names()
    assert (source, set(names)) == ("postgres", set(FLEET))
    await world.settle()
    assert await instances(world) == before


async def test_without_the_database_agents_and_discovery_go_on_and_changes_arrive_afterwards(world: World) -> None:
    before = await instances(world)
    client = RegistryClient("elk", settings=world.settings)
    await client.set_status("alive")
    world.server.stop()
    receipt = await client.set_status("draining", "while it was away")
    assert not receipt.durable
    assert receipt.why
    newcomer = RegistryClient("fox", settings=world.settings)
    assert not (await newcomer.set_status("alive")).durable
    with pytest.raises(StoreUnavailableError):
        await world.registry.set_current_epoch("another")
    # longer than a lease: no agent dies because the database is silent
    for _ in range(round(world.settings.effective_lease_s) + 2):
        await asyncio.sleep(1)
        await asyncio.gather(client.beat(), newcomer.beat())
        source, names = await world.names()
        assert (source, set(names)) == ("registry", {*FLEET, "fox"})
    assert not (await world.registry.health()).is_ready
    located = await Tier0MemoryManager(world.settings).locate("bee")
    assert located.source is Origin.REGISTRY
    world.server.start()

    async def is_committed() -> bool:
        await asyncio.gather(client.beat(), newcomer.beat())
        rows = world.rows(
            "select logical_id, status::text, cause_detail from registry_instance "
            "where logical_id in ('elk', 'fox') order by 1"
        )
        assert rows == [("elk", "draining", "while it was away"), ("fox", "alive", None)], await world.registry.health()
        return True

    await eventually(is_committed)
    await asyncio.gather(client.beat(), newcomer.beat())
    assert (client.pending, newcomer.pending) == (0, 0)
    assert {name: iid for name, iid in (await instances(world)).items() if name in FLEET} == before
    dead = world.rows("select instance_id::text from registry_instance where status = 'dead'")
    assert not {row[0] for row in dead} & set(before.values())
    await asyncio.gather(client.set_status("dead"), newcomer.set_status("dead"))


async def test_without_both_rays_listing_answers_and_everything_heals(world: World) -> None:
    before = await instances(world)
    client = RegistryClient("gnu", settings=world.settings)
    await client.set_status("alive")
    world.server.stop()
    await stop_registry(world.settings.namespace)
    page = await world.get("/v1/instances")
    assert (page["source"], page["complete"]) == ("ray", False)
    assert {item["logical_id"] for item in page["items"]} == set(FLEET)
    async with httpx.AsyncClient(timeout=30) as http:
        answer = (await http.post(world.url + "/v1/resolve", json={"logical_ids": ["ant", "x"]})).json()
        assert answer["source"] == "ray"
        assert [found["instance"] is not None for found in answer["results"]] == [True, False]
        one = (await http.get(world.url + "/v1/resolve/ant")).json()
        assert (one["source"], one["complete"], one["results"]) == ("ray", False, answer["results"][:1])
        # a name that Ray does not list proves nothing
        check_problem(await http.get(world.url + "/v1/resolve/x"), 503, "cannot_know")
        cannot = await http.get(world.url + "/v1/instances?organ=any")
        assert (cannot.status_code, cannot.json()["code"]) == (503, "cannot_know")
        check_problem(await http.get(world.url + "/v1/epoch"), 503, "cannot_know")
    ready = await world.get("/readyz")
    assert (ready["ready"], ready["sources"]["ray"]) == (True, "ok")
    located = await Tier0MemoryManager(world.settings).locate("ant")
    assert located.source is Origin.RAY
    assert await located.handle.execute_task.remote("still here") == "still here"
    handle: Any = serve.get_deployment_handle("Discovery", "seedcore")
    assert await (await handle.resolve.remote("cat")).get_id.remote() == "cat"
    receipt = await client.set_status("draining", "while both were away")
    assert not receipt.durable
    # the registry comes back first and has nothing to remember
    await start_registry(world.settings)

    async def knows_the_fleet_again() -> bool:
        await client.beat()
        listing = await world.registry.list_active(None)
        assert not listing.complete
        return {row.logical_id for row in listing} == {*FLEET, "gnu"}

    await eventually(knows_the_fleet_again)

    async def beat_for_ever() -> None:
        # an agent: however long the rest takes to be well again, it is no silent one
        while True:
            await client.beat()
            await asyncio.sleep(world.settings.beat_interval_s / 2)

    beating = asyncio.create_task(beat_for_ever())
    await world.settle()
    assert await instances(world) == before

    async def is_committed() -> bool:
        found = world.rows("select status::text, cause_detail from registry_instance where logical_id = 'gnu'")
        assert found == [("draining", "while both were away")], found
        return True

    await eventually(is_committed)
    await end(beating)
    await client.set_status("dead")


async def test_the_database_is_killed_under_a_load_of_changes_and_none_is_lost(world: World) -> None:
    clients = [RegistryClient(f"h-{n}", settings=world.settings) for n in range(20)]
    await asyncio.gather(*(client.set_status("alive") for client in clients))

    async def toggle(client: RegistryClient) -> None:
        for turn in range(10):
            await client.set_status("draining" if turn % 2 == 0 else "alive", f"turn {turn}")
            await asyncio.sleep(0.05)

    toggling = [asyncio.create_task(toggle(client)) for client in clients]
    for _ in range(2):
        await asyncio.sleep(0.3)
        world.server.stop()
        await asyncio.sleep(0.3)
        world.server.start()
    await asyncio.gather(*toggling)

    async def is_committed() -> bool:
        await asyncio.gather(*(client.beat() for client in clients))
        assert [client.pending for client in clients] == [0] * len(clients)
        return True

    await eventually(is_committed)
    assert world.rows(
        "select distinct status::text, cause_detail, seq from registry_instance where logical_id like 'h-%%'"
    ) == [("alive", "turn 9", 12)]
    await asyncio.gather(*(client.set_status("dead") for client in clients))
