"""The in-memory twin of the PostgreSQL store: same contract, no durability. For tests and for thinking."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone

from seedcore.core.errors import RetiredEpochError
from seedcore.core.lifecycle import Status
from seedcore.core.model import (
    Answer,
    Beat,
    BeatOutcome,
    Epoch,
    Instance,
    InstanceFilter,
    Listing,
    LostBeat,
    Outcome,
    OutcomeKind,
    RegisterChange,
    Source,
    StatusChange,
    check_epoch,
    check_instance_id,
    check_lease,
)
from seedcore.core.paging import check_limit, decode_cursor, encode_cursor
from seedcore.core.rules import apply_registration, apply_status, first_registration
from seedcore.core.selection import best

MAX_STAGED_EPOCHS = 64


@dataclass(slots=True)
class _EpochRow:
    number: int
    was_current: bool = False
    retired: bool = False


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


class MemoryStore:
    """Implements core.ports.Store. `now` gives the time that a database would."""

    def __init__(self, now: Callable[[], datetime] = _utc_now) -> None:
        self._now = now
        self._rows: dict[str, Instance] = {}
        self._epochs = {"epoch-1": _EpochRow(1, was_current=True)}
        self._current = "epoch-1"
        self._ray_cluster: str | None = None
        self._lease_s = 15.0
        self._beats_seen_at = now()
        self._version = 0

    async def open(self) -> None:
        """Nothing to prepare."""

    async def close(self) -> None:
        """Nothing to release."""

    async def begin(self, ray_cluster: str, epoch: str | None, lease_s: float) -> Epoch:
        check_lease(lease_s)
        wanted = epoch
        if wanted is not None:
            check_epoch(wanted)
        elif self._ray_cluster not in {None, ray_cluster}:
            serial = max(row.number for row in self._epochs.values()) + 1
            while f"epoch-{serial}" in self._epochs:
                serial += 1
            wanted = f"epoch-{serial}"
        if wanted is not None:
            self._flip(wanted)
        self._ray_cluster = ray_cluster
        self._lease_s = lease_s
        return await self.current_epoch()

    async def set_current_epoch(self, epoch: str) -> Epoch:
        self._flip(check_epoch(epoch))
        return await self.current_epoch()

    async def current_epoch(self) -> Epoch:
        return Epoch(self._current, self._epochs[self._current].number)

    def _flip(self, epoch: str) -> None:
        if epoch == self._current:
            return
        if self._stage(epoch, will_wait=False) is not None:
            raise RetiredEpochError(epoch)
        self._epochs[self._current].retired = True
        self._epochs[epoch].was_current = True
        self._current = epoch

    def _stage(self, epoch: str, *, will_wait: bool = True) -> OutcomeKind | None:
        known = self._epochs.get(epoch)
        if known is not None:
            return OutcomeKind.RETIRED_EPOCH if known.retired else None
        if will_wait and sum(not row.was_current for row in self._epochs.values()) >= MAX_STAGED_EPOCHS:
            return OutcomeKind.EPOCH_LIMIT
        self._epochs[epoch] = _EpochRow(max(row.number for row in self._epochs.values()) + 1)
        return None

    async def register_many(self, changes: Sequence[RegisterChange]) -> list[Outcome]:
        # in the order of their ids, as the database writes them, so that new epochs get the same numbers
        by_id = sorted(range(len(changes)), key=lambda index: changes[index].instance_id)
        outcomes = {index: self._register(changes[index]) for index in by_id}
        return [outcomes[index] for index in range(len(changes))]

    def _register(self, change: RegisterChange) -> Outcome:
        registration = change.registration
        known = self._rows.get(registration.instance_id)
        now = self._now()
        if known is not None:
            outcome, row = apply_registration(known, change, now)
            self._rows[row.instance_id] = row
            return outcome
        epoch = registration.cluster_epoch or self._current
        problem = self._stage(epoch)
        if problem is not None:
            return Outcome(problem, None, epoch)
        self._version += 1
        row = first_registration(change, epoch, now)
        self._rows[row.instance_id] = row
        return Outcome(OutcomeKind.APPLIED, row.status, epoch)

    async def set_status_many(self, changes: Sequence[StatusChange]) -> list[Outcome]:
        return [self._set_status(change) for change in changes]

    def _set_status(self, change: StatusChange) -> Outcome:
        known = self._rows.get(change.instance_id)
        if known is None:
            return Outcome(OutcomeKind.UNKNOWN)
        outcome, row = apply_status(known, change, self._now())
        self._rows[row.instance_id] = row
        if outcome.kind is OutcomeKind.APPLIED:
            self._version += 1
        return outcome

    def _declare_dead(self, row: Instance, cause: str) -> None:
        self._set_status(StatusChange(row.instance_id, Status.DEAD, cause=cause))

    async def beat_many(self, beats: Sequence[Beat]) -> list[LostBeat]:
        now = self._now()
        lost: dict[LostBeat, None] = {}
        for beat in beats:
            known = self._rows.get(beat.instance_id)
            if known is not None:
                self._beats_seen_at = now
            if known is None:
                lost[LostBeat(beat.instance_id, BeatOutcome.UNKNOWN)] = None
            elif known.status is Status.DEAD:
                lost[LostBeat(beat.instance_id, BeatOutcome.DEAD)] = None
            else:
                heard = max(known.last_heartbeat, now - timedelta(seconds=beat.age_s))
                self._rows[beat.instance_id] = replace(known, last_heartbeat=heard)
        return list(lost)

    async def expire_stale(self, lease_s: float | None, limit: int) -> list[str]:
        check_limit(limit)
        reference = self._lease_reference()
        expired: list[str] = []
        for row in self._live_by_id():
            silence_s = (reference - row.last_heartbeat).total_seconds()
            if silence_s > (self._lease_s if lease_s is None else lease_s) and len(expired) < limit:
                self._declare_dead(row, f"lease expired: silent for {silence_s:.0f} s")
                expired.append(row.instance_id)
        return expired

    async def expire_old_epochs(self, limit: int) -> list[str]:
        check_limit(limit)
        old = [row for row in self._live_by_id() if self._epochs[row.cluster_epoch].retired][:limit]
        for row in old:
            self._declare_dead(row, f"epoch {row.cluster_epoch} retired")
        return [row.instance_id for row in old]

    def _live_by_id(self) -> list[Instance]:
        live = (row for row in self._rows.values() if row.status is not Status.DEAD)
        return sorted(live, key=lambda row: row.instance_id)

    def _lease_reference(self) -> datetime:
        return min(self._now(), self._beats_seen_at)

    def _is_fresh(self, row: Instance) -> bool:
        return (self._lease_reference() - row.last_heartbeat).total_seconds() <= self._lease_s

    async def load_live(self) -> AsyncIterator[Instance]:
        for row in self._live_by_id():
            yield row

    async def list_instances(self, wanted: InstanceFilter, limit: int, cursor: str | None = None) -> Listing:
        check_limit(limit)
        after = decode_cursor(cursor)
        wanted.validated()
        matching = sorted(
            (
                row
                for row in self._rows.values()
                if wanted.matches(row, self._current)
                and (row.status is Status.DEAD or not wanted.fresh_only or self._is_fresh(row))
                and (row.logical_id, row.instance_id) > after
            ),
            key=lambda row: (row.logical_id, row.instance_id),
        )
        items = tuple(matching[:limit])
        return Listing(
            items=items,
            source=Source.POSTGRES,
            as_of=self._now(),
            version=self._version,
            complete=True,
            next_cursor=encode_cursor(items[-1]) if len(matching) > limit else None,
        )

    async def best_instances(self, logical_ids: Sequence[str]) -> Answer[dict[str, Instance]]:
        found: dict[str, Instance] = {}
        for logical_id in logical_ids:
            wanted = InstanceFilter(logical_id=logical_id)
            chosen = best(
                row for row in self._rows.values() if wanted.matches(row, self._current) and self._is_fresh(row)
            )
            if chosen is not None:
                found[logical_id] = chosen
        return Answer(found, Source.POSTGRES, self._now(), self._version, complete=True)

    async def get_instance(self, instance_id: str) -> Instance | None:
        return self._rows.get(check_instance_id(instance_id))

    async def history(self, logical_id: str, limit: int) -> list[Instance]:
        check_limit(limit)
        return newest_first(row for row in self._rows.values() if row.logical_id == logical_id)[:limit]


def newest_first(instances: Iterable[Instance]) -> list[Instance]:
    """In the order of a history: newest incarnation first, ties by id."""
    return sorted(instances, key=lambda row: (-row.started_at.timestamp(), row.instance_id))
