"""What a schema file may do while registries of the version before are at work. PostgreSQL itself is the parser: a file
is applied to a database with rows, and what it has done is read from the catalog.

Not judged: what a view or a function that is replaced under the same name and columns answers now. The catalog does not
know what that means for older registries; the author of such a file must.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import psycopg

from seedcore.store.migrations import Migration

_WATCH = """
create schema lint;
create table lint.rewritten (name text);
create function lint.note() returns event_trigger language plpgsql as $$
begin
    insert into lint.rewritten values (pg_event_trigger_table_rewrite_oid()::regclass::text);
end
$$;
create event trigger lint on table_rewrite execute function lint.note();
"""
_ROWS = """
select register_instance(('00000000-0000-4000-8000-00000000000' || n)::uuid, 'agent-' || n)
  from generate_series(1, 4) as n;
select set_instance_status('00000000-0000-4000-8000-000000000002', 'alive');
select hold_instance('00000000-0000-4000-8000-000000000003', 'upkeep', 'ann', now() + interval '1 hour');
select set_instance_status('00000000-0000-4000-8000-000000000004', 'dead');
insert into superseded_cluster values ('before');
"""
_COLUMNS = """
select c.relname || '.' || a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
       a.atthasdef or a.attidentity <> ''
  from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
 where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v', 'c')
"""
_INDEXES = """
select c.relname::text, x.indrelid::regclass::text, pg_get_indexdef(x.indexrelid)
  from pg_index x join pg_class c on c.oid = x.indexrelid where c.relnamespace = 'public'::regnamespace
"""
_CONSTRAINTS = """
select k.conname::text, k.conrelid::regclass::text, k.convalidated, pg_get_constraintdef(k.oid)
  from pg_constraint k where k.connamespace = 'public'::regnamespace and k.conrelid <> 0 and k.contype <> 'n'
"""
_FUNCTIONS = """
select p.proname::text, p.proargtypes::oid[]::int[], p.pronargdefaults::int, pg_get_function_result(p.oid),
       coalesce(p.proargnames[:p.pronargs], '{}')
  from pg_proc p where p.pronamespace = 'public'::regnamespace
"""
_SEQUENCES = "select relname::text from pg_class where relnamespace = 'public'::regnamespace and relkind = 'S'"
_STATUSES = """
select t.typname::text, e.enumlabel::text
  from pg_enum e join pg_type t on t.oid = e.enumtypid where t.typnamespace = 'public'::regnamespace
"""
_TRIGGERS = """
select t.tgname::text, t.tgrelid::regclass::text, t.tgenabled::text, pg_get_triggerdef(t.oid)
  from pg_trigger t join pg_class c on c.oid = t.tgrelid
 where c.relnamespace = 'public'::regnamespace and not t.tgisinternal
"""
_SECURED = """
select relname::text from pg_class
 where relnamespace = 'public'::regnamespace and (relrowsecurity or relforcerowsecurity)
"""
_KEYS = ("PRIMARY KEY", "UNIQUE", "EXCLUDE")
_ROW_VERSIONS = """
select 'registry_instance', ctid::text, xmin::text from registry_instance
union all
select 'registry_transition', ctid::text, xmin::text from registry_transition
"""


@dataclass
class _Seen:
    """What older registries use, as the catalog has it."""

    columns: dict[str, tuple[str, bool, bool]] = field(default_factory=dict)
    indexes: dict[str, tuple[str, str]] = field(default_factory=dict)
    constraints: dict[tuple[str, str], tuple[bool, str]] = field(default_factory=dict)
    functions: list[tuple[str, list[int], int, str, list[str]]] = field(default_factory=list)
    sequences: set[str] = field(default_factory=set)
    labels: set[tuple[str, str]] = field(default_factory=set)
    triggers: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    secured: set[str] = field(default_factory=set)

    @property
    def tables(self) -> set[str]:
        return {name.partition(".")[0] for name in self.columns}


def _look(connection: psycopg.Connection) -> _Seen:
    return _Seen(
        {
            name: (kind, is_required, has_default)
            for name, kind, is_required, has_default in connection.execute(_COLUMNS)
        },
        {name: (table, text) for name, table, text in connection.execute(_INDEXES)},
        {(table, name): (is_valid, text) for name, table, is_valid, text in connection.execute(_CONSTRAINTS)},
        [(name, list(types), *more) for name, types, *more in connection.execute(_FUNCTIONS)],
        {name for (name,) in connection.execute(_SEQUENCES)},
        {(kind, label) for kind, label in connection.execute(_STATUSES)},
        {(table, name): (state, text) for name, table, state, text in connection.execute(_TRIGGERS)},
        {name for (name,) in connection.execute(_SECURED)},
    )


def prepare(connection: psycopg.Connection) -> None:
    """Rows, and an eye on rewritten tables, for a database that is then spoiled. Needs a superuser."""
    connection.execute(_ROWS)
    connection.execute(_WATCH)


def problems_of(connection: psycopg.Connection, migration: Migration) -> list[str]:
    """Apply a file to a database that was prepared and has all files before it; which rules it breaks."""
    problems: list[str] = []
    if not re.match(r"-- \S.{20,}", migration.sql):
        problems.append("it begins with no comment that states its purpose")
    before = _look(connection)
    rows = connection.execute(_ROW_VERSIONS).fetchall()
    try:
        with connection.transaction():
            connection.execute(migration.sql)
    except psycopg.Error as error:
        return [*problems, f"it fails on tables with rows: {str(error).splitlines()[0]}"]
    after = _look(connection)
    for (name,) in connection.execute("select distinct name from lint.rewritten").fetchall():
        problems.append(f"it rewrites {name}, which blocks all sessions meanwhile: add a column, fill it in batches")
    text = migration.sql
    taken = [*_of_columns(before, after), *_of_functions(before, after), *_of_sequences(before, after)]
    taken += [*_of_lost_indexes(before, after, text), *_of_lost_triggers(before, after)]
    if "_contract_" not in migration.name:
        problems += taken
    elif not taken:
        problems.append("it is named a contract, which older code refuses, and takes nothing away")
    problems += _of_indexes(before, after, text)
    problems += _of_constraints(before, after, text)
    problems += _of_what_older_writes_meet(before, after, text)
    problems += _of_waits(text)
    problems += _of_registrations(connection)
    is_whole = not any("is gone, which older registries read" in problem for problem in taken) and not any(
        "rewrites" in text for text in problems
    )
    if is_whole and not _has_reason(migration.sql, r"(update|delete\s+from)\s"):
        written = {row[0] for row in set(rows) - set(connection.execute(_ROW_VERSIONS).fetchall())}
        problems += [f"it writes rows of {name}: say `-- safe: ` and why above" for name in sorted(written)]
    return problems


def _of_registrations(connection: psycopg.Connection) -> list[str]:
    """Registering works after it."""
    try:
        with connection.transaction(force_rollback=True):
            connection.execute("select register_instance(gen_random_uuid(), 'of-the-rules')")
    except psycopg.Error as error:
        why = str(error).splitlines()[0]
        return [f"a registration fails after it ({why}): give a new column a default, or set it in register_instances"]
    return []


def _of_columns(before: _Seen, after: _Seen) -> list[str]:
    problems = []
    for name, (kind, is_required, has_default) in before.columns.items():
        if name not in after.columns:
            problems.append(f"column {name} is gone, which older registries read")
            continue
        new_kind, is_now_required, has_default_now = after.columns[name]
        if new_kind != kind:
            problems.append(f"column {name} was {kind} and is {new_kind}")
        if is_now_required and not is_required:
            problems.append(
                f"column {name} must be given now: older registries do not, and every row is read under a lock"
            )
        if has_default and not has_default_now:
            problems.append(f"column {name} has no default any more, which older registries leave to it")
    return problems


def _of_sequences(before: _Seen, after: _Seen) -> list[str]:
    return [
        f"sequence {name} is gone, which older registries take numbers of"
        for name in before.sequences - after.sequences
    ]


def _of_lost_indexes(before: _Seen, after: _Seen, text: str) -> list[str]:
    """One of a table that is gone too is no matter of its own."""
    problems = []
    constrained = {name for _, name in before.constraints}
    left = {(table, definition.replace(f" {name} ", " ", 1)) for name, (table, definition) in after.indexes.items()}
    for name, (table, definition) in before.indexes.items():
        is_left = (table, definition.replace(f" {name} ", " ", 1)) in left
        if is_left or table not in after.tables or name in constrained:
            continue
        if not _has_reason(text, rf"drop\s+index\s+(if\s+exists\s+)?{re.escape(name)}\b"):
            problems.append(f"index {name} is gone, which older registries search by: say `-- safe: ` and why above")
    kept = {(table, definition) for (table, _), (_, definition) in after.constraints.items()}
    problems += [
        f"constraint {name} of {table} is gone, which older registries' `on conflict` names"
        for (table, name), (_, definition) in before.constraints.items()
        if definition.startswith(_KEYS) and table in after.tables and (table, definition) not in kept
    ]
    return problems


def _of_lost_triggers(before: _Seen, after: _Seen) -> list[str]:
    return [
        f"trigger {name} of {table} is gone, which older registries leave work to"
        for table, name in before.triggers
        if table in after.tables and (table, name) not in after.triggers
    ]


def _of_indexes(before: _Seen, after: _Seen, text: str) -> list[str]:
    problems = []
    for name, (table, definition) in after.indexes.items():
        if definition == before.indexes.get(name, ("", ""))[1] or table not in before.tables:
            continue
        if "last_heartbeat" in definition:
            problems.append(f"index {name} holds last_heartbeat: no beat would be a HOT update")
        if not _has_reason(text, rf"create\s+(unique\s+)?index\s+(if\s+not\s+exists\s+)?{re.escape(name)}\b"):
            problems.append(f"index {name} is built while writes of {table} are blocked: say `-- safe: ` and why above")
    return problems


def _of_constraints(before: _Seen, after: _Seen, text: str) -> list[str]:
    problems = []
    for (table, name), (is_valid, definition) in after.constraints.items():
        if table not in before.tables or _is_as_before(before.constraints.get((table, name)), definition):
            continue
        if _has_reason(text, rf"alter\s+table\s+{re.escape(table)}\b"):
            continue
        if is_valid:
            problems.append(
                f"constraint {name} reads all of {table} under a lock: add it as not valid, or say `-- safe: ` and why "
                "above"
            )
        else:
            problems.append(
                f"constraint {name} may refuse what older registries write to {table}: say `-- safe: ` and why above"
            )
    return problems


def _is_as_before(constraint: tuple[bool, str] | None, definition: str) -> bool:
    """Also where it was validated since, which blocks no session."""
    return constraint is not None and constraint[1].removesuffix(" NOT VALID") == definition.removesuffix(" NOT VALID")


def _of_what_older_writes_meet(before: _Seen, after: _Seen, text: str) -> list[str]:
    problems = [
        f"{kind} has {label!r} now, which older code cannot read: say `-- safe: ` and why above"
        for kind, label in sorted(after.labels - before.labels)
        if kind in {one for one, _ in before.labels} and not _has_reason(text, rf"alter\s+type\s+{re.escape(kind)}\b")
    ]
    problems += [
        f"row security of {table} hides rows from older registries"
        for table in sorted((after.secured - before.secured) & before.tables)
    ]
    for (table, name), state in after.triggers.items():
        if state == before.triggers.get((table, name)) or table not in before.tables:
            continue
        made = rf"create\s+(or\s+replace\s+)?(constraint\s+)?trigger\s+{re.escape(name)}\b"
        if not _has_reason(text, made):
            problems.append(
                f"trigger {name} meets what older registries write to {table}: say `-- safe: ` and why above"
            )
    return problems


def _of_waits(text: str) -> list[str]:
    """What holds locks for longer than its statements need."""
    plain = re.sub(r"--[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    problems = []
    if re.search(r"(^|;|\b(begin|then|else|loop)\b|[$'])\s*lock\s", plain, re.IGNORECASE):
        problems.append("it locks a table by hand, and blocks all other sessions")
    if re.search(r"\bpg_sleep(_for|_until)?\s*\(", plain, re.IGNORECASE):
        problems.append("it sleeps while it holds its locks")
    return problems


def _of_functions(before: _Seen, after: _Seen) -> list[str]:
    """An older registry calls by position and by name, with as many arguments as it knows."""
    problems = []
    for name, types, defaults, result, names in before.functions:
        heirs = [
            new_names
            for new_name, new_types, new_defaults, new_result, new_names in after.functions
            if new_name == name
            and new_types[: len(types)] == types
            and len(new_types) - new_defaults <= len(types) - defaults
            and _answers_as(result, new_result)
        ]
        if not heirs:
            problems.append(f"function {name} can no more be called as older registries do")
        elif len(heirs) > 1:
            problems.append(f"function {name} is ambiguous as older registries call it: drop the one before")
        elif heirs[0][: len(names)] != names:
            problems.append(f"function {name} has arguments of other names, by which older registries may call it")
    return problems


def _answers_as(before: str, after: str) -> bool:
    """The same, or a row with more at its end."""
    return after == before or (before.startswith("TABLE(") and after.startswith(before.rstrip(")") + ","))


def _has_reason(text: str, statement: str) -> bool:
    """Whether every matching statement has a comment right above it that explains why it is safe."""
    lines = text.splitlines()
    for match in re.finditer(rf"^\s*{statement}", text, re.IGNORECASE | re.MULTILINE):
        # the match may begin with the line breaks before it
        place = text.count("\n", 0, match.end() - len(match[0].lstrip()))
        above = []
        while place > 0 and lines[place - 1].lstrip().startswith("--"):
            place -= 1
            above.append(lines[place])
        if not any("safe: " in line for line in above):
            return False
    return bool(re.search(rf"^\s*{statement}", text, re.IGNORECASE | re.MULTILINE))
