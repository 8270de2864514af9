"""A process leaves Ray, joins it again, joins another cluster, forks: a handle of one session is used in no other."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import ray
from pydantic import SecretStr
from ray.cluster_utils import Cluster

from seedcore.agents import RayAgent
from seedcore.composition import start_registry
from seedcore.core.answers import Origin
from seedcore.core.errors import (
    AgentCallError,
    CannotKnowError,
    DirectoryUnavailableError,
    NotResolvableError,
    RegistryError,
    RegistryUnavailableError,
    SessionError,
)
from seedcore.core.instances import Instance
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.agent.thread_reporter import ThreadReporter
from seedcore.registry.caller.listing import list_active_instances
from seedcore.registry.protocol.connection import RegistryConnection, shared_connection
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.actors import end_actor
from seedcore.registry.ray_support.directory import RayDirectory
from seedcore.registry.ray_support.session import own_node_id
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.calls import bounded_call
from tests.builders import iid
from tests.cluster.agents import Worker
from tests.cluster.conftest import HEAD
from tests.servers import PostgresServer
from tests.serving import free_port
from tests.waiting import eventually


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster that goes on when this process leaves it."""
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    yield cluster
    cluster.shutdown()


def join(address: str) -> None:
    ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")


@pytest.fixture(scope="module")
def settings(postgres18: PostgresServer) -> Settings:
    dsn = SecretStr(postgres18.dsn(postgres18.create_database()))
    return Settings(namespace="sessions", pg_dsn=dsn, beat_interval_s=1.0, flush_interval_s=0.2)


async def started(settings: Settings) -> RegistryConnection:
    """A registry that has joined its database."""
    await start_registry(settings)
    connection = shared_connection(settings.namespace, settings.call_timeout_s)

    async def is_ready() -> bool:
        return (await connection.health()).is_ready

    await eventually(is_ready)
    return connection


@dataclass
class Program:
    """A process with a manager, a reporter, and an agent that it has made."""

    settings: Settings
    connection: RegistryConnection
    manager: Tier0MemoryManager
    reporter: ThreadReporter

    @property
    def problem(self) -> str | None:
        assert self.reporter.reporter is not None
        return self.reporter.reporter.problem

    async def registered(self) -> Instance | None:
        rows = await self.connection.list_active(logical_id="program")
        return rows.items[0] if rows.items else None

    async def until_held(self) -> None:
        """Until it uses what it holds: the relay of the node, and handles that the feed keeps."""

        async def is_held() -> bool:
            return self.connection.uses_relay and (await self.manager.locate("stays")).source is Origin.SNAPSHOT

        await eventually(is_held)


@pytest.fixture(scope="module")
def program(cluster: Cluster, settings: Settings) -> Iterator[Program]:
    """In the cluster when a test begins, and again when it ends."""
    join(cluster.address)
    manager = Tier0MemoryManager(settings)
    reporter = ThreadReporter("program", settings=settings)

    async def begin() -> RegistryConnection:
        connection = await started(settings)
        await manager.create_agent("stays", agent_class=Worker, arguments={"settings": settings})
        return connection

    connection = asyncio.run(begin())
    reporter.start()
    yield Program(settings, connection, manager, reporter)
    reporter.stop()
    asyncio.run(stop_registry(settings.namespace))
    ray.shutdown()


async def test_without_ray_nothing_is_called_and_ray_stays_down(
    program: Program, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, connection, settings = program.manager, program.connection, program.settings
    await program.until_held()
    handle = await manager.resolve("stays")
    before = await program.registered()
    ray.shutdown()
    # what Ray's auto-init would join
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    for error, call in (
        (CannotKnowError, lambda: manager.resolve("stays")),
        (AgentCallError, lambda: manager.create_agent("other")),
        (AgentCallError, lambda: bounded_call("stays", lambda: handle.ping.remote(), 5)),
        (RegistryUnavailableError, lambda: list_active_instances(settings=settings)),
        (RegistryUnavailableError, lambda: start_registry(settings)),
        (RegistryUnavailableError, lambda: connection.beat(iid(1))),
        (RegistryUnavailableError, connection.health),
        (DirectoryUnavailableError, lambda: RayDirectory(settings.namespace).names()),
        (DirectoryUnavailableError, lambda: stop_registry(settings.namespace)),
        (SessionError, lambda: end_actor(handle, 5)),
        (SessionError, lambda: session.ask(handle, "ping")),
    ):
        began_s = time.monotonic()
        with pytest.raises(error, match="not connected to Ray"):
            await call()
        assert time.monotonic() - began_s < 1
    problem = (await manager.get_system_summary()).registry_problem
    assert problem is not None
    assert "not connected to Ray" in problem
    await eventually(lambda: "not connected to Ray" in (program.problem or ""))
    # a shutdown between the check and the call
    for call in (
        lambda: session.submitted(handle.ping, (), {}),
        lambda: session.submitted(ray.remote(Worker), ("other",), {}, num_cpus=0),
        lambda: session.without_auto_init(ray.get_actor)("stays", namespace=settings.namespace),
        lambda: session.without_auto_init(ray.kill)(handle),
    ):
        with pytest.raises((ray.exceptions.RaySystemError, AttributeError)):
            call()
    assert not ray.is_initialized()

    # the same cluster again
    join(cluster.address)
    with pytest.raises(AgentCallError, match="a handle is of one Ray session"):
        await bounded_call("stays", lambda: handle.ping.remote(), 5)
    with pytest.raises(SessionError, match="a handle is of one Ray session"):
        await end_actor(handle, 5)
    found = await manager.resolve("stays")
    assert await found.ping.remote() == "pong"
    assert await manager.execute_task_on_agent("stays", "pid") is not None
    assert (await manager.get_system_summary()).registry_problem is None
    assert [agent.logical_id for agent in manager.list_agents()] == ["stays"]
    await eventually(lambda: program.problem is None)
    after = await program.registered()
    assert before is not None
    assert after is not None
    assert after.instance_id == before.instance_id


async def test_a_task_ends_with_the_session_it_was_made_in(program: Program, cluster: Cluster) -> None:
    handle = await program.manager.resolve("stays")
    before = (await handle.get_heartbeat.remote()).tasks_running
    task = asyncio.create_task(program.manager.execute_task_on_agent("stays", "sleep", retries=False))

    async def is_running() -> bool:
        return bool((await handle.get_heartbeat.remote()).tasks_running > before)

    await eventually(is_running)
    ray.shutdown()
    with pytest.raises(AgentCallError, match="ended during the call"):
        await task
    join(cluster.address)
    assert await (await program.manager.resolve("stays")).ping.remote() == "pong"


@pytest.mark.slow
async def test_another_cluster_is_another_world(program: Program, cluster: Cluster, postgres18: PostgresServer) -> None:
    elsewhere = program.settings.model_copy(update={"pg_dsn": SecretStr(postgres18.dsn(postgres18.create_database()))})
    here = own_node_id()

    async def is_of_this_node() -> bool:
        found = await program.registered()
        return found is not None and found.node_id == own_node_id()

    # each time at once, however often it has been asked before
    for _ in range(2):
        ray.shutdown()
        join("local")
        try:
            await started(elsewhere)
            assert own_node_id() != here
            assert program.manager.list_agents() == ()
            with pytest.raises(NotResolvableError):
                await program.manager.resolve("stays")
            await eventually(is_of_this_node)
            await stop_registry(elsewhere.namespace)
        finally:
            ray.shutdown()
            join(cluster.address)
        await eventually(is_of_this_node)
    assert await (await program.manager.resolve("stays")).ping.remote() == "pong"


@pytest.fixture
def client_address(cluster: Cluster) -> Iterator[str]:
    """Where Ray Client joins the cluster."""
    port = free_port()
    places = [f"--address={cluster.address}", "--host=127.0.0.1", f"--port={port}"]
    server = subprocess.Popen([sys.executable, "-m", "ray.util.client.server", "--mode=legacy", *places])
    yield f"ray://127.0.0.1:{port}"
    server.kill()
    server.wait()


@pytest.mark.slow
async def test_ray_client_has_sessions_too(program: Program, cluster: Cluster, client_address: str) -> None:
    ray.shutdown()
    manager = Tier0MemoryManager(program.settings)
    try:
        for _ in range(2):
            ray.init(client_address, log_to_driver=False, logging_level="error")
            # its node would be that of its server
            assert own_node_id() is None
            handle = await manager.resolve("stays")
            assert await manager.execute_task_on_agent("stays", "work") == "work"
            assert (await manager.get_system_summary()).registry_problem is None
            await eventually(lambda: program.problem is None)
            ray.shutdown()
            with pytest.raises(CannotKnowError, match="not connected to Ray"):
                await manager.resolve("stays")
            with pytest.raises(AgentCallError, match="not connected to Ray"):
                await bounded_call("stays", handle.ping.remote, 5)
            await eventually(lambda: "not connected to Ray" in (program.problem or ""))
            assert not ray.is_initialized()
        ray.init(client_address, log_to_driver=False, logging_level="error")
        with pytest.raises(AgentCallError, match="a handle is of one Ray session"):
            await bounded_call("stays", lambda: handle.ping.remote(), 5)
    finally:
        await manager.close()
        ray.shutdown()
        join(cluster.address)
    assert await (await program.manager.resolve("stays")).ping.remote() == "pong"


class Forker:
    """An actor that forks. A child writes what its calls came to, and how long that took."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.reporter = ThreadReporter("forker", settings=settings)
        self.reporter.start()
        self.manager = Tier0MemoryManager(settings)
        self.connection = shared_connection(settings.namespace, settings.call_timeout_s)

    def in_child(self) -> dict[str, tuple[str, float]]:
        reading, writing = multiprocessing.get_context("fork").Pipe(duplex=False)
        child = os.fork()
        if child == 0:
            try:
                writing.send({name: self._said(call) for name, call in self._calls().items()})
            finally:
                os._exit(0)
        writing.close()
        answer: dict[str, tuple[str, float]] = reading.recv()
        os.waitpid(child, 0)
        return answer

    def in_pool(self) -> list[str]:
        pool = multiprocessing.get_context("fork").Pool(2)
        try:
            return pool.map(_list_in_child, [self.settings] * 4)
        finally:
            pool.close()  # leaving `with` would send SIGTERM, and Ray's handler in a child can end the actor itself
            pool.join()

    def problem(self) -> str | None:
        return self.reporter.reporter.problem if self.reporter.reporter is not None else "not started"

    def drain(self) -> bool:
        receipt = self.reporter.drain()
        return receipt is not None and receipt.durable

    def _said(self, call: Callable[[], Any]) -> tuple[str, float]:
        began_s = time.monotonic()
        try:
            said = repr(call())
        except Exception as error:  # noqa: BLE001 - its text is looked at
            said = f"{type(error).__name__}: {error}"
        return said, time.monotonic() - began_s

    def _calls(self) -> dict[str, Callable[[], Any]]:
        async def agent() -> None:
            await RayAgent("child-agent", settings=self.settings).start()

        async def beat() -> None:
            await self.connection.beat(iid(1))

        return {
            "own reporter": lambda: ThreadReporter("child", settings=self.settings).start(),
            "own loop's reporter": lambda: asyncio.run(Reporter("child", settings=self.settings).start()),
            "agent": lambda: asyncio.run(agent()),
            "the parent's reporter drains": lambda: self.reporter.drain("by the child"),
            "the parent's reporter starts": self.reporter.start,
            "the parent's reporter stops": self.reporter.stop,
            "beat": lambda: asyncio.run(beat()),
            "resolve": lambda: asyncio.run(self.manager.resolve("stays")),
            "discover": lambda: asyncio.run(self.manager.discover_and_refresh_agents()),
            "create": lambda: asyncio.run(self.manager.create_agent("childs")),
            "list": lambda: asyncio.run(_list(self.settings)),
            "registry": lambda: asyncio.run(start_registry(self.settings)),
        }


async def _list(settings: Settings) -> int:
    return len((await list_active_instances(settings=settings)).items)


def _list_in_child(settings: Settings) -> str:
    try:
        return repr(asyncio.run(_list(settings)))
    except RegistryError as error:
        return f"{type(error).__name__}: {error}"


async def test_a_forked_child_is_refused_at_once_in_its_own_words_and_the_parent_goes_on(program: Program) -> None:
    remote_class: Any = ray.remote(Forker)
    forker = remote_class.options(name="forker", namespace=program.settings.namespace, num_cpus=0).remote(
        program.settings
    )
    for name, (said, took_s) in (await forker.in_child.remote()).items():
        assert said.startswith("ForkedProcessError: this process was forked"), (name, said)
        assert "use spawn" in said, (name, said)
        assert took_s < 1, (name, took_s)
    assert all("use spawn" in said for said in await forker.in_pool.remote())
    assert await forker.problem.remote() is None
    assert await forker.drain.remote()
    ray.kill(forker)
