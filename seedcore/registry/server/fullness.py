"""How full the registry is: of live instances, and of bytes of memory for them.

Owns the warning that comes before registrations are refused, and their count.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from seedcore.core.errors import RegistryFullError
from seedcore.core.members import Members
from seedcore.core.memory_bound import MIB
from seedcore.registry.server.config import RegistryConfig

logger = logging.getLogger(__name__)

_WARN_AT = 0.8
_CLEAR_AT = 0.75


class Fullness:
    """Call `look` when instances were added, and regularly."""

    def __init__(self, config: RegistryConfig, members: Members) -> None:
        self._config = config
        self._members = members
        self._is_nearly_full = False
        self._is_refusing = False
        self.refused = 0

    @property
    def shares(self) -> Mapping[str, float]:
        """How much of each bound is used, from 0 to 1."""
        memory = self._members.memory
        return {
            "instances": len(self._members) / self._config.max_instances,
            "memory": memory.used / memory.limit,
        }

    @property
    def problem(self) -> str | None:
        """Which bound is near, in one line, and what to do; None while there is room."""
        if not self._is_nearly_full:
            return None
        memory = self._members.memory
        shares = self.shares
        if shares["memory"] >= shares["instances"]:
            used = f"instances use {memory.used // MIB} of at most {memory.limit // MIB} MiB of memory"
            remedy = "raise SEEDCORE_MAX_INSTANCES_MIB, or register with less metadata"
        else:
            used = f"{len(self._members)} of at most {self._config.max_instances} instances are live"
            remedy = "raise SEEDCORE_MAX_INSTANCES"
        then = "registrations are refused" if self._is_refusing else "at the bound registrations are refused"
        return f"{used}; {then}, and agents that are registered keep working: {remedy}"

    def look(self) -> None:
        """Notice that a bound is near, or is no longer."""
        fullest = max(self.shares.values())
        if fullest < _CLEAR_AT:
            if self._is_nearly_full:
                logger.info("the registry has room again", extra=self._fields)
            self._is_nearly_full = self._is_refusing = False
        elif fullest >= _WARN_AT and not self._is_nearly_full:
            self._is_nearly_full = True
            logger.warning("the registry is nearly full: %s", self.problem, extra=self._fields)

    def note_refused(self, error: RegistryFullError) -> None:
        """Record that a registration was refused."""
        self.refused += 1
        if not self._is_refusing:
            self._is_nearly_full = self._is_refusing = True
            logger.error("the registry is full and refuses registrations: %s", error, extra=self._fields)

    @property
    def _fields(self) -> dict[str, int]:
        return {"instances": len(self._members), "bytes": self._members.memory.used}
