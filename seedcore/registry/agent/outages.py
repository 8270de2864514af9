"""What prevents the agents of this process from reporting, in few log lines: an outage concerns all of them at once.

An `Outage` is one line as it begins and one as it ends; a `Burst` is one line for its first event and one for the rest.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from weakref import WeakSet

from seedcore.core.answers import Receipt
from seedcore.core.clock import Clock
from seedcore.core.lifecycle import Status

logger = logging.getLogger(__name__)

_BURST_S = 10.0


class Outage:
    """Begins with the first agent that it concerns, and ends with the last. Safe to use from any thread."""

    def __init__(self, begins: str, ends: str, clock: Clock | None = None) -> None:
        """`begins` is formatted with why and the number of agents; `ends` with the number of agents that it concerned,
        and for how many seconds."""
        self._begins = begins
        self._ends = ends
        self._clock = clock if clock is not None else Clock()
        self._guard = threading.Lock()
        self._concerned: WeakSet[object] = WeakSet()
        self._count = 0
        self._began_s = 0.0

    @property
    def concerned(self) -> int:
        """How many agents it concerns now."""
        return len(self._concerned)

    def note(self, agent: object, why: str, fields: Mapping[str, str], agents: int = 1) -> None:
        """It concerns `agent`, and most likely so many `agents` of this process."""
        with self._guard:
            if agent in self._concerned:
                return
            is_first = not self._concerned
            self._concerned.add(agent)
            self._count = 1 if is_first else self._count + 1
            if is_first:
                self._began_s = self._clock.monotonic()
        logger.log(logging.WARNING if is_first else logging.DEBUG, self._begins, why, agents, extra=fields)

    def clear(self, agent: object) -> None:
        """It does not concern `agent` any more."""
        with self._guard:
            if agent not in self._concerned:
                return
            self._concerned.discard(agent)
            if self._concerned:
                return
            count, lasted_s = self._count, self._clock.monotonic() - self._began_s
        logger.info(self._ends, count, lasted_s)

    def forget(self, agent: object) -> None:
        """The agent has stopped: it neither begins nor ends anything."""
        with self._guard:
            self._concerned.discard(agent)


class Burst:
    """Events that come to many agents within seconds. Call from an event loop, any one."""

    def __init__(
        self, level: int, first: str, more: str, window_s: float = _BURST_S, clock: Clock | None = None
    ) -> None:
        """`first` is formatted with what `note` is given; `more` with the number of the others and the seconds."""
        self._level = level
        self._first = first
        self._more_text = more
        self._window_s = window_s
        self._clock = clock if clock is not None else Clock()
        self._guard = threading.Lock()
        self._ends_s = 0.0
        self._more = 0

    def note(self, what: str, fields: Mapping[str, str]) -> None:
        """It happened to one."""
        with self._guard:
            now_s = self._clock.monotonic()
            if now_s < self._ends_s:
                self._more += 1
                return
            self._ends_s, self._more = now_s + self._window_s, 0
        logger.log(self._level, self._first, what, extra=fields)
        asyncio.get_running_loop().call_later(self._window_s, self._end)

    def _end(self) -> None:
        with self._guard:
            more, self._more = self._more, 0
        if more:
            logger.log(self._level, self._more_text, more, self._window_s)


class Outages:
    """All outages and bursts of a set of agents, usually those of this process."""

    def __init__(self, burst_s: float = _BURST_S, clock: Clock | None = None) -> None:
        """`burst_s`: events within so many seconds share a line."""
        self.reporting: WeakSet[object] = WeakSet()
        """The agents that report."""
        self.unreported = Outage(
            "not reported, will try again: %s (agents of this process: %d)",
            "reported again (agents of this process: %d, after %.1f s)",
            clock,
        )
        self.refused = Outage(
            "refused, will try again less often: %s (agents of this process: %d, more are counted at the end)",
            "no agent is refused any more (agents of this process: %d, after %.1f s)",
            clock,
        )
        self.undurable = Outage(
            "changes are not durable, they are kept and sent again: %s (agents of this process: %d)",
            "changes are durable again (agents of this process: %d, after %.1f s)",
            clock,
        )
        self.registered_again = Burst(
            logging.INFO,
            "the registry does not know instance %s; registering again",
            "%d more instances of this process registered again within %.1f s",
            burst_s,
            clock,
        )
        self.came_back = Burst(
            logging.WARNING,
            "the registry has declared instance %s dead; coming back as a new instance",
            "%d more instances of this process came back as new ones within %.1f s",
            burst_s,
            clock,
        )
        self.not_ended = Burst(
            logging.WARNING,
            "could not report that an agent stopped: %s",
            "the same of %d more agents of this process within %.1f s",
            burst_s,
            clock,
        )

    def note_receipt(self, agent: object, receipt: Receipt, fields: Mapping[str, str]) -> None:
        """Note the answer to an agent's changes."""
        why = receipt.why or ""
        if receipt.durable and receipt.status is Status.DEAD:
            self.forget(agent)
        elif receipt.registry is not None:
            self.unreported.clear(agent)
            if receipt.durable:
                self.undurable.clear(agent)
            else:
                self.undurable.note(agent, why, fields, len(self.reporting))
        elif not receipt.durable:
            self.unreported.note(agent, why, fields, len(self.reporting))

    def forget(self, agent: object) -> None:
        """The agent has stopped."""
        self.reporting.discard(agent)
        for outage in (self.unreported, self.refused, self.undurable):
            outage.forget(agent)


of_process = Outages()
"""Those of this process."""
