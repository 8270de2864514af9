"""Makes agents' actors: named like their logical id, in our namespace, idempotently."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from seedcore.agents.ray_agent import RayAgent
from seedcore.core.errors import AgentCallError, InvalidInputError, RegistryError, first_line
from seedcore.core.model import MAX_ID_CHARS, check_labels, check_text
from seedcore.core.waiting import within
from seedcore.registry.directory import RESERVED_PREFIX
from seedcore.registry.lookup import ActorHandle
from seedcore.tier0.answers import AgentSpec

_TIMEOUT_S = 60.0
_ATTEMPTS = 3


def check_agent_id(agent_id: str) -> str:
    """A logical id that may name an actor, or InvalidInputError."""
    check_text("agent_id", agent_id, MAX_ID_CHARS)
    if agent_id.startswith(RESERVED_PREFIX):
        raise InvalidInputError("agent_id", f"must not begin with {RESERVED_PREFIX!r}: those names are ours")
    return agent_id


async def create_actor(spec: AgentSpec, namespace: str) -> ActorHandle:
    """The agent's actor, made unless it lives, and started. See Tier0MemoryManager.create_agent for the errors."""
    check_agent_id(spec.agent_id)
    check_labels(spec.labels)
    problem = ""
    for attempt in range(_ATTEMPTS):
        try:
            handle = _make_actor(spec, namespace)
        except (TypeError, ValueError) as error:
            raise AgentCallError(spec.agent_id, f"its actor cannot be made: {first_line(error)}") from error
        try:
            await within(_start(handle), _TIMEOUT_S)
        except RayTaskError as error:
            if isinstance(error.cause, RegistryError):
                raise error.cause from None
            raise AgentCallError(spec.agent_id, f"start failed: {error.cause!r}") from error
        except asyncio.TimeoutError:
            raise AgentCallError(spec.agent_id, f"did not start within {_TIMEOUT_S:g} s") from None
        except RayActorError as error:
            # the name may have belonged to an actor that was just dying
            problem = first_line(error)
            await asyncio.sleep(0.2 * 2**attempt)
        else:
            return handle
    raise AgentCallError(spec.agent_id, f"its actor does not come up: {problem}")


async def _start(handle: ActorHandle) -> None:
    await handle.start.remote()


def _make_actor(spec: AgentSpec, namespace: str) -> ActorHandle:
    agent_class = spec.agent_class if spec.agent_class is not None else RayAgent
    actor_class: Any = ray.remote(agent_class)
    return actor_class.options(
        name=spec.agent_id,
        namespace=namespace,
        get_if_exists=True,
        lifetime="detached" if spec.is_detached else None,
        max_restarts=spec.max_restarts,
        max_task_retries=0,
        num_cpus=spec.num_cpus,
        resources=dict(spec.resources),
    ).remote(
        spec.agent_id,
        organ_id=spec.organ_id,
        labels=dict(spec.labels),
        metadata=dict(spec.metadata),
        **spec.arguments,
    )
