"""Writes again what the database has lost: memory and the journal have what this registry has acknowledged.

A standby is promoted that did not have the last commits, or a backup is restored under a registry that lives on. Owns
the rule for that case: memory wins. Where nothing was lost, `comparison` lets the database win.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence, Set
from dataclasses import replace
from itertools import islice
from typing import TypeVar

from seedcore.core.answers import Outcome, OutcomeKind
from seedcore.core.changes import Change, HoldChange, RegisterChange, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.errors import EpochLimitError, RetiredEpochError, StoreRejectedError
from seedcore.core.instances import LiveState
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.core.members import Members
from seedcore.core.paging import decode_cursor
from seedcore.core.ports import Store, StoreDoubtError
from seedcore.registry.protocol.messages import DatabaseLoss
from seedcore.registry.server.backlog import Backlog
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.followed import not_followed
from seedcore.registry.server.journal import (
    Committed,
    EpochStep,
    Journal,
    RefinedCause,
    Work,
    first_commit,
    from_the_beginning,
)
from seedcore.registry.server.parts import in_parts, in_plain_words
from seedcore.registry.server.remembered import Remembered
from seedcore.registry.server.retirement import end_retired

logger = logging.getLogger(__name__)

C = TypeVar("C", RegisterChange, StatusChange, HoldChange)

_PAGE = 1000
_DOUBT_S = 60.0
_LOGGED = 100
_TAKEN = frozenset({OutcomeKind.APPLIED, OutcomeKind.UNCHANGED})
_NEW = frozenset({OutcomeKind.APPLIED})


class Restoration:
    """Use it from the write loop, between the join and the first answer that is complete."""

    def __init__(
        self, config: RegistryConfig, members: Members, backlog: Backlog, journal: Journal, clock: Clock
    ) -> None:
        self._config = config
        self._members = members
        self._backlog = backlog
        self._journal = journal
        self._clock = clock
        self._written = 0
        self._counted = _TAKEN
        # by instance; None: epochs
        self._refused: dict[str | None, list[str]] = {}
        self._is_whole = False
        self._is_patient = False
        self._is_of_memory = False
        self._doubted_since_s: float | None = None
        self._taken_since = 0
        self.losses = 0
        self.lost_commits = 0
        self.last: DatabaseLoss | None = None
        self.progress: str | None = None
        """How far it is, in one line, while it is at work."""
        self._renewed_s = 0.0

    async def restore(self, store: Store, known: int, found: int, *, is_all_ours: bool = True) -> None:
        """Write again what was committed after commit `found`, up to `known`, in order and under the same numbers; then
        whatever else memory has and the database does not. Raises RegistryError; call it again then, with the lowest
        `found`: what was written counts once. `is_all_ours` False: another registry may have written since, so that
        `found` does not tell what is left."""
        self._begin()
        is_whole = self._is_whole = is_all_ours and found >= self._journal.complete_after
        try:
            await self._replay(store, found if is_all_ours else 0, is_whole=is_whole)
            await self._restore_epoch(store)
            self._is_of_memory = True
            await self._compare(store)
            # before a comparison takes over what only the database has: memory has the causes of deaths
            while await end_retired(store, self._members, self._config.sweep_limit):
                pass
        finally:
            self.progress = None
        self._note_loss(known - found, is_whole=is_whole)

    async def replay(self, store: Store, known: int, found: int) -> None:
        """The same after another registry has written, where its commits are lost with some of ours: memory may be
        wrong, but the journal has what we had acknowledged. What the other one did after that, and the database still
        has, stays."""
        self._begin()
        # most of it may be there
        self._counted = _NEW
        try:
            # all of it: the other one's commits have the numbers of those that are lost
            kept = entries = self._journal.take_after(0)
            try:
                kept = await not_followed(store, entries, self._clock, self._go_on)
            finally:
                # all of it again where the database does not answer
                self._journal.put_back(kept)
            await self._replay(store, 0, is_whole=False)
        finally:
            self.progress = None
        self._note_loss(known - found, is_whole=False)

    def note_abandoned(self, commits: int) -> None:
        """Record a loss of `commits` commits, at least, that this registry cannot write again: another one had taken
        over."""
        self._begin()
        self._note_loss(commits, is_whole=False)

    def _begin(self) -> None:
        self._written = 0
        self._counted = _TAKEN
        self._refused.clear()
        self._is_of_memory = False
        # the join has renewed the term
        self._renewed_s = self._clock.monotonic()

    async def _go_on(self, store: Store, progress: str) -> None:
        """Note how far it is, and renew the term where that is due: it may take longer than a term may be idle."""
        self.progress = f"writing again what the database has lost: {progress}"
        now_s = self._clock.monotonic()
        if now_s - self._renewed_s >= self._config.epoch_check_s:
            await store.renew_term(self._members.silence.terms.lease_s)
            self._renewed_s = now_s

    def _note_loss(self, commits: int, *, is_whole: bool) -> None:
        self._doubted_since_s = None
        self.losses += 1
        self.lost_commits += commits
        refused = sum(map(len, self._refused.values()))
        self.last = DatabaseLoss(self._clock.utc(), commits, self._written, refused, has_whole_history=is_whole)
        logger.error(
            "the database had lost commits; what this registry had acknowledged and still has is written again",
            extra={
                "lost_commits": commits,
                "written_again": self._written,
                "refused": refused,
                "has_whole_history": is_whole,
            },
        )
        for instance_id, reasons in islice(self._refused.items(), _LOGGED):
            extra = {"instance_id": instance_id, "changes": len(reasons)}
            logger.warning("the database refuses what it had before: %s", reasons[-1], extra=extra)

    # The journal

    async def _replay(self, store: Store, found: int, *, is_whole: bool) -> None:
        left = self._journal.take_after(found)
        if not is_whole:
            left = from_the_beginning(left)
        doubted: list[Committed] = []
        self._is_patient = True
        count = len(left)
        try:
            while left:
                await self._go_on(store, f"{count - len(left)} of {count} changes")
                batch = first_commit(left)
                waiting = {entry.instance_id for entry in doubted}
                # later work on an instance waits for the earlier
                fitting = [entry for entry in batch if entry.instance_id not in waiting]
                try:
                    await self._write(store, [self._aged(entry) for entry in fitting])
                except StoreDoubtError:
                    doubted += batch
                else:
                    doubted += [entry for entry in batch if entry.instance_id in waiting]
                left = left[len(batch) :]
            self._is_patient = False
            while doubted:
                batch = first_commit(doubted)
                await self._write(store, [self._aged(entry) for entry in batch])
                doubted = doubted[len(batch) :]
        finally:
            # what was not written keeps its place behind what was
            self._journal.put_back([*doubted, *left])

    def _aged(self, entry: Committed) -> Work:
        """The work with its age: the history gets the time when it happened."""
        work = entry.work
        if isinstance(work, (RefinedCause, EpochStep)):
            return work
        return replace(work, age_s=work.age_s + max(0.0, self._clock.monotonic() - entry.at_s))

    async def _write(self, store: Store, works: Sequence[Work]) -> None:
        """Write works of one kind."""
        if not works:
            return
        first = works[0]
        if isinstance(first, EpochStep):
            await self._write_epoch(store, first)
        elif isinstance(first, RefinedCause):
            await self._write_causes(store, [work for work in works if isinstance(work, RefinedCause)])
        elif isinstance(first, RegisterChange):
            await self._write_changes(store, store.register_many, [w for w in works if isinstance(w, RegisterChange)])
        elif isinstance(first, StatusChange):
            await self._write_changes(store, store.set_status_many, [w for w in works if isinstance(w, StatusChange)])
        else:
            await self._write_changes(store, store.hold_many, [w for w in works if isinstance(w, HoldChange)])

    async def _write_changes(
        self, store: Store, write: Callable[[Sequence[C]], Awaitable[list[Outcome]]], changes: Sequence[C]
    ) -> None:
        refused: list[tuple[str, StoreRejectedError | StoreDoubtError]] = []
        async for part, answer in in_parts(changes, write):
            if isinstance(answer, Exception):
                plain = in_plain_words(part[0]) if isinstance(answer, StoreRejectedError) else None
                if plain is None:
                    refused.append((part[0].instance_id, answer))
                else:
                    # the cause that memory has may be one that was refused before
                    await self._write_changes(store, store.set_status_many, [plain])
                continue
            self._journal.note_changes(store.commits, part, answer)
            for change, outcome in zip(part, answer, strict=True):
                if outcome.kind in _TAKEN:
                    self._written += outcome.kind in self._counted
                    self._taken_since += 1
                    if self._is_of_memory:
                        # what the journal had of it is in that
                        self._refused.pop(change.instance_id, None)
                else:
                    self._note_refused(change.instance_id, outcome.kind.value)
        self._give_up(refused, len(changes))

    async def _write_causes(self, store: Store, causes: Sequence[RefinedCause]) -> None:
        async def refine(some: Sequence[RefinedCause]) -> list[str]:
            return await store.refine_causes({one.instance_id: one.cause for one in some})

        refused: list[tuple[str, StoreRejectedError | StoreDoubtError]] = []
        async for part, answer in in_parts(causes, refine):
            if isinstance(answer, Exception):
                refused.append((part[0].instance_id, answer))
            else:
                self._journal.note(store.commits, part)
                self._written += len(part)
        self._give_up(refused, len(causes))

    def _give_up(self, refused: Sequence[tuple[str, StoreRejectedError | StoreDoubtError]], count: int) -> None:
        """Give up what the database refuses. Raises StoreDoubtError where it takes none of `count` rows: they are
        written again later, until the database takes others and not these, or has taken none for long."""
        doubt = next((error for _, error in refused if isinstance(error, StoreDoubtError)), None)
        if doubt is not None and len(refused) == count:
            now_s = self._clock.monotonic()
            if self._doubted_since_s is None:
                self._doubted_since_s, self._taken_since = now_s, 0
            is_at_fault = self._taken_since > 0 or now_s - self._doubted_since_s > _DOUBT_S
            if self._is_patient or not is_at_fault:
                raise doubt
        for instance_id, error in refused:
            self._note_refused(instance_id, error)

    async def _write_epoch(self, store: Store, step: EpochStep) -> None:
        try:
            await self._write_step(store, step)
        except (RetiredEpochError, EpochLimitError) as error:
            self._note_refused(None, error)

    async def _write_step(self, store: Store, step: EpochStep) -> None:
        if step.is_current:
            # under no lower number than before, which agents know
            await store.set_current_epoch(step.epoch, above=max(0, step.number - 1))
        else:
            await store.stage_epoch(step.epoch)
        self._journal.note(store.commits, [step])
        self._written += 1

    def _note_refused(self, instance_id: str | None, why: object) -> None:
        self._refused.setdefault(instance_id, []).append(str(why))

    # Memory

    async def _restore_epoch(self, store: Store) -> None:
        """Show the epoch that this registry has shown, also where the journal does not reach back to its flip. One that
        is retired there was flipped away meanwhile."""
        shown, stored = self._members.shown.known, await store.current_epoch()
        if not shown.name or (stored.name == shown.name and stored.number >= shown.number):
            return
        try:
            await self._write_step(store, EpochStep(shown.name, is_current=True, number=shown.number))
        except RetiredEpochError:
            logger.warning("epoch %s was flipped away in the database; it stays retired", shown.name)

    async def _pages(self, store: Store) -> AsyncIterator[list[LiveState]]:
        after, count = decode_cursor(None), 0
        page: list[LiveState] = []
        while not count or len(page) == _PAGE:
            await self._go_on(store, f"{count} instances compared, memory has {len(self._members)}")
            page = await store.live_states(after, _PAGE)
            yield page
            count += max(1, len(page))
            after = page[-1][:2] if page else after

    async def _compare(self, store: Store) -> None:
        """Write what memory has and the database does not, and adopt what only the database has."""
        remembered = Remembered(self._members, self._backlog, self._clock, has_whole_history=self._is_whole)
        missing = {row.instance_id for row in self._members}
        retired = {epoch.name for epoch in await store.list_epochs(MAX_PAGE) if epoch.retired_at is not None}
        async for page in self._pages(store):
            missing.difference_update(state.instance_id for state in page)
            await self._write_all(store, [work for state in page for work in remembered.differences(state)])
            for state in page:
                if state.instance_id not in self._members and state.instance_id not in self._members.deaths:
                    await self._adopt(store, state.instance_id, retired)
        rows = [row for row in map(self._members.get, missing - self._backlog.unplaced) if row is not None]
        await self._write_all(store, [work for row in rows for work in remembered.registered_again(row)])

    async def _write_all(self, store: Store, works: Sequence[Change]) -> None:
        """Registrations first, then holds, then statuses: these have the numbers of the agents' last changes."""
        for kind in (RegisterChange, HoldChange, StatusChange):
            some = [work for work in works if isinstance(work, kind)]
            for start in range(0, len(some), self._config.batch_limit):
                await self._go_on(store, f"{start} of {len(some)} that memory has")
                await self._write(store, some[start : start + self._config.batch_limit])

    async def _adopt(self, store: Store, instance_id: str, retired: Set[str]) -> None:
        """Take over an instance that memory does not have. It died beyond our memory, or was registered by SQL, and may
        beat there: it is late, so that it is routed to once it beats and has the time to. One of a retired epoch ends
        soon; where that epoch is continued in another, its agent comes back there."""
        row = await store.read_instance(instance_id)
        if row is not None and row.status is not Status.DEAD and row.cluster_epoch not in retired:
            self._members.adopt(row, self._clock.monotonic() - self._members.silence.terms.just_late_s)
