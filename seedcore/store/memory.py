"""The in-memory twin of the PostgreSQL store: the same contract, without durability. For tests and simulations."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from seedcore.core.answers import BeatOutcome, LostBeat, Outcome, OutcomeKind
from seedcore.core.causes import Cause, CauseKind, is_refined_by
from seedcore.core.changes import HoldChange, RegisterChange, StatusChange
from seedcore.core.errors import InvalidInputError, StoreRejectedError
from seedcore.core.instances import Beat, Instance, LiveState
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_AGE_S, check_cause, check_seq
from seedcore.core.paging import check_limit
from seedcore.core.rules import apply_hold, apply_registration, apply_status, first_registration
from seedcore.store.memory_terms import MemoryTerms
from seedcore.store.tables import Tables

__all__ = ["MemoryStore", "Tables"]

# two readings of a clock may differ by this
_CLOCK_ERROR_S = 1.0


def _utc_now() -> datetime:
    return datetime.now(UTC)


class MemoryStore(MemoryTerms):
    """Implements core.ports.Store. `now` returns the time that a database would, `tables` is the database."""

    def __init__(self, now: Callable[[], datetime] = _utc_now, tables: Tables | None = None) -> None:
        super().__init__(now, tables if tables is not None else Tables(now()))

    async def open(self) -> None:
        """Nothing to prepare."""

    @property
    def pool(self) -> Mapping[str, int]:
        return {}

    # Changes

    async def register_many(self, changes: Sequence[RegisterChange]) -> list[Outcome]:
        self.fence()
        with _refusing():
            for change in changes:
                change.registration.validated()
                check_seq(change.seq)
        # in the order of their ids, as the database writes them, so that new epochs get the same numbers
        by_id = sorted(range(len(changes)), key=lambda index: changes[index].instance_id)
        outcomes = {index: self._register(changes[index]) for index in by_id}
        return [outcomes[index] for index in range(len(changes))]

    def _register(self, change: RegisterChange) -> Outcome:
        known = self.tables.rows.get(change.instance_id)
        now = self._now()
        if known is not None:
            outcome, row = apply_registration(known, change, now)
            self.tables.put(row)
            self.tables.version += row.endpoints != known.endpoints
            if outcome.kind is OutcomeKind.APPLIED:
                self.tables.remember(known.status, row, change.seq, now)
            return outcome
        if change.is_update:
            return Outcome(OutcomeKind.UNKNOWN)
        epoch = change.registration.cluster_epoch or self.tables.current_epoch
        problem = self.tables.stage(epoch, now)
        if problem is not None:
            return Outcome(problem, None, epoch)
        row = first_registration(change, epoch, now)
        self.tables.put(row)
        self.tables.remember(None, row, change.seq, now)
        return Outcome(OutcomeKind.APPLIED, row.status, epoch)

    async def set_status_many(self, changes: Sequence[StatusChange]) -> list[Outcome]:
        self.fence()
        with _refusing():
            for change in changes:
                change.validated()
        return [self._set_status(change) for change in changes]

    def _set_status(self, change: StatusChange) -> Outcome:
        known = self.tables.rows.get(change.instance_id)
        if known is None:
            return Outcome(OutcomeKind.UNKNOWN)
        if change.seq is None and self._was_applied(change):
            return Outcome(OutcomeKind.UNCHANGED, known.status, known.cluster_epoch, known.cause)
        outcome, row = apply_status(known, change, self._now())
        self.tables.put(row)
        if change.seq is None and row.reported_status is not known.reported_status:
            self._note_writer(change)
        if outcome.kind is OutcomeKind.APPLIED:
            self.tables.remember(known.status, row, change.seq, self._now())
        return outcome

    async def hold_many(self, changes: Sequence[HoldChange]) -> list[Outcome]:
        self.fence()
        with _refusing():
            for change in changes:
                change.validated()
        return [self._hold(change) for change in changes]

    def _hold(self, change: HoldChange) -> Outcome:
        known = self.tables.rows.get(change.instance_id)
        if known is None:
            return Outcome(OutcomeKind.UNKNOWN)
        if change.seq is None and self._was_applied(change):
            return Outcome(OutcomeKind.UNCHANGED, known.status, known.cluster_epoch, known.cause)
        outcome, row = apply_hold(known, change, self._now())
        self.tables.put(row)
        if outcome.kind is OutcomeKind.APPLIED:
            if change.seq is None:
                self._note_writer(change)
            self.tables.remember(known.status, row, change.seq, self._now(), change.kind)
        return outcome

    def _was_applied(self, change: StatusChange | HoldChange) -> bool:
        writer, last = self.tables.writers.get(change.instance_id, (None, -1))
        return change.number is not None and writer is self and change.number <= last

    def _note_writer(self, change: StatusChange | HoldChange) -> None:
        if change.number is not None:
            self.tables.writers[change.instance_id] = (self, change.number)

    async def refine_causes(self, causes: Mapping[str, Cause]) -> list[str]:
        self.fence()
        with _refusing():
            for cause in causes.values():
                check_cause(cause)
        known = {
            instance_id: self.tables.rows[instance_id] for instance_id in causes if instance_id in self.tables.rows
        }
        refined = sorted(
            row.instance_id
            for row in known.values()
            if row.status is Status.DEAD and is_refined_by(row.cause, causes[row.instance_id])
        )
        self.tables.refine({instance_id: causes[instance_id] for instance_id in refined})
        return refined

    async def beat_many(self, beats: Sequence[Beat]) -> list[LostBeat]:
        self.fence(counts=False)
        if not all(-_CLOCK_ERROR_S <= beat.age_s <= MAX_AGE_S for beat in beats):
            raise StoreRejectedError(f"ages of beats must be from 0 to {MAX_AGE_S:g} seconds")
        now = self._now()
        lost: dict[LostBeat, None] = {}
        for beat in beats:
            known = self.tables.rows.get(beat.instance_id)
            if known is not None:
                self.tables.beats_seen_at = now
            if known is None:
                lost[LostBeat(beat.instance_id, BeatOutcome.UNKNOWN)] = None
            elif known.status is Status.DEAD:
                lost[LostBeat(beat.instance_id, BeatOutcome.DEAD)] = None
            else:
                received_at = max(known.last_heartbeat, now - timedelta(seconds=max(0.0, beat.age_s)))
                self.tables.put(replace(known, last_heartbeat=received_at))
        return list(lost)

    async def expire_stale(self, lease_s: float | None, limit: int) -> list[str]:
        check_limit(limit)
        self.fence()
        if lease_s is not None and not 0 < lease_s < math.inf:
            raise StoreRejectedError(f"a lease must be a number of seconds above 0, not {lease_s:g}")
        now = self._now()
        allowed_s = self.tables.lease_s if lease_s is None else lease_s
        stale = [row for row in self.tables.live() if self.tables.silence_s(row, now) > allowed_s][:limit]
        for row in stale:
            silence_s = (self.tables.judged_at(now) - row.last_heartbeat).total_seconds()
            self._declare_dead(row, Cause(CauseKind.LEASE_EXPIRED, f"no beat for {silence_s:.0f} s"))
        return [row.instance_id for row in stale]

    async def expire_old_epochs(self, limit: int) -> list[str]:
        check_limit(limit)
        self.fence(counts=False)
        epochs = self.tables.epochs
        old = [row for row in self.tables.live() if epochs[row.cluster_epoch].retired_at is not None][:limit]
        for row in old:
            self._declare_dead(row, Cause(CauseKind.EPOCH_RETIRED, row.cluster_epoch))
        return [row.instance_id for row in old]

    def _declare_dead(self, row: Instance, cause: Cause) -> None:
        self._set_status(StatusChange(row.instance_id, Status.DEAD, cause=cause))

    async def prune_history(self, keep_s: float, limit: int) -> int:
        self.fence(counts=False)
        if not 0 <= keep_s <= 1e11:
            raise StoreRejectedError(f"history must be kept for 0 to 1e11 seconds, not {keep_s:g}")
        if limit < 1:
            raise StoreRejectedError(f"a limit must be at least 1, not {limit}")
        return self.tables.prune(self._now() - timedelta(seconds=keep_s), limit)

    # What the registry has in memory

    async def load_live(self) -> AsyncIterator[Instance]:
        for row in self.tables.live():
            yield row

    async def read_instance(self, instance_id: str) -> Instance | None:
        self.fence(counts=False)
        return await self.get_instance(instance_id)

    async def live_states(self, after: tuple[str, str], limit: int) -> list[LiveState]:
        check_limit(limit)
        self.fence(counts=False)
        return sorted(state for state in map(LiveState.of, self.tables.live()) if state[:2] > after)[:limit]

    async def last_beats(self, instance_ids: Sequence[str]) -> dict[str, datetime]:
        found = (self.tables.rows.get(instance_id) for instance_id in instance_ids)
        return {
            row.instance_id: row.last_heartbeat for row in found if row is not None and row.status is not Status.DEAD
        }


@contextmanager
def _refusing() -> Iterator[None]:
    """Refuse what breaks a limit as the database refuses it."""
    try:
        yield
    except InvalidInputError as error:
        raise StoreRejectedError(str(error)) from error
