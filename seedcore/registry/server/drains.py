"""The nodes that Ray drains, and the holds of kind `node` on their instances.

Owns these holds: it places, replaces and releases those that are by Ray. One by another party, placed in SQL, stays as
it is. Ray does nothing at the deadline of a drain, so a hold has no end: it is released when Ray reports the drain no
longer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime

from seedcore.core.causes import Cause, CauseKind
from seedcore.core.clock import Clock
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.instances import Instance
from seedcore.core.members import Members
from seedcore.registry.server.database import DatabaseSession
from seedcore.registry.server.own_holds import OwnHolds

logger = logging.getLogger(__name__)

BY_RAY = "ray"
"""The `by` of the holds that are placed here."""
LOOKS = 12
"""A drain is over when so many looks in a row do not report it: a restarted GCS reports none until its nodes have
reported to it again, which took 1.4 s on an idle machine."""
_AGAIN_LOOKS = 6


class Drains:
    """Use it from one event loop. `see` and `drop` follow the members, `take` gets what a look at Ray's tables finds.

    A step makes at most `step_limit` changes, and as many as the backlog has room for; the others wait for the next.
    """

    def __init__(
        self, members: Members, holds: OwnHolds, database: DatabaseSession, clock: Clock, step_limit: int
    ) -> None:
        self._members = members
        self._holds = holds
        self._database = database
        self._clock = clock
        self._step_limit = step_limit
        self._reasons: dict[str | None, str] = {}
        self._absent: dict[str | None, int] = {}
        self._held: dict[str, str | None] = {}
        self._due: dict[str, None] = {}
        self._look = 0
        self._tried: dict[str, int] = {}

    @property
    def nodes(self) -> int:
        """How many nodes Ray drains."""
        return len(self._reasons)

    # The members

    def see(self, instance: Instance) -> None:
        """Note an instance that is new, or whose details have changed."""
        if not self._reasons and not self._held and not instance.holds:
            return
        instance_id, hold = instance.instance_id, instance.hold(HoldKind.NODE)
        if hold is not None and hold.by == BY_RAY:
            self._held[instance_id] = instance.node_id
        else:
            self._held.pop(instance_id, None)
        if _is_due(hold, self._reasons.get(instance.node_id)):
            self._due[instance_id] = None

    def drop(self, instance: Instance) -> None:
        """Note that an instance lives no longer, or has left its node."""
        self._held.pop(instance.instance_id, None)
        self._due.pop(instance.instance_id, None)

    # Ray's tables

    def take(self, draining: Mapping[str, datetime | None] | None) -> None:
        """Note the nodes that Ray drains, with their deadlines; None: it is not known, and then no hold is released."""
        self._look += 1
        self._tried = {one: look for one, look in self._tried.items() if self._look - look < _AGAIN_LOOKS}
        if draining is None:
            self._absent.clear()
            return
        before = self._reasons
        reported: dict[str | None, str] = {node_id: _reason(node_id, end) for node_id, end in draining.items()}
        absent = [node_id for node_id in {**before, **dict.fromkeys(self._held.values())} if node_id not in reported]
        self._absent = {node_id: self._absent.get(node_id, 0) + 1 for node_id in absent}
        over = {node_id for node_id, looks in self._absent.items() if looks >= LOOKS}
        kept = {node_id: reason for node_id, reason in before.items() if node_id not in reported.keys() | over}
        self._reasons = {**reported, **kept}
        changed = {node_id for node_id, reason in reported.items() if before.get(node_id) != reason}
        if changed or over & before.keys():
            names = {"begun": sorted(map(str, changed)), "over": sorted(map(str, over & before.keys()))}
            logger.info("Ray drains other nodes than before", extra=names)
        if changed:
            self._due.update((row.instance_id, None) for row in self._members if row.node_id in changed)
        self._due.update((one, None) for one, node_id in self._held.items() if node_id in over)
        self.step()

    # The holds

    def step(self) -> None:
        """Place and release holds that are due. One that the database refused is tried again some looks later."""
        left = self._step_limit
        for instance_id in list(self._due):
            if left == 0 or not self._holds.has_room():
                return
            if instance_id not in self._tried:
                left -= self._settle(instance_id)

    def place(self, instance_id: str) -> None:
        """Place the hold on an instance that has just registered, if its node is being drained."""
        if instance_id in self._due and self._holds.has_room():
            self._settle(instance_id)

    def _settle(self, instance_id: str) -> bool:
        """Place, replace or release the hold of an instance where that is due. Returns whether it changed."""
        known = self._members.get(instance_id)
        if known is None:
            self._due.pop(instance_id, None)
            return False
        before, reason = known.hold(HoldKind.NODE), self._reasons.get(known.node_id)
        is_over = reason is None and before is not None and before.by == BY_RAY
        if is_over and not self._database.is_complete:
            # it is released once the database has been read
            return False
        del self._due[instance_id]
        if not is_over and not _is_due(before, reason):
            return False
        if reason is None:
            hold, cause = None, Cause(CauseKind.DRAIN_ENDED, f"Ray drains node {known.node_id} no longer", BY_RAY)
        else:
            since = self._clock.utc() if before is None else before.since
            hold, cause = Hold(HoldKind.NODE, reason, BY_RAY, since), None
        self._tried[instance_id] = self._look
        return self._holds.change(instance_id, HoldKind.NODE, hold, cause)


def _is_due(hold: Hold | None, reason: str | None) -> bool:
    """Whether an instance of a node that is drained for `reason` needs another hold than it has."""
    return reason is not None and (hold is None or (hold.by == BY_RAY and hold.reason != reason))


def _reason(node_id: str, deadline: datetime | None) -> str:
    end = "" if deadline is None else f", deadline {deadline:%Y-%m-%d %H:%M:%S} UTC"
    return f"node {node_id} is being drained by Ray{end}"
