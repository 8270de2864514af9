"""The registry in this process, with the shorthands of a connection; and tables that go back to an earlier state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from seedcore.registry.protocol.api import Shorthands
from seedcore.registry.server.registry import Registry
from seedcore.store.tables import Tables


class LocalRegistry(Shorthands, Registry):
    """A Registry that is called like a connection to one."""


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
