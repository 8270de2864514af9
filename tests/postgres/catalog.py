"""The content of a database's catalog, to compare two databases."""

from __future__ import annotations

import psycopg

_EVERYTHING = """
with home as (select oid from pg_namespace where nspname = 'public')
select 'schema', nspname::text, '' from pg_namespace where nspname !~ '^(pg_|information_schema)'
union all
select 'relation', c.relname::text, format('%s %s %s', c.relkind, c.relpersistence, c.reloptions)
  from pg_class c where c.relnamespace in (select oid from home)
union all
select 'column', format('%s %s', c.relname, a.attnum),
       format('%s %s %s %s %s %s', a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
              a.attcollation::regcollation, pg_get_expr(d.adbin, d.adrelid))
  from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
  left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
 where c.relnamespace in (select oid from home) and c.relkind in ('r', 'v', 'c')
union all
select 'index', c.relname::text, pg_get_indexdef(c.oid)
  from pg_class c where c.relnamespace in (select oid from home) and c.relkind = 'i'
union all
select 'constraint', format('%s %s', k.conrelid::regclass, k.conname),
       format('%s %s', pg_get_constraintdef(k.oid), k.convalidated)
  from pg_constraint k where k.connamespace in (select oid from home)
union all
select 'trigger', format('%s %s', t.tgrelid::regclass, t.tgname), format('%s %s', pg_get_triggerdef(t.oid), t.tgenabled)
  from pg_trigger t where not t.tgisinternal
union all
select 'view', c.relname::text, pg_get_viewdef(c.oid)
  from pg_class c where c.relnamespace in (select oid from home) and c.relkind = 'v'
union all
select 'function', p.oid::regprocedure::text, pg_get_functiondef(p.oid)
  from pg_proc p where p.pronamespace in (select oid from home)
union all
select 'type', t.typname::text,
       (select string_agg(e.enumlabel, ',' order by e.enumsortorder) from pg_enum e where e.enumtypid = t.oid)
  from pg_type t where t.typnamespace in (select oid from home) and t.typtype in ('e', 'd')
union all
select 'sequence', s.seqrelid::regclass::text,
       format('%s %s %s %s', s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqcycle)
  from pg_sequence s join pg_class c on c.oid = s.seqrelid where c.relnamespace in (select oid from home)
union all
select 'comment', format('%s %s', pg_describe_object(d.classoid, d.objoid, d.objsubid), d.objsubid), d.description
  from pg_description d
 where d.classoid in ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_type'::regclass)
   and pg_describe_object(d.classoid, d.objoid, d.objsubid) !~ '(pg_catalog|information_schema)'
   and coalesce((select c.relnamespace from pg_class c where d.classoid = 'pg_class'::regclass and c.oid = d.objoid),
                (select p.pronamespace from pg_proc p where d.classoid = 'pg_proc'::regclass and p.oid = d.objoid),
                (select t.typnamespace from pg_type t where d.classoid = 'pg_type'::regclass and t.oid = d.objoid))
       in (select oid from home)
union all
select 'migration', name, sha256 from schema_migration
"""


def catalog(dsn: str) -> dict[tuple[str, str], str]:
    """Everything that is in the database, by kind and name."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        return {(kind, name): str(text) for kind, name, text in connection.execute(_EVERYTHING).fetchall()}


def differences(one: dict[tuple[str, str], str], other: dict[tuple[str, str], str]) -> set[tuple[str, str]]:
    """Kinds and names of what only one has, or both have and differently."""
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
