"""Relays start, fail and end; the watch replaces them, and reports what it cannot see."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Registration, new_instance_id
from seedcore.core.clock import Clock
from seedcore.core.errors import BacklogFullError, DirectoryUnavailableError, NodeDeadError
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.recent_deaths import RecentDeath
from seedcore.core.verdict import Death, Witness
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.node.process_watch import OnExit
from seedcore.registry.node.relay import Relay
from seedcore.registry.protocol.messages import Watched
from seedcore.registry.ray_support.lookup import ActorHandle, in_thread
from seedcore.registry.ray_support.process_keys import process_key_of
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.death_watch import DeathWatch
from seedcore.registry.server.watched_node import WatchTimes
from seedcore.settings import Settings
from seedcore.store.memory import Tables
from tests.builders import START, iid, instance
from tests.unit.registries import Away, joined_registry
from tests.waiting import eventually


class Willing:
    """A watch that can watch any instance but those in `refused`; those in `slow` once their event is set."""

    def __init__(self, on_exit: OnExit) -> None:
        self.on_exit = on_exit
        self.watched: set[str] = set()
        self.slow: dict[str, asyncio.Event] = {}
        self.refused: set[str] = set()

    async def add(self, watched: Watched) -> bool:
        if watched.instance_id in self.slow:
            await self.slow[watched.instance_id].wait()
        if watched.instance_id in self.refused:
            return False
        self.watched.add(watched.instance_id)
        return True

    def discard(self, instance_id: str) -> None:
        self.watched.discard(instance_id)

    async def close(self) -> None: ...


class LocalRelay:
    """A relay in this process, called like an actor."""

    def __init__(self) -> None:
        self.relay = Relay((self._make,))
        self.is_hung = False
        self.fails = False

    def _make(self, on_exit: OnExit) -> Willing:
        self.eyes = Willing(on_exit)
        return self.eyes

    def __getattr__(self, method: str) -> Any:
        async def call(*arguments: Any) -> Any:
            if self.is_hung:
                await asyncio.Event().wait()
            if self.fails and method != "__ray_ready__":
                raise ActorDiedError
            return None if method == "__ray_ready__" else await getattr(self.relay, method)(*arguments)

        class Method:
            remote = staticmethod(call)

        return Method


class LocalCluster:
    """One node whose relays are local. `fails_to_make` and `fails_to_end` are how often."""

    def __init__(self, fails_to_make: int = 0, fails_to_end: int = 0) -> None:
        self.fails_to_make, self.fails_to_end = fails_to_make, fails_to_end
        self.made: list[LocalRelay] = []
        self.ended: list[ActorHandle] = []
        self.hurry: Callable[[LocalRelay], None] = lambda _: None
        self.table = {"node": True}
        self.is_away = False
        self.draining_nodes: dict[str, datetime | None] = {}
        self.is_moved = False
        self.looks = 0

    async def draining(self) -> Mapping[str, datetime | None]:
        if self.is_moved:
            raise DirectoryUnavailableError("Ray has moved it")
        return dict(self.draining_nodes)

    async def nodes(self) -> Mapping[str, bool]:
        self.looks += 1
        if self.is_away:
            raise DirectoryUnavailableError("the GCS is away")
        return dict(self.table)

    async def make_relay(self, node_id: str, name: str) -> ActorHandle:
        if self.fails_to_make:
            self.fails_to_make -= 1
            raise RuntimeError("the GCS said no")
        relay = LocalRelay()
        self.made.append(relay)
        self.hurry(relay)
        return relay

    async def end_relay(self, relay: ActorHandle) -> None:
        if self.fails_to_end:
            self.fails_to_end -= 1
            raise ValueError("it cannot be killed")
        self.ended.append(relay)

    async def ask(self, relay: ActorHandle, method: str, *args: object) -> Any:
        return await getattr(relay, method).remote(*args)

    async def find_actor(self, name: str, namespace: str, timeout_s: float) -> ActorHandle | None:
        return None


Deaths = list[str]
ENDED = Cause(CauseKind.PROCESS_EXITED, "pid 7")


@pytest.fixture
def cluster() -> LocalCluster:
    return LocalCluster()


# so quick that tests need not wait for it
QUICK = WatchTimes(node_table_s=0.01, poll_s=0.1, poll_grace_s=0.5, unwatched_s=0.05, unwatched_max_s=0.05)


@pytest.fixture
async def watch(cluster: LocalCluster) -> AsyncIterator[tuple[DeathWatch, Deaths]]:
    """A watch at work, and the deaths that it has reported."""
    deaths: Deaths = []

    def note(instance_id: str, process: Witness, node: Witness, cause: Cause) -> None:
        deaths.append(instance_id)

    watch = DeathWatch(note, cluster, QUICK)
    watch.start()
    yield watch, deaths
    await watch.stop()


Watching = tuple[DeathWatch, Deaths]


def on_node(number: int, node_id: str = "node") -> Any:
    return replace(instance(number), node_id=node_id, pid=number)


async def test_a_relay_that_could_not_be_made_is_made_later_and_is_a_problem_until_then(
    cluster: LocalCluster, watch: Watching
) -> None:
    cluster.fails_to_make = 2
    watch[0].add(on_node(1))
    await eventually(lambda: watch[0].problem == "no relay on node node: the GCS said no", every_s=0.001)
    await eventually(lambda: cluster.made and iid(1) in cluster.made[0].eyes.watched)
    await eventually(lambda: watch[0].problem is None)


async def test_a_relay_that_cannot_be_ended_is_still_replaced(cluster: LocalCluster, watch: Watching) -> None:
    cluster.fails_to_end = 1
    watch[0].add(on_node(1))
    await eventually(lambda: cluster.made)
    cluster.made[0].is_hung = True
    await eventually(lambda: len(cluster.made) > 1 and iid(1) in cluster.made[1].eyes.watched)
    cluster.made[1].eyes.on_exit(iid(1), ENDED, None)
    await eventually(lambda: watch[1] == [iid(1)])


async def test_the_watch_is_blind_while_rays_tables_cannot_be_read(cluster: LocalCluster, watch: Watching) -> None:
    watch[0].add(on_node(1))
    await eventually(lambda: watch[0].watched)
    assert not watch[0].is_blind
    cluster.is_away = True
    await eventually(lambda: watch[0].is_blind)
    assert str(watch[0].problem).endswith("the GCS is away")
    cluster.is_away = False
    await eventually(lambda: not watch[0].is_blind)
    assert watch[1] == []


async def test_a_node_whose_task_ended_gets_another(cluster: LocalCluster, watch: Watching) -> None:
    watch[0].add(on_node(1))
    await eventually(lambda: cluster.made)
    [task] = [task for task in asyncio.all_tasks() if task.get_name() == "relay-node"]
    task.cancel()
    await eventually(lambda: len(cluster.made) > 1)
    assert cluster.ended == cluster.made[:1]


async def test_a_hung_relay_is_a_problem_and_is_replaced(cluster: LocalCluster, watch: Watching) -> None:
    watch[0].add(on_node(1))
    await eventually(lambda: cluster.made and iid(1) in cluster.made[0].eyes.watched)
    cluster.made[0].is_hung = True
    cluster.hurry = lambda relay: setattr(relay, "is_hung", True)
    await eventually(
        lambda: watch[0].problem == "the relay on node node did not answer in time; making another", every_s=0.001
    )
    await eventually(lambda: len(cluster.made) > 1)
    assert cluster.ended == cluster.made[:1]


def test_a_hung_relay_is_replaced_within_ten_seconds() -> None:
    assert WatchTimes().poll_s + WatchTimes().poll_grace_s <= 10.0


async def test_exits_are_received_while_the_relay_takes_its_time_to_watch(
    cluster: LocalCluster, watch: Watching
) -> None:
    busy = asyncio.Event()
    cluster.hurry = lambda relay: relay.eyes.slow.update({iid(1): busy})
    for number in (1, 2):
        watch[0].add(on_node(number))
    # the first one does not keep the second one from being watched
    await eventually(lambda: cluster.made and iid(2) in cluster.made[0].eyes.watched)
    cluster.made[0].eyes.on_exit(iid(2), ENDED, None)
    await eventually(lambda: watch[1] == [iid(2)])
    assert len(cluster.made) == 1
    busy.set()


async def test_a_node_that_ray_does_not_know_is_a_problem_and_keeps_nothing(watch: Watching) -> None:
    watch[0].add(on_node(1, "k8s-7"))
    for number in range(2, 100):
        watch[0].add(on_node(number, "k8s-7"))
        watch[0].drop(on_node(number, "k8s-7"))
    await eventually(lambda: watch[0].problem == "no such node in Ray's table: k8s-7 (RAY_NODE_ID?)")
    assert watch[0].nodes["k8s-7"].pending == 0
    watch[0].drop(on_node(1, "k8s-7"))
    assert watch[0].problem is None
    await eventually(lambda: not watch[0].nodes)


async def test_process_on_a_dead_node_is_refused_when_it_registers_and_tries_ever_more_rarely(
    cluster: LocalCluster,
) -> None:
    cluster.table = {"node": True, "cut-off": True}
    tables = Tables(START)
    settings = Settings(namespace="nowhere", node_id="cut-off", beat_interval_s=0.05)
    config = RegistryConfig("cluster", beat_interval_s=0.05, lease_s=60.0, flush_interval_s=0.01)
    async with joined_registry(config, tables, lambda on_death: DeathWatch(on_death, cluster, QUICK)) as registry:
        connection: Any = registry
        client = RegistryClient("agent", settings=settings, connection=connection)
        reporter = Reporter("agent", settings=settings, client=client)
        await reporter.start()
        first = client.instance_id
        await registry.register(Registration(iid(1), "agent", node_id="node"))
        cluster.table["cut-off"] = False
        await eventually(lambda: first in registry.members.deaths, every_s=0.001)
        for _ in range(3):
            with pytest.raises(NodeDeadError, match="start the agent on a live node"):
                await registry.register(Registration(new_instance_id(), "agent", node_id="cut-off"))
        await eventually(lambda: "registers again in" in str(reporter.problem))
        assert "node cut-off is dead in Ray's node table" in str(reporter.problem)
        # nothing of it came back, neither in memory nor in the history
        assert [row.instance_id for row in registry.members.instances_of("agent")] == [iid(1)]
        assert set(tables.rows) == {first, iid(1)}
        receipt = await reporter.stop()
        assert receipt is not None
        assert (receipt.durable, set(tables.rows)) == (True, {first, iid(1)})


async def test_instance_that_a_relay_cannot_watch_is_not_counted_and_is_tried_again(
    cluster: LocalCluster, watch: Watching
) -> None:
    cluster.hurry = lambda relay: relay.eyes.refused.update((iid(1), iid(2)))
    for number in (1, 2, 3):
        watch[0].add(on_node(number))
    await eventually(lambda: cluster.made and cluster.made[0].eyes.watched == {iid(3)})
    await eventually(lambda: (watch[0].relays, watch[0].watched) == (1, 1))
    watch[0].drop(on_node(2))
    cluster.made[0].eyes.refused.clear()
    await eventually(lambda: watch[0].watched == 2)
    assert cluster.made[0].eyes.watched == {iid(1), iid(3)}


async def test_unwatched_instances_are_counted_and_only_what_can_be_mended_is_a_problem(
    cluster: LocalCluster, watch: Watching
) -> None:
    counts: list[Mapping[str, int]] = []
    watch[0].on_unwatched = counts.append
    key = process_key_of(os.getpid()) or ""
    in_a_container = replace(on_node(1), process_key=f"1{key[key.index('-') :]}")
    elsewhere = replace(on_node(2), process_key=f"{key[:-3]}abc")
    guest = replace(on_node(4), node_id=None)
    cluster.hurry = lambda relay: relay.eyes.refused.update((iid(1), iid(2)))
    for one in (in_a_container, elsewhere, on_node(3), guest):
        watch[0].add(one)
    await eventually(lambda: counts and counts[-1] == {"namespace": 1, "elsewhere": 2})
    problem = str(watch[0].problem)
    assert problem.startswith("1 of 3 instances on node node are not watched: their processes have another PID namesp")
    watch[0].drop(in_a_container)
    await eventually(lambda: counts[-1] == {"elsewhere": 2})
    assert (watch[0].problem, watch[0].watched) == (None, 1)
    watch[0].drop(guest)
    cluster.made[0].eyes.refused.clear()
    await eventually(lambda: counts[-1] == {})
    assert watch[0].watched == 2


async def test_many_problems_are_counted(watch: Watching) -> None:
    for number in range(1, 6):
        watch[0].add(on_node(number, f"k8s-{number}"))
    await eventually(lambda: watch[0].problem is not None and watch[0].problem.endswith("; 5 of 5 nodes in all"))


# Look-ups in threads


async def test_result_that_is_too_late_goes_to_on_late(connected: None) -> None:
    go = threading.Event()
    late: list[str] = []

    def slow() -> str:
        go.wait()
        return "a relay"

    with pytest.raises(DirectoryUnavailableError):
        await in_thread(slow, 0.01, on_late=late.append)
    cancelled = asyncio.create_task(in_thread(slow, 60.0, on_late=late.append))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    assert late == []
    go.set()
    await eventually(lambda: late == ["a relay"] * 2)


async def test_result_that_arrives_as_its_waiter_is_cancelled_goes_to_on_late(connected: None) -> None:
    done = threading.Event()
    late: list[str] = []

    def quick() -> str:
        done.set()
        return "a relay"

    asked = asyncio.create_task(in_thread(quick, 60.0, on_late=late.append))
    await asyncio.sleep(0)
    # the answer is in the loop's queue, in front of the cancellation
    done.wait()
    time.sleep(0.05)  # noqa: ASYNC251 - no other task may run
    asyncio.get_running_loop().call_soon(asked.cancel)
    [answer] = await asyncio.gather(asked, return_exceptions=True)
    assert isinstance(answer, asyncio.CancelledError)
    await eventually(lambda: late == ["a relay"])


# Reports and the backlog


async def test_a_reported_death_is_taken_while_the_backlog_is_full(cluster: LocalCluster) -> None:
    tables = Tables(START)
    store = Away(lambda: START, tables)
    config = RegistryConfig(
        "cluster", lease_s=60.0, flush_interval_s=0.01, change_capacity=3, retry_max_s=0.05, durable_wait_s=0.05
    )
    async with joined_registry(
        config, tables, lambda on_death: DeathWatch(on_death, cluster, QUICK), store=store
    ) as registry:
        for number in (1, 2):
            await registry.register(Registration(iid(number), f"agent-{number}", node_id="node", pid=number))
            await registry.set_status(iid(number), Status.ALIVE, 2)
        await eventually(lambda: cluster.made and cluster.made[0].eyes.watched == {iid(1), iid(2)})
        store.is_there = False

        async def is_full() -> bool:
            try:
                await registry.register(Registration(new_instance_id(), "another"))
            except BacklogFullError:
                return True
            return False

        await eventually(is_full)
        cluster.made[0].eyes.on_exit(iid(1), ENDED, None)
        await eventually(lambda: iid(1) not in registry.members)
        assert registry.members.deaths.get(iid(1)) == RecentDeath(ENDED, Death.PROCESS)
        # discovery has dropped it, and the relay goes on
        assert (await registry.resolve(["agent-1"])).value[0].instance is None
        assert [row.instance_id for row in await registry.list_active()] == [iid(2)]
        assert tables.rows[iid(1)].status is Status.ALIVE
        assert await registry.report_dead_call(iid(1)) is Verdict.UNKNOWN
        with pytest.raises(BacklogFullError):
            await registry.set_status(iid(2), Status.DRAINING, 3)
        cluster.made[0].eyes.on_exit(iid(2), ENDED, None)
        await eventually(lambda: iid(2) not in registry.members)
        store.is_there = True
        await eventually(lambda: {tables.rows[iid(number)].status for number in (1, 2)} == {Status.DEAD})
        assert (len(cluster.made), cluster.ended) == (1, [])


async def test_relays_that_fail_at_once_are_made_ever_more_rarely(cluster: LocalCluster) -> None:
    times = replace(QUICK, restart_s=0.02, restart_max_s=0.5)
    deaths: Deaths = []
    watch = DeathWatch(lambda instance_id, *_: deaths.append(instance_id), cluster, times)
    loop = asyncio.get_running_loop()
    made_s: list[float] = []

    def fail_at_once(relay: LocalRelay) -> None:
        made_s.append(loop.time())
        relay.fails = True

    cluster.hurry = fail_at_once
    watch.add(on_node(1))
    watch.start()
    try:
        # each has answered once when it fails: that is no reason to begin again with short delays
        await eventually(lambda: len(made_s) == 6)
        pauses_s = [later - earlier for earlier, later in pairwise(made_s)]
        for number, pause_s in enumerate(pauses_s):
            assert pause_s >= 0.5 * times.restart_s * 2**number
        assert watch.problem is not None
    finally:
        await watch.stop()


async def test_a_relay_that_has_worked_for_a_while_is_replaced_at_once(cluster: LocalCluster) -> None:
    now_s = 0.0
    clock = Clock(lambda: now_s)
    times = replace(QUICK, poll_grace_s=0.1, restart_s=0.01, restart_max_s=60.0, settled_s=30.0)
    watch = DeathWatch(lambda *_: None, cluster, times, clock)
    cluster.fails_to_make = 5
    watch.add(on_node(1))
    watch.start()
    try:
        for number in range(12):
            await eventually(lambda: len(cluster.made) > number and iid(1) in cluster.made[number].eyes.watched)  # noqa: B023
            now_s += 31.0
            cluster.made[number].fails = True
    finally:
        await watch.stop()
