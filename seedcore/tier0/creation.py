"""Creates agents' actors: named like their logical id, in the manager's namespace, idempotently."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from contextlib import suppress
from functools import wraps
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, RayActorError, RayError, RayTaskError, TaskCancelledError

from seedcore.agents.ray_agent import RayAgent
from seedcore.core.changes import Registration, new_instance_id
from seedcore.core.errors import (
    AgentCallError,
    DirectoryUnavailableError,
    InvalidInputError,
    NotAcceptingWorkError,
    RegistryError,
    SessionError,
    first_line,
    last_line,
)
from seedcore.core.lifecycle import Status
from seedcore.core.limits import check_kind
from seedcore.core.timeouts import within
from seedcore.registry.agent.identity import ProcessEpoch, note_process_epoch
from seedcore.registry.caller.locator import check_agent_id
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.actors import end_actor
from seedcore.registry.ray_support.lookup import ActorHandle, actor_id_of, find_actor, is_known_dead, ray_remembers
from seedcore.settings import use_namespace
from seedcore.tier0.answers import AgentSpec

_TIMEOUT_S = 60.0
_END_S = 10.0
_LOOK_UP_S = 5.0
_ATTEMPTS = 5
_PAUSE_S = 0.1
_GIVEN = frozenset({"agent_id", "organ_id", "labels", "metadata"})

_kept: dict[tuple[str, str], ActorHandle] = {}
"""Agents that are not detached: such an actor ends with the last handle in the process that created it."""


def check_spec(spec: AgentSpec) -> None:
    """Raise InvalidInputError for a spec that no agent can be created from, before an actor is created."""
    check_agent_id(spec.agent_id)
    check_agent_id(spec.actor_name, "actor_name")
    Registration(
        new_instance_id(),
        spec.agent_id,
        organ_id=spec.organ_id,
        labels=spec.labels,
        metadata=spec.metadata,
        cluster_epoch=spec.epoch,
        started_epoch=spec.started_epoch,
    ).validated()
    check_kind("arguments", spec.arguments, Mapping)
    if twice := sorted(_GIVEN & spec.arguments.keys()):
        raise InvalidInputError("arguments", f"must not name {', '.join(twice)}: give it beside the arguments")
    agent_class = spec.agent_class
    if agent_class is None:
        return
    if callable(getattr(agent_class, "remote", None)) and not inspect.isclass(agent_class):
        raise InvalidInputError("agent_class", "must be the plain class: leave out @ray.remote, it is applied here")
    if not inspect.isclass(agent_class):
        raise InvalidInputError("agent_class", f"must be a plain class, not {type(agent_class).__name__}")
    if not callable(getattr(agent_class, "start", None)):
        raise InvalidInputError("agent_class", f"{agent_class.__name__} has no start(): subclass RayAgent")
    _check_constructor(agent_class, spec)


def _check_constructor(agent_class: type[Any], spec: AgentSpec) -> None:
    try:
        takes = inspect.signature(agent_class)
    except (TypeError, ValueError):
        # a class in C has no signature
        return
    try:
        takes.bind(spec.agent_id, **_details(spec))
    except TypeError as error:
        why = f"{agent_class.__name__}() cannot be called: {error}"
        remedy = "let __init__(self, agent_id, **details) pass its details to super().__init__(agent_id, **details)"
        raise InvalidInputError("agent_class", f"{why}; {remedy}") from None


def _details(spec: AgentSpec) -> dict[str, Any]:
    """The arguments of its constructor beside its id."""
    return {
        "organ_id": spec.organ_id,
        "labels": dict(spec.labels),
        "metadata": dict(spec.metadata),
        **spec.arguments,
    }


async def create_actor(spec: AgentSpec, namespace: str) -> ActorHandle:
    """The agent's actor, created unless it lives, and started. See Tier0MemoryManager.create_agent for the errors.

    An actor that this call created is ended if it does not start or the call is cancelled. An actor that existed before
    is not touched.
    """
    check_spec(spec)
    creation = _Creation(spec, namespace)
    try:
        handle = await creation.run()
    except RegistryError as error:
        if creation.made is not None and not await end_actor(creation.made, _END_S):
            raise AgentCallError(spec.agent_id, f"{first_line(error)}; and its new actor does not end") from error
        raise
    except BaseException:
        # a cancelled caller does not wait
        if creation.made is not None:
            # without the session the actor is out of reach, or gone
            with suppress(SessionError):
                session.kill(creation.made)
        raise
    if handle is creation.made and not spec.is_detached:
        _keep(spec.actor_name, namespace, handle)
    return handle


def _keep(actor_name: str, namespace: str, handle: ActorHandle) -> None:
    """Keep an agent that is not detached alive as long as this process."""
    for key in [key for key, kept in _kept.items() if is_known_dead(kept)]:
        del _kept[key]
    _kept[namespace, actor_name] = handle


def kept_alive(namespace: str) -> set[str]:
    """The names of the actors in a namespace that this process keeps alive, because they are not detached."""
    return {actor_name for kept_in, actor_name in _kept if kept_in == namespace}


class _Creation:
    """The attempts to create an actor. `made` is the last actor that this object created."""

    def __init__(self, spec: AgentSpec, namespace: str) -> None:
        self._spec = spec
        self._namespace = namespace
        self.made: ActorHandle | None = None

    async def run(self) -> ActorHandle:
        """The started actor. Raises what its start raises, or AgentCallError."""
        problem = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_PAUSE_S * 2**attempt)
            handle = await self._make_or_find()
            if handle is None:
                problem = "its name belongs to an actor that is ending"
                continue
            try:
                await self._start(handle)
            except NotAcceptingWorkError as error:
                if error.status != Status.DEAD:
                    raise
                # a stopped agent never starts again, and its actor keeps the name
                problem = first_line(error)
                await end_actor(handle, _END_S)
            except RayActorError as error:
                # another's actor: it is dying. Ours: Ray may restart it, unless its constructor failed
                if error.actor_init_failed and self._is_ours(handle):
                    raise self._failed(handle, f"its constructor failed: {last_line(error)}") from error
                problem = first_line(error)
            else:
                return handle
        raise AgentCallError(self._spec.agent_id, f"its actor does not come up: {problem}")

    async def _make_or_find(self) -> ActorHandle | None:
        """Our actor, or another's of that name, or None if the name still belongs to an actor that is gone."""
        agent_id = self._spec.agent_id
        try:
            self.made = _make_actor(self._spec, self._namespace)
        except ActorAlreadyExistsError:
            # Ray decides: of many callers only one creates the actor
            try:
                return await find_actor(self._spec.actor_name, self._namespace, _LOOK_UP_S)
            except DirectoryUnavailableError as error:
                raise AgentCallError(agent_id, first_line(error)) from error
        except (TypeError, ValueError, RayError, SessionError) as error:
            # if the class cannot be pickled, the cause of Ray's error names the part
            why = first_line(error if error.__cause__ is None else error.__cause__)
            raise AgentCallError(agent_id, f"its actor cannot be created: {why}") from error
        return self.made

    async def _start(self, handle: ActorHandle) -> None:
        try:
            await within(_started(handle), _TIMEOUT_S)
        except RayTaskError as error:
            if isinstance(error.cause, RegistryError):
                raise error.cause from None
            is_ended = isinstance(error.cause, TaskCancelledError)
            why = "it raised KeyboardInterrupt, or was cancelled" if is_ended else repr(error.cause)
            raise self._failed(handle, f"start failed: {why}") from error
        except TimeoutError:
            known = await ray_remembers(self._spec.actor_name, self._namespace, _LOOK_UP_S)
            raise self._failed(handle, f"did not start within {_TIMEOUT_S:g} s; {known}") from None
        except (AttributeError, TypeError) as error:
            raise self._failed(handle, f"it is no agent: {first_line(error)}") from None
        except RayActorError:
            raise
        except RayError as error:
            raise self._failed(handle, f"start failed: {first_line(error)}") from error

    def _failed(self, handle: ActorHandle, why: str) -> AgentCallError:
        there = "" if self._is_ours(handle) else "another actor of that name exists already and is left as it is: "
        return AgentCallError(self._spec.agent_id, there + why)

    def _is_ours(self, handle: ActorHandle) -> bool:
        return self.made is not None and actor_id_of(self.made) == actor_id_of(handle)


async def _started(handle: ActorHandle) -> None:
    await session.ask(handle, "start")


def _make_actor(spec: AgentSpec, namespace: str) -> ActorHandle:
    """A new actor. Raises ActorAlreadyExistsError if its name is taken, TypeError or ValueError for the options."""
    agent_class = spec.agent_class if spec.agent_class is not None else RayAgent
    options = {
        "name": spec.actor_name,
        "namespace": namespace,
        "lifetime": "detached" if spec.is_detached else None,
        "max_restarts": spec.max_restarts,
        "max_task_retries": 0,
        "num_cpus": spec.num_cpus,
        "resources": dict(spec.resources),
    }
    actor_class = ray.remote(prepared(agent_class, namespace, _epoch_of(spec)))
    return session.create(actor_class, options, spec.agent_id, **_details(spec))


def prepared(agent_class: type[Any], namespace: str, epoch: ProcessEpoch | None) -> type[Any]:
    """The class with a constructor that first sets the namespace of its registry and its own epoch. The actor's process
    has the environment of its node, not of this process, and Ray runs the constructor again in each process that it
    starts for the actor."""

    @wraps(agent_class.__init__)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        use_namespace(namespace)
        if epoch is not None:
            note_process_epoch(epoch)
        agent_class.__init__(self, *arguments, **options)

    named = {name: getattr(agent_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(agent_class.__name__, (agent_class,), {**named, "__init__": __init__})


def _epoch_of(spec: AgentSpec) -> ProcessEpoch | None:
    epoch = spec.epoch if spec.epoch is not None else spec.started_epoch
    return None if epoch is None else ProcessEpoch(epoch, is_insisted=spec.epoch is not None)
