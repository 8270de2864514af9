"""Processes that instances depend on and that have ended: the hold of kind `process`.

Owns what the relays reported of them. A relay that is new reports again what has ended before, so that a registry which
is new learns it, too. The agent's registration says which processes count.
"""

from __future__ import annotations

import logging

from seedcore.core.causes import Cause
from seedcore.core.clock import Clock
from seedcore.core.dependencies import Dependency
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.instances import Instance
from seedcore.core.members import Members
from seedcore.registry.server.own_holds import OwnHolds

logger = logging.getLogger(__name__)


class EndedProcesses:
    """Use it from one event loop. Bounded by the live instances and the processes of each."""

    def __init__(self, members: Members, holds: OwnHolds, clock: Clock) -> None:
        self._members = members
        self._holds = holds
        self._clock = clock
        self._ended: dict[str, dict[str, Cause]] = {}

    def depends(self, instance_id: str, dependency: Dependency) -> bool:
        """Whether a live instance depends on this process, and not on a later one of its name."""
        known = self._members.get(instance_id)
        return known is not None and any(one.process_key == dependency.process_key for one in known.dependencies)

    def note(self, instance_id: str, dependency: Dependency, cause: Cause) -> None:
        """A process has ended without which the instance lives on: hold the instance."""
        self._ended.setdefault(instance_id, {})[dependency.process_key] = cause
        self.settle(instance_id)

    def settle(self, instance_id: str) -> None:
        """Hold an instance while a process that it depends on has ended. The hold names the one that ended first; the
        agent releases it when it depends on another process, or on none."""
        ended = self._ended.get(instance_id)
        if ended is None:
            return
        known = self._members.get(instance_id)
        needed = set() if known is None else {one.process_key for one in known.dependencies}
        for key in ended.keys() - needed:
            del ended[key]
        if known is None or not ended:
            del self._ended[instance_id]
        elif known.hold(HoldKind.PROCESS) is None:
            self._hold(known, next(iter(ended.values())))

    def settle_all(self) -> None:
        """Place the holds for which there was no room, and forget the dead."""
        for instance_id in list(self._ended):
            self.settle(instance_id)

    def _hold(self, known: Instance, cause: Cause) -> None:
        kind = HoldKind.PROCESS
        hold = Hold(kind, cause.detail, None, self._clock.utc())
        if self._holds.has_room() and self._holds.change(known.instance_id, kind, hold, cause):
            logger.info("instance held: %s", cause, extra={"instance_id": known.instance_id})
