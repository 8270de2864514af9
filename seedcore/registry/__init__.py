"""What agents and callers use to reach the registry. The registry itself is `server`."""

from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.identity import end_own_actor
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.agent.thread_reporter import ThreadReporter
from seedcore.registry.caller.listing import list_active_instances
from seedcore.registry.protocol.connection import RegistryConnection

__all__ = [
    "RegistryClient",
    "RegistryConnection",
    "Reporter",
    "ThreadReporter",
    "end_own_actor",
    "list_active_instances",
]
