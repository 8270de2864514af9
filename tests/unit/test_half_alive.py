"""Agents whose processes end: the registry's verdict, the client's comeback, and the probes of a URL."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from seedcore.agents import RayAgent
from seedcore.core.answers import NotResolved
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Registration
from seedcore.core.dependencies import MAX_DEPENDENCIES, Dependency
from seedcore.core.errors import BacklogFullError, InvalidInputError, NotAcceptingWorkError, RegistrationDelayedError
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.http_probe import MAX_PROBES
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.agent.thread_reporter import ThreadReporter
from seedcore.registry.ray_support.process_keys import process_key_of
from seedcore.registry.server.config import RegistryConfig
from seedcore.settings import Settings
from seedcore.store.memory import Tables
from tests.builders import START, iid
from tests.local import LocalRegistry
from tests.unit.registries import joined_registry
from tests.unit.test_dependency_watch import Children, children
from tests.waiting import eventually

__all__ = ["children"]

SETTINGS = Settings(beat_interval_s=0.05, namespace="nowhere")
CONFIG = RegistryConfig("cluster", flush_interval_s=0.01, linger_s=0.0, beat_interval_s=0.05, lease_s=30.0)
KILLED = Cause(CauseKind.PROCESS_KILLED, "vllm: SIGKILL (pid 7); CUDA error")


@pytest.fixture
def tables() -> Tables:
    return Tables(START)


@pytest.fixture
async def registry(tables: Tables) -> AsyncIterator[LocalRegistry]:
    async with joined_registry(CONFIG, tables) as registry:
        yield registry


def make_client(registry: LocalRegistry) -> RegistryClient:
    connection: Any = registry
    return RegistryClient("agent", settings=SETTINGS, connection=connection)


def report_end(registry: LocalRegistry, instance_id: str, dependency: Dependency, cause: Cause = KILLED) -> None:
    """As the relay of the node does."""
    registry.expiry.watch.on_dependency(instance_id, dependency, cause)


async def resolved(registry: LocalRegistry) -> tuple[NotResolved | None, str | None]:
    (found,) = (await registry.resolve(["agent"])).value
    return found.reason, found.detail


def held(row: Instance) -> str | None:
    hold = row.hold(HoldKind.PROCESS)
    return None if hold is None else hold.reason


# The registry


async def test_an_instance_whose_fatal_process_ended_is_dead_with_that_as_its_cause(
    registry: LocalRegistry, tables: Tables, children: Children
) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    await client.watch_process(children.make().pid, "vllm")
    instance_id = client.instance_id
    (process,) = tables.rows[instance_id].dependencies
    report_end(registry, instance_id, process)
    assert (await resolved(registry))[0] is NotResolved.DIED
    await eventually(lambda: tables.rows[instance_id].status is Status.DEAD)
    assert tables.rows[instance_id].cause == KILLED


async def test_an_instance_whose_other_process_ended_is_held_until_the_agent_has_another_one(
    registry: LocalRegistry, tables: Tables, children: Children
) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    await client.watch_process(children.make().pid, "vllm", fatal=False)
    (process,) = tables.rows[client.instance_id].dependencies
    report_end(registry, client.instance_id, process)
    assert await resolved(registry) == (
        NotResolved.DRAINING,
        f"a process that it depends on has ended: {KILLED.detail}",
    )
    await eventually(lambda: held(tables.rows[client.instance_id]) == KILLED.detail)
    # reported again, as by a relay that is new and knows less
    report_end(registry, client.instance_id, process, Cause(CauseKind.PROCESS_EXITED, "vllm: pid 7"))
    assert held(registry.members.index.by_id[client.instance_id]) == KILLED.detail
    await client.watch_process(children.make().pid, "vllm", fatal=False)
    assert await resolved(registry) == (None, None)
    assert tables.rows[client.instance_id].holds == ()
    # the one before may be reported late
    report_end(registry, client.instance_id, process)
    assert await resolved(registry) == (None, None)
    report_end(registry, client.instance_id, tables.rows[client.instance_id].dependencies[0])
    assert (await resolved(registry))[0] is NotResolved.DRAINING
    await client.unwatch_process("vllm")
    assert await resolved(registry) == (None, None)
    assert tables.rows[client.instance_id].dependencies == ()


async def test_a_hold_stays_while_another_process_has_ended(
    registry: LocalRegistry, tables: Tables, children: Children
) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    for name in ("vllm", "redis"):
        await client.watch_process(children.make().pid, name, fatal=False)
    vllm, redis = tables.rows[client.instance_id].dependencies
    report_end(registry, client.instance_id, vllm)
    report_end(registry, client.instance_id, redis, Cause(CauseKind.PROCESS_EXITED, "redis: exit code 1"))
    assert held(registry.members.index.by_id[client.instance_id]) == KILLED.detail
    await client.watch_process(children.make().pid, "vllm", fatal=False)
    await eventually(lambda: held(tables.rows[client.instance_id]) == "redis: exit code 1")
    await client.unwatch_process("redis")
    await eventually(lambda: held(tables.rows[client.instance_id]) is None)
    assert await resolved(registry) == (None, None)


async def test_a_hold_for_which_there_is_no_room_is_placed_later(
    registry: LocalRegistry, tables: Tables, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    await client.watch_process(children.make().pid, "vllm", fatal=False)

    def refuse() -> None:
        raise BacklogFullError(1)

    with monkeypatch.context() as full:
        full.setattr(registry.writer.backlog, "require_room", refuse)
        report_end(registry, client.instance_id, tables.rows[client.instance_id].dependencies[0])
        assert await resolved(registry) == (None, None)
    await eventually(lambda: held(tables.rows[client.instance_id]) == KILLED.detail)


async def test_dependencies_and_holds_outlive_a_restart(tables: Tables, children: Children) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        client = make_client(registry)
        await client.set_status("alive")
        await client.watch_process(children.make().pid, "vllm", fatal=False, stderr_path="/tmp/log")
        report_end(registry, client.instance_id, tables.rows[client.instance_id].dependencies[0])
        await eventually(lambda: held(tables.rows[client.instance_id]) is not None)
    async with joined_registry(CONFIG, tables) as another:
        row = another.members.index.by_id[client.instance_id]
        assert held(row) == KILLED.detail
        assert [(one.name, one.stderr_path) for one in row.dependencies] == [("vllm", "/tmp/log")]


# The agent


async def test_an_agent_comes_back_only_with_another_fatal_process(
    registry: LocalRegistry, tables: Tables, children: Children
) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    child = children.make()
    await client.watch_process(child.pid, "vllm")
    first = client.instance_id
    (process,) = tables.rows[first].dependencies
    child.kill()
    child.wait()
    report_end(registry, first, process)
    for _ in range(3):
        with pytest.raises(RegistrationDelayedError, match=rf"vllm \(pid {child.pid}\).* has ended"):
            await client.beat()
    receipt = await client.set_status("alive")
    assert not receipt.durable
    assert list(tables.rows) == [first]
    await client.watch_process(children.make().pid, "vllm")
    assert (await resolved(registry)) == (None, None)
    assert client.instance_id != first
    assert [row.dependencies[0].name for row in tables.rows.values()] == ["vllm", "vllm"]


async def test_an_agent_that_stops_without_its_process_registers_no_more(
    registry: LocalRegistry, tables: Tables, children: Children
) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    child = children.make()
    await client.watch_process(child.pid, "vllm")
    child.kill()
    child.wait()
    report_end(registry, client.instance_id, tables.rows[client.instance_id].dependencies[0])
    with pytest.raises(RegistrationDelayedError):
        await client.beat()
    assert (await client.set_status("dead")).durable
    assert (len(tables.rows), client.pending) == (1, 0)


async def test_an_agent_that_comes_back_without_its_other_process_is_held_from_its_start(
    registry: LocalRegistry, tables: Tables, children: Children
) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    child = children.make()
    await client.watch_process(child.pid, "vllm", fatal=False)
    child.kill()
    child.wait()
    await registry.deregister(["agent"])
    await client.beat()
    row = tables.rows[client.instance_id]
    assert (row.status, row.reported_status, held(row)) == (Status.DRAINING, Status.ALIVE, f"vllm: pid {child.pid}")
    assert Status.ALIVE not in {step.to_status for step in tables.transitions if step.instance_id == row.instance_id}
    await client.watch_process(children.make().pid, "vllm", fatal=False)
    assert await resolved(registry) == (None, None)


async def test_what_is_watched_before_the_start_is_part_of_the_registration(
    registry: LocalRegistry, tables: Tables, children: Children
) -> None:
    client = make_client(registry)
    reporter = Reporter("agent", settings=SETTINGS, client=client)
    await reporter.watch_process(children.make().pid, name="vllm")
    await reporter.start()
    assert [step.to_status for step in tables.transitions] == [Status.ALIVE]
    assert [one.name for one in tables.rows[client.instance_id].dependencies] == ["vllm"]
    await reporter.stop()


async def test_bad_processes_are_refused_and_nothing_changes(registry: LocalRegistry, children: Children) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    ended = children.make()
    ended.kill()
    ended.wait()
    zombie = children.make("pass")
    await eventually(lambda: process_key_of(zombie.pid) is None)
    pid: Any = children.make().pid
    no: Any = "no"
    three: Any = 3
    is_over = threading.Event()
    thread = threading.Thread(target=is_over.wait)
    thread.start()
    cases: list[tuple[Callable[[], Any], str]] = [
        (partial(client.watch_process, os.getpid()), "own process"),
        (partial(client.watch_process, ended.pid), "has ended"),
        (partial(client.watch_process, zombie.pid), "has ended"),
        (partial(client.watch_process, 2**31 - 1), "on another node or in another PID namespace"),
        (partial(client.watch_process, 0), "positive"),
        (partial(client.watch_process, True), "positive"),
        (partial(client.watch_process, type(no)(pid)), "positive"),
        (partial(client.watch_process, pid, ""), "empty"),
        (partial(client.watch_process, pid, "x" * 64), "at most 63"),
        (partial(client.watch_process, pid, fatal=no), "fatal"),
        (partial(client.watch_process, pid, stderr_path="log"), "absolute"),
        (partial(client.watch_process, pid, stderr_path=three), "must be a path, not int"),
        (partial(client.watch_process, thread.native_id or 0), f"is a thread of process {os.getpid()}"),
        (partial(client.unwatch_process, "vllm"), "no process of the name"),
    ]
    try:
        for call, words in cases:
            with pytest.raises(InvalidInputError, match=words):
                await call()
    finally:
        is_over.set()
        thread.join()
    assert client.registration.dependencies == ()
    for number in range(MAX_DEPENDENCIES):
        await client.watch_process(pid, f"process-{number}")
    with pytest.raises(InvalidInputError, match="at most 8"):
        await client.watch_process(pid, "ninth")
    # in the place of one of the same name
    await client.watch_process(children.make().pid, "process-0")
    assert len(client.registration.dependencies) == MAX_DEPENDENCIES


async def test_a_registry_refuses_dependencies_beyond_their_limits(registry: LocalRegistry) -> None:
    one = Dependency("vllm", 7, "key")
    bad: list[Any] = [
        (one,) * 2,
        tuple(replace(one, name=str(n)) for n in range(9)),
        [one],
        (7,),
        (replace(one, pid=0),),
    ]
    for dependencies in bad:
        with pytest.raises(InvalidInputError):
            await registry.register(Registration(iid(1), "agent", dependencies=dependencies))
    assert len(registry.members) == 0


async def test_an_agent_whose_fatal_process_has_ended_does_not_start_again(children: Children) -> None:
    agent = RayAgent("agent", settings=SETTINGS.model_copy(update={"registry_enabled": False}))
    await agent.start()
    child, side = children.make(), children.make()
    await agent._reporter.client.watch_process(child.pid, "vllm")
    await agent._reporter.client.watch_process(side.pid, "metrics", fatal=False)
    for ended in (side, child):
        await agent.start()
        ended.kill()
        ended.wait()
    # so a caller that makes the agent again replaces its actor
    with pytest.raises(NotAcceptingWorkError, match="is dead \\(its process 'vllm' has ended\\)") as refused:
        await agent.start()
    assert refused.value.status == Status.DEAD
    await agent._reporter.client.unwatch_process("vllm")
    await agent.start()


# Probes


async def test_bad_probes_are_refused(registry: LocalRegistry) -> None:
    reporter = Reporter("agent", settings=SETTINGS, client=make_client(registry))
    good: dict[str, Any] = {"url": "http://127.0.0.1:9/", "name": "vllm", "every_s": 3600.0}
    bad: dict[str, list[Any]] = {
        "url": [
            "",
            "ftp://x/",
            "http://",
            "http://ann:secret@x/",
            "http://[",
            "nonsense",
            "http://x:0/",
            "http://x:99999/",
        ],
        "name": ["", "x" * 64],
        "every_s": [0, -1, "5", 3601, float("nan"), True],
        "timeout_s": [0, -1.0, None],
        "failures": [0, 1.5, True, 1001],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(InvalidInputError):
                reporter.watch_http(**{**good, name: value})
    with pytest.raises(InvalidInputError):
        await reporter.unwatch_http("vllm")
    for number in range(MAX_PROBES):
        reporter.watch_http(**{**good, "name": str(number)})
    reporter.watch_http(**{**good, "name": "0"})
    with pytest.raises(InvalidInputError, match="at most 8"):
        reporter.watch_http(**good)
    await reporter.stop()


async def test_what_a_probe_found_counts_only_while_it_is_wanted(registry: LocalRegistry) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    assert not (await client.note_probe("vllm", "HTTP 503", lambda: False)).durable
    assert registry.members.index.by_id[client.instance_id].holds == ()
    await client.note_probe("vllm", "HTTP 503", lambda: True)
    assert [hold.reason for hold in registry.members.index.by_id[client.instance_id].holds] == ["vllm: HTTP 503"]


def test_a_blocking_reporter_keeps_what_it_watches_for_its_start() -> None:
    reporter = ThreadReporter("agent", settings=SETTINGS.model_copy(update={"registry_enabled": False}))
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert reporter.watch_process(child.pid, name="vllm") is None
        assert reporter.set_ready(False, "loading") is None
        with pytest.raises(InvalidInputError):
            reporter.watch_http("nonsense", name="vllm")
        reporter.watch_http("http://127.0.0.1:9/", name="vllm", every_s=3600.0)
        reporter.start()
        reporter.stop()
    finally:
        child.kill()
        child.wait()
