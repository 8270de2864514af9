"""A database that has lost commits gets them again: from the memory of the registry, or from its agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from seedcore.core.answers import BeatAnswer, InstanceFilter, KnownBefore, NotResolved
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import HoldChange, Registration, StatusChange
from seedcore.core.errors import InvalidInputError, StoreUnavailableError
from seedcore.core.holds import HoldKind
from seedcore.core.instances import Epoch, LiveState, Transition
from seedcore.core.lifecycle import Status
from seedcore.registry.protocol.connection import REGISTRY_NAME, RegistryConnection
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START, hold, iid, joins
from tests.local import UNSTORABLE, LocalRegistry, RefusesWords
from tests.local import Snapshot as Earlier
from tests.unit.registries import joined_registry
from tests.unit.test_relay_client import Actor
from tests.waiting import eventually

CONFIG = RegistryConfig("cluster", flush_interval_s=0.01, linger_s=0.0, epoch_check_s=0.01, compare_s=0.01)
EVERY = InstanceFilter(statuses=None)


@pytest.fixture
def tables() -> Tables:
    return Tables(START)


async def enter(registry: LocalRegistry, number: int, *, epoch: str | None = None) -> str:
    """An agent registers and is alive, durably."""
    registration = Registration(iid(number), f"agent-{number}", cluster_epoch=epoch, labels={"n": str(number)})
    assert (await registry.register(registration, 1)).durable
    assert (await registry.set_status(iid(number), "alive", 2)).durable
    return iid(number)


async def has_mended(registry: LocalRegistry, times: int = 1) -> bool:
    health = await registry.health()
    return health.is_ready and health.losses == times


def story(tables: Tables) -> list[Transition]:
    """The history without its times."""
    return [replace(one, at=START) for one in tables.transitions]


async def test_everything_that_was_acknowledged_is_written_again_in_order(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        for number in (1, 2, 3):
            await enter(registry, number)
        earlier = Earlier(tables)
        await enter(registry, 4)
        await registry.set_status(iid(2), "draining", 3, "enough")
        await registry.set_status(iid(2), "alive", 4)
        await registry.drain(["agent-1"], "a new kernel", "ann", 3600.0)
        await registry.deregister(["agent-3"], "it is gone", "bob")
        await registry.stage_epoch("green")
        before, rows = story(tables), dict(tables.rows)
        lost = tables.commits
        earlier.restore()
        assert tables.commits < lost
        await eventually(partial(has_mended, registry))
        assert story(tables) == before
        assert tables.rows.keys() == rows.keys()
        for instance_id, row in rows.items():
            again = tables.rows[instance_id]
            assert (again.status, again.reported_status, again.holds, again.cause, again.seq, again.labels) == (
                *(row.status, row.reported_status, row.holds, row.cause, row.seq, row.labels),
            )
        assert tables.rows[iid(3)].cause == Cause(CauseKind.OPERATOR, "it is gone", "bob")
        assert "green" in tables.epochs
        assert tables.commits > lost
        loss = (await registry.health()).last_loss
        assert loss is not None
        assert (loss.written_again, loss.refused, loss.has_whole_history) == (7, 0, True)
        # nothing differs: the comparison has nothing to heal
        assert (await registry.health()).healed == 0


async def test_the_holds_and_deaths_of_memory_win_over_an_older_database_all_the_time(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        await enter(registry, 1)
        await enter(registry, 2)
        earlier = Earlier(tables)
        await registry.drain(["agent-1"])
        await registry.deregister(["agent-2"])
        earlier.restore()
        for _ in range(200):
            answer = await registry.resolve(["agent-1", "agent-2"])
            assert answer.complete
            assert [one.instance for one in answer.value] == [None, None]
            await asyncio.sleep(0)
        await eventually(partial(has_mended, registry))
        assert tables.rows[iid(1)].hold(HoldKind.OPERATOR) is not None
        assert tables.rows[iid(2)].status is Status.DEAD


async def test_a_lost_flip_is_made_again(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        await enter(registry, 1)
        await registry.stage_epoch("blue")
        await enter(registry, 2, epoch="blue")
        earlier = Earlier(tables)
        await registry.set_current_epoch("blue")
        number = tables.epochs["blue"].number
        earlier.restore()
        assert tables.current_epoch == "epoch-1"
        await eventually(partial(has_mended, registry))
        assert (tables.current_epoch, tables.epochs["blue"].number) == ("blue", number)
        assert tables.epochs["epoch-1"].retired_at is not None
        assert (await registry.current_epoch()).value == Epoch("blue", number)
        await eventually(lambda: tables.rows[iid(1)].status is Status.DEAD)


async def test_states_are_restored_where_the_journal_does_not_reach_back(tables: Tables) -> None:
    config = replace(CONFIG, journal_capacity=1)
    async with joined_registry(config, tables) as registry:
        await enter(registry, 1)
        await enter(registry, 2)
        earlier = Earlier(tables)
        await enter(registry, 3)
        await registry.drain(["agent-3"], "upkeep", "ann")
        await registry.drain(["agent-1"], "upkeep", "ann")
        await registry.undrain(["agent-1"])
        await registry.set_status(iid(2), "draining", 3)
        await registry.set_current_epoch("blue")
        states = {one: (row.status, row.reported_status, row.seq) for one, row in tables.rows.items()}
        holds = {one: row.holds for one, row in tables.rows.items()}
        earlier.restore()
        await eventually(partial(has_mended, registry))
        assert tables.current_epoch == "blue"
        await eventually(lambda: all(row.status is Status.DEAD for row in tables.rows.values()))
        loss = (await registry.health()).last_loss
        assert loss is not None
        assert not loss.has_whole_history
        assert states[iid(3)] == (Status.DRAINING, Status.ALIVE, 2)
        assert holds[iid(1)] == ()


async def test_what_an_agent_has_told_another_registry_since_is_not_undone(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as before:
        await enter(before, 1)
    earlier = Earlier(tables)
    async with joined_registry(CONFIG, tables):
        pass
    async with joined_registry(CONFIG, tables) as registry:
        await registry.set_status(iid(1), "draining", 3)
        earlier.restore()
        # it takes a term that is lost
        another = MemoryStore(lambda: START, tables)
        await another.begin(CONFIG.ray_cluster, None, CONFIG.lease_s)
        await another.set_status_many([StatusChange(iid(1), Status.DRAINING, 3)])
        await another.set_status_many([StatusChange(iid(1), Status.ALIVE, 4)])
        await another.hold_many([HoldChange(iid(1), HoldKind.READINESS, hold(kind=HoldKind.READINESS), seq=5)])
        await eventually(partial(has_mended, registry))
        row = tables.rows[iid(1)]
        assert (row.reported_status, row.seq) == (Status.ALIVE, 5)
        assert row.hold(HoldKind.READINESS) is not None
        registry.writer.comparison.request()
        await eventually(lambda: LiveState.of(registry.members.index.by_id[iid(1)]) == LiveState.of(row))


class Fails(MemoryStore):
    """Its next writes fail after so many."""

    fails_after: int | None = None

    def fence(self, *, counts: bool = True) -> None:
        if counts and self.fails_after is not None:
            if self.fails_after == 0:
                raise StoreUnavailableError("for the test")
            self.fails_after -= 1
        super().fence(counts=counts)


@pytest.mark.parametrize("fails_after", range(4))
@pytest.mark.parametrize("is_lost_twice", [False, True])
async def test_a_restoration_that_is_interrupted_is_repeated_from_its_start(
    tables: Tables, fails_after: int, is_lost_twice: bool
) -> None:
    store = Fails(lambda: START, tables)
    async with joined_registry(CONFIG, tables, store=store) as registry:
        await enter(registry, 1)
        earlier = Earlier(tables)
        await enter(registry, 2)
        await registry.set_status(iid(1), "draining", 3)
        await registry.drain(["agent-2"])
        await registry.stage_epoch("green")
        before = story(tables)
        store.fails_after = fails_after
        earlier.restore()
        failures = (await registry.health()).flush.failures

        async def has_failed() -> bool:
            return (await registry.health()).flush.failures > failures

        await eventually(has_failed)
        answer = await registry.resolve(["agent-1", "agent-2"])
        # memory has all of it; only the database does not
        assert answer.complete
        assert [one.instance for one in answer.value] == [None, None]
        assert not (await registry.health()).is_ready
        if is_lost_twice:
            earlier.restore()
        store.fails_after = None
        await eventually(partial(has_mended, registry))
        assert story(tables) == before
        assert "green" in tables.epochs


async def test_an_instance_that_only_the_older_database_has_is_routed_to_once_it_beats(tables: Tables) -> None:
    config = replace(CONFIG, journal_capacity=1)
    async with joined_registry(config, tables) as registry:
        await enter(registry, 1)
        await enter(registry, 2)
        earlier = Earlier(tables)
        await registry.deregister(["agent-1"])
        # memory keeps a bounded number of deaths
        registry.members.deaths.defer_to([iid(1)])
        earlier.restore()
        await eventually(partial(has_mended, registry))
        assert (await registry.resolve(["agent-1"])).value[0].reason in {NotResolved.LATE, NotResolved.DIED}
        assert (await registry.resolve(["agent-2"])).value[0].instance is not None


@pytest.mark.parametrize("capacity", [1, 1000])
async def test_a_death_is_written_again_also_where_the_words_of_its_cause_are_refused(
    tables: Tables, capacity: int
) -> None:
    config = replace(CONFIG, journal_capacity=capacity)
    async with joined_registry(config, tables, store=RefusesWords(lambda: START, tables)) as registry:
        await enter(registry, 1)
        earlier = Earlier(tables)
        await registry.deregister(["agent-1"], UNSTORABLE)
        await enter(registry, 2)
        earlier.restore()
        await eventually(partial(has_mended, registry))
        row = tables.rows[iid(1)]
        assert (row.status, row.cause) == (Status.DEAD, Cause(CauseKind.OPERATOR))
        assert (await registry.resolve(["agent-2"])).value[0].instance is not None


async def test_the_history_of_a_registry_before_is_not_called_whole(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as first:
        earlier = Earlier(tables)
        await enter(first, 1)
    async with joined_registry(CONFIG, tables) as second:
        earlier.restore()
        await eventually(partial(has_mended, second))
        loss = (await second.health()).last_loss
        assert loss is not None
        assert not loss.has_whole_history
        assert tables.rows[iid(1)].status is Status.ALIVE


async def test_a_change_that_is_under_way_keeps_no_other_from_being_restored(tables: Tables) -> None:
    store = Fails(lambda: START, tables)
    config = replace(CONFIG, journal_capacity=1)
    async with joined_registry(config, tables, store=store) as registry:
        await enter(registry, 1)
        earlier = Earlier(tables)
        await registry.set_status(iid(1), "draining", 3)
        await enter(registry, 2)
        store.fails_after = 0
        [held] = await registry.drain(["agent-1"])
        assert not held.durable
        earlier.restore()
        store.fails_after = None
        await eventually(partial(has_mended, registry))
        assert (tables.rows[iid(1)].reported_status, tables.rows[iid(1)].seq) == (Status.DRAINING, 3)
        await eventually(lambda: tables.rows[iid(1)].hold(HoldKind.OPERATOR) is not None)
        # all was restored at once: no comparison had to find it
        assert (await registry.health()).healed == 0


async def test_a_registration_that_is_not_committed_yet_stays_in_the_epoch_of_its_actor(tables: Tables) -> None:
    store = Fails(lambda: START, tables)
    async with joined_registry(CONFIG, tables, store=store) as registry:
        first = Registration(iid(1), "agent-1", actor_id="aa" * 16, actor_name="agent-1", namespace="n")
        assert (await registry.register(first, 1)).durable
        await registry.set_status(iid(1), "dead", 2)
        await registry.set_current_epoch("green")
        earlier = Earlier(tables)
        await enter(registry, 2, epoch="green")
        store.fails_after = 0
        # Ray has restarted the actor: its epoch is retired, which only the database knows
        assert not (await registry.register(replace(first, instance_id=iid(3)), 1)).durable
        earlier.restore()
        store.fails_after = None
        await eventually(partial(has_mended, registry))
        await eventually(lambda: iid(3) not in registry.members)
        assert iid(3) not in tables.rows
        assert tables.rows[iid(2)].cluster_epoch == "green"


# A registry that starts on a database that has lost commits


@asynccontextmanager
async def called(registry: LocalRegistry) -> AsyncIterator[tuple[RegistryConnection, Callable[[LocalRegistry], None]]]:
    """A connection to a registry, and what replaces that by another."""
    actor = Actor(registry)

    async def find(name: str, namespace: str, timeout_s: float) -> Any:
        return actor if name == REGISTRY_NAME else None

    def replace_by(other: LocalRegistry) -> None:
        actor.inner = other

    connection = RegistryConnection("nowhere", 1.0, find=find)
    yield connection, replace_by
    await connection.close()


async def test_beats_of_the_same_moment_share_a_message_and_get_their_own_answers(
    tables: Tables, connected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    beat_many = LocalRegistry.beat_many

    async def counted(registry: LocalRegistry, instance_ids: Sequence[str], *details: Any) -> BeatAnswer:
        sent.append(len(instance_ids))
        return await beat_many(registry, instance_ids, *details)

    monkeypatch.setattr(LocalRegistry, "beat_many", counted)
    async with joined_registry(CONFIG, tables) as registry, called(registry) as (connection, _):
        await connection.register(Registration(iid(1), "agent-1"), 1)
        answers = await asyncio.gather(*(connection.beat(iid(number)) for number in range(1, 501)))
        assert sum(sent) == 500
        assert len(sent) < 10
        assert [answer.unknown for answer in answers] == [(), *((iid(number),) for number in range(2, 501))]
        with pytest.raises(InvalidInputError, match="instance_id"):
            await connection.beat("one")
        assert sum(sent) == 500


async def test_agents_repeat_their_last_words_to_a_registry_that_does_not_have_them(
    tables: Tables, connected: object
) -> None:
    async with joined_registry(CONFIG, tables) as first, called(first) as (connection, replace_by):
        for number in (1, 2, 3):
            await connection.register(Registration(iid(number), f"agent-{number}"), 1)
        await connection.beat_many([iid(1), iid(2), iid(3)])
        earlier = Earlier(tables)
        await connection.set_status(iid(1), "alive", 2)
        await connection.set_status(iid(2), "alive", 2)
        await connection.set_status(iid(2), "draining", 3, "enough")
        await connection.set_status(iid(3), "dead", 2, "done")
        earlier.restore()
    async with joined_registry(CONFIG, tables) as second:
        replace_by(second)
        for _ in range(2):
            await connection.beat_many([iid(1), iid(2)])
        rows = tables.rows
        assert [(rows[iid(n)].status, rows[iid(n)].seq) for n in (1, 2)] == [(Status.ALIVE, 2), (Status.DRAINING, 3)]
        assert rows[iid(2)].cause == Cause(CauseKind.AGENT, "enough")
        # it asks no more
        taken = tables.version
        await connection.beat_many([iid(1), iid(2)])
        assert tables.version == taken


async def test_a_registry_that_lacks_nothing_asks_for_nothing(tables: Tables, connected: object) -> None:
    async with joined_registry(CONFIG, tables) as first, called(first) as (connection, replace_by):
        await connection.register(Registration(iid(1), "agent-1"), 1)
        await connection.beat(iid(1))
        answer = await connection.beat(iid(1))
        assert (answer.behind, answer.registry) == ((), first.members.feed.stream)
    async with joined_registry(CONFIG, tables) as second:
        replace_by(second)
        for _ in range(3):
            answer = await connection.beat(iid(1))
            assert (answer.unknown, answer.behind) == ((), ())


async def test_after_a_lost_flip_no_mixture_of_epochs_is_resolved_until_it_is_confirmed(
    tables: Tables, connected: object
) -> None:
    async with joined_registry(CONFIG, tables) as first, called(first) as (connection, replace_by):
        await connection.register(Registration(iid(1), "blue"), 1)
        await connection.set_status(iid(1), "alive", 2)
        await connection.register(Registration(iid(2), "green", cluster_epoch="green"), 1)
        await connection.set_status(iid(2), "alive", 2)
        earlier = Earlier(tables)
        await connection.set_current_epoch("green")
        await connection.beat(iid(2))
        earlier.restore()
    async with joined_registry(CONFIG, tables) as second:
        replace_by(second)
        await connection.beat(iid(2))
        await connection.beat(iid(2))
        answer = await second.resolve(["blue", "green"])
        assert answer.complete
        assert [one.reason for one in answer.value] == [NotResolved.EPOCH_UNCONFIRMED] * 2
        assert "seedcore epoch flip" in (answer.value[0].detail or "")
        assert list(await second.page(EVERY)) == []
        assert "seedcore epoch flip" in ((await second.health()).epoch_problem or "")
        number = tables.epochs["green"].number
        await second.set_current_epoch("green")
        answer = await second.resolve(["blue", "green"])
        assert [one.instance is not None for one in answer.value] == [False, True]
        assert tables.epochs["green"].number > number
        assert (await second.health()).is_ready
        await connection.beat(iid(2))
    async with joined_registry(CONFIG, tables) as third:
        replace_by(third)
        for _ in range(2):
            await connection.beat(iid(2))
        assert (await third.health()).is_ready


async def test_the_epoch_that_the_database_shows_can_be_confirmed_too(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as registry:
        await enter(registry, 1)
        await registry.beat_many([iid(1)], None, KnownBefore({}, Epoch("green", 7)))
        assert (await registry.resolve(["agent-1"])).value[0].reason is NotResolved.EPOCH_UNCONFIRMED
        await registry.set_current_epoch("epoch-1")
        assert (await registry.resolve(["agent-1"])).value[0].instance is not None
        assert tables.epochs["epoch-1"].number == 8
        await registry.beat_many([iid(1)], None, KnownBefore({}, Epoch("green", 7)))
        assert (await registry.health()).is_ready


async def test_what_is_known_from_before_is_checked(tables: Tables) -> None:
    bad: list[Any] = [
        {"seqs": {iid(1): 1}},
        KnownBefore({iid(2): 1}),
        KnownBefore({iid(1): -1}),
        KnownBefore({}, Epoch("", 1)),
        KnownBefore({}, Epoch("green", -1)),
    ]
    async with joined_registry(CONFIG, tables) as registry:
        for known in bad:
            with pytest.raises(InvalidInputError):
                await registry.beat_many([iid(1)], None, known)


async def test_after_a_lost_takeover_the_agents_of_the_cluster_before_still_come_back_in_its_epoch(
    tables: Tables,
) -> None:
    async with joined_registry(CONFIG, tables) as first:
        await enter(first, 1)
    earlier = Earlier(tables)
    async with joined_registry(replace(CONFIG, ray_cluster="another"), tables) as second:
        assert (await second.beat_many([iid(1)])).retired == {}
        earlier.restore()
        await eventually(partial(has_mended, second))
        await eventually(lambda: tables.rows[iid(1)].status is Status.DEAD)
        answer = await second.beat_many([iid(1)])
        # it registers again, and is not retired with an epoch that is continued
        assert (answer.retired, (*answer.unknown, *answer.dead)) == ({}, (iid(1),))


async def test_an_agent_that_registers_again_while_the_takeover_is_lost_is_not_retired(tables: Tables) -> None:
    async with joined_registry(CONFIG, tables) as first:
        await enter(first, 1)
    earlier = Earlier(tables)
    async with joined_registry(replace(CONFIG, ray_cluster="another"), tables) as second:
        epoch = tables.current_epoch
        earlier.restore()
        again = asyncio.ensure_future(second.register(joins(1, "agent-1", started_epoch="epoch-1").registration))
        await asyncio.sleep(0)
        assert iid(1) in second.members
        await eventually(partial(has_mended, second))
        await asyncio.gather(again, return_exceptions=True)
        answer = await second.beat_many([iid(1)])
        assert (answer.retired, (*answer.unknown, *answer.dead)) == ({}, (iid(1),))
        # as a new instance it is of the epoch that continues its own
        await second.register(joins(2, "agent-1", started_epoch="epoch-1").registration)
        assert tables.rows[iid(2)].cluster_epoch == epoch
