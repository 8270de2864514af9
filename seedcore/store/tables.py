"""What a database would hold, in memory: rows, history, epochs and leases, with the rules that span several rows."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from seedcore.core.answers import OutcomeKind
from seedcore.core.causes import Cause
from seedcore.core.errors import RetiredEpochError
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Instance, Transition
from seedcore.core.lifecycle import Status

MAX_STAGED_EPOCHS = 64


@dataclass(slots=True)
class EpochRow:
    """One epoch."""

    number: int
    staged_at: datetime
    current_at: datetime | None = None
    retired_at: datetime | None = None
    continued_by: str | None = None


class Tables:
    """Several memory stores may share one, as registries share a database."""

    def __init__(self, now: datetime) -> None:
        self.rows: dict[str, Instance] = {}
        self.transitions: list[Transition] = []
        self.writers: dict[str, tuple[object, int]] = {}
        """By instance, the store whose own change was applied last, and its number of that change."""
        self.epochs = {"epoch-1": EpochRow(1, now, current_at=now)}
        self.current_epoch = "epoch-1"
        self.ray_cluster: str | None = None
        self.superseded: set[str] = set()
        self.term = 0
        self.database_id = str(uuid.uuid4())
        self.writer: object | None = None
        """The store that took the term last."""
        self.commits = 0
        self.term_seen_at = now
        self.lease_s = 15.0
        self.leases_from = now
        self.beats_seen_at = now
        self.version = 0

    # Epochs

    def flip(self, epoch: str, now: datetime, above: int = 0) -> None:
        """Make an epoch current, with a number higher than `above` and that of the epoch before, which is retired.
        Raises RetiredEpochError."""
        if epoch != self.current_epoch:
            if self.stage(epoch, now, will_wait=False) is not None:
                raise RetiredEpochError(epoch)
            above = max(above, self.epochs[self.current_epoch].number)
            self.epochs[self.current_epoch].retired_at = now
            self.epochs[epoch].current_at = now
            self.current_epoch = epoch
        if self.epochs[epoch].number <= above:
            self.epochs[epoch].number = max(above, *(row.number for row in self.epochs.values())) + 1

    def stage(self, epoch: str, now: datetime, *, will_wait: bool = True) -> OutcomeKind | None:
        """Record an epoch that is not known yet. None where it is usable, else why it is not."""
        known = self.epochs.get(epoch)
        if known is not None:
            return OutcomeKind.RETIRED_EPOCH if known.retired_at is not None else None
        if will_wait and sum(row.current_at is None for row in self.epochs.values()) >= MAX_STAGED_EPOCHS:
            return OutcomeKind.EPOCH_LIMIT
        self.epochs[epoch] = EpochRow(max(row.number for row in self.epochs.values()) + 1, staged_at=now)
        return None

    def next_epoch_name(self) -> str:
        """A name for a new epoch."""
        serial = max(row.number for row in self.epochs.values()) + 1
        while f"epoch-{serial}" in self.epochs:
            serial += 1
        return f"epoch-{serial}"

    def epoch_of_actor(self, logical_id: str, actor_id: str | None) -> str | None:
        """The epoch of the newest instance of an agent's actor."""
        if actor_id is None:
            return None
        wanted = (logical_id, actor_id)
        before = newest_first(row for row in self.rows.values() if (row.logical_id, row.actor_id) == wanted)
        return before[0].cluster_epoch if before else None

    def continuing(self, epoch: str | None) -> str | None:
        """The epoch in which the agents of an epoch continue; None where it is not known."""
        known = None if epoch is None else self.epochs.get(epoch)
        if known is None:
            return None
        is_last = known.retired_at is None or known.continued_by is None
        return epoch if is_last else self.continuing(known.continued_by)

    # Instances

    def put(self, row: Instance) -> None:
        """Write a row."""
        self.rows[row.instance_id] = row

    def remember(
        self, before: Status | None, row: Instance, seq: int | None, now: datetime, hold: HoldKind | None = None
    ) -> None:
        """Write the history of a change that was applied."""
        self.version += 1
        held = None if hold is None else row.hold(hold)
        self.transitions.append(
            Transition(
                instance_id=row.instance_id,
                logical_id=row.logical_id,
                from_status=before,
                to_status=row.status,
                seq=seq,
                cause=row.cause,
                at=now if before is row.status else row.status_changed_at,
                hold=hold,
                expires_at=None if held is None else held.expires_at,
            )
        )

    def live(self) -> list[Instance]:
        """The instances that are not dead, in the order of their ids."""
        found = (row for row in self.rows.values() if row.status is not Status.DEAD)
        return sorted(found, key=lambda row: row.instance_id)

    def is_fresh(self, row: Instance, now: datetime) -> bool:
        """Whether the lease of an instance is valid."""
        return self.silence_s(row, now) <= self.lease_s

    def silence_s(self, row: Instance, now: datetime) -> float:
        """The seconds that count against a lease."""
        counted_from = max(row.last_heartbeat, self.leases_from)
        return (self.judged_at(now) - counted_from).total_seconds()

    def judged_at(self, now: datetime) -> datetime:
        """When leases are judged: at the last recorded beat, and not after the registry, if there is one, was last at
        work."""
        judged = min(now, self.beats_seen_at)
        return min(judged, self.term_seen_at) if self.term > 0 else judged

    def refine(self, causes: dict[str, Cause]) -> None:
        """Write causes of deaths, in the rows and in the history."""
        for instance_id, cause in causes.items():
            self.rows[instance_id] = replace(self.rows[instance_id], cause=cause)
        self.transitions = [
            replace(one, cause=causes[one.instance_id])
            if one.instance_id in causes and one.to_status is Status.DEAD
            else one
            for one in self.transitions
        ]

    def prune(self, before: datetime, limit: int) -> int:
        """Delete transitions and dead instances that ended earlier, at most `limit` of each. Returns how many."""
        kept = [one for number, one in enumerate(self.transitions) if number >= limit or one.at >= before]
        ended = sorted(
            (row.stopped_at, row.instance_id)
            for row in self.rows.values()
            if row.stopped_at is not None and row.stopped_at < before
        )[:limit]
        pruned = len(self.transitions) - len(kept) + len(ended)
        self.transitions = kept
        for _, instance_id in ended:
            del self.rows[instance_id]
        return pruned


def newest_first(instances: Iterable[Instance]) -> list[Instance]:
    """The newest incarnation first, ties by id."""
    return sorted(instances, key=lambda row: (-row.started_at.timestamp(), row.instance_id))
