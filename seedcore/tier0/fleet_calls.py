"""Calls to many known agents: heartbeats, statistics, probes, and their end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayError

from seedcore.core.answers import Origin
from seedcore.core.errors import (
    ActorGoneError,
    AgentCallError,
    CannotKnowError,
    NotResolvableError,
    RegistryError,
    RegistryUnavailableError,
    VersionMismatchError,
    first_line,
)
from seedcore.core.limits import check_timeout
from seedcore.core.selection import best
from seedcore.registry.caller.handles import HandleFinder
from seedcore.registry.caller.known_agents import KnownAgent, KnownAgents
from seedcore.registry.caller.locator import Locator, check_agent_id
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.actors import end_actor
from seedcore.tier0.answers import AgentSpec, Gathered, Pruned
from seedcore.tier0.calls import bounded_call, gather

logger = logging.getLogger(__name__)


class FleetCalls:
    """Calls the actors of `known` agents. `connection` None: no registry is asked which actor belongs to an agent."""

    def __init__(
        self, known: KnownAgents, locator: Locator, finder: HandleFinder, connection: RegistryConnection | None
    ) -> None:
        self._known = known
        self._locator = locator
        self._finder = finder
        self._connection = connection

    async def ask_all(self, method: str, timeout_s: float | None) -> Gathered[Any]:
        """The answer of every known agent's method, each within `timeout_s` seconds (None: the probe's)."""
        check_timeout(timeout_s)
        bound_s = timeout_s if timeout_s is not None else self._finder.probe_timeout_s
        agents = {agent.logical_id: agent for agent in self._known.agents()}

        async def ask(agent_id: str) -> Any:
            known = agents[agent_id]
            handle = await self._finder.unproven(known.actor_name, known.instance)
            return await bounded_call(agent_id, lambda: session.ask(handle, method), bound_s)

        return await gather(list(agents), ask, Origin.RAY)

    async def prune(self) -> Pruned:
        """Probe every known agent, and drop the dead ones."""
        dropped: list[str] = []
        silent: list[str] = []
        agents = {agent.logical_id: agent for agent in self._known.agents()}

        async def check(agent_id: str) -> None:
            try:
                await self._locator.of_known(agents[agent_id])
            except CannotKnowError:
                silent.append(agent_id)
            except NotResolvableError as error:
                # an agent that registered without an actor cannot be probed
                is_gone = agents[agent_id].instance is None or isinstance(error, ActorGoneError)
                (dropped if is_gone else silent).append(agent_id)

        await gather(list(agents), check, Origin.RAY)
        for agent_id in dropped:
            self._known.forget(agent_id)
        return Pruned(tuple(sorted(dropped)), tuple(sorted(silent)), len(self._known))

    async def shut_down(self, agent_ids: Sequence[str] | None, timeout_s: float) -> Gathered[bool]:
        """Stop agents for good (None: all known ones). Raises InvalidInputError for a bad id, and then stops none."""
        check_timeout(timeout_s)
        if agent_ids is None:
            ids = [agent.logical_id for agent in self._known.agents()]
        else:
            ids = [check_agent_id(agent_id) for agent_id in agent_ids]
        return await gather(ids, lambda agent_id: self._shut_down(agent_id, timeout_s), Origin.RAY)

    async def shut_down_batch(self, specs: Sequence[AgentSpec], timeout_s: float) -> Gathered[bool]:
        """Stop the actors that were created from these specs, and no other actors of their logical ids."""
        check_timeout(timeout_s)
        by_id = {check_agent_id(spec.agent_id): spec for spec in specs}
        return await gather(
            list(by_id), lambda agent_id: self._shut_down(agent_id, timeout_s, by_id[agent_id]), Origin.RAY
        )

    async def _shut_down(self, agent_id: str, timeout_s: float, spec: AgentSpec | None = None) -> bool:
        known = await self._to_shut_down(agent_id, spec)
        try:
            handle = await self._locator.of_known(known)
        except CannotKnowError:
            # it hangs: its actor can be ended all the same
            handle = await self._finder.unproven(known.actor_name, known.instance)
        except NotResolvableError as error:
            if known.instance is not None and not isinstance(error, ActorGoneError):
                raise
            self._known.forget(agent_id)
            return False
        try:
            await bounded_call(agent_id, lambda: session.ask(handle, "stop"), timeout_s)
        except (RegistryError, RayError) as error:
            logger.warning("agent did not stop by itself: %s", first_line(error), extra={"logical_id": agent_id})
        if not await end_actor(handle, timeout_s):
            raise AgentCallError(agent_id, f"was ended but is not gone after {timeout_s:g} s")
        self._known.forget(agent_id)
        return True

    async def _to_shut_down(self, agent_id: str, spec: AgentSpec | None) -> KnownAgent:
        """Which actor is meant: first by the registry, then by the known agents, then by its name alone."""
        epoch, name = (None, None) if spec is None else (spec.epoch, spec.actor_name)
        if self._connection is not None:
            try:
                listing = await self._connection.list_active(None, logical_id=agent_id, epoch=epoch, fresh_only=False)
            except (RegistryUnavailableError, VersionMismatchError) as error:
                logger.debug("ends an agent without the registry: %s", error, extra={"logical_id": agent_id})
            else:
                registered = best(row for row in listing if name in {None, row.actor_name})
                if registered is not None:
                    return KnownAgent.registered(registered)
        known = self._known.get(agent_id)
        if known is not None and name in {None, known.actor_name}:
            return known
        return KnownAgent(agent_id, name if name is not None else agent_id, Origin.RAY, None)
