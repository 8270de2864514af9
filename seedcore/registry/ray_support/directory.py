"""Ray's own listing of named actors: the fallback that needs neither registry nor database.

It knows names, not states. An agent's actor carries its logical id as its name; names that begin with
`seedcore-` are ours.
"""

from __future__ import annotations

from seedcore.core.errors import InvalidInputError
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.lookup import in_thread

RESERVED_PREFIX = "seedcore-"


def check_not_ours(field: str, name: str) -> str:
    """The name of an agent or its actor, or InvalidInputError for one that is reserved for SeedCore's own actors."""
    if isinstance(name, str) and name.startswith(RESERVED_PREFIX):
        raise InvalidInputError(field, f"must not begin with {RESERVED_PREFIX!r}: those names are ours")
    return name


class RayDirectory:
    """Implements core.ports.ActorDirectory over `ray.util.list_named_actors`, which has no limit."""

    def __init__(self, namespace: str, timeout_s: float = 5.0) -> None:
        self._namespace = namespace
        self._timeout_s = timeout_s

    async def names(self) -> list[str]:
        """All agent actors' names in our namespace, sorted. Raises DirectoryUnavailableError."""
        listed = await in_thread(session.list_named_actors, self._timeout_s)
        return sorted(
            entry["name"]
            for entry in listed
            if entry["namespace"] == self._namespace and not entry["name"].startswith(RESERVED_PREFIX)
        )
