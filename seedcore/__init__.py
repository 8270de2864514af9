"""SeedCore Registry: a runtime registry for fleets of Ray actors.

The names below are the public interface. Each is imported from its module at first use, so `import seedcore` takes
milliseconds and imports neither Ray nor pydantic nor psycopg.
"""

from __future__ import annotations

from importlib import import_module

# true for type checkers; the constant of `typing` would cost more than the rest of this module
TYPE_CHECKING = False
if TYPE_CHECKING:
    from seedcore import errors
    from seedcore.agents import RayAgent
    from seedcore.core.answers import InstanceFilter, NotResolved, Origin
    from seedcore.core.causes import Cause, CauseKind
    from seedcore.core.events import AgentEvent, EventKind
    from seedcore.core.holds import Hold, HoldKind
    from seedcore.core.instances import Instance, Verdict
    from seedcore.core.lifecycle import Status
    from seedcore.core.not_ready import MissingAgent, NotReady
    from seedcore.core.selection import Policy
    from seedcore.registry import (
        RegistryClient,
        RegistryConnection,
        Reporter,
        ThreadReporter,
        end_own_actor,
        list_active_instances,
    )
    from seedcore.registry.caller.known_agents import KnownAgent
    from seedcore.registry.caller.locator import Located
    from seedcore.registry.caller.watching import Watch
    from seedcore.settings import Mode, Settings, load_settings
    from seedcore.tier0 import (
        BlockingManager,
        BlockingWatch,
        Tier0MemoryManager,
        get_actor,
        get_tier0_manager,
        list_agents,
        wait_for,
        watch,
    )
    from seedcore.tier0.answers import AgentSpec

__version__ = "0.1.0"

__all__ = [
    "AgentEvent",
    "AgentSpec",
    "BlockingManager",
    "BlockingWatch",
    "Cause",
    "CauseKind",
    "EventKind",
    "Hold",
    "HoldKind",
    "Instance",
    "InstanceFilter",
    "KnownAgent",
    "Located",
    "MissingAgent",
    "Mode",
    "NotReady",
    "NotResolved",
    "Origin",
    "Policy",
    "RayAgent",
    "RegistryClient",
    "RegistryConnection",
    "Reporter",
    "Settings",
    "Status",
    "ThreadReporter",
    "Tier0MemoryManager",
    "Verdict",
    "Watch",
    "__version__",
    "end_own_actor",
    "errors",
    "get_actor",
    "get_tier0_manager",
    "list_active_instances",
    "list_agents",
    "load_settings",
    "wait_for",
    "watch",
]

_MODULES = {
    "seedcore.agents": ("RayAgent",),
    "seedcore.core.answers": ("InstanceFilter", "NotResolved", "Origin"),
    "seedcore.core.causes": ("Cause", "CauseKind"),
    "seedcore.core.events": ("AgentEvent", "EventKind"),
    "seedcore.core.holds": ("Hold", "HoldKind"),
    "seedcore.core.instances": ("Instance", "Verdict"),
    "seedcore.core.lifecycle": ("Status",),
    "seedcore.core.not_ready": ("MissingAgent", "NotReady"),
    "seedcore.core.selection": ("Policy",),
    "seedcore.registry": (
        "RegistryClient",
        "RegistryConnection",
        "Reporter",
        "ThreadReporter",
        "end_own_actor",
        "list_active_instances",
    ),
    "seedcore.registry.caller.known_agents": ("KnownAgent",),
    "seedcore.registry.caller.locator": ("Located",),
    "seedcore.registry.caller.watching": ("Watch",),
    "seedcore.settings": ("Mode", "Settings", "load_settings"),
    "seedcore.tier0": (
        "BlockingManager",
        "BlockingWatch",
        "Tier0MemoryManager",
        "get_actor",
        "get_tier0_manager",
        "list_agents",
        "wait_for",
        "watch",
    ),
    "seedcore.tier0.answers": ("AgentSpec",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

# hidden from type checkers, which would otherwise accept every name
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name == "errors":
            return import_module("seedcore.errors")
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'seedcore' has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(_MODULE_OF[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
