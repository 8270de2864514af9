"""What agents know from before reaches a new registry with their first beat."""

from __future__ import annotations

from dataclasses import replace

import pytest

from seedcore.core.answers import BeatAnswer, KnownBefore, NotResolved, Receipt
from seedcore.core.changes import RegisterChange, Registration, SequencedChange
from seedcore.core.instances import Epoch
from seedcore.core.lifecycle import Status
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.identity import Identity
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.protocol.durable_words import DurableWords
from seedcore.settings import Settings
from seedcore.store.memory import Tables
from tests.builders import START, iid, turns
from tests.local import Snapshot as Earlier
from tests.unit.registries import joined_registry
from tests.unit.test_lost_commits import CONFIG, called
from tests.waiting import eventually


async def test_the_first_beat_to_a_new_registry_carries_the_epoch(connected: object) -> None:
    tables = Tables(START)
    async with joined_registry(CONFIG, tables) as first, called(first) as (connection, replace_by):
        await connection.register(Registration(iid(1), "blue"), 1)
        await connection.set_status(iid(1), "alive", 2)
        await connection.beat(iid(1))
        earlier = Earlier(tables)
        await connection.set_current_epoch("green")
        await connection.register(Registration(iid(2), "green", cluster_epoch="green"), 1)
        for _ in range(2):
            await connection.beat(iid(2))
        earlier.restore()
    async with joined_registry(CONFIG, tables) as second:
        replace_by(second)
        await connection.beat(iid(1))
        (found,) = (await second.resolve(["blue"])).value
        assert found.reason is NotResolved.EPOCH_UNCONFIRMED


def test_a_registry_that_agents_know_gets_the_epoch_and_no_numbers_again() -> None:
    words, epoch = DurableWords(), Epoch("blue", 2)
    answer = BeatAnswer(registry="first", epoch=epoch)
    registered = SequencedChange(RegisterChange(Registration(iid(1), "agent-1"), 1))
    words.note_receipt(registered, Receipt(iid(1), Status.STARTING, 1, durable=True))
    assert words.known_before([iid(1)]) is None
    words.note_answer(None, answer)
    sent = words.known_before([iid(1), iid(2)])
    assert sent == KnownBefore({iid(1): 1}, epoch)
    words.note_answer(sent, answer)
    assert words.known_before([iid(1), iid(2)]) == KnownBefore({}, epoch)


def test_an_earlier_word_that_was_sent_again_does_not_replace_a_later_one() -> None:
    words = DurableWords()
    registered = SequencedChange(RegisterChange(Registration(iid(1), "agent-1"), 1))
    words.note_receipt(registered, Receipt(iid(1), Status.STARTING, 1, durable=True))
    for seq in (3, 2):
        turned = SequencedChange(turns(1, Status.ALIVE, seq))
        words.note_sent(turned)
        words.note_receipt(turned, Receipt(iid(1), Status.ALIVE, seq, durable=True))
    words.note_answer(None, BeatAnswer(registry="second"))
    assert words.known_before([iid(1)]) == KnownBefore({iid(1): 3})
    answer = BeatAnswer(behind=(iid(1),), registry="second")
    assert [change.seq for change in words.note_answer(None, answer)[0]] == [1, 3]


def test_a_registry_that_does_not_know_an_instance_gets_its_number_again() -> None:
    words = DurableWords()
    registered = SequencedChange(RegisterChange(Registration(iid(1), "agent-1"), 1))
    words.note_receipt(registered, Receipt(iid(1), Status.STARTING, 1, durable=True))
    words.note_answer(None, BeatAnswer(registry="first"))
    # it goes on without its database, which it has not read
    words.note_answer(words.known_before([iid(1)]), BeatAnswer(unknown=(iid(1),), registry="first"))
    assert words.known_before([iid(1)]) == KnownBefore({iid(1): 1})


async def test_what_was_true_in_another_database_is_not_held_against_its_registry(connected: object) -> None:
    here, there = Tables(START), Tables(START)
    async with joined_registry(CONFIG, here) as first, called(first) as (connection, replace_by):
        await connection.register(Registration(iid(1), "agent-1"), 1)
        for epoch in ("green", "teal"):
            await connection.set_current_epoch(epoch)
        await connection.beat(iid(1))
        async with joined_registry(CONFIG, there) as second:
            await second.register(Registration(iid(1), "agent-1"), 1)
            replace_by(second)
            for _ in range(3):
                answer = await connection.beat(iid(1))
                assert answer.behind == ()
                assert (await second.health()).epoch_problem is None


async def test_a_registry_of_another_cluster_on_the_same_database_gets_what_it_has_lost(connected: object) -> None:
    tables = Tables(START)
    async with joined_registry(CONFIG, tables) as first, called(first) as (connection, replace_by):
        await connection.register(Registration(iid(1), "agent-1"), 1)
        earlier = Earlier(tables)
        await connection.set_status(iid(1), "alive", 2)
        await connection.beat(iid(1))
        earlier.restore()
    async with joined_registry(replace(CONFIG, ray_cluster="another", epoch="epoch-1"), tables) as second:
        replace_by(second)
        for _ in range(2):
            await connection.beat(iid(1))
        assert (tables.rows[iid(1)].status, tables.rows[iid(1)].seq) == (Status.ALIVE, 2)


async def test_an_agent_repeats_its_last_words_where_its_death_is_lost_before_it_acts_on_it(connected: object) -> None:
    tables = Tables(START)
    async with joined_registry(CONFIG, tables) as first, called(first) as (connection, replace_by):
        await connection.register(Registration(iid(1), "agent-1"), 1)
        earlier = Earlier(tables)
        await connection.set_status(iid(1), "alive", 2)
        await connection.deregister(["agent-1"], "it is gone", "ann")
        # as with the beats of others: the agent itself beats again, and acts on the answer to that
        assert (await connection.beat(iid(1))).dead == (iid(1),)
        earlier.restore()
    async with joined_registry(CONFIG, tables) as second:
        replace_by(second)
        for _ in range(2):
            assert (await connection.beat(iid(1))).dead == ()
        assert (tables.rows[iid(1)].status, tables.rows[iid(1)].seq) == (Status.ALIVE, 2)


async def test_nothing_is_kept_of_an_instance_that_its_agent_has_given_up(
    connected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, forgotten = Tables(START), list[str]()
    forget = DurableWords.forget

    def noted(words: DurableWords, instance_id: str) -> None:
        forgotten.append(instance_id)
        forget(words, instance_id)

    monkeypatch.setattr(DurableWords, "forget", noted)

    async def identified(*_: object) -> Identity:
        return Identity(None, None, None, None, None, 1, None)

    async with joined_registry(CONFIG, tables) as registry, called(registry) as (connection, _):
        settings = Settings(beat_interval_s=0.05)
        client = RegistryClient("agent-1", settings=settings, connection=connection, identifier=identified)
        async with Reporter("agent-1", settings=settings, client=client) as reporter:
            first = client.instance_id
            await connection.deregister(["agent-1"])
            await eventually(lambda: client.instance_id != first)
            assert forgotten == [first]
            second = client.instance_id
            await eventually(lambda: second in tables.rows)
            await connection.set_current_epoch("green")
            await eventually(lambda: reporter.retired_epoch is not None)
            assert forgotten == [first, second]


def test_words_of_a_dead_instance_are_kept_until_they_are_forgotten() -> None:
    words = DurableWords()
    registered = SequencedChange(RegisterChange(Registration(iid(1), "agent-1"), 1))
    words.note_receipt(registered, Receipt(iid(1), Status.STARTING, 1, durable=True))
    words.note_answer(None, BeatAnswer(dead=(iid(1),), registry="first"))
    words.note_answer(None, BeatAnswer(registry="second"))
    assert words.known_before([iid(1)]) == KnownBefore({iid(1): 1})
    words.forget(iid(1))
    words.note_answer(None, BeatAnswer(registry="third"))
    assert words.known_before([iid(1)]) is None


def test_senders_of_two_databases_do_not_share_what_they_know() -> None:
    here, there = (KnownBefore({iid(n): n}, Epoch(f"epoch-{n}", n), f"database-{n}") for n in (9, 2))
    assert here.joined(there) == there
    assert here.joined(KnownBefore({iid(3): 3}, None, "database-9")) == replace(here, seqs={iid(9): 9, iid(3): 3})
