"""The in-memory twin of the PostgreSQL store: same contract, no durability. For tests and for thinking."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from seedcore.core.answers import Answer, BeatOutcome, InstanceFilter, Listing, LostBeat, Origin, Outcome, OutcomeKind
from seedcore.core.changes import RegisterChange, Registration, StatusChange, check_until
from seedcore.core.errors import EpochLimitError, FencedError, InvalidInputError, RetiredEpochError, StoreRejectedError
from seedcore.core.instances import Beat, Epoch, EpochRecord, Instance, LiveState, Transition
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_TEXT_CHARS, check_epoch, check_instance_id, check_lease, check_seq
from seedcore.core.paging import (
    check_limit,
    check_within_s,
    decode_cursor,
    decode_death_cursor,
    encode_cursor,
    encode_death_cursor,
    first_page,
)
from seedcore.core.rules import apply_registration, apply_status, first_registration
from seedcore.core.selection import best

MAX_STAGED_EPOCHS = 64
# what two readings of a clock may differ by
_CLOCK_ERROR_S = 1.0
_MAX_AGE_S = 1e9


@dataclass(slots=True)
class _EpochRow:
    number: int
    staged_at: datetime
    current_at: datetime | None = None
    retired_at: datetime | None = None
    continued_by: str | None = None


class Tables:
    """What a database would hold: several stores may work on the same."""

    def __init__(self, now: datetime) -> None:
        self.rows: dict[str, Instance] = {}
        self.transitions: list[Transition] = []
        self.hands: dict[str, tuple[object, int]] = {}
        self.epochs = {"epoch-1": _EpochRow(1, now, current_at=now)}
        self.current_epoch = "epoch-1"
        self.ray_cluster: str | None = None
        self.superseded: set[str] = set()
        self.term = 0
        self.term_seen_at = now
        self.lease_s = 15.0
        self.leases_from = now
        self.beats_seen_at = now
        self.version = 0


def _utc_now() -> datetime:
    return datetime.now(UTC)


class MemoryStore:
    """Implements core.ports.Store. `now` gives the time that a database would, `tables` is the database."""

    def __init__(self, now: Callable[[], datetime] = _utc_now, tables: Tables | None = None) -> None:
        self._now = now
        self._tables = tables if tables is not None else Tables(now())
        self._term: int | None = None
        self._lease_before_s: float | None = None

    async def open(self) -> None:
        """Nothing to prepare."""

    async def close(self) -> None:
        """Nothing to release."""

    async def begin(self, ray_cluster: str, epoch: str | None, lease_s: float, idle_s: float | None = None) -> Epoch:
        check_lease(lease_s)
        wanted = epoch
        if wanted is not None:
            check_epoch(wanted)
        is_at_work = idle_s is None or (self._now() - self._tables.term_seen_at).total_seconds() < idle_s
        if is_at_work and (idle_s is not None or ray_cluster in self._tables.superseded):
            raise FencedError(self._term or 0, self._tables.term)
        is_new = self._tables.ray_cluster not in {None, ray_cluster}
        if is_new and wanted is None:
            serial = max(row.number for row in self._tables.epochs.values()) + 1
            while f"epoch-{serial}" in self._tables.epochs:
                serial += 1
            wanted = f"epoch-{serial}"
        before = self._tables.epochs[self._tables.current_epoch]
        if wanted is not None:
            self._flip(wanted)
        if epoch is None:
            before.continued_by = wanted
        if is_new and self._tables.ray_cluster is not None:
            self._tables.superseded.add(self._tables.ray_cluster)
            self._tables.superseded.discard(ray_cluster)
        self._lease_before_s = None if self._tables.ray_cluster is None else self._tables.lease_s
        self._tables.ray_cluster = ray_cluster
        self._tables.lease_s = lease_s
        self._tables.leases_from = self._now()
        self._tables.term_seen_at = self._now()
        self._tables.term += 1
        self._term = self._tables.term
        return await self.current_epoch()

    @property
    def term(self) -> int | None:
        return self._term

    @property
    def lease_before_s(self) -> float | None:
        return self._lease_before_s

    def _fence(self) -> None:
        if self._term is not None and self._term != self._tables.term:
            raise FencedError(self._term, self._tables.term)

    async def renew_term(self, lease_s: float) -> None:
        check_lease(lease_s)
        self._fence()
        self._tables.term_seen_at = self._now()
        self._tables.lease_s = lease_s

    async def renew_every_lease(self) -> None:
        self._fence()
        self._tables.leases_from = self._now()

    async def set_current_epoch(self, epoch: str) -> Epoch:
        check_epoch(epoch)
        self._fence()
        self._flip(epoch)
        return await self.current_epoch()

    async def stage_epoch(self, epoch: str) -> bool:
        check_epoch(epoch)
        self._fence()
        is_new = epoch not in self._tables.epochs
        problem = self._stage(epoch)
        if problem is OutcomeKind.RETIRED_EPOCH:
            raise RetiredEpochError(epoch)
        if problem is not None:
            raise EpochLimitError(epoch)
        return is_new

    async def list_epochs(self, limit: int) -> list[EpochRecord]:
        check_limit(limit)
        newest = sorted(self._tables.epochs.items(), key=lambda item: -item[1].number)[:limit]
        return [
            EpochRecord(
                name,
                row.number,
                row.staged_at,
                row.current_at,
                row.retired_at,
                sum(instance.cluster_epoch == name for instance in self._live_by_id()),
            )
            for name, row in newest
        ]

    async def current_epoch(self) -> Epoch:
        return Epoch(self._tables.current_epoch, self._tables.epochs[self._tables.current_epoch].number)

    def _flip(self, epoch: str) -> None:
        if epoch == self._tables.current_epoch:
            return
        if self._stage(epoch, will_wait=False) is not None:
            raise RetiredEpochError(epoch)
        self._tables.epochs[self._tables.current_epoch].retired_at = self._now()
        self._tables.epochs[epoch].current_at = self._now()
        self._tables.current_epoch = epoch

    def _stage(self, epoch: str, *, will_wait: bool = True) -> OutcomeKind | None:
        known = self._tables.epochs.get(epoch)
        if known is not None:
            return OutcomeKind.RETIRED_EPOCH if known.retired_at is not None else None
        if will_wait and sum(row.current_at is None for row in self._tables.epochs.values()) >= MAX_STAGED_EPOCHS:
            return OutcomeKind.EPOCH_LIMIT
        self._tables.epochs[epoch] = _EpochRow(
            max(row.number for row in self._tables.epochs.values()) + 1, staged_at=self._now()
        )
        return None

    async def epochs_of(self, registrations: Sequence[Registration]) -> list[str | None]:
        return [self._continuing(row.started_epoch or self._epoch_of_actor(row)) for row in registrations]

    def _epoch_of_actor(self, registration: Registration) -> str | None:
        if registration.actor_id is None:
            return None
        wanted = (registration.logical_id, registration.actor_id)
        before = newest_first(row for row in self._tables.rows.values() if (row.logical_id, row.actor_id) == wanted)
        return before[0].cluster_epoch if before else None

    def _continuing(self, epoch: str | None) -> str | None:
        known = None if epoch is None else self._tables.epochs.get(epoch)
        if known is None:
            return None
        is_last = known.retired_at is None or known.continued_by is None
        return epoch if is_last else self._continuing(known.continued_by)

    async def register_many(self, changes: Sequence[RegisterChange]) -> list[Outcome]:
        self._fence()
        with _refusing():
            for change in changes:
                change.registration.validated()
                check_seq(change.seq)
        # in the order of their ids, as the database writes them, so that new epochs get the same numbers
        by_id = sorted(range(len(changes)), key=lambda index: changes[index].instance_id)
        outcomes = {index: self._register(changes[index]) for index in by_id}
        return [outcomes[index] for index in range(len(changes))]

    def _register(self, change: RegisterChange) -> Outcome:
        registration = change.registration
        known = self._tables.rows.get(registration.instance_id)
        now = self._now()
        if known is not None:
            outcome, row = apply_registration(known, change, now)
            self._tables.rows[row.instance_id] = row
            return outcome
        epoch = registration.cluster_epoch or self._tables.current_epoch
        problem = self._stage(epoch)
        if problem is not None:
            return Outcome(problem, None, epoch)
        self._tables.version += 1
        row = first_registration(change, epoch, now)
        self._tables.rows[row.instance_id] = row
        self._remember(None, row, change.seq)
        return Outcome(OutcomeKind.APPLIED, row.status, epoch)

    async def set_status_many(self, changes: Sequence[StatusChange]) -> list[Outcome]:
        self._fence()
        with _refusing():
            for change in changes:
                check_seq(change.seq)
                check_until(change)
                _check_storable(change.cause)
                if not 0 <= change.age_s <= 1e9:
                    raise InvalidInputError("age_s", f"must be from 0 to 1e9 seconds, not {change.age_s!r}")
        return [self._set_status(change) for change in changes]

    def _set_status(self, change: StatusChange) -> Outcome:
        known = self._tables.rows.get(change.instance_id)
        if known is None:
            return Outcome(OutcomeKind.UNKNOWN)
        hand, last = self._tables.hands.get(change.instance_id, (None, -1))
        if change.number is not None and hand is self and change.number <= last:
            return Outcome(OutcomeKind.UNCHANGED, known.status, known.cluster_epoch, known.cause)
        outcome, row = apply_status(known, change, self._now())
        self._tables.rows[row.instance_id] = row
        if outcome.kind is OutcomeKind.APPLIED:
            self._tables.version += 1
            if change.number is not None:
                self._tables.hands[change.instance_id] = (self, change.number)
            self._remember(known.status, row, change.seq)
        return outcome

    def _remember(self, before: Status | None, row: Instance, seq: int | None) -> None:
        self._tables.transitions.append(
            Transition(
                row.instance_id,
                row.logical_id,
                before,
                row.status,
                seq,
                row.cause,
                self._now() if before is row.status else row.status_changed_at,
                row.drain_until,
            )
        )

    def _declare_dead(self, row: Instance, cause: str) -> None:
        self._set_status(StatusChange(row.instance_id, Status.DEAD, cause=cause))

    @property
    def pool(self) -> Mapping[str, int]:
        return {}

    async def refine_causes(self, causes: Mapping[str, str]) -> list[str]:
        self._fence()
        with _refusing():
            for cause in causes.values():
                _check_storable(cause)
        rows, steps = self._tables.rows, self._tables.transitions
        dead = sorted(
            row.instance_id
            for row in (rows[instance_id] for instance_id in causes if instance_id in rows)
            if row.status is Status.DEAD and causes[row.instance_id].startswith(row.cause or "\0")
        )
        for instance_id in dead:
            rows[instance_id] = replace(rows[instance_id], cause=causes[instance_id])
        for index, step in enumerate(steps):
            if step.instance_id in dead and step.to_status is Status.DEAD:
                steps[index] = replace(step, cause=causes[step.instance_id])
        return dead

    async def beat_many(self, beats: Sequence[Beat]) -> list[LostBeat]:
        self._fence()
        if not all(-_CLOCK_ERROR_S <= beat.age_s <= _MAX_AGE_S for beat in beats):
            raise StoreRejectedError(f"ages of beats must be from 0 to {_MAX_AGE_S:g} seconds")
        now = self._now()
        lost: dict[LostBeat, None] = {}
        for beat in beats:
            known = self._tables.rows.get(beat.instance_id)
            if known is not None:
                self._tables.beats_seen_at = now
            if known is None:
                lost[LostBeat(beat.instance_id, BeatOutcome.UNKNOWN)] = None
            elif known.status is Status.DEAD:
                lost[LostBeat(beat.instance_id, BeatOutcome.DEAD)] = None
            else:
                heard = max(known.last_heartbeat, now - timedelta(seconds=max(0.0, beat.age_s)))
                self._tables.rows[beat.instance_id] = replace(known, last_heartbeat=heard)
        return list(lost)

    async def expire_stale(self, lease_s: float | None, limit: int) -> list[str]:
        check_limit(limit)
        self._fence()
        if lease_s is not None and not 0 < lease_s < math.inf:
            raise StoreRejectedError(f"a lease must be a number of seconds above 0, not {lease_s:g}")
        reference = self._lease_reference()
        expired: list[str] = []
        for row in self._live_by_id():
            silence_s = (reference - row.last_heartbeat).total_seconds()
            counted_s = min(silence_s, (reference - self._tables.leases_from).total_seconds())
            if counted_s > (self._tables.lease_s if lease_s is None else lease_s) and len(expired) < limit:
                self._declare_dead(row, f"lease expired: silent for {silence_s:.0f} s")
                expired.append(row.instance_id)
        return expired

    async def expire_old_epochs(self, limit: int) -> list[str]:
        check_limit(limit)
        self._fence()
        old = [row for row in self._live_by_id() if self._tables.epochs[row.cluster_epoch].retired_at is not None][
            :limit
        ]
        for row in old:
            self._declare_dead(row, f"epoch {row.cluster_epoch} retired")
        return [row.instance_id for row in old]

    async def prune_history(self, keep_s: float, limit: int) -> int:
        self._fence()
        if not 0 <= keep_s <= 1e11:
            raise StoreRejectedError(f"history must be kept for 0 to 1e11 seconds, not {keep_s:g}")
        if limit < 1:
            raise StoreRejectedError(f"a limit must be at least 1, not {limit}")
        before = self._now() - timedelta(seconds=keep_s)
        steps = self._tables.transitions
        kept = [step for number, step in enumerate(steps) if number >= limit or step.at >= before]
        ended = sorted(
            (row.stopped_at, row.instance_id)
            for row in self._tables.rows.values()
            if row.stopped_at is not None and row.stopped_at < before
        )[:limit]
        pruned = len(steps) - len(kept) + len(ended)
        self._tables.transitions = kept
        for _, instance_id in ended:
            del self._tables.rows[instance_id]
        return pruned

    def _live_by_id(self) -> list[Instance]:
        live = (row for row in self._tables.rows.values() if row.status is not Status.DEAD)
        return sorted(live, key=lambda row: row.instance_id)

    def _lease_reference(self) -> datetime:
        return min(self._now(), self._tables.beats_seen_at)

    def _is_fresh(self, row: Instance) -> bool:
        counted_from = max(row.last_heartbeat, self._tables.leases_from)
        return (self._lease_reference() - counted_from).total_seconds() <= self._tables.lease_s

    async def load_live(self) -> AsyncIterator[Instance]:
        for row in self._live_by_id():
            yield row

    async def live_states(self, after: tuple[str, str], limit: int) -> list[LiveState]:
        check_limit(limit)
        states = (
            LiveState(row.logical_id, row.instance_id, row.status, row.seq, row.cluster_epoch)
            for row in self._live_by_id()
        )
        return sorted(state for state in states if state[:2] > after)[:limit]

    async def last_beats(self, instance_ids: Sequence[str]) -> dict[str, datetime]:
        found = (self._tables.rows.get(instance_id) for instance_id in instance_ids)
        return {
            row.instance_id: row.last_heartbeat for row in found if row is not None and row.status is not Status.DEAD
        }

    async def list_instances(self, wanted: InstanceFilter, limit: int, cursor: str | None = None) -> Listing:
        check_limit(limit)
        after = decode_cursor(cursor)
        wanted.validated()
        matching = sorted(
            (
                row
                for row in self._tables.rows.values()
                if wanted.matches(row, self._tables.current_epoch)
                and (row.status is Status.DEAD or not wanted.fresh_only or self._is_fresh(row))
                and (row.logical_id, row.instance_id) > after
            ),
            key=lambda row: (row.logical_id, row.instance_id),
        )
        items = tuple(matching[:limit])
        return Listing(
            items=items,
            source=Origin.POSTGRES,
            as_of=self._now(),
            version=self._tables.version,
            complete=True,
            next_cursor=encode_cursor(items[-1]) if len(matching) > limit else None,
        )

    async def best_instances(self, logical_ids: Sequence[str]) -> Answer[dict[str, Instance]]:
        found: dict[str, Instance] = {}
        for logical_id in logical_ids:
            wanted = InstanceFilter(logical_id=logical_id)
            chosen = best(
                row
                for row in self._tables.rows.values()
                if wanted.matches(row, self._tables.current_epoch) and self._is_fresh(row)
            )
            if chosen is not None:
                found[logical_id] = chosen
        return Answer(found, Origin.POSTGRES, self._now(), self._tables.version, complete=True)

    async def get_instance(self, instance_id: str) -> Instance | None:
        return self._tables.rows.get(check_instance_id(instance_id))

    async def history(self, logical_id: str, limit: int) -> list[Instance]:
        check_limit(limit)
        return newest_first(row for row in self._tables.rows.values() if row.logical_id == logical_id)[:limit]

    async def deaths(self, limit: int, cursor: str | None = None, within_s: float | None = None) -> Listing:
        before, span_s = decode_death_cursor(cursor), check_within_s(within_s)
        since = None if span_s is None else self._now() - timedelta(seconds=span_s)
        ended = sorted(
            (row.stopped_at, row.instance_id)
            for row in self._tables.rows.values()
            if row.stopped_at is not None and (since is None or row.stopped_at >= since)
        )
        earlier = (self._tables.rows[key[1]] for key in reversed(ended) if key < before)
        items, has_more = first_page(earlier, check_limit(limit))
        next_cursor = encode_death_cursor(items[-1]) if has_more else None
        return Listing(
            tuple(items), Origin.POSTGRES, self._now(), self._tables.version, complete=True, next_cursor=next_cursor
        )

    async def transitions(self, logical_id: str, limit: int) -> list[Transition]:
        check_limit(limit)
        return [step for step in reversed(self._tables.transitions) if step.logical_id == logical_id][:limit]


@contextmanager
def _refusing() -> Iterator[None]:
    """What breaks a limit is refused as the database refuses it."""
    try:
        yield
    except InvalidInputError as error:
        raise StoreRejectedError(str(error)) from error


def _check_storable(cause: str | None) -> None:
    """Refuse a cause that PostgreSQL cannot hold."""
    if cause is not None and (len(cause) > MAX_TEXT_CHARS or re.search("[\0\ud800-\udfff]", cause)):
        raise InvalidInputError("cause", f"must be Unicode text of at most {MAX_TEXT_CHARS} characters, without NUL")


def newest_first(instances: Iterable[Instance]) -> list[Instance]:
    """In the order of a history: newest incarnation first, ties by id."""
    return sorted(instances, key=lambda row: (-row.started_at.timestamp(), row.instance_id))
