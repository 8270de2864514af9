"""The bounds of a registry: how many instances, and how many bytes of memory for them."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seedcore.core.answers import Outcome, OutcomeKind, Receipt
from seedcore.core.batch import ChangeBatch
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Change, RegisterChange, Registration, SequencedChange, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.errors import RegistryFullError, StoreUnavailableError
from seedcore.core.instances import Instance
from seedcore.core.lease import LeaseTerms
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_LABELS, MAX_METADATA_BYTES
from seedcore.core.members import Members
from seedcore.core.memory_bound import PLACES_BYTES, MemoryBound, weight_of, weight_of_change
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.server.backlog import Backlog
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.journal import Journal
from seedcore.settings import Settings
from seedcore.store.memory import Tables
from tests.builders import START, hold, holds, iid, instance, joins, turns
from tests.local import LocalRegistry
from tests.unit.registries import Away, joined_registry
from tests.waiting import eventually

TERMS = LeaseTerms(5.0, 15.0)
KIB = 1024
SHAPES: dict[str, Any] = {
    "one text": {"text": "x" * 16_000},
    "one text outside ASCII": {"text": "\U0001f600" * 1300},
    "empty lists": {"lists": [[] for _ in range(4000)]},
    "empty objects": {"objects": [{} for _ in range(4000)]},
    "many keys": {f"key-{number}": number for number in range(900)},
    "numbers": {"numbers": [number + 0.5 for number in range(2000)]},
    "deep": {"a": [[[[[[{"b": [1, 2, "three"]}]]]]]]},
}


def heavy(number: int, **details: Any) -> RegisterChange:
    """A registration with 10 KiB of metadata."""
    return joins(number, f"agent-{number}", 1, metadata={"text": "x" * 10 * KIB}, **details)


def entered(members: Members, upto: int = 1000) -> int:
    """How many heavy instances can register."""
    for number in range(upto):
        try:
            members.register(heavy(number), 0.0, START)
        except RegistryFullError:
            return number
    return upto


# Weights


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_is_about_what_is_allocated_and_not_less(shape: str) -> None:
    # a copy of each part, as unpickling makes it; texts that are alike are different objects there
    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {"".join(list(key)): copied(child) for key, child in value.items()}
        if isinstance(value, list):
            return [copied(child) for child in value]
        return "".join(list(value)) if isinstance(value, str) else value * 1

    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    kept = [copied(SHAPES[shape]) for _ in range(20)]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    allocated = (after - before) / len(kept)
    weight = weight_of(instance(1, metadata=kept[0])) - weight_of(instance(1))
    assert allocated <= weight <= 1.6 * allocated + 1000


def test_endpoints_of_an_instance_and_of_a_change_have_their_weight() -> None:
    few, many = {"http": "http://h"}, {f"n{number}": "http://h/" + "x" * 2000 for number in range(16)}
    of_instances = [weight_of(instance(1, endpoints=endpoints)) for endpoints in ({}, few, many)]
    of_changes = [weight_of_change(joins(1, endpoints=endpoints)) for endpoints in ({}, few, many)]
    for none, light, heavy_ones in (of_instances, of_changes):
        assert none < light < heavy_ones - 16 * 2000
    members = Members(TERMS, 10)
    for seq, endpoints in enumerate((few, many, {}), 1):
        members.register(joins(1, seq=seq, endpoints=endpoints), 0.0, START)
        (row,) = members
        assert members.memory.instances == weight_of(row) + PLACES_BYTES


TEXTS = st.text(max_size=600)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(
            ["register", "alive", "draining", "dead", "hold", "forget", "move", "overwrite", "bury", "retire"]
        ),
        st.integers(1, 4),
        st.dictionaries(st.text(max_size=5), TEXTS, max_size=3),
        TEXTS,
    ),
    max_size=40,
)


@given(CHANGES)
def test_bytes_of_the_members_are_those_of_the_instances_that_live(steps: list[tuple[str, int, Any, str]]) -> None:
    members = Members(TERMS, 100)
    for seq, (step, number, metadata, text) in enumerate(steps):
        row = instance(number, seq=seq, metadata=metadata, cause=Cause(CauseKind.AGENT, text))
        if step == "register":
            members.register(joins(number, "agent", seq, metadata=metadata), 0.0, START)
        elif step == "hold":
            members.hold(holds(number, text or None), START)
        elif step == "forget":
            members.forget(iid(number))
        elif step == "move":
            members.move(iid(number), f"epoch-{seq}" * 9)
        elif step == "overwrite":
            members.overwrite(row, 0.0)
        elif step == "bury":
            members.bury(iid(number), Cause(CauseKind.AGENT, text))
        elif step == "retire":
            members.retire(iid(number))
        else:
            members.set_status(turns(number, Status(step), seq, text), 0.0, START)
        if seq == 3:
            members.set_epoch("epoch-1")
        assert members.memory.instances == sum(weight_of(row) + PLACES_BYTES for row in members)
    members.forget_all([])
    assert members.memory.instances == 0


def test_weight_counts_every_text_of_any_length() -> None:
    plain = weight_of(instance(1))
    long: dict[str, dict[str, Any]] = {
        name: {name: "x" * 1000}
        for name in ("actor_name", "namespace", "actor_id", "serve_route", "organ_id", "node_id", "process_key")
    }
    long |= {
        "cause": {"cause": Cause(CauseKind.AGENT, "x" * 1000)},
        "hold": {"holds": (hold("x" * 1000),)},
        "labels": {"labels": {"key": "x" * 1000}},
        "metadata": {"metadata": {"key": "x" * 1000}},
    }
    for name, details in long.items():
        assert weight_of(instance(1, **details)) > plain + 900, name


# The bound


def test_full_memory_refuses_newcomers_by_bytes_and_names_the_setting() -> None:
    members = Members(TERMS, 1000, memory=MemoryBound(1024 * KIB))
    count = entered(members)
    assert 80 < count < 100
    with pytest.raises(RegistryFullError, match=r"limit of 1 MiB of instances: raise SEEDCORE_MAX_INSTANCES_MIB"):
        members.register(heavy(count), 0.0, START)
    assert len(members) == count
    # agents that are registered go on, also with a registration that is repeated, or smaller
    assert members.set_status(turns(1, Status.ALIVE, 2), 0.0, START).status is Status.ALIVE
    members.register(replace(heavy(1), seq=3), 0.0, START)
    members.register(joins(2, "agent-2", 3), 0.0, START)
    with pytest.raises(RegistryFullError):
        members.register(joins(3, "agent-3", 3, metadata={"text": "x" * 100 * KIB}), 0.0, START)
    known = members.get(iid(3))
    assert known is not None
    assert len(known.metadata["text"]) == 10 * KIB  # type: ignore[arg-type]
    members.set_status(turns(4, Status.DEAD, 2), 0.0, START)
    members.register(heavy(count), 0.0, START)


def test_instances_of_the_database_are_taken_over_beyond_the_bound() -> None:
    members = Members(TERMS, 1000, memory=MemoryBound(20 * KIB))
    for number in range(10):
        members.adopt(instance(number, f"agent-{number}", metadata={"text": "x" * 10 * KIB}), 0.0)
    assert len(members) == 10
    assert members.memory.used > members.memory.limit
    with pytest.raises(RegistryFullError):
        members.register(joins(11), 0.0, START)


async def test_changes_that_wait_count_until_they_are_settled_or_dropped() -> None:
    memory = MemoryBound()
    backlog = Backlog(10, 10, Clock(), memory)
    changes: list[Change] = [heavy(1), turns(1, Status.ALIVE, 2, "x" * 1000)]
    for change in changes:
        backlog.offer(change)
    backlog.offer_death(StatusChange(iid(2), Status.DEAD, number=backlog.next_number()))
    assert memory.waiting >= sum(map(weight_of_change, changes)) > 10 * KIB
    (first, *_) = backlog.take_changes(1)
    backlog.put_back([first])
    for change in backlog.take_changes(10):
        backlog.settle(change, Outcome(OutcomeKind.APPLIED))
    assert memory.waiting == 0


def test_batch_ends_before_it_has_too_many_bytes() -> None:
    batch = ChangeBatch(100, max_batch_bytes=25 * KIB)
    for number in range(6):
        batch.offer(heavy(number))
    assert [len(batch.take(100)) for _ in range(3)] == [2, 2, 2]
    batch.offer(joins(9, metadata={"text": "x" * 100 * KIB}))
    # one that is larger alone is a batch of its own
    assert len(batch.take(100)) == 1


def test_journal_keeps_a_bounded_number_of_bytes_and_knows_what_it_lacks() -> None:
    journal = Journal(1000, Clock(), max_bytes=100 * KIB)
    for number in range(50):
        journal.note(number + 1, [heavy(number)])
        assert journal.bytes <= 100 * KIB
    assert journal.complete_after == 50 - len(journal)
    taken = journal.take_after(48)
    assert [entry.number for entry in taken] == [49, 50]
    journal.put_back(taken)
    assert journal.bytes == sum(entry.weight for entry in journal.take_after(0))
    assert journal.bytes == 0


# The registry


CONFIG = RegistryConfig(
    "cluster", beat_interval_s=0.05, lease_s=15.0, flush_interval_s=0.01, linger_s=0.0, max_instance_bytes=1024 * KIB
)
LARGEST: dict[str, Any] = {
    "metadata": {"text": "x" * (MAX_METADATA_BYTES - 20)},
    "labels": {f"{number:063}": "x" * 255 for number in range(MAX_LABELS)},
}


async def test_registry_warns_before_its_memory_is_full_then_refuses_and_has_room_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with joined_registry(CONFIG, Tables(START)) as registry:
        assert (await registry.health()).capacity_problem is None
        lived: list[str] = []
        warned_at: float | None = None
        while len(lived) < 100:
            try:
                await registry.register(Registration(iid(len(lived)), f"agent-{len(lived)}", **LARGEST), 1)
            except RegistryFullError:
                break
            lived.append(iid(len(lived)))
            health = await registry.health()
            if health.capacity_problem is not None and warned_at is None:
                warned_at = health.capacity_used["memory"]
        assert 15 < len(lived) < 40
        assert warned_at is not None
        assert 0.8 <= warned_at < 0.9
        health = await registry.health()
        assert health.registrations_refused == 1
        assert "registrations are refused" in str(health.capacity_problem)
        # the others work on
        assert (await registry.set_status(lived[0], Status.ALIVE, 2)).durable
        assert (await registry.beat_many(lived)).unknown == ()
        for instance_id in lived[: len(lived) // 2]:
            await registry.set_status(instance_id, Status.DEAD, 3)
        assert (await registry.health()).capacity_problem is None
        await registry.register(Registration(iid(99), "agent-99", **LARGEST), 1)
    said = [record.message for record in caplog.records if record.name.endswith("fullness")]
    assert [message.split(":")[0] for message in said] == [
        "the registry is nearly full",
        "the registry is full and refuses registrations",
        "the registry has room again",
    ]


async def test_registry_warns_before_it_has_too_many_instances() -> None:
    async with joined_registry(replace(CONFIG, max_instances=10), Tables(START)) as registry:
        for number in range(10):
            await registry.register(Registration(iid(number), f"agent-{number}"), 1)
        health = await registry.health()
        assert "10 of at most 10 instances are live" in str(health.capacity_problem)
        assert "SEEDCORE_MAX_INSTANCES" in str(health.capacity_problem)
        with pytest.raises(RegistryFullError, match=r"raise SEEDCORE_MAX_INSTANCES$"):
            await registry.register(Registration(iid(11), "agent-11"), 1)


async def test_memory_is_bounded_while_the_database_is_away() -> None:
    store = Away(lambda: START, Tables(START))
    async with joined_registry(CONFIG, Tables(START), store=store) as registry:
        store.is_there = False
        for turn in range(200):
            # each waits for the database, although it is dead at once
            try:
                await registry.register(Registration(iid(turn), "agent", **LARGEST), 1)
            except RegistryFullError:
                break
            await registry.set_status(iid(turn), Status.DEAD, 2)
        assert 10 < turn < 40
        assert registry.members.memory.used <= registry.members.memory.limit + 100 * KIB
        store.is_there = True

        async def is_written() -> bool:
            return (await registry.health()).pending_changes == 0

        await eventually(is_written)
        await registry.register(Registration(iid(201), "agent", **LARGEST), 1)


async def test_agent_that_is_refused_for_the_memory_of_others_registers_when_there_is_room() -> None:
    async with joined_registry(CONFIG, Tables(START)) as registry:
        count = await _filled(registry)
        connection: Any = registry
        client = RegistryClient("newcomer", settings=Settings(), connection=connection, metadata={"text": "x" * 16_000})
        receipt = await client.register()
        assert not receipt.durable
        assert "SEEDCORE_MAX_INSTANCES_MIB" in str(receipt.why)
        for number in range(count // 2):
            await registry.set_status(iid(number), Status.DEAD, 2)
        await client.beat()
        found = registry.members.instances_of("newcomer")
        assert [row.status for row in found] == [Status.STARTING]


async def _filled(registry: LocalRegistry) -> int:
    for number in range(1000):
        try:
            await registry.register(Registration(iid(number), f"agent-{number}", **LARGEST), 1)
        except RegistryFullError:
            return number
    raise AssertionError("never full")


def heaviest() -> Instance:
    """What one instance uses at most, about: its metadata are empty lists."""
    return instance(1, metadata={"lists": [[] for _ in range(4000)]})


def test_one_instance_is_small_beside_the_bound() -> None:
    assert weight_of(heaviest()) < MemoryBound().limit / 1000


class Slow(Away):
    """A database that commits no more than ten changes in time."""

    largest = 0

    async def set_status_many(self, changes: Sequence[StatusChange]) -> list[Outcome]:
        if len(changes) > 10:
            raise StoreUnavailableError("canceling statement due to statement timeout")
        self.largest = max(self.largest, len(changes))
        return await super().set_status_many(changes)


async def test_database_that_is_too_slow_for_a_whole_batch_gets_smaller_ones() -> None:
    store = Slow(lambda: START, Tables(START))
    config = replace(CONFIG, durable_wait_s=0.1, retry_max_s=0.05, batch_limit=400)
    async with joined_registry(config, Tables(START), store=store) as registry:
        for number in range(200):
            await registry.register(Registration(iid(number), f"agent-{number}"), 1)
        turned = [SequencedChange(turns(number, Status.ALIVE, 2)) for number in range(200)]
        receipts = await registry.deliver(turned)
        assert not all(isinstance(receipt, Receipt) and receipt.durable for receipt in receipts)

        async def is_written() -> bool:
            return (await registry.health()).pending_changes == 0

        await eventually(is_written)
        assert 5 < store.largest <= 10
        for receipt in await registry.deliver(turned):
            assert isinstance(receipt, Receipt)
            assert receipt.durable
