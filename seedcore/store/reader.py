"""Reading instances, their history and the epochs from PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from seedcore.core.answers import Answer, InstanceFilter, Listing, Origin
from seedcore.core.instances import Epoch, EpochRecord, Instance, Transition
from seedcore.core.limits import check_instance_id
from seedcore.core.paging import (
    check_limit,
    check_within_s,
    decode_cursor,
    decode_death_cursor,
    encode_cursor,
    encode_death_cursor,
)
from seedcore.store.rows import filters, instance_of, transition_of
from seedcore.store.statements import Statements


class PostgresReader:
    """Implements core.ports.InstanceReader."""

    def __init__(self, statements: Statements) -> None:
        self._statements = statements

    async def close(self) -> None:
        await self._statements.connections.close()

    @property
    def statements(self) -> int:
        """How many statements were sent."""
        return self._statements.count

    @property
    def pool(self) -> Mapping[str, int]:
        return self._statements.connections.use

    async def current_epoch(self) -> Epoch:
        rows = await self._statements.run("stamp", {})
        return Epoch(name=rows[0][2], number=rows[0][3])

    async def list_epochs(self, limit: int) -> list[EpochRecord]:
        return [EpochRecord(*row) for row in await self._statements.run("list_epochs", {"limit": check_limit(limit)})]

    async def list_instances(self, wanted: InstanceFilter, limit: int, cursor: str | None = None) -> Listing:
        after_logical_id, after_instance_id = decode_cursor(cursor)
        page = {
            "after_logical_id": after_logical_id,
            "after_instance_id": after_instance_id,
            "limit": check_limit(limit) + 1,
        }
        stamps, rows = await self._statements.run_all([("stamp", {}), ("list_instances", {**filters(wanted), **page})])
        items = tuple(instance_of(row) for row in rows[:limit])
        return Listing(
            items=items,
            source=Origin.POSTGRES,
            as_of=stamps[0][0],
            version=stamps[0][1],
            complete=True,
            next_cursor=encode_cursor(items[-1]) if len(rows) > limit else None,
        )

    async def best_instances(self, logical_ids: Sequence[str]) -> Answer[dict[str, Instance]]:
        stamps, rows = await self._statements.run_all(
            [("stamp", {}), ("best_instances", {"logical_ids": list(logical_ids)})]
        )
        found = {instance.logical_id: instance for instance in map(instance_of, rows)}
        return Answer(found, Origin.POSTGRES, stamps[0][0], stamps[0][1], complete=True)

    async def get_instance(self, instance_id: str) -> Instance | None:
        rows = await self._statements.run("get_instance", {"instance_id": check_instance_id(instance_id)})
        return instance_of(rows[0]) if rows else None

    async def instances(self, logical_id: str, limit: int) -> list[Instance]:
        rows = await self._statements.run("instances", {"logical_id": logical_id, "limit": check_limit(limit)})
        return [instance_of(row) for row in rows]

    async def transitions(self, logical_id: str, limit: int) -> list[Transition]:
        rows = await self._statements.run("transitions", {"logical_id": logical_id, "limit": check_limit(limit)})
        return [transition_of(row) for row in rows]

    async def history(
        self, logical_id: str, instances: int, transitions: int
    ) -> tuple[list[Instance], list[Transition]]:
        rows, steps = await self._statements.run_all(
            [
                ("instances", {"logical_id": logical_id, "limit": check_limit(instances)}),
                ("transitions", {"logical_id": logical_id, "limit": check_limit(transitions)}),
            ]
        )
        return [instance_of(row) for row in rows], [transition_of(row) for row in steps]

    async def deaths(self, limit: int, cursor: str | None = None, within_s: float | None = None) -> Listing:
        before, before_id = decode_death_cursor(cursor)
        page = {
            "before": before,
            "before_id": before_id,
            "limit": check_limit(limit) + 1,
            "within_s": check_within_s(within_s),
        }
        stamps, rows = await self._statements.run_all([("stamp", {}), ("deaths", page)])
        items = tuple(instance_of(row) for row in rows[:limit])
        next_cursor = encode_death_cursor(items[-1]) if len(rows) > limit else None
        return Listing(items, Origin.POSTGRES, stamps[0][0], stamps[0][1], complete=True, next_cursor=next_cursor)
