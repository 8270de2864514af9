"""Recognizes a database of the earlier SeedCore by its tables, views and functions."""

from __future__ import annotations

from collections.abc import Mapping

from seedcore.core.errors import SchemaError
from seedcore.store.adoption.sending import all_rows
from seedcore.store.sessions import Connection

_STATUSES = "starting, alive, draining, dead"

_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "cluster_metadata": {"id": "integer", "current_epoch": "uuid", "updated_at": "timestamp with time zone"},
    "registry_instance": {
        "instance_id": "uuid",
        "logical_id": "text",
        "cluster_epoch": "uuid",
        "status": "instancestatus",
        "actor_name": "text",
        "serve_route": "text",
        "node_id": "text",
        "ip_address": "inet",
        "pid": "integer",
        "started_at": "timestamp with time zone",
        "stopped_at": "timestamp with time zone",
        "last_heartbeat": "timestamp with time zone",
    },
}
_VIEWS = ("active_instance", "active_instances")
_CALLS: Mapping[str, tuple[str, ...]] = {
    "beat(uuid)": ("void",),
    "expire_old_epoch_instances()": ("integer", "bigint"),
    "expire_stale_instances(integer)": ("integer", "bigint"),
    "register_instance(uuid, text, uuid, text, text, text, inet, integer)": ("void",),
    "set_current_epoch(uuid)": ("void",),
    "set_instance_status(uuid, instancestatus)": ("void",),
}


async def is_earlier_database(connection: Connection) -> bool:
    """Whether this is a database of the earlier SeedCore. False if none of its names exist, or if our migrations
    created them. Raises SchemaError if other objects have these names."""
    rows = await all_rows(connection, "traces")
    if not rows or "schema_migration" in {name for _, name, _ in rows}:
        return False
    problem = _difference([(str(kind), str(name), str(shape)) for kind, name, shape in rows])
    if problem is None:
        return True
    names = ", ".join(sorted(str(name) for _, name, _ in rows))
    raise SchemaError(
        f"the schema could not be brought up to date: the database contains objects with our names ({names}), but "
        f"neither our schema nor that of the earlier SeedCore: {problem}. Nothing was changed"
    )


def _difference(rows: list[tuple[str, str, str]]) -> str | None:
    """The first difference from the schema of the earlier SeedCore; None if there is none."""
    found = {name: (kind, shape) for kind, name, shape in rows}
    for table, columns in _COLUMNS.items():
        kind, shape = found.get(table, ("", ""))
        if kind != "table":
            return f"there is no table {table}"
        actual = {name: _plain(type_) for name, _, type_ in (column.partition(" ") for column in shape.split(", "))}
        if actual != columns:
            wrong = sorted(set(actual.items()) ^ set(columns.items()))
            return f"table {table} has other columns ({', '.join(' '.join(column) for column in wrong)})"
    for view in _VIEWS:
        if found.get(view, ("nothing", ""))[0] != "view":
            return f"there is no view {view}"
    for call, results in _CALLS.items():
        result = found.get(call, ("", "missing"))[1]
        if result not in results:
            return f"function {call} is missing" if result == "missing" else f"function {call} answers {result}"
    if found.get("instancestatus", ("", ""))[1] != _STATUSES:
        return f"type instancestatus is not ({_STATUSES})"
    more = sorted(set(found) - set(_COLUMNS) - set(_VIEWS) - set(_CALLS) - {"instancestatus"})
    return f"there is also {', '.join(more)}" if more else None


def _plain(type_: str) -> str:
    """A column's type, with equivalent types mapped to one name."""
    if type_.startswith("character varying"):
        return "text"
    return {"smallint": "integer", "bigint": "integer"}.get(type_, type_.rpartition(".")[2])
