"""Two roles: the owner, who migrates, and one for the registry, which may do what it does and nothing more."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import psycopg
from psycopg import sql

from seedcore.core.errors import InvalidInputError, SchemaError
from seedcore.store.connections import transaction
from seedcore.store.migrations import compare, known_migrations

_ROLE = re.compile(r"[a-z_][a-z0-9_-]{0,62}")

# rows are read and written; how they are made and what was applied is the owner's
_KEPT = ("cluster_epoch", "cluster_metadata")
_PRUNED = ("registry_instance", "registry_transition", "superseded_cluster")
_READ = ("schema_migration", "active_instance", "active_instances")

_RIGHTS = ("select", "insert", "update", "delete")
_MADE = r"\bcreate\s+(?:or\s+replace\s+)?{}\s+(?:if\s+not\s+exists\s+)?(\w+)"

# a schema may be shared: ours is what has a name of ours, and of functions those alone that belong to the owner of our
# tables, or to whoever migrates now
_OURS = """
with home as (select oid from pg_namespace where nspname = current_schema()),
     ours as (select c.oid, c.relname, c.relowner from pg_class c join home on home.oid = c.relnamespace
               where c.relkind in ('r', 'p', 'v') and c.relname = any(%(relations)s))
select 'relation', relname::text from ours
union all
select 'sequence', s.oid::regclass::text from pg_class s join home on home.oid = s.relnamespace
 where s.relkind = 'S'
   and (s.relname = any(%(sequences)s)
        or exists (select from pg_depend d join ours on ours.oid = d.refobjid
                    where d.classid = 'pg_class'::regclass and d.objid = s.oid
                      and d.refclassid = 'pg_class'::regclass and d.deptype in ('a', 'i')))
union all
select 'function', p.oid::regprocedure::text from pg_proc p join home on home.oid = p.pronamespace
 where p.prokind = 'f' and p.proname = any(%(functions)s)
   and (p.proowner in (select relowner from ours) or pg_get_userbyid(p.proowner) = current_user)
"""

# whose power over the tables a role has with its own: their owner's, the schema's, or his who migrates now
_ROLE_AS_IT_IS = """
with owner as (
    select c.relowner as oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
     where n.nspname = current_schema() and c.relkind = 'r' and c.relname = any(%(relations)s)
    union
    select nspowner from pg_namespace where nspname = current_schema()
    union
    select oid from pg_roles where rolname = current_user
)
select r.rolsuper,
       (select o.rolname::text from pg_roles o join owner on owner.oid = o.oid
         where pg_has_role(r.oid, o.oid, 'member') order by o.oid <> r.oid, o.rolname ~ '^pg_', 1 limit 1),
       (select m.rolname::text from pg_roles m
         where (m.rolsuper or m.rolcreaterole or m.rolcreatedb or m.rolreplication or m.rolbypassrls)
           and pg_has_role(r.oid, m.oid, 'member') order by m.oid <> r.oid, 1 limit 1)
  from pg_roles r where r.rolname = %(role)s
"""

_WRITERS = """
select g.rolname::text, array_agg(lower(a.privilege_type))
  from pg_class c join pg_namespace n on n.oid = c.relnamespace, aclexplode(c.relacl) a
  join pg_roles g on g.oid = a.grantee
 where n.nspname = current_schema() and c.relname = 'registry_instance' and a.grantee <> c.relowner
 group by 1
having bool_or(a.privilege_type = 'INSERT')
"""


def check_role(name: str) -> str:
    """A legal name of a role, or InvalidInputError."""
    if _ROLE.fullmatch(name) is None or name.startswith("pg_") or name == "public":
        like = "a name like seedcore_registry (a-z, 0-9, _ and -)"
        raise InvalidInputError("--grant", f"must be {like}, not {name[:80]!r}")
    return name


async def check_grant(connection: psycopg.AsyncConnection[Any], role: str, *, with_password: bool) -> bool:
    """Whether there is such a role yet. Raises InvalidInputError or SchemaError where `grant` would refuse it."""
    check_role(role)
    cursor = await connection.execute(_ROLE_AS_IT_IS, {"relations": [*_KEPT, *_PRUNED], "role": role})
    found = await cursor.fetchone()
    if found is not None:
        is_superuser, owner, mighty = found
        if is_superuser:
            raise SchemaError(f"role {role} is a superuser, whom nothing can be kept from: name another")
        if owner == role:
            raise SchemaError(f"role {role} owns the tables: the registry's must be another than the owner's")
        if owner is not None:
            raise SchemaError(f"role {role} is a member of the owner, {owner}: name a role of the registry's own")
        if mighty is not None:
            has = "has" if mighty == role else f"is a member of {mighty}, which has"
            raise SchemaError(
                f"role {role} {has} createrole, createdb, replication or bypassrls: name a role of the registry's own"
            )
    if found is None or with_password:
        await _require_may_make(connection, role, is_there=found is not None)
    return found is not None


async def _require_may_make(connection: psycopg.AsyncConnection[Any], role: str, *, is_there: bool) -> None:
    """PostgreSQL only says that permission is denied, and in words that differ from version to version."""
    # since PostgreSQL 16 the right to make roles is not one over roles that others have made
    cursor = await connection.execute(
        "select current_user::text, rolsuper or (rolcreaterole and (current_setting('server_version_num')::int < 160000"
        " or not exists (select from pg_roles where rolname = %(role)s)"
        " or pg_has_role(current_user, (select oid from pg_roles where rolname = %(role)s),"
        " 'member with admin option'))) from pg_roles where rolname = current_user",
        {"role": role},
    )
    owner, may_make = await cursor.fetchone() or ("", False)
    if may_make:
        return
    if is_there:
        raise SchemaError(
            f"{owner} may not change the password of role {role}, which needs CREATEROLE: have an administrator set "
            "it, then run this again without --password-file"
        )
    raise SchemaError(
        f"there is no role {role}, and {owner} may not make it, which needs CREATEROLE: have an administrator run "
        f'`create role "{role}" login` and set its password, then run this again without --password-file'
    )


async def grant(connection: psycopg.AsyncConnection[Any], role: str, password: str | None) -> bool:
    """Let `role` do what a registry and discovery need; it is made where there is none. Whether it was made.

    Run as the owner of an up-to-date schema. Raises InvalidInputError or SchemaError; then nothing has changed.
    """
    name = sql.Identifier(role)
    missing, unknown = await compare(connection)
    if missing:
        raise SchemaError("the schema is not up to date: migrate first")
    if unknown:
        raise SchemaError(f"the schema is newer than this version ({unknown[-1]}): grant with the newer version")
    async with transaction(connection):
        is_there = await check_grant(connection, role, with_password=password is not None)
        if not is_there:
            await connection.execute(sql.SQL("create role {} login").format(name))
        if password is not None:
            # the server gets the hash: a statement may be logged
            algorithm = b"scram-sha-256"
            told = connection.pgconn.encrypt_password(password.encode(), role.encode(), algorithm).decode()
            await connection.execute(sql.SQL("alter role {} password {}").format(name, sql.Literal(told)))
        await _open_the_way(connection, name)
        await _give(connection, name, _RIGHTS, anew=True)
    return not is_there


async def grant_again(connection: psycopg.AsyncConnection[Any]) -> None:
    """Let every role that writes instances do with new tables and functions what it may with those before.

    Run as the owner in the transaction of a migration: an older registry at work lives with its triggers and functions.
    """
    cursor = await connection.execute(_WRITERS)
    for role, rights in await cursor.fetchall():
        await _give(connection, sql.Identifier(role), rights, anew=False)


async def _open_the_way(connection: psycopg.AsyncConnection[Any], role: sql.Identifier) -> None:
    cursor = await connection.execute("select current_database(), current_schema()")
    database, schema = map(sql.Identifier, await cursor.fetchone() or ())
    for text in (
        "grant connect on database {database} to {role}",
        "grant usage on schema {schema} to {role}",
        # an earlier version gave what this owner would ever make here, whatever it was for
        "alter default privileges in schema {schema} revoke select, insert, update, delete on tables from {role}",
        "alter default privileges in schema {schema} revoke usage, select on sequences from {role}",
        "alter default privileges in schema {schema} revoke execute on functions from {role}",
    ):
        await connection.execute(sql.SQL(text).format(database=database, schema=schema, role=role))


async def _give(
    connection: psycopg.AsyncConnection[Any], role: sql.Identifier, rights: Iterable[str], *, anew: bool
) -> None:
    """Give those of the four `rights` that our tables are for, and what they need; `anew`: and take all else."""
    ours = await _ours(connection)
    pruned = [right for right in _RIGHTS if right in rights]
    kept = [right for right in pruned if right != "delete"]
    wanted = [(kept, "", _KEPT), (pruned, "", _PRUNED), (["select"], "", _READ)]
    given = [(which, kind, [name for name in names if name in ours["relation"]]) for which, kind, names in wanted]
    given.append((["usage", "select"], "sequence ", ours["sequence"]))
    given.append((["execute"], "function ", ours["function"]))
    for which, kind, names in given:
        if not names:
            continue
        # names of ours, and of what the server itself has written as it reads it
        things = sql.SQL(kind + ", ".join(names))
        if anew:
            await connection.execute(sql.SQL("revoke all on {} from {}").format(things, role))
        await connection.execute(sql.SQL("grant {} on {} to {}").format(sql.SQL(", ".join(which)), things, role))


async def _ours(connection: psycopg.AsyncConnection[Any]) -> dict[str, list[str]]:
    """What is there of ours, by kind."""
    text = "\n".join(migration.sql for migration in known_migrations())
    names = {kind: re.findall(_MADE.format(kind), text, re.IGNORECASE) for kind in ("sequence", "function")}
    cursor = await connection.execute(
        _OURS,
        {
            "relations": [*_KEPT, *_PRUNED, *_READ],
            "sequences": names["sequence"],
            "functions": names["function"],
        },
    )
    found: dict[str, list[str]] = {"relation": [], "sequence": [], "function": []}
    for kind, name in await cursor.fetchall():
        found[kind].append(name)
    return found
