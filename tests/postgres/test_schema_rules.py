"""Schema files after the baseline may be applied while older registries are at work: CONTRIBUTING.md, "The schema"."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from seedcore.store.migrations import Migration, known_migrations
from tests.postgres.rules import prepare, problems_of
from tests.servers import PostgresServer

# the baseline is what the first release makes in an empty database
BASELINE = 7
LATER = [migration for migration in known_migrations() if migration.number > BASELINE]
NEXT = f"{BASELINE + 1:04}"
HEAD = "-- A file that breaks a rule, so that the test notices it.\n"


@pytest.fixture
def baseline(postgres18: PostgresServer) -> Iterator[psycopg.Connection]:
    """A database with the files of the baseline, and rows."""
    name = postgres18.create_database(template="template1")
    with psycopg.connect(postgres18.dsn(name), autocommit=True) as connection:
        for migration in known_migrations()[:BASELINE]:
            connection.execute(migration.sql)
        prepare(connection)
        yield connection
    postgres18.drop_database(name)


def test_every_file_after_the_baseline_keeps_the_rules(baseline: psycopg.Connection) -> None:
    assert [(file.name, problem) for file in LATER for problem in problems_of(baseline, file)] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("create table more (id int)", "no comment"),
        (HEAD + "create index more on registry_instance (last_heartbeat)", "holds last_heartbeat"),
        (
            HEAD + "create index more on registry_instance (status) where last_heartbeat > '2024-01-01'",
            "holds last_heart",
        ),
        (HEAD + "create index more on registry_instance (node_id)", "-- safe: "),
        (HEAD + "create index concurrently more on registry_instance (node_id)", "cannot run inside a transaction"),
        (HEAD + "alter table registry_instance alter column pid type bigint", "column used by a view"),
        (HEAD + "alter table registry_transition alter column seq type numeric", "rewrites registry_transition"),
        (HEAD + "alter table registry_transition alter column cause_detail type varchar", "was text and is"),
        (HEAD + "alter table registry_instance add column more int not null", "fails on tables with rows"),
        (HEAD + "alter table registry_instance add column more float not null default random()", "rewrites"),
        (HEAD + "alter table registry_instance alter column node_id set not null", "fails on tables with rows"),
        (HEAD + "alter table registry_instance alter column cause_by set not null", "fails on tables with rows"),
        (HEAD + "alter table cluster_epoch alter column staged_at drop not null", ""),
        (HEAD + "alter table registry_instance drop column organ_id cascade", "organ_id is gone"),
        (HEAD + "alter table registry_instance rename column organ_id to organ", "organ_id is gone"),
        (HEAD + "alter table registry_transition rename to history", "registry_transition.cause_kind is gone"),
        (HEAD + "alter table registry_instance add constraint more check (pid < 1e9)", "constraint more reads all"),
        (HEAD + "update registry_instance set organ_id = 'none' where organ_id is null", "writes rows"),
        (HEAD + "drop function beat(uuid)", "function beat can no more"),
        (
            HEAD + "create function stage_epoch(a text, b int default 1) returns bool language sql as 'select true'",
            "ambig",
        ),
        (
            HEAD
            + "drop function beat(uuid); create function beat(a uuid, b int) returns text language sql as 'select 1'",
            "function beat can no more",
        ),
        (
            HEAD + "drop function beat(uuid); create function beat(a uuid) returns int language sql as 'select 1'",
            "beat can",
        ),
        (
            HEAD + "alter table registry_instance add constraint more check (pid < 1e9) not valid",
            "may refuse what older",
        ),
        (
            HEAD + "-- safe: all are less\nalter table registry_instance drop constraint registry_instance_pid_check,"
            " add constraint registry_instance_pid_check check (pid > 7) not valid",
            "",
        ),
        (
            HEAD + "alter table registry_instance drop constraint registry_instance_pid_check,"
            " add constraint registry_instance_pid_check check (pid > 7) not valid",
            "may refuse what older",
        ),
        (HEAD + "alter table cluster_epoch alter column staged_at drop default", "staged_at has no default any more"),
        (HEAD + "alter table registry_transition alter column id drop identity", "id has no default any more"),
        (HEAD + "drop sequence registry_version cascade", "sequence registry_version is gone"),
        (HEAD + "alter type instancestatus add value 'resting'", "has 'resting' now, which older code cannot read"),
        (HEAD + "alter type instancestatus rename value 'dead' to 'gone'", "has 'gone' now"),
        (HEAD + "alter table registry_instance enable row level security", "row security of registry_instance hides"),
        (HEAD + "alter table registry_transition force row level security", "row security of registry_transition"),
        (HEAD + "drop index registry_instance_ended", "index registry_instance_ended is gone"),
        (
            HEAD + "drop index registry_instance_ended;"
            "\n-- safe: few are dead\ncreate index registry_instance_ended on registry_instance (stopped_at)",
            "index registry_instance_ended is gone",
        ),
        (HEAD + "alter table registry_transition drop constraint registry_transition_pkey", "registry_transition_pkey"),
        (HEAD + "alter table superseded_cluster drop constraint superseded_cluster_pkey", "`on conflict` names"),
        (HEAD + "alter table cluster_epoch drop constraint cluster_epoch_number_key", "cluster_epoch_number_key of"),
        (
            HEAD + "create trigger more before update on registry_instance for each row"
            " execute function registry_instance_guard()",
            "trigger more meets what older registries write",
        ),
        (
            HEAD + "alter table registry_instance disable trigger registry_instance_guard",
            "registry_instance_guard meets",
        ),
        (HEAD + "drop trigger registry_instance_remember on registry_instance", "registry_instance_remember of"),
        (
            HEAD + "drop function beat(uuid); create function beat(a uuid) returns text language sql as 'select 1'",
            "arguments of other names",
        ),
        (HEAD + "lock table registry_instance in access exclusive mode", "locks a table by hand"),
        (HEAD + "select 1;\n-- now\nLOCK registry_instance", "locks a table by hand"),
        (HEAD + "do $$ begin lock table registry_instance; end $$", "locks a table by hand"),
        (HEAD + "do $$ begin execute 'lock registry_instance'; end $$", "locks a table by hand"),
        (HEAD + "select pg_sleep(0)", "sleeps while it holds"),
        (
            HEAD + "alter table registry_instance add column more int not null default 7",
            "",
        ),
        (
            HEAD + "alter table registry_instance add column more int;"
            " alter table registry_instance add check (more is not null) not valid",
            "a registration fails after it",
        ),
        (HEAD + "do $$ begin perform pg_sleep_for('0'); end $$", "sleeps while it holds"),
    ],
)
def test_file_that_would_stop_older_registries_is_noticed(
    baseline: psycopg.Connection, text: str, expected: str
) -> None:
    problems = problems_of(baseline, Migration(BASELINE + 1, f"{NEXT}_more.sql", text))
    assert any(expected in problem for problem in problems) if expected else problems == [], problems


def test_file_that_takes_away_is_named_for_it(baseline: psycopg.Connection) -> None:
    text = HEAD + "alter table cluster_epoch alter column staged_at set default now()"
    problems = problems_of(baseline, Migration(BASELINE + 1, f"{NEXT}_contract_more.sql", text))
    assert [problem for problem in problems if "takes nothing away" in problem] == problems != []
    text = HEAD + "drop function beat(uuid)"
    assert problems_of(baseline, Migration(BASELINE + 1, f"{NEXT}_contract_more.sql", text)) == []


@pytest.mark.parametrize(
    "text",
    [
        "-- safe: few rows have one\ncreate index more on registry_instance (node_id) where reported_status <> status",
        "alter table registry_instance add column more int default 7",
        "-- safe: no pid is\nalter table registry_instance add constraint more check (pid < 1e9) not valid",
        "-- safe: the column is new and empty\nalter table registry_instance add column more int check (more > 0)",
        "create table more (id int primary key, of text check (of <> '')); create index more_of on more (of)",
        "-- safe: a few\nupdate registry_instance set organ_id = 'none' where organ_id is null",
        "drop function beat(uuid);"
        " create function beat(p_instance_id uuid, b int default 1) returns text language sql as 'select 1'",
        "-- safe: no query searches by it\ndrop index registry_instance_ended",
        "-- safe: it is sent to no registry that cannot read it\nalter type instancestatus add value 'resting'",
        "-- safe: it refuses nothing\ncreate trigger more before update on registry_instance"
        " for each row execute function registry_instance_guard()",
        "create table more (lock text, locked_at timestamptz); -- without a lock, or pg_sleep(1)\n"
        "select from registry_instance for update skip locked",
        "drop trigger registry_instance_remember on registry_instance;"
        " create trigger registry_instance_remember"
        " after update of status, reported_status, holds on registry_instance"
        " for each row execute function registry_instance_remember()",
        "create or replace view active_instance as select a.*, 1 as more from active_instances a",
    ],
)
def test_file_that_keeps_the_rules_is_not_refused(baseline: psycopg.Connection, text: str) -> None:
    assert problems_of(baseline, Migration(BASELINE + 1, f"{NEXT}_more.sql", HEAD + text)) == []
