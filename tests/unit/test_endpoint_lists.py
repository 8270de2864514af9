"""The lists of endpoints: whose are listed, from which source, and what Prometheus makes of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from seedcore.core.answers import InstanceFilter, KnownBefore, Origin
from seedcore.core.changes import Registration
from seedcore.core.errors import CannotKnowError, InvalidInputError, RegistryUnavailableError, StoreUnavailableError
from seedcore.core.instances import Epoch, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.discovery import endpoints
from seedcore.discovery.endpoints import Found, endpoint_json, find_endpoints
from seedcore.discovery.prometheus import target_json
from seedcore.discovery.reader import DiscoveryReader
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import iid, instance
from tests.local import LocalRegistry
from tests.unit.callers import Actors, Plain
from tests.unit.test_registry import CONFIG, Elapsed, NoWitness
from tests.waiting import eventually

WANTED = InstanceFilter(endpoint="http")


class World:
    """A registry on a clock of its own, its database, and a reader over both."""

    def __init__(self) -> None:
        self.elapsed = Elapsed()
        clock = self.elapsed.clock()
        self.store = MemoryStore(clock.utc, Tables(clock.utc()))

        async def make_store() -> MemoryStore:
            return self.store

        self.registry = LocalRegistry(CONFIG, make_store, clock=clock, watch_factory=NoWitness)
        self.connection: Any = Plain(self.registry, RegistryUnavailableError, is_reworded=False)
        self.database: Any = Plain(self.store, StoreUnavailableError, is_reworded=False)
        actors: Any = Actors()
        connection: Any = self.connection

        async def read() -> Any:
            return self.database

        self.reader = DiscoveryReader(connection, read, actors, actors, CallerMetrics("discovery"), follows=False)

    async def enter(self, number: int, logical_id: str = "", *steps: Status, **details: Any) -> str:
        """An agent registers, by default with the endpoint, and is alive."""
        details = {"endpoints": {"http": f"http://10.0.0.{number}:80"}, **details}
        name = logical_id or f"agent-{number}"
        await self.registry.register(Registration(iid(number), name, **details), 1)
        for seq, status in enumerate((Status.ALIVE, *steps), 2):
            await self.registry.set_status(iid(number), status, seq)
        return iid(number)

    async def pass_time(self, seconds: float) -> None:
        """Let time pass in which the registry works."""
        for _ in range(round(10 * seconds)):
            self.elapsed.now_s += 0.1
            self.registry.expiry.attentive_now_s()
        await self.registry.expiry.sweep(self.registry.expiry.attentive_now_s())

    async def found(self, wanted: InstanceFilter = WANTED) -> Found:
        return await find_endpoints(self.reader, wanted, endpoint_json)

    async def ids(self, wanted: InstanceFilter = WANTED) -> list[str]:
        return [json.loads(part)["instance_id"] for part in (await self.found(wanted)).parts]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    world.registry.start()

    async def is_ready() -> bool:
        return (await world.registry.health()).is_ready

    await eventually(is_ready)
    yield world
    await world.registry.stop()


async def test_an_item_has_what_a_router_needs(world: World) -> None:
    await world.enter(1, labels={"tier": "hot"}, organ_id="eye", node_id="node")
    found = await world.found()
    assert [json.loads(part) for part in found.parts] == [
        {
            "logical_id": "agent-1",
            "instance_id": iid(1),
            "url": "http://10.0.0.1:80",
            "labels": {"tier": "hot"},
            "organ_id": "eye",
            "node_id": "node",
        }
    ]
    assert (found.source, found.complete, found.stream) == (Origin.REGISTRY, True, world.registry.members.feed.stream)


async def test_one_missed_beat_takes_no_agent_out_of_the_list_and_a_second_one_does(world: World) -> None:
    silent = await world.enter(1)
    beating = await world.enter(2)
    seen: list[tuple[Verdict, bool]] = []
    for _ in range(28):
        await world.pass_time(0.5)
        await world.registry.beat(beating)
        row = (await world.registry.list_active(logical_id="agent-1")).verdicts.get(silent, Verdict.FRESH)
        seen.append((row, silent in await world.ids()))
    assert set(seen) == {(Verdict.FRESH, True), (Verdict.LATE, True), (Verdict.SUSPECT, False)}
    assert await world.ids() == [beating]


async def test_who_drains_is_not_ready_or_is_dead_leaves_at_once(world: World) -> None:
    for number, last in enumerate((Status.ALIVE, Status.DRAINING, Status.DEAD), 1):
        await world.enter(number, "", *([] if last is Status.ALIVE else [last]))
    await world.enter(4)
    await world.registry.drain(["agent-4"])
    await world.registry.register(Registration(iid(5), "agent-5", endpoints={"http": "http://h"}), 1)
    await world.enter(6, cluster_epoch="later")
    await world.enter(7, endpoints={"https": "https://h"})
    assert await world.ids() == [iid(1)]
    await world.registry.undrain(["agent-4"])
    assert await world.ids() == [iid(1), iid(4)]
    await world.registry.report_dead_call(iid(1))
    await world.pass_time(0.5)
    assert await world.ids() == [iid(4)]


async def test_an_agent_is_listed_once_by_its_best_instance_that_has_the_endpoint(world: World) -> None:
    late = await world.enter(1, "one")
    await world.pass_time(6.0)
    fresh = await world.enter(2, "one")
    assert await world.ids() == [fresh]
    # the newest has none of this name
    await world.enter(3, "one", endpoints={})
    assert await world.ids() == [fresh]
    await world.registry.deregister(instance_ids=[fresh])
    assert await world.ids() == [late]


async def test_the_filters_select_before_the_best_is_chosen(world: World) -> None:
    await world.enter(1, "one", labels={"tier": "a"})
    await world.enter(2, "one", labels={"tier": "b"})
    await world.enter(3, "two", organ_id="eye")
    assert await world.ids(InstanceFilter(endpoint="http", labels={"tier": "a"})) == [iid(1)]
    assert await world.ids(InstanceFilter(endpoint="http", organ_id="eye")) == [iid(3)]


async def test_a_list_of_many_pages_has_each_agent_once_in_order(world: World) -> None:
    count = MAX_PAGE + 5
    rows = [
        instance(number, f"agent-{number // 2:05}", endpoints={"http": f"http://h:{number}"})
        for number in range(2 * count)
    ]
    now_s = world.elapsed.now_s
    for row in rows:
        world.registry.members.adopt(row, now_s)
    found = await world.found()
    items = [json.loads(part) for part in found.parts]
    assert [item["logical_id"] for item in items] == [f"agent-{number:05}" for number in range(count)]
    assert [item["url"] for item in items] == [f"http://h:{2 * number}" for number in range(count)]


async def test_while_the_registry_is_away_its_database_lists_them(world: World) -> None:
    await world.enter(1)
    await world.enter(2, "", Status.DRAINING)
    world.connection.is_away = True
    found = await world.found()
    assert (found.source, found.complete, found.stream) == (Origin.POSTGRES, True, None)
    assert await world.ids() == [iid(1)]
    world.database.is_away = True
    with pytest.raises(CannotKnowError):
        await world.found()


async def test_that_there_is_none_is_known_only_where_the_epoch_is_certain(world: World) -> None:
    found = await world.found()
    assert (found.parts, found.complete) == ((), True)
    await world.enter(1)
    await world.registry.beat_many([iid(1)], None, KnownBefore({}, Epoch("lost", 9)))
    found = await world.found()
    assert (found.parts, found.complete) == ((), False)


async def test_a_list_that_is_too_long_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.enter(1)
    await world.enter(2)
    part = (await world.found()).parts[0]

    def padded(row: Any, url: str) -> bytes:
        return part * (endpoints.MAX_LIST_BYTES // len(part) // 2 + 1)

    with pytest.raises(InvalidInputError, match="more than 8388608 bytes: select fewer agents"):
        await find_endpoints(world.reader, WANTED, padded)


# Prometheus


@pytest.mark.parametrize(
    ("url", "target", "more"),
    [
        ("http://10.0.0.3:8000", "10.0.0.3:8000", {"__scheme__": "http"}),
        ("http://h/", "h:80", {"__scheme__": "http"}),
        ("https://h/m?a=1&a=2&b[]=3", "h:443", {"__scheme__": "https", "__metrics_path__": "/m", "__param_a": "1"}),
        ("http://[2001:db8::1]:9/m", "[2001:db8::1]:9", {"__scheme__": "http", "__metrics_path__": "/m"}),
        ("grpc://h:50051", "h:50051", {}),
        ("tcp://h", "h", {}),
    ],
)
def test_a_url_is_a_target_with_its_scheme_path_and_parameters(url: str, target: str, more: dict[str, str]) -> None:
    row = instance(1, "an agent", organ_id="eye", labels={"app.kubernetes.io/tier": "hot"}, endpoints={"http": url})
    group = target_json(row, url)
    assert group is not None
    shown = json.loads(group)
    assert shown["targets"] == [target]
    meta = "__meta_seedcore_"
    assert shown["labels"] == {
        f"{meta}logical_id": "an agent",
        f"{meta}instance_id": iid(1),
        f"{meta}organ_id": "eye",
        f"{meta}url": url,
        f"{meta}scheme": url.partition(":")[0],
        f"{meta}label_app_kubernetes_io_tier": "hot",
        **more,
    }


@pytest.mark.parametrize("url", ["", "no URL", "http://", "//h", "http://h:x", "http://[::1", "http://ann:secret@h"])
def test_what_is_no_url_is_no_target(url: str) -> None:
    assert target_json(instance(1, endpoints={"http": url}), url) is None


def test_labels_of_other_programs_are_text() -> None:
    labels: Any = {"n": 5, "list": [1], "none": None}
    group = target_json(instance(1, labels=labels, started_at=instance().started_at + timedelta(1)), "http://h")
    assert group is not None
    shown = json.loads(group)["labels"]
    assert [shown[f"__meta_seedcore_label_{name}"] for name in labels] == ["5", "[1]", "null"]
