"""Agents that live and accept no work: those that are not ready, and those whose processes have ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest
import ray

from seedcore.cli.why import Reason, reason_of
from seedcore.core.answers import NotResolved, Origin
from seedcore.core.causes import CauseKind
from seedcore.core.errors import NotResolvableError
from seedcore.discovery.rendering import agent_answer
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.ray_support.lookup import ActorHandle, actor_id_of
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from tests.cluster.agents import Engine, Worker
from tests.waiting import eventually

pytestmark = pytest.mark.usefixtures("registry")


async def create(
    manager: Tier0MemoryManager, settings: Settings, name: str, agent_class: type[Worker] = Worker
) -> None:
    await manager.create_agent(name, agent_class=agent_class, arguments={"settings": settings})

    async def is_followed() -> bool:
        return (await manager.locate(name)).source is Origin.SNAPSHOT

    await eventually(is_followed)


async def refusal(manager: Tier0MemoryManager, name: str) -> NotResolvableError | None:
    """Why the agent is not resolved; None where it is."""
    try:
        await manager.resolve(name)
    except NotResolvableError as error:
        return error
    return None


async def test_an_agent_that_is_not_ready_is_resolved_by_no_process_until_it_is(
    manager: Tier0MemoryManager, settings: Settings
) -> None:
    await create(manager, settings, "loader")
    agent = await manager.resolve("loader")
    assert await agent.set_ready.remote(False, "loading weights")

    async def is_refused() -> bool:
        error = await refusal(manager, "loader")
        return error is not None and error.reason is NotResolved.NOT_READY

    await eventually(is_refused, every_s=0.005)
    with pytest.raises(NotResolvableError, match="not ready: loading weights"):
        await manager.execute_task_on_agent("loader", "pid")
    assert await agent.set_ready.remote(True)

    async def is_resolved() -> bool:
        return await refusal(manager, "loader") is None

    await eventually(is_resolved, every_s=0.005)
    assert await manager.execute_task_on_agent("loader", "done") == "done"


@pytest.mark.slow
async def test_no_caller_gets_an_agent_that_is_not_ready(
    manager: Tier0MemoryManager, registry: RegistryConnection, settings: Settings
) -> None:
    await create(manager, settings, "flipping")
    agent = await manager.resolve("flipping")
    waits_s: list[float] = []

    async def is_resolved() -> bool:
        return await refusal(manager, "flipping") is None

    async def is_refused() -> bool:
        return await refusal(manager, "flipping") is not None

    for _ in range(100):
        began_s = time.monotonic()
        reported = agent.set_ready.remote(False, "loading")
        await eventually(is_refused, every_s=0.001)
        waits_s.append(time.monotonic() - began_s)
        assert await reported
        for _ in range(50):
            error = await refusal(manager, "flipping")
            assert error is not None
            assert error.reason is NotResolved.NOT_READY
            (found,) = (await registry.resolve(["flipping"])).value
            assert found.instance is None
        await agent.set_ready.remote(True)
        await eventually(is_resolved, every_s=0.001)
    p99_s = quantiles(waits_s, n=100)[98]
    print(f"\nset_ready to unresolvable: median {1000 * sorted(waits_s)[50]:.1f} ms, p99 {1000 * p99_s:.1f} ms")  # noqa: T201
    assert p99_s < 1.0


# Processes


async def begin(agent: ActorHandle, log: Path, *, is_fatal: bool) -> int:
    """Start the child of an engine. Returns its process id."""
    pid: int = await agent.begin.remote(str(log), is_fatal)
    return pid


def killed(pid: int) -> str:
    return f"vllm: SIGKILL (pid {pid}); loading | CUDA error"


async def until_refused(manager: Tier0MemoryManager, name: str) -> NotResolvableError:
    found = await eventually(lambda: refusal(manager, name), every_s=0.002)
    assert found is not None
    return found


async def why(registry: RegistryConnection, name: str) -> Reason:
    """As `seedcore why` explains it."""
    return reason_of(agent_answer(await registry.describe(name)))


async def test_an_agent_dies_with_the_process_that_it_depends_on_and_comes_back_with_the_next(
    manager: Tier0MemoryManager, registry: RegistryConnection, settings: Settings, tmp_path: Path
) -> None:
    await create(manager, settings, "engine", Engine)
    agent = await manager.resolve("engine")
    pid = await begin(agent, tmp_path / "stderr", is_fatal=True)
    os.kill(pid, signal.SIGKILL)
    refused = await until_refused(manager, "engine")
    assert refused.reason is NotResolved.DIED

    async def dead() -> Reason:
        reason = await why(registry, "engine")
        assert reason.state == "dead"
        return reason

    reason = await eventually(dead)
    assert reason.cause is not None
    assert (reason.cause.kind, reason.cause.detail) == (CauseKind.PROCESS_KILLED, killed(pid))
    await begin(agent, tmp_path / "stderr", is_fatal=True)

    async def is_back() -> bool:
        return await refusal(manager, "engine") is None

    await eventually(is_back)


async def test_an_agent_that_is_dead_without_its_process_is_replaced_by_making_it_again(
    manager: Tier0MemoryManager, settings: Settings, tmp_path: Path
) -> None:
    await create(manager, settings, "replaced", Engine)
    agent = await manager.resolve("replaced")
    os.kill(await begin(agent, tmp_path / "stderr", is_fatal=True), signal.SIGKILL)
    await until_refused(manager, "replaced")
    options: dict[str, Any] = {"agent_class": Engine, "arguments": {"settings": settings}}
    made = await manager.create_agent("replaced", **options)
    assert actor_id_of(made) != actor_id_of(agent)
    # now it is there, and stays
    assert actor_id_of(await manager.create_agent("replaced", **options)) == actor_id_of(made)

    async def is_back() -> bool:
        return await refusal(manager, "replaced") is None

    await eventually(is_back)


async def test_an_agent_is_held_while_another_process_has_ended(
    manager: Tier0MemoryManager, registry: RegistryConnection, settings: Settings, tmp_path: Path
) -> None:
    await create(manager, settings, "held", Engine)
    agent = await manager.resolve("held")
    pid = await begin(agent, tmp_path / "stderr", is_fatal=False)
    os.kill(pid, signal.SIGKILL)
    refused = await until_refused(manager, "held")
    assert (refused.reason, killed(pid) in refused.detail) == (NotResolved.DRAINING, True), refused.detail
    reason = await why(registry, "held")
    assert reason.why == f"a process that it depends on has ended: {killed(pid)}"
    # the agent itself lives, and restarts it
    await begin(agent, tmp_path / "stderr", is_fatal=False)

    async def is_released() -> bool:
        return await refusal(manager, "held") is None

    await eventually(is_released)


async def test_a_url_that_fails_is_noticed_also_while_the_event_loop_of_the_agent_is_stuck(
    manager: Tier0MemoryManager, settings: Settings
) -> None:
    await create(manager, settings, "served", Engine)
    agent = await manager.resolve("served")
    with served() as (server, url):
        await agent.watch_http.remote(url, name="vllm", every_s=0.05, failures=2)
        await eventually(lambda: server.asked > 2)
        assert await refusal(manager, "served") is None
        stuck = agent.execute_task.remote(3.0)
        server.status = 503

        async def is_unready() -> bool:
            error = await refusal(manager, "served")
            return error is not None and error.detail == "it is not ready: vllm: HTTP 503"

        async def is_ready() -> bool:
            return await refusal(manager, "served") is None

        await eventually(is_unready, every_s=0.01)
        assert not ray.wait([stuck], timeout=0)[0]
        await stuck
        server.status = 200
        await eventually(is_ready)


class Server:
    """A server whose status the test decides."""

    status = 200
    asked = 0


@contextmanager
def served() -> Iterator[tuple[Server, str]]:
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked += 1
            self.send_response(server.status)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=partial(http.serve_forever, 0.01))
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{http.server_port}/health"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.mark.slow
async def test_the_end_of_a_process_is_known_everywhere_at_once(
    manager: Tier0MemoryManager, registry: RegistryConnection, settings: Settings, tmp_path: Path
) -> None:
    await create(manager, settings, "killed", Engine)
    agent = await manager.resolve("killed")
    waits_s: list[float] = []

    async def is_released() -> bool:
        return await refusal(manager, "killed") is None

    for _ in range(200):
        pid = await begin(agent, tmp_path / "stderr", is_fatal=False)
        await eventually(is_released, every_s=0.002)
        began_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        refused = await until_refused(manager, "killed")
        waits_s.append(time.monotonic() - began_s)
        assert killed(pid) in refused.detail
    p99_s = quantiles(waits_s, n=100)[98]
    print(f"\nkill to unresolvable: median {1000 * sorted(waits_s)[100]:.1f} ms, p99 {1000 * p99_s:.1f} ms")  # noqa: T201
    assert p99_s < 3.0
