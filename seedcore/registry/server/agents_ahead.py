"""Agents that know later changes than the database: it lost commits before this registry started.

Owns the count of them, and what `health` reports about it. The agents send their changes again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime

from seedcore.core.clock import Clock
from seedcore.core.members import Members

logger = logging.getLogger(__name__)


class AgentsAhead:
    """Use it from one event loop."""

    def __init__(self, members: Members, clock: Clock) -> None:
        self._members = members
        self._clock = clock
        self._ahead: set[str] = set()
        self.count = 0
        self.last_at: datetime | None = None

    def compare(self, seqs: Mapping[str, int]) -> tuple[str, ...]:
        """Compare the numbers of the last durable changes that agents know, by instance, with those in memory. Returns
        the instances of which the agents know later ones. Each is counted once, however often it is compared."""
        rows = [(row, seq) for one, seq in seqs.items() if (row := self._members.get(one)) is not None]
        ahead = {row.instance_id for row, seq in rows if row.seq < seq}
        new = ahead - self._ahead
        self._ahead.difference_update(row.instance_id for row, _ in rows)
        self._ahead |= ahead
        if new:
            log = logger.error if self.count == 0 else logger.info
            log(
                "the database had lost commits before this registry started; agents send their last changes again",
                extra={"agents": len(new)},
            )
            self.count += len(new)
            self.last_at = self._clock.utc()
        return tuple(one for one in seqs if one in ahead)
