"""The memory store beyond the contract that tests/conformance checks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from seedcore.store.memory import MemoryStore
from tests.builders import iid, joins


async def test_without_a_clock_it_takes_the_worlds() -> None:
    store = MemoryStore()
    await store.register_many([joins(1)])
    row = await store.get_instance(iid(1))
    assert row is not None
    assert timedelta(0) <= datetime.now(UTC) - row.started_at < timedelta(minutes=1)
