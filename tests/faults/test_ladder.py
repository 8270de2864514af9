"""Each rung of the ladder is taken away: agents go on, callers go on, nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import httpx
import pytest
from ray import serve

from seedcore.core.errors import StoreUnavailableError
from seedcore.core.model import Source
from seedcore.registry import RegistryClient
from seedcore.registry.actor import stop_registry
from seedcore.runtime import start_registry
from seedcore.tier0 import Tier0MemoryManager
from tests.faults.conftest import FLEET, World
from tests.waiting import eventually


async def instances(world: World) -> dict[str, str]:
    page = await world.get("/v1/instances")
    return {item["logical_id"]: item["instance_id"] for item in page["items"]}


async def test_everything_up_the_registry_answers_over_http_and_by_handle(world: World) -> None:
    page = await world.get("/v1/instances?limit=2")
    assert [item["logical_id"] for item in page["items"]] == ["ant", "bee"]
    assert (page["source"], page["complete"]) == ("registry", True)
    page = await world.get(f"/v1/instances?limit=2&cursor={page['next_cursor']}")
    assert ([item["logical_id"] for item in page["items"]], page["next_cursor"]) == (["cat"], None)
    one = page["items"][0]
    assert (await world.get(f"/v1/instances/{one['instance_id']}"))["instance"]["logical_id"] == "cat"
    agent = await world.get("/v1/agents/cat")
    assert agent["live"][0]["verdict"] == "fresh"
    assert agent["history"][0]["instance_id"] == one["instance_id"]
    assert (await world.get("/v1/epoch"))["epoch"] == "epoch-1"
    assert (await world.get("/healthz"))["registry"]["recovered"]
    assert (await world.get("/readyz"))["rungs"] == {"registry": "ok", "postgres": "ok", "ray": "ok"}
    handle: Any = serve.get_deployment_handle("Discovery", "seedcore")
    agent_handle = await handle.resolve.remote("bee")
    assert await agent_handle.get_id.remote() == "bee"
    many = await handle.resolve_many.remote(["ant", "nobody"])
    assert await many["ant"].get_id.remote() == "ant"
    assert "cannot be resolved" in many["nobody"]


BAD_REQUESTS = [
    ("/v1/instances?status=asleep", 422, "status"),
    ("/v1/instances?limit=0", 422, "limit"),
    ("/v1/instances?limit=1001", 422, "limit"),
    ("/v1/instances?cursor=junk", 422, "cursor"),
    ("/v1/instances?label=nokey", 422, "key=value"),
    ("/v1/instances?organ=%00", 422, "organ_id"),
    ("/v1/instances/not-a-uuid", 422, "UUID"),
    ("/v1/instances/00000000-0000-4000-8000-000000000000", 404, "not registered"),
    ("/v1/agents/never-was", 404, "nobody ever registered"),
    ("/v1/agents/" + "x" * 256, 422, "255"),
]


async def test_bad_input_over_http_is_a_problem_that_says_what(world: World) -> None:
    async with httpx.AsyncClient(timeout=30) as client:
        for path, status, says in BAD_REQUESTS:
            answer = await client.get(world.url + path)
            assert answer.status_code == status, path
            assert answer.headers["content-type"] == "application/problem+json"
            assert says in answer.json()["detail"]


async def test_the_registry_is_killed_and_comes_back_with_everybody(world: World) -> None:
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
    assert world.rows("select status::text, cause from registry_instance where logical_id = 'dog'") == [
        ("draining", "acknowledged")
    ]
    await client.set_status("dead")


async def test_without_the_registry_the_database_answers(world: World) -> None:
    before = await instances(world)
    await stop_registry(world.settings.namespace)
    source, names = await world.names()
    assert (source, set(names)) == ("postgres", set(FLEET))
    assert await instances(world) == before
    async with httpx.AsyncClient(timeout=30) as client:
        answer = (await client.post(world.url + "/v1/resolve", json={"logical_ids": ["ant", "x"]})).json()
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
    # longer than a lease: silence of the database is nobody's death
    for _ in range(round(world.settings.effective_lease_s) + 2):
        await asyncio.sleep(1)
        await asyncio.gather(client.beat(), newcomer.beat())
        source, names = await world.names()
        assert (source, set(names)) == ("registry", {*FLEET, "fox"})
    assert not (await world.registry.health()).is_ready
    located = await Tier0MemoryManager(world.settings).locate("bee")
    assert located.source is Source.REGISTRY
    world.server.start()

    async def is_committed() -> bool:
        await asyncio.gather(client.beat(), newcomer.beat())
        rows = world.rows(
            "select logical_id, status::text, cause from registry_instance "
            "where logical_id in ('elk', 'fox') order by 1"
        )
        assert rows == [("elk", "draining", "while it was away"), ("fox", "alive", None)], await world.registry.health()
        return True

    await eventually(is_committed)
    await asyncio.gather(client.beat(), newcomer.beat())
    assert (client.undelivered, newcomer.undelivered) == (0, 0)
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
        cannot = await http.get(world.url + "/v1/instances?organ=any")
        assert (cannot.status_code, "neither status, organ" in cannot.json()["detail"]) == (503, True)
    ready = await world.get("/readyz")
    assert (ready["ready"], ready["rungs"]["ray"]) == (True, "ok")
    located = await Tier0MemoryManager(world.settings).locate("ant")
    assert located.source is Source.RAY
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
    await world.settle()
    assert await instances(world) == before

    async def is_committed() -> bool:
        await client.beat()
        return world.rows("select status::text, cause from registry_instance where logical_id = 'gnu'") == [
            ("draining", "while both were away")
        ]

    await eventually(is_committed)
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
        assert [client.undelivered for client in clients] == [0] * len(clients)
        return True

    await eventually(is_committed)
    assert world.rows(
        "select distinct status::text, cause, seq from registry_instance where logical_id like 'h-%%'"
    ) == [("alive", "turn 9", 12)]
    await asyncio.gather(*(client.set_status("dead") for client in clients))
