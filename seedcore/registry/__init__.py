"""The registry on Ray: the actor, and what agents and callers use to reach it."""

from seedcore.registry.client import RegistryClient, list_active_instances
from seedcore.registry.identity import end_own_actor
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.reporter import Reporter, ThreadReporter

__all__ = [
    "RegistryClient",
    "RegistryConnection",
    "Reporter",
    "ThreadReporter",
    "end_own_actor",
    "list_active_instances",
]
