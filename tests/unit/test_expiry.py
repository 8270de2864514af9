"""What keeps live instances from being declared dead: new leases, freezes that begin in time, and what is evidence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.verdict import Witness
from seedcore.store.memory import Tables
from tests.builders import iid, joins
from tests.local import LocalRegistry as Registry
from tests.unit.test_registry import CONFIG, Closed, Elapsed, NoWitness, database, elapsed, registry, restarted, tables
from tests.waiting import eventually

__all__ = ["database", "elapsed", "registry", "tables"]


@pytest.fixture
async def restarted_actor(registry: Registry) -> Instance:
    """An instance of an actor that has a newer instance, which is alive too."""
    for number in (2, 3):
        row = replace(joins(number, "restarted").registration, actor_id="ab", actor_name="actor", namespace="ns")
        await registry.register(row)
        await registry.set_status(iid(number), Status.ALIVE, 2)
    older = registry.members.get(iid(2))
    assert older is not None
    return older


async def pass_time(registry: Registry, elapsed: Elapsed, seconds: float, *beating: int) -> None:
    """Seconds in which the registry is at work, and some instances send beats."""
    for _ in range(round(seconds * 10)):
        elapsed.now_s += 0.1
        registry.expiry.attentive_now_s()
        await registry.beat_many([iid(number) for number in beating])


async def test_a_registration_that_arrives_late_ends_no_newer_instance(
    registry: Registry, restarted_actor: Instance
) -> None:
    row = replace(joins(1, "restarted").registration, actor_id=restarted_actor.actor_id, actor_name="actor")
    await registry.register(replace(row, instance_id=iid(4), namespace="ns"))
    rows = (await registry.describe("restarted")).live
    assert {row.instance.instance_id for row in rows} == {iid(2), iid(3), iid(4)}


async def test_an_instance_that_only_the_grace_made_fresh_is_no_evidence_of_a_death(
    registry: Registry, elapsed: Elapsed, restarted_actor: Instance
) -> None:
    elapsed.now_s += 60.0
    registry.expiry.attentive_now_s()
    assert (await registry.expiry.ask_about(restarted_actor))[0] is Witness.UNKNOWN
    # its own beats are evidence
    await pass_time(registry, elapsed, CONFIG.lease_s + 1, 3)
    assert (await registry.expiry.ask_about(restarted_actor))[0] is Witness.GONE


async def test_expiry_of_a_small_fleet_freezes_before_its_first_lease_expires(
    registry: Registry, elapsed: Elapsed
) -> None:
    for number in (2, 3):
        await registry.register(joins(number, f"agent-{number}").registration)
    await pass_time(registry, elapsed, 2.5 * CONFIG.beat_interval_s)
    await registry.expiry.sweep(elapsed.now_s)
    assert registry.expiry.is_frozen
    assert registry.members.silence.lapsed(elapsed.now_s) == []


async def test_instances_that_were_known_before_the_database_is_read_get_a_whole_lease_too(
    elapsed: Elapsed, tables: Tables
) -> None:
    store = Closed(elapsed.clock().utc, tables)
    async with restarted(elapsed, store, tables) as registry:
        await registry.register(joins(7, "agent-7").registration)
        elapsed.now_s += CONFIG.lease_s - 1
        assert registry.members.silence.silence_s(iid(7), elapsed.now_s) > 0
        store.is_open.set()
        await eventually(lambda: registry.writer.database.is_complete)
        assert registry.members.silence.silence_s(iid(7), elapsed.now_s) <= 0


async def test_no_lease_expires_by_silence_while_rays_tables_cannot_be_read_nor_in_the_lease_after(
    registry: Registry, elapsed: Elapsed
) -> None:
    witness = registry.expiry.watch
    assert isinstance(witness, NoWitness)
    witness.is_blind = True
    await pass_time(registry, elapsed, 2 * CONFIG.lease_s)
    await registry.expiry.sweep(elapsed.now_s)
    # it is alone: no freeze protects it
    assert not registry.expiry.is_frozen
    assert iid(1) in registry.members
    assert registry.members.silence.verdict(iid(1), elapsed.now_s) is Verdict.SUSPECT
    witness.is_blind = False
    await registry.expiry.sweep(elapsed.now_s)
    await pass_time(registry, elapsed, CONFIG.lease_s - 1)
    await registry.expiry.sweep(elapsed.now_s)
    assert iid(1) in registry.members
    await pass_time(registry, elapsed, 2)
    await registry.expiry.sweep(elapsed.now_s)
    assert iid(1) not in registry.members


async def test_no_lease_expires_right_after_a_stall_of_the_registry(registry: Registry, elapsed: Elapsed) -> None:
    beating = range(2, 10)
    for number in beating:
        await registry.register(joins(number, f"agent-{number}").registration)
    await pass_time(registry, elapsed, CONFIG.lease_s - 0.1, *beating)
    # what the meter of stalls does not credit is enough for the lease to end
    elapsed.now_s += 0.09
    registry.expiry.attentive_now_s()
    await registry.beat_many([iid(number) for number in beating])
    elapsed.now_s += 10.0
    await registry.expiry.sweep(elapsed.now_s)
    assert registry.members.silence.lapsed(elapsed.now_s) == [iid(1)]
    assert iid(1) in registry.members
    # its beat was on its way
    await registry.beat_many([iid(1)])
    await pass_time(registry, elapsed, 1.0, *beating)
    await registry.expiry.sweep(elapsed.now_s)
    assert iid(1) in registry.members
    await pass_time(registry, elapsed, CONFIG.lease_s + 1.0, *beating)
    await registry.expiry.sweep(elapsed.now_s)
    assert iid(1) not in registry.members
