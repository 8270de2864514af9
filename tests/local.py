"""The registry in this process, with the shorthands of a connection; tables that go back to an earlier state; and a
store that refuses a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from seedcore.core.answers import Outcome
from seedcore.core.changes import HoldChange, StatusChange
from seedcore.core.errors import StoreRejectedError
from seedcore.registry.protocol.shorthands import Shorthands
from seedcore.registry.server.registry import Registry
from seedcore.store.memory import MemoryStore
from seedcore.store.tables import Tables

UNSTORABLE = "a reason that the database refuses"


class LocalRegistry(Shorthands, Registry):
    """A Registry that is called like a connection to one."""

    def forget(self, instance_id: str) -> None:
        """It keeps nothing for an agent."""


def is_unstorable(change: StatusChange | HoldChange) -> bool:
    """Whether a change has the reason that the database refuses."""
    cause = change.why if isinstance(change, HoldChange) else change.cause
    return cause is not None and cause.detail == UNSTORABLE


class RefusesWords(MemoryStore):
    """A store that refuses UNSTORABLE, as PostgreSQL refuses what it cannot encode."""

    async def set_status_many(self, changes: Sequence[StatusChange]) -> list[Outcome]:
        _refuse_any(changes)
        return await super().set_status_many(changes)

    async def hold_many(self, changes: Sequence[HoldChange]) -> list[Outcome]:
        _refuse_any(changes)
        return await super().hold_many(changes)


def _refuse_any(changes: Sequence[StatusChange | HoldChange]) -> None:
    if any(map(is_unstorable, changes)):
        raise StoreRejectedError("it refuses a reason")


class Snapshot:
    """Tables in memory as they are now: a standby that gets no more, or a backup."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._state = _copy(vars(tables))

    def restore(self) -> None:
        """Make the tables as they were."""
        vars(self._tables).update(_copy(self._state))


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    copied = {name: value.copy() if isinstance(value, (dict, list, set)) else value for name, value in state.items()}
    copied["epochs"] = {name: replace(row) for name, row in state["epochs"].items()}
    return copied
