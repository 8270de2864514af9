"""A driver on one of the hosts: it creates the fleet, resolves and calls each agent continuously, and looks at Ray.

It takes commands as lines on its standard input and answers each with a line that begins with `MARK`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from seedcore.composition import start_registry
from seedcore.core.errors import RegistryError
from seedcore.core.timeouts import within
from seedcore.registry.caller.listing import every_page
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.settings import load_settings
from seedcore.tier0 import Tier0MemoryManager
from tests.hosts.agents import Answer, Echo, Reporting
from tests.hosts.records import Call, Ended, Look, Node

MARK = "@@"
PAUSE_S = 0.5
CALL_S = 3.0
_NODES_S = 0.5
_START_S = 60.0
_PROBLEM_CHARS = 200


class Caller:
    """The commands are its public methods; each takes and returns what JSON can."""

    def __init__(self) -> None:
        self._settings = load_settings()
        self._manager = Tier0MemoryManager(self._settings)
        self._registry = RegistryConnection(self._settings.namespace, self._settings.call_timeout_s)
        self._calls: list[Call] = []
        self._ended: list[Ended] = []
        self._under_way: dict[asyncio.Task[Answer], Ended] = {}
        self._nodes: list[Node] = []
        self._known_nodes: dict[str, bool] = {}
        self._loops: list[asyncio.Task[None]] = []

    async def begin(self, fleet: dict[str, str]) -> None:
        """Start the registry, and make each agent that is missing, if possible on the host with its address."""
        await start_registry(self._settings)
        node_of = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
        await asyncio.gather(*(self._make(agent_id, node_of[address]) for agent_id, address in fleet.items()))
        if not self._loops:
            self._loops = [asyncio.create_task(self._watch_nodes())]
            self._loops += [asyncio.create_task(self._call_continuously(agent_id)) for agent_id in fleet]

    async def work(self, agent_ids: list[str], work_s: float) -> None:
        """Begin a call of each of these agents that works for so long."""
        for agent_id in agent_ids:
            located = await self._manager.locate(agent_id)
            self._call(agent_id, located.handle, work_s)

    async def take(self) -> dict[str, Any]:
        """What was observed since the last time; the calls that Ray has not ended yet are among them, and stay."""
        taken = {
            "calls": [asdict(one) for one in self._calls],
            "ended": [asdict(one) for one in (*self._ended, *self._under_way.values())],
            "nodes": [asdict(one) for one in self._nodes],
        }
        self._calls, self._ended, self._nodes = [], [], []
        return taken

    async def look(self, agent_ids: list[str]) -> dict[str, Any]:
        """What the registry and Ray have now, and the instances that answer."""
        health = await self._registry.health()
        is_settled = health.is_ready and not health.is_frozen and not health.pending_changes
        listing = await every_page(self._registry, statuses=None, fresh_only=False)
        names = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        nodes = await asyncio.to_thread(ray.nodes)
        answers = await asyncio.gather(*(self._ask(agent_id) for agent_id in agent_ids))
        look = Look(
            problem=None if is_settled else f"the registry is not settled: {health}",
            is_store_away=health.store_problem is not None,
            listed={one.instance_id: one.logical_id for one in listing.items},
            in_ray=sorted(one["name"] for one in names if one["namespace"] == self._settings.namespace),
            answered_by=dict(zip(agent_ids, answers, strict=True)),
            alive_nodes=sum(node["Alive"] for node in nodes),
        )
        return asdict(look)

    async def _ask(self, agent_id: str) -> str:
        handle = await self._manager.resolve(agent_id)
        answer: Answer = await within(_answer(handle, 0.0), CALL_S)
        return answer[1]

    async def _make(self, agent_id: str, node_id: str) -> None:
        agent_class: Any = ray.remote(Reporting if agent_id.endswith("reporting") else Echo)
        handle = agent_class.options(
            name=agent_id,
            namespace=self._settings.namespace,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            # an agent whose host is lost restarts on another one, and never on the head
            resources={"worker": 0.001},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=True),
        ).remote(agent_id, settings=self._settings)
        await within(_started(handle), _START_S)

    # What it does continuously

    async def _call_continuously(self, agent_id: str) -> None:
        while True:
            for way in (self._located, self._resolved):
                call = Call(agent_id, way.__name__.strip("_"), time.time())
                self._calls.append(await self._finish(call, way))
                await asyncio.sleep(PAUSE_S)

    async def _finish(self, call: Call, way: Callable[[Call], Awaitable[tuple[Call, ActorHandle]]]) -> Call:
        try:
            call, handle = await way(call)
            call = replace(call, resolved_at=time.time())
            task = self._call(call.agent_id, handle, 0.0)
            await asyncio.wait({task}, timeout=CALL_S)
            if not task.done():
                return replace(call, problem=f"no answer within {CALL_S:g} s")
            agent_id, instance_id = task.result()
        except (TimeoutError, RegistryError, RayError) as error:
            return replace(call, problem=_shown(error))
        problem = None if agent_id == call.agent_id else f"a wrong handle: {agent_id} answered"
        return replace(call, answered_at=time.time(), answered_by=instance_id, problem=problem)

    async def _located(self, call: Call) -> tuple[Call, ActorHandle]:
        found = await self._manager.locate(call.agent_id)
        if found.instance is None:
            return replace(call, source=str(found.source)), found.handle
        named = replace(
            call, source=str(found.source), instance_id=found.instance.instance_id, node_id=found.instance.node_id
        )
        return named, found.handle

    async def _resolved(self, call: Call) -> tuple[Call, ActorHandle]:
        return call, await self._manager.resolve(call.agent_id)

    def _call(self, agent_id: str, handle: ActorHandle, work_s: float) -> asyncio.Task[Answer]:
        """A call whose end is recorded, also if its caller no longer waits for it."""
        task = asyncio.create_task(_answer(handle, work_s))
        self._under_way[task] = Ended(agent_id, time.time(), None, work_s, None)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[Answer]) -> None:
        error = None if task.cancelled() else task.exception()
        begun = self._under_way.pop(task)
        self._ended.append(replace(begun, ended_at=time.time(), problem=None if error is None else _shown(error)))

    async def _watch_nodes(self) -> None:
        while True:
            # without Ray's tables nothing is known; the next round asks again
            with suppress(Exception):
                for node in await asyncio.to_thread(ray.nodes):
                    node_id, is_alive = str(node["NodeID"]), bool(node["Alive"])
                    if self._known_nodes.get(node_id) is not is_alive:
                        self._known_nodes[node_id] = is_alive
                        self._nodes.append(Node(time.time(), node_id, str(node["NodeManagerAddress"]), is_alive))
            await asyncio.sleep(_NODES_S)


async def _answer(handle: ActorHandle, work_s: float) -> Answer:
    answer: Answer = await handle.execute_task.remote(work_s)
    return answer


async def _started(handle: ActorHandle) -> None:
    await handle.start.remote()


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_PROBLEM_CHARS]


def _print(answer: dict[str, Any]) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(answer)}\n")
    sys.stdout.flush()


async def _serve() -> None:
    caller = Caller()
    _print({"result": "ready"})
    while line := await asyncio.to_thread(sys.stdin.readline):
        name, arguments = json.loads(line)
        try:
            _print({"result": await getattr(caller, name)(*arguments)})
        except (TimeoutError, RegistryError, RayError, LookupError) as error:
            _print({"problem": _shown(error)})


def main() -> None:
    """Connect to the Ray of this host, and serve until the input ends."""
    ray.init(address=sys.argv[1], namespace=load_settings().namespace, log_to_driver=False, logging_level="error")
    asyncio.run(_serve())


if __name__ == "__main__":
    main()
