"""Two roles: the owner, who migrates, and one for the registry, which may do what it does and nothing more."""

from __future__ import annotations

import re
from typing import Any

import psycopg
from psycopg import sql

from seedcore.core.errors import InvalidInputError, SchemaError
from seedcore.store.migrations import compare

_ROLE = re.compile(r"[a-z_][a-z0-9_-]{0,62}")

# rows are read and written; how they are made and what was applied is the owner's
_KEPT = ("cluster_epoch", "cluster_metadata")
_PRUNED = ("registry_instance", "registry_transition", "superseded_cluster")


def check_role(name: str) -> str:
    """A legal name of a role, or InvalidInputError."""
    if _ROLE.fullmatch(name) is None or name.startswith("pg_") or name == "public":
        like = "a name like seedcore_registry (a-z, 0-9, _ and -)"
        raise InvalidInputError("--grant", f"must be {like}, not {name[:80]!r}")
    return name


async def grant(connection: psycopg.AsyncConnection[Any], role: str, password: str | None) -> bool:
    """Let `role` do what a registry and discovery need; it is made where there is none. Whether it was made.

    Run as the owner of an up-to-date schema, again after a migration. Raises InvalidInputError or SchemaError; then
    nothing has changed.
    """
    name = sql.Identifier(check_role(role))
    missing, unknown = await compare(connection)
    if missing:
        raise SchemaError("the schema is not up to date: migrate first")
    if unknown:
        raise SchemaError(f"the schema is newer than this version ({unknown[-1]}): grant with the newer version")
    async with connection.transaction():
        known = await (await connection.execute("select rolsuper from pg_roles where rolname = %s", (role,))).fetchone()
        if known is not None and known[0]:
            raise SchemaError(f"role {role} is a superuser, whom nothing can be kept from: name another")
        if await _is_owner(connection, role):
            raise SchemaError(f"role {role} owns the tables: the registry's must be another than the owner's")
        if known is None:
            await connection.execute(sql.SQL("create role {} login").format(name))
        if password is not None:
            # the server gets the hash: a statement may be logged
            algorithm = b"scram-sha-256"
            told = connection.pgconn.encrypt_password(password.encode(), role.encode(), algorithm).decode()
            await connection.execute(sql.SQL("alter role {} password {}").format(name, sql.Literal(told)))
        for statement in await _statements(connection):
            await connection.execute(sql.SQL(statement).format(role=name))
    return known is None


async def _is_owner(connection: psycopg.AsyncConnection[Any], role: str) -> bool:
    cursor = await connection.execute(
        "select exists (select from pg_tables where schemaname = current_schema() and tableowner = %s)", (role,)
    )
    row = await cursor.fetchone()
    return row is not None and bool(row[0])


async def _statements(connection: psycopg.AsyncConnection[Any]) -> list[str]:
    cursor = await connection.execute("select current_database(), current_schema()")
    row = await cursor.fetchone()
    assert row is not None
    database, schema = (sql.Identifier(name).as_string(connection) for name in row)
    kept, pruned = (", ".join(f"{schema}.{table}" for table in tables) for tables in (_KEPT, _PRUNED))
    return [
        f"grant connect on database {database} to {{role}}",
        f"grant usage on schema {schema} to {{role}}",
        f"revoke all on all tables in schema {schema} from {{role}}",
        f"grant select, insert, update on {kept} to {{role}}",
        f"grant select, insert, update, delete on {pruned} to {{role}}",
        f"grant select on {schema}.schema_migration, {schema}.active_instance, {schema}.active_instances to {{role}}",
        f"grant usage, select on all sequences in schema {schema} to {{role}}",
        f"grant execute on all functions in schema {schema} to {{role}}",
        # made by this owner later, by a migration that an older registry has to live with
        f"alter default privileges in schema {schema} grant select, insert, update, delete on tables to {{role}}",
        f"alter default privileges in schema {schema} grant usage, select on sequences to {{role}}",
        f"alter default privileges in schema {schema} grant execute on functions to {{role}}",
    ]
