"""Owns what all parts of a history share: chance, time, the faults in force, what runs, and the first violation."""

from __future__ import annotations

import random
from collections import Counter
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from seedcore.core.clock import Clock
from seedcore.core.lifecycle import Status
from seedcore.store.memory import Tables
from tests.builders import START
from tests.faults.simulated.drains import Drains
from tests.faults.simulated.losses import Losses
from tests.faults.simulated.virtual import VirtualLoop

if TYPE_CHECKING:
    from tests.faults.simulated.callers import Caller
    from tests.faults.simulated.fleet import Process
    from tests.faults.simulated.nodes import SimRelay
    from tests.faults.simulated.registries import Office

# mostly a few, so that much happens to each; now and then so many that some are silent and the fleet is not
AGENTS = (5, 5, 5, 14)
BEAT_S = 1.0
LEASE_S = 8.0
CALL_TIMEOUT_S = 2.0
FAULTS_S = 50.0
CALM_S = 40.0
# longer than the faults: no freeze of theirs ends by it
FREEZE_MAX_S = 60.0
NODES = ("north", "south")
NAMESPACE = "simulated"
OPERATOR = "operator"
ENDPOINTS_SHARE = 0.25


class Violation(AssertionError):
    """A law is broken."""


class World:
    """Everything there is, and what is true of it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.agents = self.random.choice(AGENTS)
        self.loop = VirtualLoop()
        self.log: list[str] = []
        self.tables = Tables(START)
        self._continued: dict[str, str | None] = {}
        self._ever_continued: set[tuple[str, str]] = set()
        self.losses = Losses(self, seed)
        self.drains = Drains(self, seed)
        # of its own: histories without such changes stay what they are
        self.endpoints_random = random.Random(f"endpoints of {seed}")
        self.changes_endpoints = self.endpoints_random.random() < ENDPOINTS_SHARE
        self.clock_offset_s = 0.0
        self.clock = Clock(lambda: self.now_s, self.utc)
        self.database_back_s = 0.0
        self.gcs_back_s = 0.0
        self.all_cut_s = 0.0
        self.cut_s: dict[str, float] = {}
        self.nodes: dict[str, bool] = dict.fromkeys(NODES, True)
        self.processes: list[Process] = []
        self.offices: list[Office] = []
        self.relays: list[SimRelay] = []
        self.callers: list[Caller] = []
        self.held_by_hand: set[str] = set()
        self.lost_share = self.random.choice([0.0, 0.01, 0.03])
        self.twice_share = self.random.choice([0.0, 0.02])
        self.slow_share = self.random.choice([0.0, 0.01])
        self.database_lost_share = self.random.choice([0.0, 0.02, 0.05])
        self.has_relays = self.random.random() < 0.8
        # now and then so few that a short outage of the database fills the backlog
        self.change_capacity = self.random.choice([3, 8, 100_000])
        self.is_calm = False
        self.violation: Violation | None = None
        self.counts: Counter[str] = Counter()
        self.latest_utc = START

    # Time and chance

    @property
    def now_s(self) -> float:
        return self.loop.now_s

    def utc(self) -> datetime:
        now = START + timedelta(seconds=self.now_s + self.clock_offset_s)
        self.latest_utc = max(self.latest_utc, now)
        return now

    def note(self, text: str) -> None:
        self.log.append(f"{self.now_s:8.3f}  {text}")

    def happens(self, share: float) -> bool:
        return not self.is_calm and self.random.random() < share

    # What there is

    def owner(self, instance_id: str) -> Process | None:
        return next((process for process in self.processes if instance_id in process.instance_ids), None)

    def office(self) -> Office | None:
        """The registry that has the name: the last one started, never an older one again."""
        return self.offices[-1] if self.offices and self.offices[-1].is_up else None

    def serves(self, office: Office, component: str) -> bool:
        """Whether a call of this component to this registry arrives. Ray reports the end of a registry that it has
        replaced to some later than to others."""
        is_last = office is self.offices[-1]
        return office.is_up and (is_last or office.keeps.get(component, 0.0) > self.now_s)

    def is_cut(self, component: str) -> bool:
        return max(self.all_cut_s, self.cut_s.get(component, 0.0)) > self.now_s

    def note_epochs(self) -> None:
        """Note which epoch continues which, also for when the database has lost it."""
        epochs = self.tables.epochs.items()
        known = [(name, row.continued_by) for name, row in epochs if row.continued_by is not None]
        self._continued.update(known)
        self._ever_continued.update(known)
        # it may be current again, where what continued it is lost
        self._continued.pop(self.tables.current_epoch, None)

    def line_of(self, epoch: str) -> str:
        """The epoch that continues this one in the end."""
        self.note_epochs()
        following = self._continued.get(epoch)
        return epoch if following is None else self.line_of(following)

    def is_of_line(self, epoch: str, before: str) -> bool:
        """Whether an epoch is `before`, or continues it, also where the database has lost that."""
        self.note_epochs()
        line, new = {before}, {before}
        while new:
            new = {after for name, after in self._ever_continued if name in new} - line
            line |= new
        return epoch in line

    def is_retired(self, epoch: str) -> bool:
        """Whether the database has the epoch as one that ended."""
        row = self.tables.epochs.get(epoch)
        return row is not None and row.retired_at is not None

    def living_row(self, instance_id: str) -> bool:
        row = self.tables.rows.get(instance_id)
        return row is not None and row.status is not Status.DEAD

    # Laws

    def check(self, is_so: bool, law: int, what: str) -> None:
        if not is_so:
            # kept, since the code under test survives what is raised in it
            self.violation = self.violation or Violation(f"law {law}: {what}")
            raise self.violation
