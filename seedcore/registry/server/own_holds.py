"""The holds that the registry itself places and releases: in memory at once, in the database with the next batch."""

from __future__ import annotations

import logging

from seedcore.core.answers import OutcomeKind
from seedcore.core.causes import Cause
from seedcore.core.changes import HoldChange
from seedcore.core.clock import Clock
from seedcore.core.errors import BacklogFullError, FencedError
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.members import Members
from seedcore.registry.server.backlog import Backlog

logger = logging.getLogger(__name__)


class OwnHolds:
    """Use it from one event loop."""

    def __init__(self, members: Members, backlog: Backlog, clock: Clock) -> None:
        self._members = members
        self._backlog = backlog
        self._clock = clock

    def has_room(self) -> bool:
        """Whether another change fits. If not, try again later."""
        try:
            self._backlog.require_room()
        except (BacklogFullError, FencedError) as error:
            logger.debug("holds are changed later: %s", error)
            return False
        return True

    def change(self, instance_id: str, kind: HoldKind, hold: Hold | None, cause: Cause | None = None) -> bool:
        """Place a hold, or release the one of its kind (None). Returns whether the instance has changed. There must be
        room."""
        change = HoldChange(instance_id, kind, hold, self._backlog.next_number(), cause)
        if self._members.hold(change, self._clock.utc()).kind is not OutcomeKind.APPLIED:
            return False
        self._backlog.offer(change)
        return True
