"""A registry lives through a loss of its database: what it answers meanwhile, and what it writes again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from seedcore.core.answers import BeatAnswer, InstanceFilter, KnownBefore, NotResolved, Outcome
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Change, HoldChange, RegisterChange, Registration, StatusChange
from seedcore.core.clock import utc_now
from seedcore.core.errors import InstanceDeadError, StoreUnavailableError
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.instances import Beat, Epoch, Instance, TermSeen
from seedcore.core.lifecycle import Status
from seedcore.core.ports import StoreDoubtError
from seedcore.core.shown_epoch import MAX_LOST_EPOCHS
from seedcore.core.verdict import Death
from seedcore.registry.protocol.durable_words import DurableWords
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START, iid
from tests.local import LocalRegistry
from tests.local import Snapshot as Earlier
from tests.unit.registries import Away, joined_registry
from tests.unit.test_lost_commits import CONFIG, Fails, called, enter, has_mended, story
from tests.waiting import eventually

EVERY = InstanceFilter(statuses=None)


@pytest.fixture
def tables() -> Tables:
    return Tables(START)


# The join


async def test_the_epoch_of_the_configuration_counts_at_the_first_join_alone(tables: Tables) -> None:
    async with joined_registry(replace(CONFIG, epoch="blue"), tables) as registry:
        await enter(registry, 1)
        await registry.set_current_epoch("green")
        earlier = Earlier(tables)
        await enter(registry, 2, epoch="green")
        earlier.restore()
        await eventually(partial(has_mended, registry))
        assert tables.current_epoch == "green"
        assert iid(2) in tables.rows


async def test_a_registry_that_is_restarted_after_a_flip_keeps_the_current_epoch(tables: Tables) -> None:
    async with joined_registry(replace(CONFIG, epoch="blue"), tables) as registry:
        await registry.set_current_epoch("green")
    async with joined_registry(replace(CONFIG, epoch="blue"), tables) as registry:
        assert (await registry.current_epoch()).value.name == "green"


# Epochs


async def test_a_flip_to_an_epoch_that_was_staged_earlier_than_the_current_one_is_shown(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        await registry.stage_epoch("blue")
        await registry.set_current_epoch("green")
        await enter(registry, 1, epoch="blue")
        await registry.set_current_epoch("blue")
        assert (await registry.resolve(["agent-1"])).value[0].instance is not None


async def test_a_flip_that_is_made_again_keeps_its_number(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        earlier = Earlier(tables)
        # by SQL: the journal does not have them
        for name in ("one", "two"):
            tables.stage(name, START)
        await registry.set_current_epoch("green")
        number = tables.epochs["green"].number
        earlier.restore()
        await eventually(partial(has_mended, registry))
        assert tables.epochs["green"].number == number
        assert (await registry.current_epoch()).value == Epoch("green", number)


@pytest.mark.parametrize("capacity", [0, 100])
async def test_numbers_of_epochs_do_not_sink_where_earlier_flips_are_lost(
    tables: Tables, connected: object, capacity: int
) -> None:
    earlier = Earlier(tables)
    async with joined_registry(CONFIG, tables) as first:
        for name in ("e2", "e3", "e4", "e5"):
            await first.set_current_epoch(name)
    config = replace(CONFIG, journal_capacity=capacity)
    async with joined_registry(config, tables) as second, called(second) as (connection, replace_by):
        await connection.register(Registration(iid(1), "agent-1", cluster_epoch="e6"), 1)
        await connection.set_status(iid(1), "alive", 2)
        assert (await connection.beat(iid(1))).epoch == Epoch("e5", 5)
        earlier.restore()
        await eventually(partial(has_mended, second))
        await connection.set_current_epoch("e6")
        assert tables.epochs["e6"].number > 5
        await connection.beat(iid(1))
        async with joined_registry(CONFIG, tables) as third:
            replace_by(third)
            for _ in range(3):
                await connection.beat(iid(1))
            assert (await third.resolve(["agent-1"])).value[0].instance is not None


def test_a_client_takes_the_epoch_of_a_registry_that_knows_its_own() -> None:
    words = DurableWords()
    words.note_answer(None, BeatAnswer(registry="one", epoch=Epoch("green", 7)))
    words.note_answer(None, BeatAnswer(registry="two", epoch=Epoch("green", 3)))
    sent = words.known_before([])
    assert sent == KnownBefore({}, Epoch("green", 7))
    # it has not confirmed it while an operator must
    words.note_answer(sent, BeatAnswer(registry="two", epoch=None))
    assert words.known_before([]) == sent
    words.note_answer(sent, BeatAnswer(registry="two", epoch=Epoch("green", 3)))
    words.note_answer(None, BeatAnswer(registry="two", epoch=Epoch("red", 4)))
    words.note_answer(None, BeatAnswer(registry="three", epoch=Epoch("red", 4)))
    assert words.known_before([]) == KnownBefore({}, Epoch("red", 4))


async def test_a_flip_gets_a_higher_number_than_every_one_that_agents_know(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        await enter(registry, 1)
        # of the same name: a lost flip was made again in SQL
        await registry.beat_many([iid(1)], None, KnownBefore({}, Epoch("epoch-1", 7)))
        assert (await registry.health()).is_ready
        await registry.set_current_epoch("green")
        assert tables.epochs["green"].number == 8
        await registry.beat_many([iid(1)], None, KnownBefore({}, Epoch("epoch-1", 7)))
        assert (await registry.health()).is_ready


async def test_a_flip_is_lost_too_where_another_epoch_has_its_number(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        await enter(registry, 1)
        await registry.set_current_epoch("green")
        lost = KnownBefore({}, Epoch("blue", tables.epochs["green"].number))
        await registry.beat_many([iid(1)], None, lost)
        assert not (await registry.health()).is_ready
        version = registry.members.feed.version
        await registry.beat_many([iid(1)], None, lost)
        assert registry.members.feed.version == version
        await registry.set_current_epoch("green")
        assert (await registry.health()).is_ready
        await registry.beat_many([iid(1)], None, lost)
        assert (await registry.health()).is_ready


async def test_an_incredible_number_of_an_epoch_is_not_believed(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        await enter(registry, 1)
        for number in (2**63 - 1, 2**62, MAX_LOST_EPOCHS + 2):
            await registry.beat_many([iid(1)], None, KnownBefore({}, Epoch("green", number)))
            assert (await registry.health()).is_ready
        await registry.set_current_epoch("blue")
        assert tables.epochs["blue"].number == 2


async def test_an_epoch_that_was_flipped_away_in_the_database_meanwhile_stays_so(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        await enter(registry, 1)
        earlier = Earlier(tables)
        await registry.set_status(iid(1), "draining", 3)
        earlier.restore()
        tables.flip("green", START)
        await eventually(partial(has_mended, registry))
        assert (await registry.current_epoch()).value.name == "green"
        loss = (await registry.health()).last_loss
        assert loss is not None
        assert loss.refused == 0


async def test_a_cluster_gets_its_epoch_again_where_the_database_is_from_before_it(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables):
        earlier = Earlier(tables)
        tables.stage("staged", START)
    async with joined_registry(replace(CONFIG, ray_cluster="next"), tables) as registry:
        epoch = tables.current_epoch
        await enter(registry, 1)
        earlier.restore()
        await eventually(partial(has_mended, registry))
        assert (tables.current_epoch, tables.rows[iid(1)].cluster_epoch) == (epoch, epoch)
        assert tables.continuing("epoch-1") == epoch


# What it answers meanwhile


async def test_answers_are_complete_while_the_database_lacks_what_it_had(tables: Tables) -> None:
    store = Fails(lambda: START, tables)
    async with joined_registry(CONFIG, tables, store=store) as registry:
        await enter(registry, 1)
        earlier = Earlier(tables)
        await registry.deregister(["agent-1"])
        await enter(registry, 2)
        store.fails_after = 1
        earlier.restore()

        async def cannot_write() -> bool:
            return not (await registry.health()).is_ready

        await eventually(cannot_write)
        listed = await registry.list_active()
        assert (listed.complete, [row.instance_id for row in listed]) == (True, [iid(2)])
        assert (await registry.changes(FeedQuestion(EVERY))).complete
        assert (await registry.beat_many([iid(9)])).unknown == (iid(9),)
        # what only the database has is not read from one that lacks commits, and nothing counts as durable
        with pytest.raises(StoreUnavailableError):
            await registry.transitions("agent-1")
        assert not (await registry.set_status(iid(2), "alive", 2)).durable
        store.fails_after = None
        await eventually(partial(has_mended, registry))
        assert (await registry.set_status(iid(2), "alive", 2)).durable
        assert len(await registry.transitions("agent-1")) == 3


# Instances that were registered by SQL


async def by_sql(tables: Tables, number: int, status: Status = Status.ALIVE) -> str:
    """An instance that registers and reports by the SQL functions."""
    agent = MemoryStore(lambda: START, tables)
    await agent.register_many([RegisterChange(Registration(iid(number), f"agent-{number}"), 0)])
    await agent.set_status_many([StatusChange(iid(number), status)])
    return iid(number)


async def test_an_instance_that_only_the_database_has_gets_the_time_to_beat(tables: Tables) -> None:
    async with joined_registry(replace(CONFIG, compare_s=3600.0), tables) as registry:
        await enter(registry, 1)
        earlier = Earlier(tables)
        await enter(registry, 2)
        earlier.restore()
        await by_sql(tables, 3)
        await eventually(partial(has_mended, registry))
        answer = (await registry.resolve(["agent-3"])).value[0]
        assert answer.reason is NotResolved.LATE
        now_s = registry.expiry.attentive_now_s()
        await registry.expiry.sweep(now_s)
        row = tables.rows[iid(3)]
        tables.put(replace(row, last_heartbeat=row.last_heartbeat + timedelta(seconds=5)))
        await registry.expiry.sweep(now_s + 5)
        assert (await registry.resolve(["agent-3"])).value[0].instance is not None


@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_drain_by_sql_after_the_loss_stays_where_the_journal_is_whole(tables: Tables, is_whole: bool) -> None:
    config = replace(CONFIG, journal_capacity=100 if is_whole else 1)
    async with joined_registry(config, tables) as registry:
        await enter(registry, 1)
        await registry.drain(["agent-1"])
        earlier = Earlier(tables)
        await registry.undrain(["agent-1"])
        await enter(registry, 2)
        await enter(registry, 3)
        earlier.restore()
        hold = Hold(HoldKind.NODE, "by hand", "ann", START)
        await MemoryStore(lambda: START, tables).hold_many([HoldChange(iid(1), HoldKind.NODE, hold, 1)])
        await eventually(partial(has_mended, registry))
        # the release that was lost is made again in any case
        assert tables.rows[iid(1)].hold(HoldKind.OPERATOR) is None
        assert (tables.rows[iid(1)].hold(HoldKind.NODE) is not None) is is_whole
        await eventually(lambda: registry.members.index.by_id[iid(1)].holds == tables.rows[iid(1)].holds)


async def test_an_instance_that_reports_in_sql_is_restored_with_its_status(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        earlier = Earlier(tables)
        await enter(registry, 1)
        await by_sql(tables, 2)
        await eventually(lambda: iid(2) in registry.members)
        earlier.restore()
        await eventually(partial(has_mended, registry))
        assert (tables.rows[iid(2)].status, tables.rows[iid(2)].seq) == (Status.ALIVE, 0)
        assert registry.members.index.by_id[iid(2)].status is Status.ALIVE


async def test_details_are_restored_where_the_journal_does_not_reach_back(tables: Tables) -> None:
    async with joined_registry(replace(CONFIG, journal_capacity=0), tables) as registry:
        await enter(registry, 1)
        earlier = Earlier(tables)
        again = Registration(iid(1), "agent-1", labels={"n": "new"}, metadata={"k": "v"})
        assert (await registry.register(again, 3)).durable
        earlier.restore()
        await eventually(partial(has_mended, registry))
        row = tables.rows[iid(1)]
        assert (row.labels, row.metadata, row.seq, row.status) == ({"n": "new"}, {"k": "v"}, 3, Status.ALIVE)


async def test_what_memory_restores_is_not_counted_as_refused(tables: Tables) -> None:
    async with joined_registry(replace(CONFIG, journal_capacity=1), tables) as registry:
        earlier = Earlier(tables)
        # the journal has the status, and its registration made room
        await enter(registry, 1)
        earlier.restore()
        await eventually(partial(has_mended, registry))
        loss = (await registry.health()).last_loss
        assert loss is not None
        assert (loss.written_again, loss.refused) == (2, 0)


async def test_a_sweep_of_retired_epochs_that_ends_nothing_is_no_commit(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        await enter(registry, 1)
        earlier, commits = Earlier(tables), tables.commits
        await registry.writer.database.writable.expire_old_epochs(10)
        assert tables.commits == commits
        earlier.restore()
        await enter(registry, 2)
        assert (await registry.health()).losses == 0


# What the database refuses


class Doubts(MemoryStore):
    """A rule of the database's owner refuses every row, or those of one instance."""

    doubts: str | None = None
    refusals = 0

    def _require(self, changes: Sequence[Change]) -> None:
        if self.doubts is not None and any(self.doubts in change.instance_id for change in changes):
            self.refusals += 1
            raise StoreDoubtError("a trigger")

    async def register_many(self, changes: Sequence[RegisterChange]) -> list[Outcome]:
        self._require(changes)
        return await super().register_many(changes)

    async def set_status_many(self, changes: Sequence[StatusChange]) -> list[Outcome]:
        self._require(changes)
        return await super().set_status_many(changes)

    async def hold_many(self, changes: Sequence[HoldChange]) -> list[Outcome]:
        self._require(changes)
        return await super().hold_many(changes)


async def test_a_database_that_refuses_every_row_for_a_moment_gets_them_all_later(tables: Tables) -> None:
    store = Doubts(lambda: START, tables)
    async with joined_registry(replace(CONFIG, retry_max_s=0.05), tables, store=store) as registry:
        await enter(registry, 1)
        earlier = Earlier(tables)
        await enter(registry, 2)
        await registry.drain(["agent-1"])
        before = story(tables)
        store.doubts = ""
        earlier.restore()
        await eventually(lambda: store.refusals > 2)
        assert (await registry.health()).losses == 0
        store.doubts = None
        await eventually(partial(has_mended, registry))
        assert story(tables) == before
        loss = (await registry.health()).last_loss
        assert loss is not None
        assert (loss.refused, loss.has_whole_history) == (0, True)


@pytest.mark.parametrize("capacity", [0, 100])
async def test_a_row_that_is_refused_among_others_keeps_none_of_them_back(tables: Tables, capacity: int) -> None:
    store = Doubts(lambda: START, tables)
    config = replace(CONFIG, journal_capacity=capacity, retry_max_s=0.05)
    async with joined_registry(config, tables, store=store) as registry:
        earlier = Earlier(tables)
        await enter(registry, 2)
        await enter(registry, 1)
        store.doubts = iid(1)
        earlier.restore()
        await eventually(partial(has_mended, registry))
        assert tables.rows.keys() == {iid(2)}


class Waits(Fails):
    """Renewals are counted; a status change waits for `may_go_on` once it is set."""

    may_go_on: asyncio.Event | None = None
    renewals = 0

    async def renew_term(self, lease_s: float) -> None:
        await super().renew_term(lease_s)
        self.renewals += 1

    async def set_status_many(self, changes: Sequence[StatusChange]) -> list[Outcome]:
        if self.may_go_on is not None:
            await asyncio.sleep(0.02)
            await self.may_go_on.wait()
        return await super().set_status_many(changes)


async def test_a_long_restoration_renews_the_term_and_shows_how_far_it_is(tables: Tables) -> None:
    store = Waits(lambda: START, tables)
    async with joined_registry(CONFIG, tables, store=store) as registry:
        earlier = Earlier(tables)
        await enter(registry, 1)
        await enter(registry, 2)
        store.may_go_on = asyncio.Event()
        earlier.restore()

        async def is_writing() -> bool:
            return (await registry.health()).store_problem == (
                "writing again what the database has lost: 1 of 4 changes"
            )

        await eventually(is_writing, every_s=0.0)
        renewals = store.renewals
        store.may_go_on.set()
        await eventually(lambda: tables.rows.keys() == {iid(1), iid(2)}, every_s=0.0)
        assert store.renewals > renewals
        store.may_go_on = None
        await eventually(partial(has_mended, registry))


# Where another registry has written


async def is_superseded(registry: LocalRegistry) -> bool:
    return (await registry.health()).fenced_by is not None


async def is_alive(registry: LocalRegistry, number: int) -> bool:
    answer = await registry.resolve([f"agent-{number}"])
    return answer.complete and answer.value[0].instance is not None


class BesideAnother(MemoryStore):
    """Another registry is at work in its tables, until it `is_alone`."""

    is_alone = False

    async def term_seen(self) -> TermSeen:
        if not self.is_alone:
            self.tables.term_seen_at += timedelta(seconds=1)
        return await super().term_seen()


async def test_a_registry_that_takes_over_a_database_from_before_its_own_commits_writes_them_again(
    tables: Tables, connected: object
) -> None:
    config = replace(CONFIG, term_idle_s=0.05)
    rival = MemoryStore(lambda: START, tables)
    store = BesideAnother(lambda: START + timedelta(seconds=1), tables)
    async with joined_registry(config, tables, store=store) as registry, called(registry) as (connection, _):
        await connection.register(Registration(iid(1), "agent-1"), 1)
        await connection.beat(iid(1))
        earlier = Earlier(tables)
        await connection.set_status(iid(1), "alive", 2)
        await rival.begin(CONFIG.ray_cluster, None, 15.0)
        await eventually(partial(is_superseded, registry))
        stream = registry.members.feed.stream
        earlier.restore()
        store.is_alone = True
        await eventually(partial(is_alive, registry, 1))
        health = await registry.health()
        assert health.last_loss is not None
        assert (health.losses, health.last_loss.written_again, health.last_loss.has_whole_history) == (1, 1, False)
        # its agents repeat what the other one had
        assert registry.members.feed.stream != stream
        assert health.is_ready


async def test_a_takeover_that_the_database_has_lost_is_reported(tables: Tables) -> None:
    config = replace(CONFIG, term_idle_s=0.05)
    rival = MemoryStore(lambda: START, tables)
    store = BesideAnother(lambda: START + timedelta(seconds=1), tables)
    async with joined_registry(config, tables, store=store) as registry:
        await enter(registry, 1)
        earlier = Earlier(tables)
        await rival.begin(CONFIG.ray_cluster, None, 15.0)
        await eventually(partial(is_superseded, registry))
        earlier.restore()
        store.is_alone = True
        await eventually(partial(is_alive, registry, 1))
        assert (await registry.health()).losses == 1


async def test_a_takeover_that_the_database_has_is_no_loss_and_the_journal_is_of_before(tables: Tables) -> None:
    config = replace(CONFIG, term_idle_s=0.05)
    rival = MemoryStore(lambda: START, tables)
    store = BesideAnother(lambda: START + timedelta(seconds=1), tables)
    async with joined_registry(config, tables, store=store) as registry:
        await enter(registry, 1)
        await rival.begin(CONFIG.ray_cluster, None, 15.0)
        await eventually(partial(is_superseded, registry))
        store.is_alone = True
        await eventually(partial(is_alive, registry, 1))
        assert (await registry.health()).losses == 0
        assert len(registry.writer.journal) == 0


async def test_a_death_of_before_a_takeover_is_declared_again_where_it_is_lost_later(tables: Tables) -> None:
    config = replace(CONFIG, term_idle_s=0.05)
    rival = MemoryStore(lambda: START, tables)
    store = BesideAnother(lambda: START + timedelta(seconds=1), tables)
    async with joined_registry(config, tables, store=store) as registry:
        await enter(registry, 1)
        earlier = Earlier(tables)
        await registry.deregister(["agent-1"], "it is gone", "ann")
        await rival.begin(CONFIG.ray_cluster, None, 15.0)
        await eventually(partial(is_superseded, registry))
        store.is_alone = True
        await eventually(partial(has_taken_back, registry))
        await enter(registry, 2)
        version = registry.members.feed.version
        earlier.restore()
        await eventually(partial(has_mended, registry))
        assert (tables.rows[iid(1)].status, tables.rows[iid(2)].status) == (Status.DEAD, Status.ALIVE)
        assert tables.rows[iid(1)].cause == Cause(CauseKind.OPERATOR, "it is gone", "ann")
        # it was in no list and in no change of the feed meanwhile
        assert registry.members.feed.version == version


async def test_a_registry_in_force_joins_a_database_from_before_it_took_it_back(tables: Tables) -> None:
    other = MemoryStore(lambda: START, tables)
    store = MemoryStore(lambda: START, tables)
    await store.begin(CONFIG.ray_cluster, None, 15.0)
    await other.begin("other", None, 15.0)
    earlier = Earlier(tables)
    await store.begin(CONFIG.ray_cluster, None, 15.0, await store.term_seen())
    async with joined_registry(CONFIG, tables, store=store) as registry:
        await enter(registry, 1)
        await registry.drain(["agent-1"])
        await registry.set_current_epoch("green")
        earlier.restore()
        await eventually(partial(has_mended, registry))
        assert (await registry.health()).fences == 0
        assert tables.current_epoch == "green"
        assert iid(1) in tables.rows


async def test_memory_wins_over_another_database_with_more_commits(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        await enter(registry, 1)
        await registry.drain(["agent-1"])
        await enter(registry, 2)
        vars(tables).update(vars(Tables(START)))
        tables.commits = 5000
        await eventually(partial(has_mended, registry))
        assert tables.rows[iid(1)].hold(HoldKind.OPERATOR) is not None
        assert tables.rows[iid(2)].status is Status.ALIVE
        assert tables.commits > 5000


@asynccontextmanager
async def taken_over_after_a_loss(
    tables: Tables,
    acknowledged: Callable[[LocalRegistry], Awaitable[object]],
    kind: type[BesideAnother] = BesideAnother,
) -> AsyncIterator[tuple[LocalRegistry, MemoryStore]]:
    """A registry whose last work is lost, and the store of another one that began before it noticed that. When the
    block ends the first one takes the database back."""
    store, rival = kind(utc_now, tables), MemoryStore(utc_now, tables)
    async with joined_registry(replace(CONFIG, term_idle_s=0.05), tables, store=store) as registry:
        for number in (1, 2):
            await enter(registry, number)
        earlier = Earlier(tables)
        await acknowledged(registry)
        for number in range(20):
            await registry.stage_epoch(f"stage-{number}")
        earlier.restore()
        await rival.begin(CONFIG.ray_cluster, None, 15.0)
        await eventually(partial(is_superseded, registry))
        yield registry, rival
        store.is_alone = True
        await eventually(partial(has_taken_back, registry))


async def has_taken_back(registry: LocalRegistry) -> bool:
    health = await registry.health()
    return health.is_ready and health.fenced_by is None


async def test_a_later_release_by_another_registry_is_not_undone(tables: Tables) -> None:
    async def drain(registry: LocalRegistry) -> None:
        await registry.drain(["agent-1", "agent-2"], "a new kernel", "ann")

    async with taken_over_after_a_loss(tables, drain) as (_, rival):
        hold = Hold(HoldKind.OPERATOR, "the other kernel", "bob", utc_now())
        await rival.hold_many([HoldChange(iid(1), hold.kind, hold, 1)])
        await rival.hold_many([HoldChange(iid(1), hold.kind, None, 2)])
    assert tables.rows[iid(1)].holds == ()
    # nothing followed the other one, which is written again
    (again,) = tables.rows[iid(2)].holds
    assert again.by == "ann"


async def test_a_later_flip_by_another_registry_is_not_undone(tables: Tables) -> None:
    async with taken_over_after_a_loss(tables, lambda registry: registry.set_current_epoch("blue")) as (_, rival):
        await rival.set_current_epoch("green")
    assert tables.current_epoch == "green"
    assert tables.epochs["green"].retired_at is None


async def test_a_registry_that_knows_a_lost_flip_shows_no_epoch_of_before_it_until_one_is_confirmed(
    tables: Tables,
) -> None:
    async with joined_registry(CONFIG, tables) as first:
        await enter(first, 1)
        before = (await first.current_epoch()).value
        earlier = Earlier(tables)
        flip = Epoch(await first.set_current_epoch("green"), before.number + 1)
    store, rival = BesideAnother(utc_now, tables), MemoryStore(utc_now, tables)
    # it has read the flip, and its journal does not have it
    async with joined_registry(replace(CONFIG, term_idle_s=0.05), tables, store=store) as registry:
        assert (await registry.current_epoch()).value == flip
        await rival.begin(CONFIG.ray_cluster, None, 15.0)
        await eventually(partial(is_superseded, registry))
        earlier.restore()
        store.is_alone = True
        await eventually(partial(writes_again, registry))
        # no agent has sent a beat
        (found,) = (await registry.resolve(["agent-1"])).value
        assert (found.instance, found.reason) == (None, NotResolved.EPOCH_UNCONFIRMED)
        await registry.set_current_epoch(before.name)
        assert await is_alive(registry, 1)
        assert (await registry.current_epoch()).value.number > flip.number


async def writes_again(registry: LocalRegistry) -> bool:
    return registry.writer.database.is_joined


async def test_a_death_of_before_is_not_declared_again_where_the_instance_has_beaten_since(tables: Tables) -> None:
    async with taken_over_after_a_loss(tables, lambda registry: registry.deregister(["agent-1"])) as (_, rival):
        assert await rival.beat_many([Beat(iid(1))]) == []
    assert tables.rows[iid(1)].status is Status.ALIVE


class CannotReadAtFirst(BesideAnother):
    """A database that does not answer the first question for an instance."""

    is_asked = False

    async def read_instance(self, instance_id: str) -> Instance | None:
        if not self.is_asked:
            self.is_asked = True
            raise StoreUnavailableError("it is away again")
        return await super().read_instance(instance_id)


async def test_nothing_is_lost_where_the_database_is_away_again_while_it_is_taken_back(tables: Tables) -> None:
    async with taken_over_after_a_loss(
        tables, lambda registry: registry.drain(["agent-1"], "a new kernel", "ann"), CannotReadAtFirst
    ):
        pass
    (again,) = tables.rows[iid(1)].holds
    assert again.by == "ann"


async def test_a_restoration_that_is_interrupted_takes_no_term_from_a_newer_registry(tables: Tables) -> None:
    store, rival = Fails(utc_now, tables), MemoryStore(utc_now, tables)
    # the journal does not reach back: memory would win
    async with joined_registry(replace(CONFIG, journal_capacity=1), tables, store=store) as registry:
        await enter(registry, 1)
        earlier = Earlier(tables)
        await enter(registry, 2)
        store.fails_after = 0
        earlier.restore()

        async def cannot_write() -> bool:
            return (await registry.health()).flush.failures > 0

        await eventually(cannot_write)
        await rival.begin(CONFIG.ray_cluster, None, 15.0)
        hold = Hold(HoldKind.OPERATOR, "a new kernel", "ann", utc_now())
        await rival.hold_many([HoldChange(iid(1), hold.kind, hold, 1)])
        store.fails_after = None
        await eventually(partial(is_superseded, registry))
        health = await registry.health()
        # what it cannot write again is reported
        assert (health.fences, health.losses) == (1, 1)
        assert tables.term == rival.term
        assert tables.rows[iid(1)].hold(HoldKind.OPERATOR) == hold
        await rival.register_many([RegisterChange(Registration(iid(3), "agent-3"), 1)])


class IsReplacedWhileItLoads(MemoryStore):
    """A database that is away at the first read of a registry, while a newer one begins."""

    rival: MemoryStore | None = None

    async def load_live(self) -> AsyncIterator[Instance]:
        if self.rival is None:
            self.rival = MemoryStore(utc_now, self.tables)
            await self.rival.begin(CONFIG.ray_cluster, None, 15.0)
            raise StoreUnavailableError("it is away")
        async for row in super().load_live():
            yield row


async def test_a_start_that_is_interrupted_takes_no_term_from_a_newer_registry(tables: Tables) -> None:
    store = IsReplacedWhileItLoads(utc_now, tables)
    async with joined_registry(replace(CONFIG, term_idle_s=0.1), tables, store=store) as registry:
        assert store.rival is not None
        # only once the newer one was not seen at work any more
        assert (await registry.health()).fences == 1
        assert (store.term or 0) > (store.rival.term or 0)
        await enter(registry, 1)


class LosesWhileItLoads(MemoryStore):
    """A database that goes back between the begin of a registry and its first read."""

    earlier: Earlier | None = None

    async def begin(self, *args: Any, **kwargs: Any) -> Epoch:
        epoch = await super().begin(*args, **kwargs)
        if self.earlier is not None:
            self.earlier.restore()
            self.earlier = None
        return epoch


async def test_a_loss_while_a_registry_starts_does_not_make_its_agents_late(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as first:
        await enter(first, 1)
        earlier = Earlier(tables)
        await enter(first, 2)
    store = LosesWhileItLoads(lambda: START, tables)
    store.earlier = earlier
    async with joined_registry(CONFIG, tables, store=store) as second:
        assert await is_alive(second, 1)
        health = await second.health()
        assert health.last_loss is not None
        assert (health.losses, health.last_loss.written_again, health.last_loss.has_whole_history) == (1, 0, False)


class LosesWhileMemoryIsCorrected(MemoryStore):
    """A database that goes back after the first read of an instance that is dead."""

    earlier: Earlier | None = None

    async def read_instance(self, instance_id: str) -> Instance | None:
        row = await super().read_instance(instance_id)
        if self.earlier is not None:
            assert row is not None
            assert row.status is Status.DEAD
            self.earlier.restore()
            self.earlier = None
        return row


async def test_a_registration_that_was_refused_as_dead_is_not_committed_where_that_death_is_lost(
    tables: Tables,
) -> None:
    store = LosesWhileMemoryIsCorrected(lambda: START, tables)
    async with joined_registry(replace(CONFIG, compare_s=3600.0), tables, store=store) as registry:
        earlier = Earlier(tables)
        for number in (1, 2):
            # dead in the database alone
            await by_sql(tables, number, Status.DEAD)
        await enter(registry, 3)
        store.earlier = earlier
        agents = [Registration(iid(number), f"agent-{number}") for number in (1, 2)]
        first, second = await asyncio.gather(*(registry.register(agent, 1) for agent in agents), return_exceptions=True)
        await eventually(partial(has_mended, registry))
        # memory has the death of the first one, and no side that of the second
        assert isinstance(first, InstanceDeadError)
        assert iid(1) not in tables.rows
        assert not isinstance(second, BaseException)
        assert second.durable
        assert registry.writer.backlog.pending_changes == 0
        assert (await registry.health()).healed == 0


async def test_a_registration_whose_instance_has_died_since_is_committed_before_its_death(tables: Tables) -> None:
    store = Away(lambda: START, tables)
    async with joined_registry(replace(CONFIG, durable_wait_s=0.01), tables, store=store) as registry:
        store.is_there = False
        assert not (await registry.register(Registration(iid(1), "agent-1"), 1)).durable
        cause = Cause(CauseKind.PROCESS_EXITED, "exit code 1")
        registry.expiry.declare_dead(iid(1), Death.PROCESS, cause)
        store.is_there = True
        await eventually(lambda: registry.writer.backlog.pending_changes == 0)
        assert [step.to_status for step in tables.transitions] == [Status.STARTING, Status.DEAD]
        assert tables.rows[iid(1)].cause == cause
