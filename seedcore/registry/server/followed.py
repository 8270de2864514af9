"""Which entries of the journal may be written again after another registry has written to the database, too."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta

from seedcore.core.changes import HoldChange, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.instances import Instance
from seedcore.core.limits import MAX_PAGE
from seedcore.core.ports import Store
from seedcore.registry.server.journal import Committed, EpochStep


async def not_followed(
    store: Store, entries: Sequence[Committed], clock: Clock, go_on: Callable[[Store, str], Awaitable[None]]
) -> list[Committed]:
    """Those entries after which the database has nothing else that concerns their instance, or the epoch. The agents'
    own changes are all among them: their numbers decide. `go_on` is called with the progress."""
    now_s, now = clock.monotonic(), clock.utc()
    flips = [epoch.current_at for epoch in await store.list_epochs(MAX_PAGE) if epoch.current_at is not None]
    last_flip = max(flips, default=None)
    rows: dict[str, Instance | None] = {}
    kept: list[Committed] = []
    for entry in entries:
        work, at = entry.work, now - timedelta(seconds=max(0.0, now_s - entry.at_s))
        if isinstance(work, EpochStep):
            is_followed = work.is_current and last_flip is not None and last_flip > at
        elif isinstance(work, (HoldChange, StatusChange)) and work.seq is None:
            await go_on(store, f"{len(kept)} of {len(entries)} changes compared")
            if work.instance_id not in rows:
                rows[work.instance_id] = await store.read_instance(work.instance_id)
            row = rows[work.instance_id]
            is_followed = row is not None and _changed_at(row, work) > at
        else:
            is_followed = False
        if not is_followed:
            kept.append(entry)
    return kept


def _changed_at(row: Instance, work: HoldChange | StatusChange) -> datetime:
    """When the database last learned what such work would undo: of a death, also a beat."""
    times = [row.status_changed_at, *(hold.since for hold in row.holds)]
    return max([*times, row.last_heartbeat] if isinstance(work, StatusChange) else times)
