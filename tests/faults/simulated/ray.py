"""Owns what Ray is to a process: a session, handles of actors, and a network that loses, delays, repeats and reorders.

The real connection, relay client, handle cache and proofs call these handles as they call Ray's own.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from seedcore.core.errors import DirectoryUnavailableError
from seedcore.registry.protocol.api import RegistryApi, RelayApi
from seedcore.registry.protocol.connection import REGISTRY_NAME
from seedcore.registry.ray_support import session
from tests.faults.simulated.virtual import COMPONENT
from tests.faults.simulated.world import OPERATOR, World

if TYPE_CHECKING:
    from tests.faults.simulated.fleet import Process
    from tests.faults.simulated.registries import Office

ALIVE, GONE = 2, 4
# Ray notifies the callers of an actor of its end so much later
_NOTIFIED_S = 0.3
SENT: ContextVar[list[str] | None] = ContextVar("sent", default=None)
"""The calls that were sent to a registry on behalf of one call of the code above the connection, where that counts."""


class _Connection:
    """Stands for what Ray makes for each connection of a process."""


@contextmanager
def joined() -> Iterator[None]:
    """This process, and with it every simulated one, is in a Ray session."""
    connection = _Connection()

    def ray_connection() -> _Connection:
        return connection

    # a mock would record each of its thousands of calls
    with mock.patch.object(session, "ray_connection", ray_connection):
        yield


class SimMethod:
    """A method of a handle, as Ray has it: `remote` calls it."""

    __slots__ = ("_actor", "_name")

    def __init__(self, actor: SimActor, name: str) -> None:
        self._actor = actor
        self._name = name

    def remote(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        return self._actor.call(self._name, args, kwargs)


class SimActor(ABC):
    """The handle of an actor. The component that calls is the caller."""

    METHODS: frozenset[str]

    def __getattr__(self, name: str) -> SimMethod:
        if name in type(self).METHODS:
            return SimMethod(self, name)
        raise AttributeError(name)

    @abstractmethod
    def call(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Awaitable[Any]:
        """As a call by Ray: returns the answer, raises a RayError, or never returns."""


def is_silent(world: World, caller: str) -> bool:
    """Whether Ray never reports a message of this caller that was lost. A message of an agent is reported, unless it is
    cut off: three silences in a row are a lease."""
    may_be = world.is_cut(caller) or any(caller == one.name for one in world.callers)
    return may_be and world.random.random() < 0.5


async def lose(world: World, caller: str) -> None:
    """Raise ActorUnavailableError, or never return."""
    if is_silent(world, caller):
        await world.loop.create_future()
    raise ActorUnavailableError("simulated", None)


def as_raised_there(method: str, error: Exception) -> RayTaskError:
    """An error of an actor's method, as its caller gets it."""
    return RayTaskError(method, "simulated", error, proctitle="simulated", pid=1, ip="10.0.0.1")


@dataclass(eq=False)
class _Call:
    """One call of a registry, and its answer."""

    caller: str
    method: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    reply: asyncio.Future[Any]

    def fail(self, error: Exception) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)


class RegistryHandle(SimActor):
    """The actor of one registry."""

    METHODS = frozenset(name for name in vars(RegistryApi) | vars(RelayApi) if not name.startswith("_"))

    def __init__(self, world: World, office: Office) -> None:
        self._world = world
        self._office = office
        self._network = contextvars.copy_context()
        self._network.run(COMPONENT.set, "network")

    def call(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> asyncio.Future[Any]:
        world, office = self._world, self._office
        made = _Call(COMPONENT.get(), method, args, kwargs, world.loop.create_future())
        made.reply.add_done_callback(_note_read)
        sent = SENT.get()
        if sent is not None and method != "hello":
            sent.append(office.name)
        if not world.serves(office, made.caller):
            self._later(made.fail, ActorDiedError())
        elif world.is_cut(made.caller) or world.happens(world.lost_share):
            self._lose(made)
        else:
            office.calls.add(made.reply)
            made.reply.add_done_callback(office.calls.discard)
            for delay_s in self._deliveries(made.caller):
                world.loop.call_later(delay_s, self._arrive, made, context=self._network)
        return made.reply

    def _deliveries(self, caller: str) -> list[float]:
        world = self._world
        delays_s = [world.random.uniform(0.002, 0.04)]
        if world.happens(world.slow_share):
            delays_s = [world.random.uniform(0.1, 3.0)]
        # Ray repeats no call, and an operator's has no number
        if caller != OPERATOR and world.happens(world.twice_share):
            delays_s.append(world.random.uniform(0.001, 4.0))
        return delays_s

    def _later(self, step: Callable[..., object], *args: Any) -> None:
        world = self._world
        world.loop.call_later(world.random.uniform(0.001, 0.02), step, *args, context=self._network)

    def _lose(self, made: _Call) -> None:
        if not is_silent(self._world, made.caller):
            self._later(made.fail, ActorUnavailableError("simulated", None))

    def _arrive(self, made: _Call) -> None:
        office = self._office
        if office.is_up:
            answer = self._world.loop.run_in(office.name, office.serve(made.method, made.args, made.kwargs))
            answer.add_done_callback(functools.partial(self._later, self._answer, made), context=self._network)

    def _answer(self, made: _Call, answer: asyncio.Task[Any]) -> None:
        error = None if answer.cancelled() else answer.exception()
        if answer.cancelled() or made.reply.done():
            return
        if self._world.is_cut(made.caller) or self._world.happens(self._world.lost_share):
            self._lose(made)
        elif isinstance(error, Exception):
            made.fail(as_raised_there(made.method, error))
        else:
            made.reply.set_result(answer.result())


def _note_read(reply: asyncio.Future[Any]) -> None:
    if not reply.cancelled():
        reply.exception()


class AgentHandle(SimActor):
    """The actor of an agent. `answered_s`: when it answered last, by the instance that it ran then."""

    METHODS = frozenset({"seedcore_instance", "__ray_ready__"})

    def __init__(self, world: World, actor_id: str) -> None:
        self._world = world
        self._actor_id = bytes.fromhex(actor_id)
        self.answered_s: dict[str | None, float] = {}

    @property
    def actor_id(self) -> str:
        return self._actor_id.hex()

    def _process(self) -> Process | None:
        """The process that the actor runs in, or ran in last."""
        own = [one for one in self._world.processes if one.actor_id == self.actor_id]
        return next((one for one in reversed(own) if one.ended_s is None), own[-1] if own else None)

    def _get_local_state(self) -> int:
        process = self._process()
        ended_s = None if process is None else process.ended_s
        return GONE if ended_s is not None and ended_s + _NOTIFIED_S < self._world.now_s else ALIVE

    async def call(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        world, caller = self._world, COMPONENT.get()
        await asyncio.sleep(world.random.uniform(0.001, 0.02))
        process = self._process()
        if process is None or process.ended_s is not None:
            raise ActorDiedError
        if world.is_cut(process.name) or world.is_cut(caller) or world.happens(world.lost_share):
            await lose(world, caller)
        answer = await world.loop.run_in(process.name, self._answer(process, method))
        if process.ended_s is not None:
            raise ActorDiedError
        return answer

    async def _answer(self, process: Process, method: str) -> tuple[str, str | None] | None:
        await asyncio.sleep(self._world.random.uniform(0.001, 0.01))
        instance_id = None if process.reporter is None else process.reporter.client.instance_id
        self.answered_s[instance_id] = self._world.now_s
        return (process.logical_id, instance_id) if method == "seedcore_instance" else None


class SimDirectory:
    """Ray's tables, where they answer: named actors, and the listing of them (core.ports.ActorDirectory)."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._agents: dict[str, AgentHandle] = {}

    def handle_of(self, actor_id: str) -> AgentHandle:
        return self._agents.setdefault(actor_id, AgentHandle(self._world, actor_id))

    async def find_actor(self, name: str, namespace: str, timeout_s: float) -> Any:
        """As lookup.find_actor."""
        await self.asked()
        if name == REGISTRY_NAME:
            office = self._world.office()
            return None if office is None else office.handle
        for relay in reversed(self._world.relays):
            if relay.actor_name == name:
                return relay if relay.is_up else None
        for process in reversed(self._world.processes):
            if process.actor_name == name and process.ended_s is None:
                return self.handle_of(process.actor_id)
        return None

    async def names(self) -> list[str]:
        await self.asked()
        return sorted({process.actor_name for process in self._world.processes if process.ended_s is None})

    async def asked(self) -> None:
        await asyncio.sleep(self._world.random.uniform(0.001, 0.02))
        if self._world.gcs_back_s > self._world.now_s:
            await asyncio.sleep(0.5)
            raise DirectoryUnavailableError("simulated: the GCS is down")
