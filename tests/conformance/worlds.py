"""A store under test and its time: the same for the memory store and for PostgreSQL."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any, Protocol

import psycopg

from seedcore.core.answers import InstanceFilter
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.core.ports import Store
from seedcore.store.memory import MemoryStore, Tables
from seedcore.store.postgres import PostgresStore
from seedcore.store.sessions import PoolLimits
from tests.builders import FakeClock, iid, joins, turns
from tests.servers import forget_everything

EVERYONE = InstanceFilter(statuses=None, fresh_only=False)


class World(Protocol):
    """A store, and ways to make time pass for it."""

    @property
    def store(self) -> Store: ...

    async def pass_time(self) -> None:
        """Make what comes next be later than what was."""
        ...

    async def age(self, instance_id: str, seconds: float) -> None:
        """Make an instance's last beat lie that much further back; the registry was at work all the while."""
        ...

    async def live_longer(self, seconds: float) -> None:
        """Make every start and status change lie that much further back."""
        ...

    async def silence(self, seconds: float) -> None:
        """Make the last recorded beat and the registry's last sign of work lie that much further back: it was down."""
        ...

    async def age_history(self, seconds: float) -> None:
        """Make all that has happened so far lie that much further back."""
        ...

    def rival(self) -> Store:
        """Another store on the same database. The caller opens and closes it."""
        ...

    async def reset(self) -> None:
        """Forget everything, as a fresh database."""
        ...

    async def exchange(self) -> None:
        """Put a fresh database in the place of the one that the stores know."""
        ...

    async def close(self) -> None:
        """Let go of the store."""
        ...


class MemoryWorld:
    """The memory store on a fake clock."""

    def __init__(self) -> None:
        self._clock = FakeClock()
        self.store = MemoryStore(self._clock)

    async def pass_time(self) -> None:
        self._clock.advance(0.001)

    async def age(self, instance_id: str, seconds: float) -> None:
        row = self.store.tables.rows[instance_id]
        received_at = row.last_heartbeat - timedelta(seconds=seconds)
        self.store.tables.rows[instance_id] = replace(row, last_heartbeat=received_at)
        self.store.tables.leases_from -= timedelta(seconds=seconds)

    async def live_longer(self, seconds: float) -> None:
        rows, by = self.store.tables.rows, timedelta(seconds=seconds)
        for row in list(rows.values()):
            earlier = replace(row, started_at=row.started_at - by, status_changed_at=row.status_changed_at - by)
            rows[row.instance_id] = earlier

    async def silence(self, seconds: float) -> None:
        self.store.tables.beats_seen_at -= timedelta(seconds=seconds)
        self.store.tables.term_seen_at -= timedelta(seconds=seconds)

    async def age_history(self, seconds: float) -> None:
        tables, by = self.store.tables, timedelta(seconds=seconds)
        tables.transitions = [replace(one, at=one.at - by) for one in tables.transitions]
        for row in list(tables.rows.values()):
            if row.stopped_at is not None:
                tables.rows[row.instance_id] = replace(row, stopped_at=row.stopped_at - by)

    def rival(self) -> Store:
        return MemoryStore(self._clock, self.store.tables)

    async def reset(self) -> None:
        self.store = MemoryStore(self._clock)

    async def exchange(self) -> None:
        vars(self.store.tables).update(vars(Tables(self._clock())))

    async def close(self) -> None:
        await self.store.close()


class PostgresWorld:
    """The PostgreSQL store on a database of its own."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.store = PostgresStore(dsn, PoolLimits(max_size=2))
        self._admin = psycopg.connect(dsn, autocommit=True)

    async def pass_time(self) -> None:
        """The server's own clock does."""

    async def age(self, instance_id: str, seconds: float) -> None:
        self._admin.execute(
            "update registry_instance set last_heartbeat = last_heartbeat - make_interval(secs => %s)"
            " where instance_id = %s",
            (seconds, instance_id),
        )
        self._admin.execute(
            "update cluster_metadata set leases_from = leases_from - make_interval(secs => %s)", (seconds,)
        )

    async def age_history(self, seconds: float) -> None:
        self._admin.execute("update registry_transition set at = at - make_interval(secs => %s)", (seconds,))
        self._admin.execute(
            "update registry_instance set stopped_at = stopped_at - make_interval(secs => %s) where status = 'dead'",
            (seconds,),
        )

    async def live_longer(self, seconds: float) -> None:
        self._admin.execute(
            "update registry_instance set started_at = started_at - make_interval(secs => %(by)s),"
            " status_changed_at = status_changed_at - make_interval(secs => %(by)s)",
            {"by": seconds},
        )

    async def silence(self, seconds: float) -> None:
        self._admin.execute(
            "update cluster_metadata set beats_seen_at = beats_seen_at - make_interval(secs => %(by)s),"
            " term_seen_at = term_seen_at - make_interval(secs => %(by)s)",
            {"by": seconds},
        )

    def rival(self) -> Store:
        return PostgresStore(self._dsn, PoolLimits(max_size=2))

    async def reset(self) -> None:
        forget_everything(self._admin)
        if self.store.term is not None:
            await self.store.close()
            self.store = PostgresStore(self._dsn, PoolLimits(max_size=2))
            await self.store.open()

    async def exchange(self) -> None:
        forget_everything(self._admin)

    async def close(self) -> None:
        await self.store.close()
        self._admin.close()


async def enter(
    world: World, number: int, logical_id: str = "agent", status: str = "alive", **details: Any
) -> Instance:
    """The number-th instance joins and comes to `status`."""
    await world.pass_time()
    await world.store.register_many([joins(number, logical_id, **details)])
    if status != "starting":
        await world.store.set_status_many([turns(number, Status(status))])
    return await row_of(world, number)


async def row_of(world: World, number: int) -> Instance:
    """The number-th instance as the store knows it."""
    row = await world.store.get_instance(iid(number))
    assert row is not None
    return row
