"""`seedcore demo`: a small real fleet whose agents register, are resolved, drain and die."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rich.console import Console

from seedcore.agents import RayAgent
from seedcore.cli.cluster import join_cluster, join_or_start_cluster
from seedcore.cli.render import show_listing
from seedcore.composition import start_registry
from seedcore.core.errors import AgentCallError, NotResolvableError, RegistryUnavailableError
from seedcore.core.lifecycle import Status
from seedcore.discovery.rendering import page_of
from seedcore.registry.caller.handles import HandleFinder
from seedcore.registry.caller.listing import every_page
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.protocol.messages import Health
from seedcore.registry.ray_support import session
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec

_PREFIX = "demo-"
_ORGANS = ("vision", "memory")
_READY_TIMEOUT_S = 90.0
_POLL_S = 0.1


class DemoAgent(RayAgent):
    """An agent that counts words."""

    async def is_of_the_demo(self) -> bool:
        """Only this class has this method: it identifies the actors that the demo may stop."""
        return True

    async def handle_task(self, task: Any) -> Any:
        """Return the number of words of a text."""
        return len(str(task).split())


async def run(settings: Settings, console: Console, agents: int) -> None:
    """Show the life of a fleet. The remaining agents keep running; `take_down` stops them."""
    join_or_start_cluster(settings, console)
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
    manager = Tier0MemoryManager(settings)

    ids = [f"{_PREFIX}{_ORGANS[number % 2]}-{number // 2 + 1}" for number in range(agents)]
    earlier = await _stop_agents(manager, settings, needed=ids)
    if earlier:
        console.print(f"Stopped {earlier} agents of an earlier demo.")

    console.rule("1. The registry")
    with console.status("starting the registry actor and its database"):
        await start_registry(settings)
        health = await _ready(connection)
    console.print(f"up: {health.store_kind} PostgreSQL, epoch {health.epoch}, lease {health.lease_s:g} s")

    console.rule(f"2. {agents} agents register")
    specs = [
        AgentSpec(
            agent_id,
            organ_id=_ORGANS[number % 2],
            agent_class=DemoAgent,
            labels={"app": "demo"},
            max_restarts=0,
        )
        for number, agent_id in enumerate(ids)
    ]
    with console.status(f"creating {agents} actors"):
        created = await manager.create_agents_batch(specs)
    for agent_id, why in created.failures.items():
        raise AgentCallError(agent_id, why)
    await _registered(connection, set(ids))
    show_listing(console, page_of(await every_page(connection, labels={"app": "demo"})))

    worker, drained, lost = f"{_PREFIX}vision-1", f"{_PREFIX}memory-1", f"{_PREFIX}vision-2"
    console.rule(f"3. {worker} is resolved and works")
    located = await manager.locate(worker)
    words = await manager.execute_task_on_agent(worker, "how many words are in this text")
    console.print(f"source: {located.source}; it counted {words} words")

    console.rule(f"4. {drained} drains")
    await session.ask(await manager.resolve(drained), "drain", "shown in the demo")
    await _show_unresolvable(manager, console, drained)

    console.rule(f"5. {lost} dies")
    session.kill(await manager.resolve(lost))
    with console.status("waiting for the report of the node's relay"):
        await _declared_dead(connection, lost, health.lease_s * 3)
    last = (await connection.describe(lost)).instances[0]
    console.print(f"declared dead; cause: {last.cause}")
    await _show_unresolvable(manager, console, lost)

    console.rule("6. The remaining fleet")
    left = await every_page(connection, statuses=(Status.ALIVE, Status.DRAINING), labels={"app": "demo"})
    show_listing(console, page_of(left))
    console.print(
        f"See `seedcore ls --all`, `seedcore why {lost}`, or the page of a running deployment. "
        "`seedcore demo --down` stops the agents."
    )


async def take_down(settings: Settings, console: Console) -> None:
    """Stop the live agents of the demo."""
    join_cluster(settings)
    console.print(f"stopped {await _stop_agents(Tier0MemoryManager(settings), settings)} agents")


async def _stop_agents(manager: Tier0MemoryManager, settings: Settings, needed: Sequence[str] = ()) -> int:
    """Stop the agents of every demo. Returns their number.

    Raises AgentCallError, and stops none, if an agent that is not of the demo has a needed name.
    """
    await manager.discover_and_refresh_agents()
    finder = HandleFinder(settings.namespace, settings.probe_timeout_s)
    ids: list[str] = []
    for agent in manager.list_agents():
        if not agent.logical_id.startswith(_PREFIX):
            continue
        try:
            handle = await finder.unproven(agent.actor_name)
        except NotResolvableError:
            continue
        # a handle has the methods of its class even if the actor hangs
        if hasattr(handle, DemoAgent.is_of_the_demo.__name__):
            ids.append(agent.logical_id)
        elif agent.logical_id in needed:
            raise AgentCallError(agent.logical_id, "is not of the demo, which needs its name: stop it first")
    stopped = await manager.shutdown_agents(ids)
    for agent_id, why in stopped.failures.items():
        raise AgentCallError(agent_id, why)
    return len(stopped.results)


async def _show_unresolvable(manager: Tier0MemoryManager, console: Console, agent_id: str) -> None:
    try:
        await manager.resolve(agent_id)
    except NotResolvableError as error:
        console.print(f"resolve now fails: {error}")
    else:
        raise AgentCallError(agent_id, "is still resolvable")


async def _ready(connection: RegistryConnection) -> Health:
    async def problem() -> str | None:
        health = await connection.health()
        return None if health.is_ready else f"the registry is not ready: {health.store_problem}"

    await _until_none(problem, _READY_TIMEOUT_S)
    return await connection.health()


async def _registered(connection: RegistryConnection, agent_ids: set[str]) -> None:
    async def problem() -> str | None:
        missing = agent_ids - {row.logical_id for row in await every_page(connection, labels={"app": "demo"})}
        return f"these agents did not register: {', '.join(sorted(missing)[:5])}" if missing else None

    await _until_none(problem, _READY_TIMEOUT_S)


async def _declared_dead(connection: RegistryConnection, agent_id: str, timeout_s: float) -> None:
    async def problem() -> str | None:
        found = await connection.describe(agent_id)
        if found.live or not found.instances:
            return f"agent {agent_id!r} is not declared dead"
        return None if found.instances[0].status is Status.DEAD else f"the death of {agent_id!r} is not in the database"

    await _until_none(problem, timeout_s)


async def _until_none(problem: Callable[[], Awaitable[str | None]], timeout_s: float) -> None:
    """Wait until `problem` returns None. Raises RegistryUnavailableError with the last problem after `timeout_s`."""
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + timeout_s
    while (why := await problem()) is not None:
        if loop.time() > ends_s:
            raise RegistryUnavailableError(f"{why} after {timeout_s:g} s")
        await asyncio.sleep(_POLL_S)
