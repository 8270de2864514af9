"""The code broken on purpose where the database has lost commits: laws 17 and 18 have to notice each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from seedcore.core.answers import KnownBefore, Outcome
from seedcore.core.changes import Change, HoldChange, StatusChange
from seedcore.core.errors import FencedError
from seedcore.core.instances import LiveState
from seedcore.core.lifecycle import Status
from seedcore.core.ports import Store
from seedcore.core.shown_epoch import ShownEpoch
from seedcore.registry.agent.pending import PendingChanges
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.server.database import DatabaseSession
from seedcore.registry.server.journal import Committed, Journal
from seedcore.registry.server.registry import Registry
from seedcore.registry.server.remembered import Remembered
from seedcore.registry.server.restoration import Restoration
from seedcore.store.memory_terms import MemoryTerms
from tests.faults.mutant import Mutant


def _nothing(*_: object) -> None:
    """Instead of what the code does."""


async def _do_nothing(*_: object) -> None:
    """Instead of what the code does."""


def _no_changes(*_: object) -> Iterator[Change]:
    return iter(())


def _fence_by_term(store: MemoryTerms, *, counts: bool = True) -> None:
    tables, term = store.tables, store._term
    if term is None:
        return
    if tables.term > term or (tables.term == term and tables.writer is not store):
        raise FencedError(term, tables.term)
    tables.commits += counts
    store._commits = tables.commits


_note_changes, _take_after, _differences = Journal.note_changes, Journal.take_after, Remembered.differences


def _note_no_holds(journal: Journal, number: int, changes: Sequence[Change], outcomes: Sequence[Outcome]) -> None:
    if not isinstance(changes[0], HoldChange):
        _note_changes(journal, number, changes, outcomes)


def _note_no_deaths(journal: Journal, number: int, changes: Sequence[Change], outcomes: Sequence[Outcome]) -> None:
    kept = [
        one
        for one in zip(changes, outcomes, strict=True)
        if not isinstance(one[0], StatusChange) or one[0].status is not Status.DEAD
    ]
    _note_changes(journal, number, [change for change, _ in kept], [outcome for _, outcome in kept])


def _differences_of_the_living(remembered: Remembered, state: LiveState) -> Iterator[Change]:
    if state.instance_id in remembered._members:
        yield from _differences(remembered, state)


def _take_later(journal: Journal, number: int) -> list[Committed]:
    return _take_after(journal, number + 2)


def _ask_for_nothing(registry: Registry, known: KnownBefore) -> tuple[str, ...]:
    if known.epoch is not None and registry.writer.database.is_complete:
        registry.members.shown.note_known_before(known.epoch)
    return ()


@contextmanager
def _patch_no_holds() -> Iterator[None]:
    with (
        mock.patch.object(Remembered, "_holds_again", _no_changes),
        mock.patch.object(Journal, "note_changes", _note_no_holds),
    ):
        yield


@contextmanager
def _patch_no_deaths() -> Iterator[None]:
    with (
        mock.patch.object(Remembered, "differences", _differences_of_the_living),
        mock.patch.object(Journal, "note_changes", _note_no_deaths),
    ):
        yield


_last_changes = PendingChanges._last_changes


def _last_changes_but_readiness(pending: PendingChanges, instance_id: str) -> list[StatusChange | HoldChange]:
    queued = list(pending)
    return [
        change
        for change in _last_changes(pending, instance_id)
        if not isinstance(change, HoldChange) or change in queued
    ]


_restore = Restoration.restore


async def _restore_as_ours(restoration: Restoration, store: Store, known: int, found: int, **_: object) -> None:
    # also those of before it began
    restoration._journal.complete_after = 0
    await _restore(restoration, store, known, found)


LOSS_MUTANTS: dict[str, Mutant] = {
    "a registry does not compare commits": Mutant(
        7, lambda: mock.patch.object(MemoryTerms, "fence", _fence_by_term), law=17
    ),
    "the database wins after a loss": Mutant(
        1, lambda: mock.patch.object(DatabaseSession, "_note_found", _nothing), law=17
    ),
    "the journal is not replayed": Mutant(7, lambda: mock.patch.object(Restoration, "_replay", _do_nothing), law=17),
    "the journal is replayed from a later commit": Mutant(
        7, lambda: mock.patch.object(Journal, "take_after", _take_later), law=17
    ),
    "the commits of another registry count as its own": Mutant(
        22, lambda: mock.patch.object(Restoration, "restore", _restore_as_ours), law=17
    ),
    "memory is not compared after the replay": Mutant(
        22, lambda: mock.patch.object(Restoration, "_compare", _do_nothing), law=17
    ),
    "holds are not restored": Mutant(3, _patch_no_holds, law=17),
    "deaths are not restored": Mutant(22, _patch_no_deaths, law=17),
    "the epoch is not restored": Mutant(
        1, lambda: mock.patch.object(Restoration, "_restore_epoch", _do_nothing), law=17
    ),
    "agents do not repeat their last changes": Mutant(
        99, lambda: mock.patch.object(RegistryConnection, "_take_again", _do_nothing), law=17
    ),
    "an agent's readiness is not sent again": Mutant(
        9, lambda: mock.patch.object(PendingChanges, "_last_changes", _last_changes_but_readiness)
    ),
    "a later change hides one that was lost": Mutant(
        21, lambda: mock.patch.object(PendingChanges, "repeat", _nothing), law=17
    ),
    "a new registry asks agents for nothing": Mutant(
        99, lambda: mock.patch.object(Registry, "_compare_known", _ask_for_nothing), law=17
    ),
    "a lost flip is ignored": Mutant(2, lambda: mock.patch.object(ShownEpoch, "note_known_before", _nothing), law=18),
    "an epoch that is not confirmed is listed": Mutant(
        2, lambda: mock.patch.object(ShownEpoch, "listed", property(lambda shown: shown.name)), law=18
    ),
}
