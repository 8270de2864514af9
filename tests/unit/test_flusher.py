"""One pass of the write loop ends, whatever arrives while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from seedcore.core.answers import LostBeat
from seedcore.core.instances import Beat
from seedcore.core.lifecycle import Status
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START, iid, joins
from tests.local import LocalRegistry as Registry
from tests.unit.registries import joined_registry
from tests.unit.test_registry import CONFIG
from tests.waiting import eventually


class BeatsMeanwhile(MemoryStore):
    """While it records beats, the next ones arrive."""

    registry: Registry | None = None
    recorded = 0

    async def beat_many(self, beats: Sequence[Beat]) -> list[LostBeat]:
        if self.registry is not None:
            # others may run meanwhile, as while a database works
            await asyncio.sleep(0)
            await self.registry.beat_many([beat.instance_id for beat in beats])
        self.recorded += len(beats)
        return await super().beat_many(beats)


async def test_beats_that_arrive_during_a_flush_keep_no_change_waiting() -> None:
    tables = Tables(START)
    store = BeatsMeanwhile(lambda: START, tables)
    async with joined_registry(CONFIG, tables, store=store) as registry:
        await registry.register(joins(1).registration)
        store.registry = registry
        await registry.beat(iid(1))
        await eventually(lambda: store.recorded > 3)
        for seq, status in enumerate((Status.ALIVE, Status.DRAINING, Status.ALIVE), 2):
            assert (await registry.set_status(iid(1), status, seq)).durable
