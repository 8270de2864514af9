"""The commits: accepted changes, refined causes and beats go to the database in batches, one flush at a time.

Owns the rules of a commit: what is refused alone, what goes back, and where the database's answer corrects memory.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from seedcore.core.answers import LostBeat, Outcome, OutcomeKind
from seedcore.core.causes import Cause
from seedcore.core.changes import Change, HoldChange, RegisterChange, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.errors import RegistryError, StoreRejectedError, StoreUnavailableError
from seedcore.core.instances import Beat
from seedcore.core.lifecycle import Status
from seedcore.core.members import Members
from seedcore.core.ports import StoreDoubtError
from seedcore.registry.protocol.messages import FlushCounts
from seedcore.registry.server.backlog import Backlog, Key, key_of
from seedcore.registry.server.comparison import Comparison
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.database import DatabaseSession
from seedcore.registry.server.journal import Journal, RefinedCause
from seedcore.registry.server.parts import in_parts, in_plain_words

logger = logging.getLogger(__name__)

C = TypeVar("C", RegisterChange, StatusChange, HoldChange)
D = TypeVar("D", StatusChange, HoldChange)

_RATE_S = 10.0
_MAX_REFUSED_BEATS = 100
_LEAST_SHARE = 1 / 4096
_GROWTH = 1.1


@dataclass(slots=True)
class _Commit:
    """What became of a batch so far. `doubts` are changes that were refused for what may not be their own fault."""

    statements: int = 0
    applied: int = 0
    doubts: list[tuple[Change, StoreDoubtError]] = field(default_factory=list)

    @property
    def doubted(self) -> list[Change]:
        return [change for change, _ in self.doubts]


class Flusher:
    """Use it from the write loop. `on_flush` is called with the duration in seconds and the rows of each flush."""

    def __init__(
        self,
        config: RegistryConfig,
        members: Members,
        backlog: Backlog,
        database: DatabaseSession,
        comparison: Comparison,
        journal: Journal,
        clock: Clock,
    ) -> None:
        self._config = config
        self._members = members
        self._backlog = backlog
        self._database = database
        self._comparison = comparison
        self._journal = journal
        self._clock = clock
        self._next_beats_s = 0.0
        self._counts = FlushCounts()
        self._share = 1.0
        self._offered: deque[tuple[float, int]] = deque([(clock.monotonic(), 0)])
        self.on_flush: Callable[[float, int], None] = _ignore

    @property
    def counts(self) -> FlushCounts:
        """Totals since the start; without `failures`, which the write loop counts."""
        beats = self._backlog.beats.counts
        return replace(
            self._counts,
            beats_offered=beats.offered,
            beats_coalesced=beats.coalesced,
            beats_dropped=beats.dropped,
        )

    @property
    def beats_per_s(self) -> float | None:
        """Beats per second over the last _RATE_S seconds; None before they can be measured."""
        (first_s, first), (last_s, last) = self._offered[0], self._offered[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else None

    @property
    def until_beats_s(self) -> float:
        """Seconds until beats are due."""
        return max(0.0, self._next_beats_s - self._clock.monotonic())

    async def flush_due(self) -> None:
        """Commit every waiting change, and the beats if they are due."""
        now_s = self._clock.monotonic()
        beats_due = now_s >= self._next_beats_s
        if beats_due:
            self._next_beats_s = now_s + self._config.flush_interval_s
            self._note_rate(now_s)
        await self.flush(beats_due=beats_due)

    def _note_rate(self, now_s: float) -> None:
        self._offered.append((now_s, self._backlog.beats.counts.offered))
        while now_s - self._offered[0][0] > _RATE_S:
            self._offered.popleft()

    async def flush(self, *, beats_due: bool) -> None:
        """Commit every waiting change, then the beats if due. A batch that fails goes back to its place."""
        started_s = self._clock.monotonic()
        before = self._counts
        statements = 0
        doubt: StoreDoubtError | None = None
        # only what is here now: what comes meanwhile must not keep refined causes and beats waiting
        left = self._backlog.pending_changes
        while left > 0 and doubt is None:
            changes = self._backlog.take_changes(min(left, self._part_of(self._config.batch_limit)))
            if not changes:
                break
            left -= len(changes)
            try:
                with self._sized():
                    statements += await self._commit_changes(self._comparison.without_dead(changes))
            except StoreDoubtError as error:
                # refined causes and beats do not wait for it
                doubt = error
        statements += await self._commit_refined()
        beats = self._backlog.beats
        waiting = len(beats) if beats_due else 0
        while waiting > 0 and (received := beats.take(self._part_of(self._config.beat_batch_limit))):
            with self._sized():
                await self._commit_beats(received)
            waiting -= len(received)
            statements += 1
        if statements:
            self._counts = replace(
                self._counts,
                flushes=self._counts.flushes + 1,
                statements=self._counts.statements + statements,
                last_flush_s=self._clock.monotonic() - started_s,
            )
            counts = self._counts
            rows = counts.changes_committed + counts.beats_committed - before.changes_committed - before.beats_committed
            self.on_flush(counts.last_flush_s, rows)
        if doubt is not None:
            raise doubt

    def _part_of(self, limit: int) -> int:
        return max(1, int(limit * self._share))

    @contextmanager
    def _sized(self) -> Iterator[None]:
        """Halve the size of later batches if this one is not committed, and let it grow again, slowly, if it is. A
        database that is too slow for a whole batch would else never commit it in time."""
        try:
            yield
        except StoreDoubtError:
            raise
        except StoreUnavailableError:
            self._share = max(_LEAST_SHARE, self._share / 2)
            raise
        self._share = min(1.0, _GROWTH * self._share)

    async def _commit_refined(self) -> int:
        """Commit what became known of deaths, whose changes the database has by now."""
        refined = self._backlog.refined(self._config.batch_limit)
        statements = 0
        async for part, answer in in_parts(list(refined.items()), self._refine_many):
            statements += 1
            if isinstance(answer, (StoreRejectedError, StoreDoubtError)):
                logger.warning("the database refused the refined cause of a death: %s", answer)
            else:
                self._journal.note(self._database.writable.commits, [RefinedCause(*one) for one in part])
            self._backlog.discard_refined(part)
        return statements

    async def _refine_many(self, causes: Sequence[tuple[str, Cause]]) -> list[str]:
        return await self._database.writable.refine_causes(dict(causes))

    # Changes

    async def _commit_changes(self, changes: list[Change]) -> int:
        """Commit a run of changes. Raises StoreDoubtError for those that the database refuses while it takes no other;
        one that it refuses beside others is at fault itself."""
        registrations = [change for change in changes if isinstance(change, RegisterChange)]
        statuses = [change for change in changes if isinstance(change, StatusChange)]
        holds = [change for change in changes if isinstance(change, HoldChange)]
        commit = _Commit()
        left: list[Change] = [*registrations, *statuses, *holds]
        try:
            await self._commit_batch(registrations, partial(self._register_placed, commit), commit)
            # a change waits for the changes of its instance before it
            statuses, later = _without(statuses, commit.doubted)
            left = [*commit.doubted, *later, *statuses, *holds]
            await self._commit_batch(statuses, self._database.writable.set_status_many, commit)
            holds, later_holds = _without(holds, [*commit.doubted, *later])
            later = [*later, *later_holds]
            left = [*commit.doubted, *later, *holds]
            await self._commit_batch(holds, self._database.writable.hold_many, commit)
            left = [*commit.doubted, *later]
            if commit.doubts and not commit.applied:
                raise commit.doubts[0][1]
            for change, error in commit.doubts:
                await self._refuse(change, StoreRejectedError(error.why), commit)
            left = [*later]
        finally:
            # what was not committed returns to the front in its order, whatever went wrong; replaying a part
            # that was is harmless
            self._backlog.put_back(left)
        return commit.statements

    async def _register_placed(self, commit: _Commit, changes: Sequence[RegisterChange]) -> list[Outcome]:
        placed, looks = await self._placed(changes)
        commit.statements += looks
        return await self._database.writable.register_many(placed)

    async def _placed(self, changes: Sequence[RegisterChange]) -> tuple[list[RegisterChange], int]:
        """The registrations, each with the epoch that it belongs to, which the store refuses where that is retired; and
        the number of statements for that."""
        placed: dict[Key, str | None] = {
            key_of(change): change.registration.started_epoch
            for change in changes
            if change.registration.started_epoch == self._members.epoch
        }
        open_ones = [change for change in changes if key_of(change) not in placed and _may_belong_elsewhere(change)]
        if open_ones:
            epochs = await self._database.writable.epochs_of([change.registration for change in open_ones])
            placed.update(zip(map(key_of, open_ones), epochs, strict=True))
        return [_in_epoch(change, placed.get(key_of(change))) for change in changes], bool(open_ones)

    async def _commit_batch(
        self, batch: Sequence[C], write: Callable[[Sequence[C]], Awaitable[list[Outcome]]], commit: _Commit
    ) -> None:
        """Commit a batch but for those that the database refuses, and note what became of it."""
        async for part, answer in in_parts(batch, write):
            commit.statements += 1
            if isinstance(answer, StoreDoubtError):
                commit.doubts.append((part[0], answer))
            elif isinstance(answer, StoreRejectedError):
                await self._refuse(part[0], answer, commit)
            else:
                self._journal.note_changes(self._database.writable.commits, part, answer)
                await self._take_outcomes(part, answer)
                commit.applied += sum(outcome.kind is OutcomeKind.APPLIED for outcome in answer)

    async def _take_outcomes(self, changes: Sequence[Change], outcomes: list[Outcome]) -> None:
        for change, outcome in zip(changes, outcomes, strict=True):
            if outcome.kind is OutcomeKind.APPLIED and outcome.cluster_epoch is not None:
                self._members.move(change.instance_id, outcome.cluster_epoch)
            if isinstance(change, RegisterChange) and change.is_alive:
                # only now: before, it would be resolved in an epoch that may not be its own
                self._members.set_status(change.status_change(), self._clock.monotonic(), self._clock.utc())
            if self._contradicts(change, outcome):
                await self._comparison.correct(change.instance_id, key_of(change))
        # only now: an outage while correcting puts the whole batch back, and its callers go on waiting
        for change, outcome in zip(changes, outcomes, strict=True):
            self._backlog.settle(change, outcome)
        self._counts = replace(self._counts, changes_committed=self._counts.changes_committed + len(changes))

    async def _refuse(self, change: Change, error: StoreRejectedError, commit: _Commit) -> None:
        """Give up a change that the database refuses; of a death only the words of its cause."""
        logger.warning("the database refused a change for good: %s", error, extra={"instance_id": change.instance_id})
        plain = in_plain_words(change)
        if plain is not None and plain.status is Status.DEAD:
            await self._commit_batch([plain], self._database.writable.set_status_many, commit)
            return
        if change.instance_id in self._members:
            await self._comparison.correct(change.instance_id, key_of(change))
        self._backlog.settle(change, error)

    def _contradicts(self, change: Change, outcome: Outcome) -> bool:
        """Whether the database's answer shows that memory has a wrong state of the instance."""
        known = self._members.get(change.instance_id)
        if known is None:
            return False
        if outcome.kind is OutcomeKind.APPLIED or outcome.kind is OutcomeKind.UNCHANGED:
            # with more of it under way, memory is ahead
            return known.status is not outcome.status and self._backlog.unsettled(known.instance_id) == 1
        return True

    # Beats

    async def _commit_beats(self, received: dict[str, float]) -> None:
        now_s = self._clock.monotonic()
        beats = [Beat(instance_id, now_s - received_s) for instance_id, received_s in received.items()]
        lost: list[LostBeat] = []
        refused: list[RegistryError] = []
        taken = 0
        try:
            async for part, answer in in_parts(beats, self._database.writable.beat_many):
                if isinstance(answer, (StoreRejectedError, StoreDoubtError)):
                    refused.append(answer)
                else:
                    lost += answer
                    taken += len(part)
                if len(refused) == _MAX_REFUSED_BEATS:
                    break
        except BaseException:
            self._backlog.beats.put_back(received)
            raise
        if refused and taken == 0 and isinstance(refused[0], StoreDoubtError):
            self._backlog.beats.put_back(received)
            raise refused[0]
        if refused:
            # the rest of a batch that is refused again and again is not looked through
            logger.warning("the database refused beats: %s", refused[0], extra={"beats": len(beats) - taken})
            self._backlog.beats.counts.dropped += len(beats) - taken
        for beat in lost:
            # one that is registered in memory and not yet in the database is committed later
            if not self._backlog.unsettled(beat.instance_id) and beat.instance_id in self._members:
                await self._comparison.correct(beat.instance_id)
        self._counts = replace(self._counts, beats_committed=self._counts.beats_committed + taken - len(lost))


def _ignore(_seconds: float, _rows: int) -> None:
    """The default of a callback."""


def _without(changes: Sequence[D], waiting: Sequence[Change]) -> tuple[list[D], list[Change]]:
    """The changes of other instances than those that wait, and the changes of these."""
    ids = {change.instance_id for change in waiting}
    return (
        [change for change in changes if change.instance_id not in ids],
        [change for change in changes if change.instance_id in ids],
    )


def _may_belong_elsewhere(change: RegisterChange) -> bool:
    """Whether only the store knows its epoch: it was started in one that is not shown, or Ray may have restarted it."""
    registration = change.registration
    has_past = registration.started_epoch is not None or registration.actor_id is not None
    return registration.cluster_epoch is None and has_past


def _in_epoch(change: RegisterChange, epoch: str | None) -> RegisterChange:
    if change.registration.cluster_epoch is not None or epoch is None:
        return change
    return replace(change, registration=replace(change.registration, cluster_epoch=epoch))
