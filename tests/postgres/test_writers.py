"""Several writers at once: no deadlock, no lost change."""

from __future__ import annotations

import asyncio

from seedcore.core.answers import OutcomeKind
from seedcore.core.changes import RegisterChange
from seedcore.core.instances import Beat
from seedcore.core.lifecycle import Status
from seedcore.store.postgres import PostgresStore
from seedcore.store.sessions import PoolLimits
from tests.builders import iid, joins, turns
from tests.conformance.worlds import EVERYONE

COUNT = 120
ROUNDS = 25


async def test_overlapping_batches_in_opposite_order_never_deadlock(fresh_dsn: str) -> None:
    writers = [PostgresStore(fresh_dsn, PoolLimits(max_size=4)) for _ in range(2)]
    for writer in writers:
        await writer.open()
    numbers = list(range(COUNT))

    async def work(writer: PostgresStore, order: list[int]) -> None:
        await writer.register_many([joins(number, f"agent-{number}", seq=1) for number in order])
        await writer.set_status_many([turns(number, Status.ALIVE) for number in order])
        await writer.set_status_many([turns(number, Status.DRAINING) for number in order])
        await writer.beat_many([Beat(iid(number)) for number in order])

    for turn in range(ROUNDS):
        await asyncio.gather(
            work(writers[0], numbers),
            work(writers[1], numbers[::-1]),
            writers[0].beat_many([Beat(iid(number)) for number in numbers[::-1]]),
            writers[1].beat_many([Beat(iid(number)) for number in numbers]),
            writers[turn % 2].expire_stale(None, 100),
            writers[turn % 2].expire_old_epochs(100),
        )
    listed = await writers[0].list_instances(EVERYONE, 1000)
    assert len(listed) == COUNT
    for writer in writers:
        await writer.close()


async def test_staging_epochs_in_batches_never_deadlocks_with_other_writers(fresh_dsn: str) -> None:
    """Staging takes a lock that all writers share; beats and flips take it too."""
    writers = [PostgresStore(fresh_dsn, PoolLimits(max_size=4)) for _ in range(2)]
    for writer in writers:
        await writer.open()
    known = [number * 1000 for number in range(1, COUNT)]
    await writers[0].register_many([joins(number, f"agent-{number}") for number in known])

    def batch(turn: int, place: int) -> list[RegisterChange]:
        """Everyone again, and among them a newcomer that brings a new epoch."""
        newcomer = joins(place * 1000 + turn + 1, cluster_epoch=f"epoch-{turn}-{place}")
        return [newcomer, *(joins(number, f"agent-{number}", seq=turn) for number in known)]

    for turn in range(ROUNDS):
        outcomes = await asyncio.gather(
            writers[0].register_many(batch(turn, COUNT)),
            writers[1].register_many(batch(turn, 0)),
            writers[0].beat_many([Beat(iid(number)) for number in known]),
            writers[1].set_current_epoch(f"epoch-{turn}-0"),
        )
        kinds = {outcome.kind for batch_outcomes in outcomes[:2] for outcome in batch_outcomes}
        assert kinds <= {OutcomeKind.APPLIED, OutcomeKind.UNCHANGED}
    for writer in writers:
        await writer.close()


async def test_two_registrations_of_one_instance_at_once_make_one_row(fresh_dsn: str) -> None:
    writers = [PostgresStore(fresh_dsn, PoolLimits(max_size=4)) for _ in range(2)]
    for writer in writers:
        await writer.open()
    for number in range(40):
        outcomes = await asyncio.gather(*(writer.register_many([joins(number)]) for writer in writers * 2))
        kinds = sorted(outcome.kind.value for (outcome,) in outcomes)
        assert kinds == ["applied", "unchanged", "unchanged", "unchanged"]
    for writer in writers:
        await writer.close()


async def test_one_epoch_staged_by_many_at_once_is_staged_once(fresh_dsn: str) -> None:
    writers = [PostgresStore(fresh_dsn, PoolLimits(max_size=4)) for _ in range(2)]
    for writer in writers:
        await writer.open()
    for turn in range(20):
        changes = [joins(turn * 10 + n, cluster_epoch=f"blue-{turn}") for n in range(4)]
        outcomes = await asyncio.gather(*(writers[n % 2].register_many([change]) for n, change in enumerate(changes)))
        assert {outcome.kind for (outcome,) in outcomes} == {OutcomeKind.APPLIED}
    assert (await writers[0].set_current_epoch("blue-19")).number == 21
    for writer in writers:
        await writer.close()


async def test_concurrent_flips_agree_on_one_epoch_and_lose_no_number(fresh_dsn: str) -> None:
    store = PostgresStore(fresh_dsn, PoolLimits(max_size=8))
    await store.open()
    epochs = await asyncio.gather(*(store.set_current_epoch(f"epoch-x{n}") for n in range(8)))
    assert sorted(epoch.number for epoch in epochs) == list(range(2, 10))
    assert (await store.current_epoch()).number == 9
    await store.close()
