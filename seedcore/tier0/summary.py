"""The manager's view of fleet and registry, made on request."""

from __future__ import annotations

from collections import Counter

from seedcore.core.clock import utc_now
from seedcore.core.errors import RegistryUnavailableError
from seedcore.registry.caller.known_agents import KnownAgents
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.settings import Mode
from seedcore.tier0.answers import SystemSummary


async def system_summary(
    mode: Mode, namespace: str, connection: RegistryConnection, known: KnownAgents
) -> SystemSummary:
    """The summary now. Without a registry, or while it is away, it has the reason."""
    health, problem = None, "the mode is ray" if mode is Mode.RAY else None
    if mode is not Mode.RAY:
        try:
            health = await connection.health()
        except RegistryUnavailableError as error:
            problem = str(error)
    return SystemSummary(
        mode=mode,
        namespace=namespace,
        as_of=utc_now(),
        known_agents=len(known),
        agents_by_source=dict(Counter(agent.source.value for agent in known.agents())),
        registry=health,
        registry_problem=problem,
        last_discovery_at=known.discovered_at,
        healed=known.healed,
    )
