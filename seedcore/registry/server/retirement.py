"""Owns the rule for the instances of an epoch that was retired: they are dead, and their agents end, except where the
epoch is continued in another."""

from __future__ import annotations

from collections.abc import Sequence

from seedcore.core.changes import Registration
from seedcore.core.members import Members
from seedcore.core.ports import Store


async def end_retired(store: Store, members: Members, limit: int) -> int:
    """End up to `limit` instances of retired epochs, in the database and then in memory. Returns how many the database
    had. The agent of one whose epoch is continued in another comes back there: its next beat is unknown."""
    ended = await store.expire_old_epochs(limit)
    rows = [row for row in map(members.get, ended) if row is not None]
    last: Sequence[str | None] = [None] * len(rows)
    try:
        if rows:
            begun = [Registration(row.instance_id, row.logical_id, started_epoch=row.cluster_epoch) for row in rows]
            last = await store.epochs_of(begun)
    finally:
        # without an answer: an agent whose beat is unknown asks, and hears that it is retired
        for row, epoch in zip(rows, last, strict=True):
            if epoch == row.cluster_epoch:
                members.retire(row.instance_id)
            else:
                members.forget(row.instance_id)
    return len(ended)
