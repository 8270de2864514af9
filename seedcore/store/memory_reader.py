"""Reading instances, their history and the epochs from tables in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from seedcore.core.answers import Answer, InstanceFilter, Listing, Origin
from seedcore.core.instances import Epoch, EpochRecord, Instance, Transition
from seedcore.core.lifecycle import Status
from seedcore.core.limits import check_instance_id
from seedcore.core.paging import (
    check_limit,
    check_within_s,
    decode_cursor,
    decode_death_cursor,
    encode_cursor,
    encode_death_cursor,
    first_page,
)
from seedcore.core.selection import best
from seedcore.store.tables import Tables, newest_first


class MemoryReader:
    """Implements core.ports.InstanceReader. `now` returns the time that a database would."""

    def __init__(self, now: Callable[[], datetime], tables: Tables) -> None:
        self._now = now
        self.tables = tables

    async def close(self) -> None:
        """Nothing to release."""

    async def current_epoch(self) -> Epoch:
        return Epoch(self.tables.current_epoch, self.tables.epochs[self.tables.current_epoch].number)

    async def list_epochs(self, limit: int) -> list[EpochRecord]:
        check_limit(limit)
        newest = sorted(self.tables.epochs.items(), key=lambda item: -item[1].number)[:limit]
        live = self.tables.live()
        return [
            EpochRecord(
                name,
                row.number,
                row.staged_at,
                row.current_at,
                row.retired_at,
                sum(instance.cluster_epoch == name for instance in live),
            )
            for name, row in newest
        ]

    async def list_instances(self, wanted: InstanceFilter, limit: int, cursor: str | None = None) -> Listing:
        check_limit(limit)
        after = decode_cursor(cursor)
        wanted.validated()
        matching = sorted(
            (
                row
                for row in self.tables.rows.values()
                if wanted.matches(row, self.tables.current_epoch)
                and (row.status is Status.DEAD or not wanted.fresh_only or self.tables.is_fresh(row, self._now()))
                and (row.logical_id, row.instance_id) > after
            ),
            key=lambda row: (row.logical_id, row.instance_id),
        )
        items = matching[:limit]
        return self._listing(items, encode_cursor(items[-1]) if len(matching) > limit else None)

    async def best_instances(self, logical_ids: Sequence[str]) -> Answer[dict[str, Instance]]:
        found: dict[str, Instance] = {}
        for logical_id in logical_ids:
            wanted = InstanceFilter(logical_id=logical_id)
            chosen = best(
                row
                for row in self.tables.rows.values()
                if wanted.matches(row, self.tables.current_epoch) and self.tables.is_fresh(row, self._now())
            )
            if chosen is not None:
                found[logical_id] = chosen
        return Answer(found, Origin.POSTGRES, self._now(), self.tables.version, complete=True)

    async def get_instance(self, instance_id: str) -> Instance | None:
        return self.tables.rows.get(check_instance_id(instance_id))

    async def instances(self, logical_id: str, limit: int) -> list[Instance]:
        check_limit(limit)
        return newest_first(row for row in self.tables.rows.values() if row.logical_id == logical_id)[:limit]

    async def transitions(self, logical_id: str, limit: int) -> list[Transition]:
        check_limit(limit)
        return [one for one in reversed(self.tables.transitions) if one.logical_id == logical_id][:limit]

    async def history(
        self, logical_id: str, instances: int, transitions: int
    ) -> tuple[list[Instance], list[Transition]]:
        return await self.instances(logical_id, instances), await self.transitions(logical_id, transitions)

    async def deaths(self, limit: int, cursor: str | None = None, within_s: float | None = None) -> Listing:
        before, span_s = decode_death_cursor(cursor), check_within_s(within_s)
        since = None if span_s is None else self._now() - timedelta(seconds=span_s)
        ended = sorted(
            (row.stopped_at, row.instance_id)
            for row in self.tables.rows.values()
            if row.stopped_at is not None and (since is None or row.stopped_at >= since)
        )
        earlier = (self.tables.rows[key[1]] for key in reversed(ended) if key < before)
        items, has_more = first_page(earlier, check_limit(limit))
        return self._listing(items, encode_death_cursor(items[-1]) if has_more else None)

    def _listing(self, items: Sequence[Instance], next_cursor: str | None) -> Listing:
        return Listing(
            items=tuple(items),
            source=Origin.POSTGRES,
            as_of=self._now(),
            version=self.tables.version,
            complete=True,
            next_cursor=next_cursor,
        )
