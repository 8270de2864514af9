"""Two roles: the owner, which migrates, and one for the registry, which has only the rights that it needs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import psycopg
from psycopg import sql

from seedcore.core.errors import InvalidInputError, SchemaError
from seedcore.store.migrations import Migration, compare, known_migrations
from seedcore.store.sessions import transaction

_ROLE = re.compile(r"[a-z_][a-z0-9_-]{0,62}")

# rows of these tables are never deleted; rows of the others are pruned
_KEPT = ("cluster_epoch", "cluster_metadata", "registry_writer")
_RECORD = "schema_migration"

_RIGHTS = ("select", "insert", "update", "delete")
_MADE = r"\bcreate\s+(?:or\s+replace\s+)?{}\s+(?:if\s+not\s+exists\s+)?(\w+)"

# a schema may be shared: ours are the relations with our names, and of the functions with our names those that belong
# to the owner of our tables or to the current user
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

# the owner whose rights the role has by membership: of the tables, of the schema, or the current user
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
    """Whether the role exists. Raises InvalidInputError or SchemaError where `grant` would refuse it."""
    check_role(role)
    cursor = await connection.execute(_ROLE_AS_IT_IS, {"relations": _names(known_migrations())["table"], "role": role})
    found = await cursor.fetchone()
    if found is not None:
        is_superuser, owner, mighty = found
        if is_superuser:
            raise SchemaError(f"role {role} is a superuser, whose rights cannot be limited: name another")
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
    """Explain what is missing: PostgreSQL reports that permission is denied, in words that differ between versions."""
    # since PostgreSQL 16 createrole gives no rights over roles that others have created
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
    """Grant `role` the rights of a registry and of discovery, and create it where it is missing. Whether it was
    created.

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
            hashed = connection.pgconn.encrypt_password(password.encode(), role.encode(), algorithm).decode()
            await connection.execute(sql.SQL("alter role {} password {}").format(name, sql.Literal(hashed)))
        await _open_the_way(connection, name)
        await _give(connection, name, _RIGHTS, known_migrations(), reset=True)
    return not is_there


async def grant_again(connection: psycopg.AsyncConnection[Any], migrations: list[Migration]) -> None:
    """Grant every role that writes instances the same rights on new tables and functions as on those before.

    Run as the owner in the transaction of a migration, because a registry of the version before works on with it.
    """
    cursor = await connection.execute(_WRITERS)
    for role, rights in await cursor.fetchall():
        await _give(connection, sql.Identifier(role), rights, migrations, reset=False)


async def _open_the_way(connection: psycopg.AsyncConnection[Any], role: sql.Identifier) -> None:
    cursor = await connection.execute("select current_database(), current_schema()")
    database, schema = map(sql.Identifier, await cursor.fetchone() or ())
    for text in (
        "grant connect on database {database} to {role}",
        "grant usage on schema {schema} to {role}",
        # rights are named one by one: none on everything that this owner will create
        "alter default privileges in schema {schema} revoke select, insert, update, delete on tables from {role}",
        "alter default privileges in schema {schema} revoke usage, select on sequences from {role}",
        "alter default privileges in schema {schema} revoke execute on functions from {role}",
    ):
        await connection.execute(sql.SQL(text).format(database=database, schema=schema, role=role))


async def _give(
    connection: psycopg.AsyncConnection[Any],
    role: sql.Identifier,
    rights: Iterable[str],
    migrations: list[Migration],
    *,
    reset: bool,
) -> None:
    """Grant those of the four `rights` that our tables need, and what comes with them. `reset`: revoke all others."""
    names = _names(migrations)
    ours = await _ours(connection, names)
    pruned = [right for right in _RIGHTS if right in rights]
    kept = [right for right in pruned if right != "delete"]
    wanted = [
        (kept, "", _KEPT),
        (pruned, "", [name for name in names["table"] if name not in _KEPT]),
        (["select"], "", [_RECORD, *names["view"]]),
    ]
    given = [(which, kind, [name for name in found if name in ours["relation"]]) for which, kind, found in wanted]
    given.append((["usage", "select"], "sequence ", ours["sequence"]))
    given.append((["execute"], "function ", ours["function"]))
    for which, kind, found in given:
        if not found:
            continue
        # our own names, and names as the server writes them
        things = sql.SQL(kind + ", ".join(found))
        if reset:
            await connection.execute(sql.SQL("revoke all on {} from {}").format(things, role))
        await connection.execute(sql.SQL("grant {} on {} to {}").format(sql.SQL(", ".join(which)), things, role))


def _names(migrations: list[Migration]) -> dict[str, list[str]]:
    """The names of what the schema files create, by kind."""
    text = "\n".join(migration.sql for migration in migrations)
    kinds = ("table", "view", "sequence", "function")
    return {kind: sorted(set(re.findall(_MADE.format(kind), text, re.IGNORECASE))) for kind in kinds}


async def _ours(connection: psycopg.AsyncConnection[Any], names: dict[str, list[str]]) -> dict[str, list[str]]:
    """The names of our objects in the database, by kind."""
    cursor = await connection.execute(
        _OURS,
        {
            "relations": [_RECORD, *names["table"], *names["view"]],
            "sequences": names["sequence"],
            "functions": names["function"],
        },
    )
    found: dict[str, list[str]] = {"relation": [], "sequence": [], "function": []}
    for kind, name in await cursor.fetchall():
        found[kind].append(name)
    return found
