"""The registry in one process over the memory store, with a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from seedcore.core.answers import InstanceFilter, Outcome, Receipt
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import HoldChange, SequencedChange, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.errors import (
    FencedError,
    FollowersFullError,
    InvalidInputError,
    RegistryReplacedError,
    RegistryUnavailableError,
    StoreUnavailableError,
    UnknownInstanceError,
)
from seedcore.core.feed import FeedBatch
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Beat, Epoch, Instance, TermSeen, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.ports import OnDeath, OnDependency, OnDraining, OnExplained, OnLostNodes, OnUnwatched
from seedcore.core.recent_deaths import RecentDeath
from seedcore.core.verdict import Death, Witness
from seedcore.registry.protocol.messages import OperationResult
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.database import DatabaseSession
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START, iid, joins, turns
from tests.local import UNSTORABLE, RefusesWords, is_unstorable
from tests.local import LocalRegistry as Registry
from tests.waiting import eventually

EVERY = InstanceFilter(statuses=None)
LEFT = InstanceFilter(statuses=None, organ_id="left")
CONFIG = RegistryConfig(
    "cluster", beat_interval_s=5.0, lease_s=15.0, flush_interval_s=0.01, linger_s=0.0, max_followers=2
)


class Elapsed:
    """Seconds since the start, on both clocks; the one of timestamps has jumped by `jumped_s`."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.jumped_s = 0.0

    def clock(self) -> Clock:
        return Clock(lambda: self.now_s, lambda: START + timedelta(seconds=self.now_s + self.jumped_s))


class NoWitness:
    """A death witness that sees nothing."""

    problem: str | None = None
    is_blind = False
    relays = watched = 0
    on_refined: OnExplained
    on_dependency: OnDependency
    on_lost_nodes: OnLostNodes
    on_unwatched: OnUnwatched
    on_draining: OnDraining

    def relay_of(self, node_id: str) -> None: ...

    def __init__(self, on_death: OnDeath) -> None:
        self.on_death = on_death

    def start(self) -> None: ...

    async def stop(self) -> None: ...

    def add(self, instance: Instance) -> None: ...

    def drop(self, instance: Instance) -> None: ...

    async def ask_ray(self, instance: Instance, timeout_s: float) -> Witness:
        return Witness.UNKNOWN


@pytest.fixture
def elapsed() -> Elapsed:
    return Elapsed()


class SlowReads(RefusesWords):
    """Something may happen while a row is read, or a hold is refused. `looks` counts how often a registry looked for
    the one in force."""

    meanwhile: Callable[[], Awaitable[object]] | None = None
    looks = 0

    async def term_seen(self) -> TermSeen:
        self.looks += 1
        return await super().term_seen()

    async def get_instance(self, instance_id: str) -> Instance | None:
        row = await super().get_instance(instance_id)
        await self._happen()
        return row

    async def current_epoch(self) -> Epoch:
        epoch = await super().current_epoch()
        await self._happen()
        return epoch

    async def hold_many(self, changes: Sequence[HoldChange]) -> list[Outcome]:
        if any(map(is_unstorable, changes)):
            await self._happen()
        return await super().hold_many(changes)

    async def _happen(self) -> None:
        if self.meanwhile is not None:
            happens, self.meanwhile = self.meanwhile, None
            await happens()


@pytest.fixture
def tables(elapsed: Elapsed) -> Tables:
    return Tables(elapsed.clock().utc())


@pytest.fixture
def database(elapsed: Elapsed, tables: Tables) -> SlowReads:
    return SlowReads(elapsed.clock().utc, tables)


@pytest.fixture
async def registry(elapsed: Elapsed, database: SlowReads) -> AsyncIterator[Registry]:
    """One that has joined its store, with an instance that is alive."""
    clock = elapsed.clock()

    async def store() -> MemoryStore:
        return database

    registry = Registry(CONFIG, store, clock=clock, watch_factory=NoWitness)
    registry.start()

    async def is_ready() -> bool:
        return (await registry.health()).is_ready

    await eventually(is_ready)
    await registry.register(joins(1).registration)
    await registry.set_status(iid(1), Status.ALIVE, 2)
    yield registry
    await registry.stop()


async def test_instance_that_was_fresh_before_a_stall_is_resolved_right_after_it(
    registry: Registry, elapsed: Elapsed
) -> None:
    elapsed.now_s += 60.0
    # nothing of the registry has run in this minute: the caller's question is the first that does
    found = (await registry.resolve(["agent"])).value[0]
    assert found.instance is not None
    assert found.verdict is Verdict.FRESH
    described = await registry.describe("agent")
    assert described.live[0].silence_s < CONFIG.beat_interval_s
    assert [row.instance_id for row in await registry.list_active()] == [iid(1)]
    assert (await registry.health()).credited_s > 50.0


async def test_silence_while_the_registry_works_counts(registry: Registry, elapsed: Elapsed) -> None:
    for _ in range(100):
        elapsed.now_s += 0.1
        await registry.resolve(["agent"])
    found = (await registry.resolve(["agent"])).value[0]
    assert found.instance is None
    assert found.verdict is Verdict.LATE
    assert (await registry.health()).credited_s == 0.0


async def test_repeated_questions_after_a_stall_credit_it_once(registry: Registry, elapsed: Elapsed) -> None:
    elapsed.now_s += 7.0
    await asyncio.gather(*(registry.resolve(["agent"]) for _ in range(10)))
    assert (await registry.health()).credited_s < 7.0


async def test_a_stall_while_expiry_is_frozen_is_no_evidence_of_a_death(registry: Registry, elapsed: Elapsed) -> None:
    await registry.register(replace(joins(2).registration, actor_id="ab", actor_name="actor", namespace="ns"))
    for _ in range(400):
        elapsed.now_s += 0.1
        registry.expiry.attentive_now_s()
        await registry.beat(iid(2))
    silent = registry.members.get(iid(2))
    assert silent is not None
    elapsed.now_s += 60.0
    # the stall is credited only when Ray is to be asked: the silent one is fresh again
    silence = registry.members.silence
    assert silence.lapsed(elapsed.now_s) == [iid(1), iid(2)]
    witness, _ = await registry.expiry.ask_about(silent)
    assert witness is Witness.UNKNOWN
    assert silence.verdict(iid(2), elapsed.now_s) is Verdict.FRESH


async def test_many_changes_in_one_message_get_each_its_own_answer(registry: Registry) -> None:
    changes = [
        SequencedChange(joins(2, "other", 1)),
        SequencedChange(StatusChange(iid(1), Status.DRAINING, 3)),
        SequencedChange(StatusChange(iid(3), Status.ALIVE, 2)),
        SequencedChange(StatusChange(iid(1), Status.DEAD, 4), after="another registry"),
    ]
    answers = await registry.deliver(changes)
    assert [type(answer) for answer in answers] == [Receipt, Receipt, UnknownInstanceError, RegistryReplacedError]
    assert all(answer.durable for answer in answers if isinstance(answer, Receipt))
    with pytest.raises(InvalidInputError, match="at most 1000"):
        await registry.deliver([changes[0]] * 1001)


async def test_a_fault_of_ours_in_one_change_is_not_the_others(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setattr(registry.members, "register", fail)
    [broken_answer, answer] = await registry.deliver(
        [SequencedChange(joins(2, "other", 1)), SequencedChange(StatusChange(iid(1), Status.DRAINING, 3))]
    )
    assert isinstance(broken_answer, RegistryUnavailableError)
    assert isinstance(answer, Receipt)


async def test_loads_come_with_beats_and_are_listed(registry: Registry) -> None:
    await registry.beat_many([iid(1)], {iid(1): 2.5})
    assert (await registry.list_active()).loads == {iid(1): 2.5}
    await registry.beat_many([iid(1)])
    assert (await registry.list_active()).loads == {iid(1): 2.5}
    await registry.beat_many([iid(1), iid(2)], {iid(2): 1.0})
    assert (await registry.list_active()).loads == {iid(1): 2.5}
    for load in (-1.0, float("nan"), float("inf"), "much", True):
        loads: Any = {iid(1): load}
        with pytest.raises(InvalidInputError, match="load: must be a finite number from 0"):
            await registry.beat_many([iid(1)], loads)
    with pytest.raises(InvalidInputError, match="some of the instance ids"):
        await registry.beat_many([iid(1)], {iid(1): 1.0, iid(2): 1.0})


@asynccontextmanager
async def superseded(
    elapsed: Elapsed, database: SlowReads, tables: Tables
) -> AsyncIterator[tuple[DatabaseSession, MemoryStore]]:
    """A registry that another one has superseded: its session with the database, and the store of the other one."""

    async def store() -> MemoryStore:
        return database

    config = replace(CONFIG, epoch_check_s=0.01, term_idle_s=20.0)
    registry = Registry(config, store, clock=elapsed.clock(), watch_factory=NoWitness)
    session = registry.writer.database
    registry.start()
    try:
        await eventually(lambda: session.is_complete)
        rival = MemoryStore(elapsed.clock().utc, tables)
        await rival.begin(CONFIG.ray_cluster, None, 15.0)

        def is_fenced() -> bool:
            elapsed.now_s += 0.02
            return session.fenced_by is not None

        await eventually(is_fenced)
        yield session, rival
    finally:
        await registry.stop()


async def is_looked_for(database: SlowReads) -> None:
    """Wait until a superseded registry has looked some times more."""
    looks = database.looks
    await eventually(lambda: database.looks > looks + 3)


async def test_a_superseded_registry_leaves_the_holder_time_to_be_seen_after_an_outage(
    elapsed: Elapsed, database: SlowReads, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> TermSeen:
        raise StoreUnavailableError("away for the test")

    async with superseded(elapsed, database, tables) as (session, rival):
        await is_looked_for(database)
        # no registry was seen at work in it for a minute: it was away, for the holder too
        with monkeypatch.context() as outage:
            outage.setattr(database, "term_seen", away)
            await eventually(lambda: session.is_failing)
            elapsed.now_s += 60.0
        await eventually(lambda: not session.is_failing)
        await is_looked_for(database)
        assert session.fenced_by is not None
        await rival.renew_term(15.0)
        await is_looked_for(database)
        # one that is not seen while the database answers is gone
        elapsed.now_s += 21.0
        await eventually(lambda: session.fenced_by is None)
        with pytest.raises(FencedError):
            await rival.renew_term(15.0)


@pytest.mark.parametrize("jumped_s", [-3600.0, 3600.0])
async def test_a_holder_that_is_gone_gives_way_in_time_although_the_clock_of_the_database_jumps(
    elapsed: Elapsed, database: SlowReads, tables: Tables, jumped_s: float
) -> None:
    async with superseded(elapsed, database, tables) as (session, rival):
        await rival.renew_term(15.0)
        elapsed.jumped_s = jumped_s
        await is_looked_for(database)
        elapsed.now_s += 21.0
        await eventually(lambda: session.fenced_by is None, within_s=10.0)


@pytest.mark.parametrize("jumped_s", [-3600.0, 3600.0])
async def test_a_holder_at_work_keeps_the_term_although_the_clock_of_the_database_jumps(
    elapsed: Elapsed, database: SlowReads, tables: Tables, jumped_s: float
) -> None:
    async with superseded(elapsed, database, tables) as (session, rival):
        for _ in range(5):
            await rival.renew_term(15.0)
            await is_looked_for(database)
            elapsed.now_s += 10.0
        elapsed.jumped_s = jumped_s
        await is_looked_for(database)
        assert session.fenced_by is not None
        await rival.renew_term(15.0)


class Closed(MemoryStore):
    """Is read once it opens; `problem` is its error until then, None that it does not answer."""

    def __init__(self, now: Callable[[], datetime], tables: Tables, problem: str | None = None) -> None:
        super().__init__(now, tables)
        self.is_open = asyncio.Event()
        self.problem = problem

    async def open(self) -> None:
        if self.problem is not None and not self.is_open.is_set():
            raise StoreUnavailableError(self.problem)

    async def load_live(self) -> AsyncIterator[Instance]:
        await self.is_open.wait()
        async for row in super().load_live():
            yield row


@asynccontextmanager
async def restarted(
    elapsed: Elapsed, database: Closed, tables: Tables, durable_wait_s: float = 0.05
) -> AsyncIterator[Registry]:
    """A registry that starts on a database with instances."""
    before = MemoryStore(elapsed.clock().utc, tables)
    await before.begin("cluster", None, CONFIG.lease_s)
    await before.register_many([joins(number, f"agent-{number}") for number in range(3)])

    async def store() -> MemoryStore:
        return database

    config = replace(CONFIG, retry_max_s=0.01, durable_wait_s=durable_wait_s)
    registry = Registry(config, store, clock=elapsed.clock(), watch_factory=NoWitness)
    registry.start()
    yield registry
    await registry.stop()


async def test_instance_that_is_not_read_yet_is_not_unknown(elapsed: Elapsed, tables: Tables) -> None:
    database = Closed(elapsed.clock().utc, tables)
    async with restarted(elapsed, database, tables) as registry:
        ids = [iid(number) for number in range(3)]
        answer = await registry.beat_many([*ids, iid(9)])
        assert (answer.unknown, answer.dead, answer.is_recovering) == ((), (), True)
        # however long it takes to read it
        elapsed.now_s += 10 * CONFIG.lease_s
        assert (await registry.beat_many(ids)).unknown == ()
        for refused in (registry.set_status(ids[0], Status.ALIVE, 1), registry.drain(["agent-1"])):
            with pytest.raises(RegistryUnavailableError, match="has not read its database yet"):
                await refused


async def test_a_change_sent_shortly_before_the_database_is_read_is_answered_in_the_same_call(
    elapsed: Elapsed, tables: Tables
) -> None:
    database = Closed(elapsed.clock().utc, tables)
    async with restarted(elapsed, database, tables, durable_wait_s=20.0) as registry:
        ids = [iid(number) for number in range(3)]
        asked = asyncio.gather(registry.set_status(ids[0], Status.ALIVE, 1), registry.drain(["agent-1"]))
        await asyncio.sleep(0)
        database.is_open.set()
        receipt, turned = await asked
        assert (receipt.durable, [result.instance_id for result in turned]) == (True, [ids[1]])
        answer = await registry.beat_many([*ids, iid(9)])
        assert (answer.unknown, answer.is_recovering) == ((iid(9),), False)
        # no agent was asked to register again
        assert (await registry.health()).flush.changes_committed == 2


async def test_agents_register_again_once_the_database_has_been_away_for_a_lease(
    elapsed: Elapsed, tables: Tables
) -> None:
    database = Closed(elapsed.clock().utc, tables, "down for the test")
    async with restarted(elapsed, database, tables) as registry:

        async def is_failing() -> bool:
            return (await registry.health()).store_problem == "down for the test"

        await eventually(is_failing)
        assert (await registry.beat(iid(1))).is_recovering
        elapsed.now_s += CONFIG.lease_s + 1
        answer = await registry.beat(iid(1))
        assert (answer.unknown, answer.is_recovering) == ((iid(1),), False)
        with pytest.raises(UnknownInstanceError):
            await registry.set_status(iid(1), Status.ALIVE, 1)


async def test_superseded_registry_calls_no_instance_unknown(
    registry: Registry, tables: Tables, elapsed: Elapsed
) -> None:
    rival = MemoryStore(elapsed.clock().utc, tables)
    await rival.begin("cluster", None, CONFIG.lease_s)
    await rival.register_many([joins(2)])

    async def is_fenced() -> bool:
        elapsed.now_s += 1.0
        await registry.beat(iid(1))
        return (await registry.health()).fenced_by is not None

    await eventually(is_fenced)
    answer = await registry.beat_many([iid(1), iid(2)])
    assert (answer.unknown, answer.is_fenced, answer.is_recovering) == ((), True, True)


async def test_the_interval_follows_the_fleet(elapsed: Elapsed, database: SlowReads, tables: Tables) -> None:
    async def store() -> MemoryStore:
        return database

    config = replace(CONFIG, max_beats_per_s=4.0, epoch_check_s=0.01)
    registry = Registry(config, store, clock=elapsed.clock(), watch_factory=NoWitness)
    registry.start()
    try:
        for number in range(40):
            await registry.register(joins(number, f"agent-{number}").registration)

        async def interval_s() -> float:
            elapsed.now_s += 0.2
            return (await registry.beat(iid(0))).beat_interval_s

        async def is_longer() -> bool:
            return 10.0 <= await interval_s() <= 11.0

        await eventually(is_longer)
        answer = await registry.beat(iid(0))
        assert answer.lease_s == pytest.approx(3 * answer.beat_interval_s)
        health = await registry.health()
        assert (health.beat_interval_s, health.lease_s) == (answer.beat_interval_s, answer.lease_s)
        # so that the views use the same
        await eventually(lambda: tables.lease_s == answer.lease_s)
    finally:
        await registry.stop()


async def test_a_follower_lists_once_and_then_gets_every_change(registry: Registry) -> None:
    first = await registry.changes(FeedQuestion(EVERY))
    assert first.is_reset
    listing = await registry.list_active(None)
    assert (listing.stream, listing.version) == (first.stream, first.version)
    waiting = asyncio.create_task(registry.changes(FeedQuestion(EVERY, first.stream, first.version, 30.0)))
    await eventually(lambda: registry.members.feed.followers == 1)
    await registry.set_status(iid(1), Status.DRAINING, 3)
    batch: FeedBatch = await waiting
    assert [(change.instance_id, change.instance and change.instance.status) for change in batch.changes] == [
        (iid(1), Status.DRAINING)
    ]
    await registry.set_status(iid(1), Status.DEAD, 4)
    batch = await registry.changes(FeedQuestion(EVERY, batch.stream, batch.version))
    assert [change.instance for change in batch.changes] == [None]
    assert (await registry.health()).followers == 0


async def test_a_wait_for_changes_ends_with_none_at_its_bound(registry: Registry) -> None:
    at = await registry.changes(FeedQuestion(EVERY))
    batch = await registry.changes(FeedQuestion(LEFT, at.stream, at.version, 0.01))
    assert (batch.changes, batch.is_reset, batch.version) == ((), False, at.version)


async def test_followers_are_bounded_and_bad_questions_refused(registry: Registry) -> None:
    at = await registry.changes(FeedQuestion(EVERY))
    waiting = [
        asyncio.create_task(registry.changes(FeedQuestion(EVERY, at.stream, at.version, 30.0))) for _ in range(2)
    ]
    await eventually(lambda: registry.members.feed.followers == 2)
    with pytest.raises(FollowersFullError, match="2 followers"):
        await registry.changes(FeedQuestion(EVERY, at.stream, at.version, 1.0))
    assert not (await registry.changes(FeedQuestion(EVERY, at.stream, at.version))).is_reset
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert registry.members.feed.followers == 0
    for bad in ((at.stream, -1), (at.stream, 0, -1.0), (at.stream, 0, 31.0)):
        with pytest.raises(InvalidInputError):
            await registry.changes(FeedQuestion(EVERY, *bad))


async def test_after_a_freeze_longer_than_a_lease_every_instance_has_a_whole_lease_to_return(
    registry: Registry, elapsed: Elapsed
) -> None:
    others = [iid(number) for number in range(2, 13)]
    for number in range(2, 13):
        await registry.register(joins(number, f"agent-{number}").registration)
        await registry.set_status(iid(number), Status.ALIVE, 2)

    async def silence(seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            elapsed.now_s += 0.1
            await registry.resolve(["agent"])
        await registry.expiry.sweep(elapsed.now_s)

    await silence(12.0)
    assert (await registry.health()).is_frozen
    await silence(40.0)
    await registry.beat_many(others)
    await silence(0.5)
    assert not (await registry.health()).is_frozen
    # all but one have sent a beat: it has until the end of a new lease
    for _ in range(3):
        await silence(4.5)
        await registry.beat_many(others)
        assert (await registry.health()).instances == {"starting": 0, "alive": 12, "draining": 0}
    await silence(4.5)
    assert (await registry.health()).instances["alive"] == 11


async def test_late_instances_that_return_and_those_that_die_are_counted_apart(
    registry: Registry, elapsed: Elapsed
) -> None:
    await registry.register(joins(2, "other").registration)
    await registry.set_status(iid(2), Status.ALIVE, 2)

    async def silence(seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            elapsed.now_s += 0.1
            await registry.resolve(["agent"])
        await registry.expiry.sweep(elapsed.now_s)

    await silence(8.0)
    assert (await registry.health()).became_silent == 2
    await registry.beat_many([iid(2)])
    await silence(8.0)
    health = await registry.health()
    assert (health.became_silent, health.came_back, health.deaths_declared) == (3, 1, 1)
    assert health.deaths_reported == 0


async def test_a_correction_does_not_overwrite_what_happened_while_it_was_read(
    registry: Registry, database: SlowReads, tables: Tables
) -> None:
    # memory and database differ, so that the comparison reads the row
    tables.rows[iid(1)] = replace(tables.rows[iid(1)], seq=9)

    async def a_relay_reports_the_death() -> None:
        registry.expiry.declare_dead(iid(1), Death.PROCESS, Cause(CauseKind.PROCESS_EXITED))

    database.meanwhile = a_relay_reports_the_death
    before = registry.members.feed.version
    registry.writer.comparison.request()
    await eventually(lambda: tables.rows[iid(1)].status is Status.DEAD)
    seen = await registry.changes(FeedQuestion(InstanceFilter(statuses=None), registry.members.feed.stream, before))
    # no follower was told that it lives, either
    assert [change.instance for change in seen.changes] == [None]
    assert database.meanwhile is None
    assert (await registry.resolve(["agent"])).value[0].instance is None
    assert (await registry.health()).instances["alive"] == 0


async def test_a_correction_for_a_refused_change_undoes_no_later_one(
    registry: Registry, database: SlowReads, tables: Tables
) -> None:
    await registry.drain(["agent"], "a new disk")
    later: list[asyncio.Task[Receipt]] = []

    async def the_agent_reports() -> None:
        later.append(asyncio.create_task(registry.set_status(iid(1), Status.DRAINING, 3)))
        await eventually(lambda: known().seq == 3)

    def known() -> Instance:
        row = registry.members.get(iid(1))
        assert row is not None
        return row

    database.meanwhile = the_agent_reports
    [result] = await registry.drain(["agent"], UNSTORABLE)
    assert not result.durable
    # it is draining all the time: only what it reports has changed
    assert (await later[0]).durable
    assert (tables.rows[iid(1)].reported_status, tables.rows[iid(1)].seq) == (Status.DRAINING, 3)
    assert (known().reported_status, known().seq) == (Status.DRAINING, 3)


async def test_a_correction_for_a_refused_change_keeps_a_later_hold(
    registry: Registry, database: SlowReads, tables: Tables
) -> None:
    await registry.drain(["agent"], "a new disk")
    later: list[asyncio.Task[list[OperationResult]]] = []

    def reason_of(row: Instance | None) -> str | None:
        hold = None if row is None else row.hold(HoldKind.OPERATOR)
        return None if hold is None else hold.reason

    async def an_operator_gives_another_reason() -> None:
        later.append(asyncio.create_task(registry.drain(["agent"], "a new kernel")))
        await eventually(lambda: reason_of(registry.members.get(iid(1))) == "a new kernel")

    database.meanwhile = an_operator_gives_another_reason
    [result] = await registry.drain(["agent"], UNSTORABLE)
    assert not result.durable
    [result] = await later[0]
    assert result.durable
    assert reason_of(tables.rows[iid(1)]) == "a new kernel"
    assert reason_of(registry.members.get(iid(1))) == "a new kernel"


async def test_an_answer_from_before_a_flip_does_not_undo_it(
    registry: Registry, database: SlowReads, elapsed: Elapsed
) -> None:
    async def an_operator_flips() -> None:
        assert await registry.set_current_epoch("green") == "green"

    database.meanwhile = an_operator_flips
    elapsed.now_s += CONFIG.epoch_check_s
    await eventually(lambda: database.meanwhile is None)
    await registry.set_status((await _another(registry)), Status.ALIVE, 2)
    assert (await registry.health()).epoch == "green"


async def _another(registry: Registry) -> str:
    """Another instance registers; its commit means that the write loop has gone on."""
    await registry.register(joins(7, "another").registration)
    return iid(7)


async def test_one_that_beats_in_the_database_alone_lives_as_long_as_it_does(
    registry: Registry, elapsed: Elapsed, tables: Tables
) -> None:
    ours = [iid(1), *(iid(number) for number in range(10, 20))]
    for number in range(10, 20):
        await registry.register(joins(number, f"agent-{number}").registration)
    by_hand = MemoryStore(elapsed.clock().utc, tables)
    await by_hand.register_many([joins(2, "by-hand"), joins(3, "silent")])
    await by_hand.set_status_many([turns(2, Status.ALIVE), turns(3, Status.ALIVE)])
    registry.writer.comparison.request()

    async def are_adopted() -> bool:
        return (await registry.health()).instances["alive"] == 3

    await eventually(are_adopted)
    for _ in range(30):
        for _ in range(10):
            elapsed.now_s += 0.1
            await registry.resolve(["agent"])
        await registry.beat_many(ours)
        await by_hand.beat_many([Beat(iid(2))])
        await registry.expiry.sweep(elapsed.now_s)
        # one that misses no beat is resolved, wherever it beats
        assert (await registry.resolve(["by-hand"], allow_late=True)).value[0].instance is not None
    await eventually(lambda: tables.rows[iid(3)].status is Status.DEAD)
    assert tables.rows[iid(2)].status is Status.ALIVE
    assert (await registry.health()).instances["alive"] == 2


# Deaths


class ActorTable(NoWitness):
    """A death witness that knows what Ray's actor table has."""

    def __init__(self, on_death: OnDeath) -> None:
        super().__init__(on_death)
        self.gone: set[str] = set()

    async def ask_ray(self, instance: Instance, timeout_s: float) -> Witness:
        return Witness.GONE if instance.instance_id in self.gone else Witness.ALIVE


@asynccontextmanager
async def with_actor_table(elapsed: Elapsed, tables: Tables) -> AsyncIterator[tuple[Registry, ActorTable]]:
    """A registry with six instances that are alive, and its death witness."""
    made: list[ActorTable] = []

    def watch(on_death: OnDeath) -> ActorTable:
        made.append(ActorTable(on_death))
        return made[-1]

    async def store() -> MemoryStore:
        return MemoryStore(elapsed.clock().utc, tables)

    registry = Registry(CONFIG, store, clock=elapsed.clock(), watch_factory=watch)
    registry.start()
    await eventually(lambda: registry.writer.database.is_complete)
    for number in range(1, 7):
        await registry.register(joins(number, f"agent-{number}").registration)
        await registry.set_status(iid(number), Status.ALIVE, 2)
    yield registry, made[0]
    await registry.stop()


async def test_every_death_is_what_the_truth_table_returns_and_is_remembered_so(
    elapsed: Elapsed, tables: Tables
) -> None:
    async with with_actor_table(elapsed, tables) as (registry, witness):

        async def silence(seconds: float) -> None:
            for _ in range(round(seconds * 10)):
                elapsed.now_s += 0.1
                await registry.resolve(["agent-1"])
            await registry.expiry.sweep(elapsed.now_s)

        def death_of(number: int) -> Death | None:
            known = registry.members.deaths.get(iid(number))
            return None if known is None else known.death

        witness.on_death(iid(1), Witness.GONE, Witness.ALIVE, Cause(CauseKind.PROCESS_EXITED))
        witness.on_death(iid(2), Witness.UNKNOWN, Witness.GONE, Cause(CauseKind.NODE_DIED))
        assert (death_of(1), death_of(2)) == (Death.PROCESS, Death.NODE)
        # a caller's report is a hint: Ray decides
        assert await registry.report_dead_call(iid(3)) is Verdict.SUSPECT
        assert death_of(3) is None
        witness.gone.add(iid(3))
        assert await registry.report_dead_call(iid(3)) is Verdict.UNKNOWN
        assert death_of(3) is Death.ACTOR
        # one of three is silent: its lease ends, by the sweep and not before
        for _ in range(4):
            await silence(4.0)
            await registry.beat_many([iid(5), iid(6)])
        assert death_of(4) is Death.LEASE
        # all are silent: expiry is frozen, and only a death that Ray confirms is declared
        witness.gone.add(iid(6))
        await silence(14.0)
        await silence(4.0)
        assert (await registry.health()).is_frozen
        assert (death_of(5), death_of(6)) == (None, Death.ACTOR)
        # what an agent reports of itself is not the table's
        await registry.set_status(iid(5), Status.DEAD, 3, "stopped")
        assert registry.members.deaths.get(iid(5)) == RecentDeath(Cause(CauseKind.AGENT, "stopped"))
        health = await registry.health()
        assert (health.deaths_declared, health.deaths_reported) == (5, 2)
        await eventually(lambda: all(row.status is Status.DEAD for row in tables.rows.values()))


async def test_expired_leases_wait_for_the_sweep_and_are_suspect_until_then(elapsed: Elapsed, tables: Tables) -> None:
    async with with_actor_table(elapsed, tables) as (registry, _):
        others = [iid(number) for number in range(2, 7)]
        for _ in range(160):
            elapsed.now_s += 0.1
            # every one but the first beats
            await registry.beat_many(others)
            found = (await registry.resolve(["agent-1"], allow_late=True)).value[0]
        assert (found.instance, found.verdict) == (None, Verdict.SUSPECT)
        # a caller's report of it is no expiry
        assert await registry.report_dead_call(iid(1)) is Verdict.SUSPECT
        await registry.expiry.sweep(elapsed.now_s)
        assert iid(1) not in registry.members
