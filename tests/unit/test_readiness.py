"""An agent's readiness: kept by its client until it is durable, sent again in order, and restored with the rest."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from seedcore.core.answers import NotResolved, Receipt
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Change, HoldChange, RegisterChange, Registration, SequencedChange, StatusChange
from seedcore.core.errors import ForbiddenTransitionError, InvalidInputError, RegistryReplacedError
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.pending import PendingChanges
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.protocol.durable_words import DurableWords
from seedcore.registry.server.config import RegistryConfig
from seedcore.settings import Settings
from seedcore.store.memory import Tables
from tests.builders import START, iid, joins, readies, turns
from tests.local import UNSTORABLE, LocalRegistry, RefusesWords
from tests.local import Snapshot as Earlier
from tests.unit.registries import joined_registry
from tests.unit.test_lost_commits import called, has_mended
from tests.waiting import eventually

SETTINGS = Settings(beat_interval_s=0.1, namespace="nowhere")
CONFIG = RegistryConfig("cluster", flush_interval_s=0.01, linger_s=0.0, epoch_check_s=0.01, compare_s=0.01)
READINESS = HoldKind.READINESS
FIRST = Registration(iid(1), "agent")


@pytest.fixture
def tables() -> Tables:
    return Tables(START)


@pytest.fixture
async def registry(tables: Tables) -> AsyncIterator[LocalRegistry]:
    async with joined_registry(CONFIG, tables) as registry:
        yield registry


def make_client(connection: Any, **details: Any) -> RegistryClient:
    return RegistryClient("agent", settings=SETTINGS, connection=connection, **details)


def words(row: Instance) -> tuple[Status, Status, str | None]:
    held = row.hold(READINESS)
    return row.status, row.reported_status, None if held is None else held.reason


async def resolved(registry: LocalRegistry) -> tuple[bool, NotResolved | None, str | None]:
    (found,) = (await registry.resolve(["agent"])).value
    return found.instance is not None, found.reason, found.detail


async def test_an_agent_that_is_not_ready_is_not_resolved_and_says_why(registry: LocalRegistry, tables: Tables) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    receipt = await client.set_ready(False, "loading weights")
    assert (receipt.durable, receipt.status, receipt.seq) == (True, Status.STARTING, 3)
    assert await resolved(registry) == (False, NotResolved.NOT_READY, "it is not ready: loading weights")
    assert words(tables.rows[client.instance_id]) == (Status.STARTING, Status.ALIVE, "loading weights")
    receipt = await client.set_ready(True, "loaded")
    assert (receipt.durable, receipt.status) == (True, Status.ALIVE)
    assert (await resolved(registry))[0]
    assert tables.rows[client.instance_id].cause == Cause(CauseKind.AGENT, "loaded")
    assert [step.seq for step in tables.transitions] == [2, 3, 4]


async def test_readiness_from_before_the_start_comes_between_registration_and_status(
    registry: LocalRegistry, tables: Tables
) -> None:
    client = make_client(registry)
    reporter = Reporter("agent", settings=SETTINGS, client=client)
    receipt = await reporter.set_ready(False, "loading weights")
    assert receipt is not None
    assert (receipt.durable, receipt.why) == (False, "it is sent with the registration")
    await reporter.start()
    assert words(tables.rows[client.instance_id]) == (Status.STARTING, Status.ALIVE, "loading weights")
    assert Status.ALIVE not in {step.to_status for step in tables.transitions}
    await reporter.set_ready(True)
    await eventually(lambda: tables.rows[client.instance_id].status is Status.ALIVE)
    await reporter.stop()
    assert await reporter.set_ready(False) is None


async def test_a_bad_readiness_is_refused_and_changes_nothing(registry: LocalRegistry) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    bad: Any = ("yes", None), (False, "x" * 1025), (False, "a\nb"), (1, None), (False, "")
    for ready, reason in bad:
        with pytest.raises(InvalidInputError):
            await client.set_ready(ready, reason)
    assert (await resolved(registry))[0]
    assert client.pending == 0


async def test_an_agents_hold_is_its_own_alone(registry: LocalRegistry) -> None:
    await registry.register(FIRST)
    await registry.take(SequencedChange(turns(1, Status.ALIVE, 2)))
    for change in (readies(1, False, None), replace(readies(1, False, 3), kind=HoldKind.PROCESS)):
        with pytest.raises(InvalidInputError):
            await registry.take(SequencedChange(change))
    with pytest.raises(RegistryReplacedError):
        await registry.take(SequencedChange(readies(1, False, 3), after="another"))
    forged = readies(1, False, 3, "loading")
    assert forged.hold is not None
    later = replace(forged.hold, by="ann", expires_at=START, since=START.replace(year=1990))
    await registry.take(SequencedChange(replace(forged, hold=later)))
    (held,) = registry.members.index.by_id[iid(1)].holds
    assert (held.reason, held.by, held.expires_at, held.since > START) == ("loading", None, None, True)


async def test_a_readiness_that_the_database_refuses_is_undone_everywhere(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables, store=RefusesWords(lambda: START, tables)) as registry:
        client = make_client(registry)
        await client.set_status("alive")
        with pytest.raises(Exception, match="refuses a reason"):
            await client.set_ready(False, UNSTORABLE)
        assert (await resolved(registry))[0]
        assert client.pending == 0
        await client.set_ready(False, "loading")
        assert words(tables.rows[client.instance_id]) == (Status.STARTING, Status.ALIVE, "loading")


# Sent again


def queue(*changes: str) -> PendingChanges:
    """Everything queued, and durable: what is sent again are the last words."""
    pending = PendingChanges()
    pending.register(FIRST)
    for change in changes:
        if change in {"ready", "unready"}:
            pending.hold(readies(1, change == "ready", None, change))
        else:
            pending.set_status(iid(1), Status(change), None)
    for sent in pending:
        pending.settle(sent, Receipt(iid(1), Status.ALIVE, 0, durable=True))
    assert len(pending) == 0
    return pending


def sent_by(pending: PendingChanges) -> list[tuple[str, int | None]]:
    def name(change: object) -> str:
        if isinstance(change, HoldChange):
            return "ready" if change.hold is None else "unready"
        return str(change.status) if isinstance(change, StatusChange) else "registration"

    return [(name(change), change.seq) for change in pending]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("alive", "unready"), [("registration", 1), ("alive", 2), ("unready", 3)]),
        (("unready", "alive"), [("registration", 1), ("unready", 2), ("alive", 3)]),
        (("alive", "unready", "ready"), [("registration", 1), ("alive", 2), ("ready", 4)]),
        (("unready", "alive", "draining", "alive"), [("registration", 1), ("unready", 2), ("alive", 5)]),
        (("unready",), [("registration", 1), ("unready", 2)]),
        ((), [("registration", 1)]),
    ],
)
def test_the_last_words_of_the_same_instance_are_sent_again_under_their_numbers(
    before: tuple[str, ...], after: list[tuple[str, int]]
) -> None:
    pending = queue(*before)
    pending.register_again(FIRST, as_new=False)
    assert sent_by(pending) == after
    pending.register_again(FIRST, as_new=False)
    assert sent_by(pending) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("alive", "unready"), [("registration", 1), ("unready", 2), ("alive", 3)]),
        (("alive", "unready", "ready"), [("registration", 1), ("alive", 2)]),
        (("unready", "ready", "unready"), [("registration", 1), ("unready", 2)]),
        (("unready", "ready", "unready", "draining"), [("registration", 1), ("unready", 2), ("draining", 3)]),
    ],
)
def test_a_new_instance_has_its_holds_before_its_status(before: tuple[str, ...], after: list[tuple[str, int]]) -> None:
    pending = queue(*before)
    another = replace(FIRST, instance_id=iid(2))
    pending.register_again(another, as_new=True)
    assert sent_by(pending) == after
    assert {change.instance_id for change in pending} == {iid(2)}
    pending.register_again(another, as_new=False)
    assert sent_by(pending) == after


def test_a_queued_readiness_is_sent_again_beside_the_last_status_and_not_in_its_place() -> None:
    pending = queue("alive")
    pending.hold(readies(1, False, None))
    pending.register_again(FIRST, as_new=False)
    assert sent_by(pending) == [("registration", 1), ("alive", 2), ("unready", 3)]
    pending = queue("alive", "unready")
    pending.set_status(iid(1), Status.DRAINING, None)
    pending.register_again(FIRST, as_new=False)
    assert sent_by(pending) == [("registration", 2), ("unready", 3), ("draining", 4)]


def test_no_number_is_used_twice_after_a_refused_return() -> None:
    pending = queue("alive", "unready")
    before = pending.wanted
    another = replace(FIRST, instance_id=iid(2))
    for _ in range(3):
        pending.set_status(iid(1), Status.DRAINING, None)
    pending.register_again(another, as_new=True)
    pending.refuse(next(iter(pending)))
    pending.wanted = before
    pending.register_again(another, as_new=False)
    assert pending.seq >= max(change.seq or 0 for change in pending)


async def test_a_readiness_is_kept_where_the_error_is_of_a_change_before_it(registry: LocalRegistry) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    client._pending._changes.append(StatusChange(client.instance_id, Status.STARTING, client._pending._next_seq()))
    with pytest.raises(ForbiddenTransitionError):
        await client.set_ready(False, "loading weights")
    assert client.pending == 1
    await client.beat()
    assert await resolved(registry) == (False, NotResolved.NOT_READY, "it is not ready: loading weights")
    await client.set_ready(True)
    assert (await resolved(registry))[0]


async def test_readiness_after_a_start_that_was_cancelled_is_reported(registry: LocalRegistry) -> None:
    client = make_client(registry)
    reporter = Reporter("agent", settings=SETTINGS, client=client)
    await client.set_status("alive")
    # as a cancelled start leaves it: the client has asked for a status, and nothing is reported
    assert not reporter.is_reporting
    assert await reporter.set_ready(False, "loading weights") is not None
    assert (await resolved(registry))[:2] == (False, NotResolved.NOT_READY)


async def test_an_agent_that_no_registry_knows_brings_its_readiness(registry: LocalRegistry, tables: Tables) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    await client.set_ready(False, "loading weights")
    await client.set_status("draining")
    await client.set_status("alive")
    elsewhere = Tables(START)
    async with joined_registry(CONFIG, elsewhere) as another:
        client._connection = client._delivery._connection = another  # type: ignore[assignment]
        await client.beat()
        assert await resolved(another) == (False, NotResolved.NOT_READY, "it is not ready: loading weights")
    again, row = elsewhere.rows[client.instance_id], tables.rows[client.instance_id]
    assert (words(again), again.seq) == (words(row), row.seq)


async def test_an_agent_that_was_declared_dead_comes_back_as_not_ready_as_it_was(registry: LocalRegistry) -> None:
    client = make_client(registry)
    await client.set_status("alive")
    await client.set_ready(False, "loading weights")
    await registry.deregister(["agent"])
    await client.beat()
    assert (await resolved(registry))[:2] == (False, NotResolved.NOT_READY)
    await client.set_ready(True)
    assert (await resolved(registry))[0]


# Lost


def test_durable_words_keep_registration_status_and_readiness_apart() -> None:
    kept = DurableWords()
    changes: list[Change] = [
        RegisterChange(FIRST, 1),
        turns(1, Status.ALIVE, 2),
        readies(1, False, 3),
        readies(1, True, 4),
    ]
    changes += [RegisterChange(replace(FIRST, organ_id="left"), 5), turns(1, Status.DRAINING, 6)]
    for change in changes:
        kept.note_receipt(SequencedChange(change), Receipt(iid(1), Status.ALIVE, change.seq or 0, durable=True))
    assert sorted(change.seq or 0 for change in kept._words[iid(1)].values()) == [4, 5, 6]


def test_what_was_taken_before_a_durable_change_is_durable_too() -> None:
    kept = DurableWords()
    for change, is_durable in (
        (RegisterChange(FIRST, 1), False),
        (turns(1, Status.ALIVE, 2), False),
        (readies(1, False, 3), True),
        (turns(1, Status.DRAINING, 4), False),
    ):
        kept.note_sent(SequencedChange(change))
        kept.note_receipt(SequencedChange(change), Receipt(iid(1), Status.ALIVE, change.seq or 0, durable=is_durable))
    assert sorted(change.seq or 0 for change in kept._words[iid(1)].values()) == [1, 2, 3]
    # the last status was refused when it was sent again
    kept.note_sent(SequencedChange(turns(1, Status.DRAINING, 4)))
    kept.note_receipt(SequencedChange(readies(1, True, 5)), Receipt(iid(1), Status.ALIVE, 5, durable=True))
    assert sorted(change.seq or 0 for change in kept._words[iid(1)].values()) == [1, 2, 5]


@pytest.mark.parametrize("last", ["readiness", "status"])
async def test_a_new_registry_over_a_database_that_lost_readiness_gets_it_from_the_agent(
    connected: object, tables: Tables, last: str
) -> None:
    async with joined_registry(CONFIG, tables) as first, called(first) as (connection, replace_by):
        await connection.register(FIRST, 1)
        await connection.set_status(iid(1), "alive", 2)
        await connection.beat(iid(1))
        earlier = Earlier(tables)
        await connection.take(SequencedChange(readies(1, False, 3, "loading")))
        if last == "status":
            await connection.set_status(iid(1), "draining", 4)
            await connection.set_status(iid(1), "alive", 5)
        before = tables.rows[iid(1)]
        await connection.beat(iid(1))
        earlier.restore()
    async with joined_registry(CONFIG, tables) as second:
        replace_by(second)
        for _ in range(2):
            await connection.beat(iid(1))
        row = tables.rows[iid(1)]
        assert (words(row), row.seq) == (words(before), before.seq)


@pytest.mark.parametrize("capacity", [20_000, 1], ids=["by the journal", "from memory"])
@pytest.mark.parametrize("is_ready", [True, False])
async def test_a_registry_writes_a_lost_readiness_again(tables: Tables, capacity: int, is_ready: bool) -> None:
    async with joined_registry(replace(CONFIG, journal_capacity=capacity), tables) as registry:
        client = make_client(registry)
        await client.set_status("alive")
        if is_ready:
            await client.set_ready(False, "loading")
        earlier = Earlier(tables)
        await client.set_ready(is_ready, "loading")
        await client.set_status("draining")
        before = tables.rows[client.instance_id]
        earlier.restore()
        await eventually(lambda: has_mended(registry))
        row = tables.rows[client.instance_id]
        assert (words(row), row.seq) == (words(before), before.seq)


@pytest.mark.parametrize("is_ready", [True, False])
async def test_memory_that_is_ahead_corrects_the_readiness_in_the_database(tables: Tables, is_ready: bool) -> None:
    async with joined_registry(replace(CONFIG, compare_s=0.0), tables) as registry:
        await registry.take(SequencedChange(joins(1, "agent", 1)))
        await registry.take(SequencedChange(turns(1, Status.ALIVE, 2)))
        if is_ready:
            await registry.take(SequencedChange(readies(1, False, 3, "loading")))
        row = tables.rows[iid(1)]
        await registry.take(SequencedChange(readies(1, is_ready, 4, "loading")))
        # by hand: no registry notices that a commit is lost
        tables.rows[iid(1)] = row
        await eventually(lambda: tables.rows[iid(1)].seq == 4)
        assert (tables.rows[iid(1)].status is Status.ALIVE) is is_ready
        assert registry.members.index.by_id[iid(1)].holds == tables.rows[iid(1)].holds
