"""SQL by hand: what the functions return to psql and other programs, and what the database refuses."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from seedcore.core.answers import InstanceFilter
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_EPOCH_CHARS, MAX_ID_CHARS, MAX_LEASE_S, MAX_TEXT_CHARS
from seedcore.core.selection import best
from seedcore.store.migrations import known_migrations
from seedcore.store.postgres import PostgresStore
from seedcore.store.tables import MAX_STAGED_EPOCHS
from tests.builders import iid, joins, turns

BASELINE = 7
"""So many schema files are the baseline: CONTRIBUTING.md."""

UNKNOWN_INSTANCE = "SC001"
FORBIDDEN_TRANSITION = "SC002"
ANOTHER_AGENT = "SC003"
RETIRED_EPOCH = "SC004"
TOO_MANY_STAGED = "SC005"
NULL_GIVEN = "22004"
BAD_PARAMETER = "22023"
BAD_TEXT = "22P02"
NOT_NULL = "23502"
FOREIGN_KEY = "23503"
CHECK = "23514"


@contextmanager
def refused(sqlstate: str) -> Iterator[None]:
    with pytest.raises(psycopg.Error) as caught:
        yield
    assert caught.value.sqlstate == sqlstate, caught.value


def call(db: psycopg.Connection, statement: str, *parameters: object) -> object:
    """The one value that a statement returns."""
    row = db.execute(statement, parameters).fetchone()
    assert row is not None
    return row[0]


def register(db: psycopg.Connection, number: int = 1, logical_id: str = "agent", status: str = "starting") -> str:
    assert call(db, "select register_instance(%s, %s)", iid(number), logical_id) == "epoch-1"
    if status != "starting":
        assert call(db, "select set_instance_status(%s, %s)", iid(number), status) == "applied"
    return iid(number)


# Registering


def test_registering_answers_the_epoch_and_again_the_same(db: psycopg.Connection) -> None:
    statement = "select register_instance(%s, 'agent', p_organ_id => 'vision', p_ip_address => '10.0.0.1', p_pid => 7)"
    assert call(db, statement, iid(1)) == "epoch-1"
    assert call(db, statement, iid(1)) == "epoch-1"
    assert call(db, "select register_instance(%s, 'agent', 'green')", iid(2)) == "green"
    rows = db.execute("select status::text, cluster_epoch, organ_id, host(ip_address), pid from registry_instance")
    assert set(rows) == {("starting", "epoch-1", "vision", "10.0.0.1", 7), ("starting", "green", None, None, None)}


@pytest.mark.parametrize(
    ("arguments", "sqlstate"),
    [
        ("null, 'agent'", NULL_GIVEN),
        ("%(id)s, null", NULL_GIVEN),
        ("'not-a-uuid', 'agent'", BAD_TEXT),
        ("%(id)s, ''", BAD_PARAMETER),
        ("%(id)s, '  '", BAD_PARAMETER),
        ("%(id)s, E'\\u3000'", BAD_PARAMETER),
        ("%(id)s, E'hand\\n4'", BAD_PARAMETER),
        ("%(id)s, E'hand\\x7f'", BAD_PARAMETER),
        ("%(id)s, repeat('x', 256)", CHECK),
        ("%(id)s, 'agent', repeat('x', 129)", BAD_PARAMETER),
        ("%(id)s, 'agent', ' '", BAD_PARAMETER),
        ("%(id)s, 'agent', p_actor_name => ' '", BAD_PARAMETER),
        ("%(id)s, 'agent', p_organ_id => E'\\t'", BAD_PARAMETER),
        ("%(id)s, 'agent', p_seq => -9", BAD_PARAMETER),
        ("%(id)s, 'agent', p_node_id => repeat('x', 256)", CHECK),
        ("%(id)s, 'agent', p_serve_route => repeat('x', 1025)", CHECK),
        ("%(id)s, 'agent', p_ip_address => 'nowhere'", BAD_TEXT),
        ("%(id)s, 'agent', p_pid => 0", CHECK),
        ("%(id)s, 'agent', p_labels => '[]'", CHECK),
        ("%(id)s, 'agent', p_metadata => '7'", CHECK),
        ("%(id)s, 'agent', p_labels => 'not json'", BAD_TEXT),
        ('%(id)s, \'agent\', p_labels => \'{"a": {"x": 1}, "b": 5}\'', BAD_PARAMETER),
        ("%(id)s, 'agent', p_labels => '{\"\": \"no key\"}'", BAD_PARAMETER),
        ("%(id)s, 'agent', p_labels => jsonb_build_object('k', repeat('v', 256))", BAD_PARAMETER),
        ("%(id)s, 'agent', p_labels => jsonb_build_object(repeat('k', 64), 'v')", BAD_PARAMETER),
        (
            "%(id)s, 'agent', p_labels => (select jsonb_object_agg(n, 'v') from generate_series(1, 10000) n)",
            BAD_PARAMETER,
        ),
        ("%(id)s, 'agent', p_metadata => jsonb_build_object('k', repeat('v', 200000))", BAD_PARAMETER),
        ("%(id)s, 'agent', p_metadata => '{\"k\": [1e5000]}'", BAD_PARAMETER),
        (
            "%(id)s, 'agent', p_metadata => ('{\"k\": ' || repeat('[', 500) || repeat(']', 500) || '}')::jsonb",
            BAD_PARAMETER,
        ),
    ],
)
def test_bad_registration_is_an_error_and_leaves_nothing(db: psycopg.Connection, arguments: str, sqlstate: str) -> None:
    with refused(sqlstate):
        db.execute(f"select register_instance({arguments})", {"id": iid(1)})
    assert call(db, "select count(*) from registry_instance") == 0
    assert call(db, "select count(*) from cluster_epoch") == 1


def test_refused_value_is_named_with_its_limit(db: psycopg.Connection) -> None:
    for arguments, expected in (
        ("'  '", "logical_id must not be empty"),
        ("E'a\\nb'", "logical_id must not contain control characters"),
        ("'a', p_labels => '{\"b\": 5}'", 'label "b" must be text'),
        ("'a', p_labels => (select jsonb_object_agg(n, '') from generate_series(1, 65) n)", "at most 64 keys, not 65"),
        ("'a', p_seq => -9", "seq must not be negative"),
    ):
        with pytest.raises(psycopg.Error) as caught:
            db.execute(f"select register_instance('{iid(1)}', {arguments})")
        assert str(caught.value).startswith(f"instance {iid(1)}: ")
        assert expected in str(caught.value)


def test_endpoints_by_sql_are_checked_stored_and_changed_by_registering_again(db: psycopg.Connection) -> None:
    statement = "select register_instance(%s, 'agent', p_endpoints => %s)"
    for wrong in ('{"http": "no URL"}', '{"http": 5}', '{"http": "http://ann:secret@h"}'):
        with pytest.raises(psycopg.Error) as caught:
            db.execute(statement, (iid(1), wrong))
        assert str(caught.value).startswith(f'instance {iid(1)}: endpoint "http" must ')
        assert "secret" not in str(caught.value)
    with refused(CHECK):
        db.execute(statement, (iid(1), "[]"))
    for endpoints in ('{"http": "http://h:1"}', '{"http": "http://h:2"}', "{}"):
        db.execute(statement, (iid(1), endpoints))
        assert call(db, "select endpoints from registry_instance") == json.loads(endpoints)
    db.execute(statement, (iid(1), '{"http": "http://h:3"}'))
    db.execute("select set_instance_status(%s, 'alive')", (iid(1),))
    assert call(db, "select endpoints ->> 'http' from active_instance") == "http://h:3"


async def test_values_of_other_programs_that_are_no_text_are_no_endpoints(
    db: psycopg.Connection, store: PostgresStore
) -> None:
    register(db, 1, status="alive")
    db.execute(
        """update registry_instance set endpoints = '{"http": 5, "grpc": null, "a": ["b"], "tcp": "tcp://h:1"}'"""
    )
    (row,) = await store.list_instances(InstanceFilter(), 10)
    (state,) = await store.live_states(("", iid(0)), 10)
    assert row.endpoints == state.endpoints == {"tcp": "tcp://h:1"}
    listed = [
        len(await store.list_instances(InstanceFilter(endpoint=name), 10)) for name in ("http", "grpc", "a", "tcp")
    ]
    assert listed == [0, 0, 0, 1]


def test_arrays_of_a_batch_must_be_given_and_fit_together(db: psycopg.Connection) -> None:
    instance_id = register(db)
    for call_of, sqlstate in (
        ("register_instances(null)", NULL_GIVEN),
        ("register_instances('[{}]')", NULL_GIVEN),
        ("register_instances('{}')", BAD_PARAMETER),
        ("beat_many(null)", NULL_GIVEN),
        ("beat_many(array[%(id)s, null]::uuid[])", NULL_GIVEN),
        ("beat_many(array[%(id)s]::uuid[], array[0, 0])", BAD_PARAMETER),
        ("set_instance_statuses(null, '{}', null, null, null, null)", NULL_GIVEN),
        ("set_instance_statuses('{}', null, null, null, null, null)", NULL_GIVEN),
        (
            "set_instance_statuses(array[%(id)s]::uuid[], array[null]::instancestatus[], null, null, null, null)",
            NULL_GIVEN,
        ),
        ("set_instance_statuses(array[%(id)s]::uuid[], '{alive,dead}', null, null, null, null)", BAD_PARAMETER),
        ("set_instance_statuses(array[%(id)s]::uuid[], '{alive}', '{1,2}', null, null, null)", BAD_PARAMETER),
        ("set_instance_statuses(array[%(id)s]::uuid[], '{alive}', null, '{}', null, null)", BAD_PARAMETER),
        ("set_instance_statuses(array[%(id)s]::uuid[], '{alive}', null, null, null, null, 'w', '{}')", BAD_PARAMETER),
        ("hold_instances(null, '{}', null, null, null, null, null)", NULL_GIVEN),
        ("hold_instances(array[%(id)s]::uuid[], null, null, null, null, null, null)", NULL_GIVEN),
        (
            "hold_instances(array[%(id)s]::uuid[], '{node}', array['{}', null]::jsonb[], null, null, null, null)",
            BAD_PARAMETER,
        ),
        (
            "hold_instances(array[%(id)s]::uuid[], '{node}', array['[]']::jsonb[], null, null, null, null)",
            BAD_PARAMETER,
        ),
        (
            "hold_instances(array[%(id)s]::uuid[], '{node}', array['{\"a\": 1}']::jsonb[], null, null, null, null)",
            BAD_PARAMETER,
        ),
        ("refine_causes(array[%(id)s]::uuid[], null, null)", NULL_GIVEN),
        ("refine_causes(array[%(id)s]::uuid[], '{}', null)", BAD_PARAMETER),
    ):
        with refused(sqlstate):
            db.execute(f"select * from {call_of}", {"id": instance_id})
    assert call(db, "select status::text from registry_instance") == "starting"
    statement = "select outcome from set_instance_statuses(array[%s]::uuid[], '{alive}', null, null, null, null)"
    assert call(db, statement, instance_id) == "applied"
    assert db.execute("select * from beat_many('{}')").fetchall() == []
    assert db.execute("select * from register_instances('[]')").fetchall() == []


def test_refused_registration_has_its_reason_as_sqlstate(db: psycopg.Connection) -> None:
    register(db, 1, "mine")
    with refused(ANOTHER_AGENT):
        db.execute("select register_instance(%s, 'yours')", (iid(1),))
    register(db, 2, status="dead")
    with refused(FORBIDDEN_TRANSITION):
        db.execute("select register_instance(%s, 'agent')", (iid(2),))
    db.execute("select set_current_epoch('green')")
    with refused(RETIRED_EPOCH):
        db.execute("select register_instance(%s, 'agent', 'epoch-1')", (iid(3),))
    for number in range(MAX_STAGED_EPOCHS):
        db.execute("select register_instance(%s, 'agent', %s)", (iid(100 + number), f"own-{number}"))
    with refused(TOO_MANY_STAGED):
        db.execute("select register_instance(%s, 'agent', 'one-more')", (iid(4),))


def test_limits_are_those_of_the_package(db: psycopg.Connection) -> None:
    # an emoji is one character to both
    longest, route = "\U0001f600" * MAX_ID_CHARS, "\U0001f600" * MAX_TEXT_CHARS
    epoch = "\U0001f600" * MAX_EPOCH_CHARS
    statement = "select register_instance(%s, %s, %s, %s, %s, p_namespace => %s, p_organ_id => %s)"
    assert call(db, statement, iid(1), longest, epoch, longest, route, longest, longest) == epoch
    assert call(db, "select set_instance_status(%s, 'alive', p_cause => %s)", iid(1), route) == "applied"
    with refused(CHECK):
        db.execute("select set_instance_status(%s, 'dead', p_cause => %s)", (iid(1), route + "x"))
    assert call(db, "select number from begin_registry('cluster', null, %s)", MAX_LEASE_S) == 1
    for lease_s in (0, -1, MAX_LEASE_S + 1):
        with refused(CHECK):
            db.execute("select begin_registry('cluster', null, %s)", (lease_s,))


# Status changes


def test_status_change_answers_what_it_did(db: psycopg.Connection) -> None:
    instance_id = register(db)
    assert call(db, "select set_instance_status(%s, 'alive')", instance_id) == "applied"
    assert call(db, "select set_instance_status(%s, 'alive')", instance_id) == "unchanged"
    assert call(db, "select set_instance_status(%s, 'draining', 3, 'rolling')", instance_id) == "applied"
    assert call(db, "select set_instance_status(%s, 'alive', 3)", instance_id) == "unchanged"
    assert call(db, "select status::text from registry_instance") == "draining"


@pytest.mark.parametrize(
    ("arguments", "sqlstate"),
    [
        ("null, 'alive'", NULL_GIVEN),
        ("%(id)s, null", NULL_GIVEN),
        ("'not-a-uuid', 'alive'", BAD_TEXT),
        ("%(id)s, 'zombie'", BAD_TEXT),
        ("%(id)s, 'draining', -9", BAD_PARAMETER),
        ("%(unknown)s, 'alive'", UNKNOWN_INSTANCE),
        ("%(id)s, 'starting'", FORBIDDEN_TRANSITION),
        ("%(dead)s, 'alive'", FORBIDDEN_TRANSITION),
    ],
)
def test_bad_status_change_is_an_error_and_changes_nothing(
    db: psycopg.Connection, arguments: str, sqlstate: str
) -> None:
    ids = {"id": register(db, 1, status="alive"), "dead": register(db, 2, status="dead"), "unknown": iid(9)}
    with refused(sqlstate):
        db.execute(f"select set_instance_status({arguments})", ids)
    assert [status for (status,) in db.execute("select status::text from registry_instance order by instance_id")] == [
        "alive",
        "dead",
    ]


def test_cause_of_a_status_change_has_the_kind_that_is_given(db: psycopg.Connection) -> None:
    instance_id = register(db)
    cause = "select cause_kind::text, cause_detail, cause_by from registry_instance"
    for arguments, expected in (
        ("'alive'", (None, None, None)),
        ("'draining', null, 'a pause'", ("agent", "a pause", None)),
        ("'alive', null, ''", (None, None, None)),
        ("'dead', null, null, 'operator', 'ann'", ("operator", None, "ann")),
    ):
        assert call(db, f"select set_instance_status(%s, {arguments})", instance_id) == "applied"
        assert db.execute(cause).fetchone() == expected, arguments


# Holds


def test_instance_is_drained_and_released_by_hand(db: psycopg.Connection) -> None:
    instance_id = register(db, status="alive")
    hold = "select hold_instance(%s, 'upkeep', 'ann', '2030-01-01 12:00+02')"
    assert call(db, hold, instance_id) == "applied"
    with db.transaction():
        db.execute("set local time zone 'Asia/Tokyo'")
        assert call(db, hold, instance_id) == "unchanged"
    held = db.execute("select status::text, reported_status::text, holds from registry_instance").fetchone()
    assert held is not None
    assert held[:2] == ("draining", "alive")
    assert set(held[2]) == {"operator"}
    assert held[2]["operator"].pop("since")
    assert held[2]["operator"] == {"reason": "upkeep", "by": "ann", "expires_at": "2030-01-01T10:00:00.000000+00:00"}
    assert call(db, "select hold_instance(%s)", instance_id) == "applied"
    assert call(db, "select release_instance(%s, p_kind => 'node')", instance_id) == "unchanged"
    assert call(db, "select release_instance(%s, 'done', 'ann')", instance_id) == "applied"
    assert call(db, "select release_instance(%s)", instance_id) == "unchanged"
    kept = db.execute(
        "select to_status::text, hold::text, cause_kind::text, cause_detail, cause_by, expires_at is null"
        "  from registry_transition order by id desc limit 3"
    ).fetchall()
    assert kept == [
        ("alive", "operator", "operator", "done", "ann", True),
        ("draining", "operator", "operator", None, None, True),
        ("draining", "operator", "operator", "upkeep", "ann", False),
    ]


@pytest.mark.parametrize(
    ("statement", "sqlstate"),
    [
        ("select hold_instance(null)", NULL_GIVEN),
        ("select hold_instance(%(id)s, p_kind => null)", NULL_GIVEN),
        ("select hold_instance(%(id)s, p_kind => 'whim')", BAD_TEXT),
        ("select hold_instance(%(id)s, repeat('x', 1025))", BAD_PARAMETER),
        ("select hold_instance(%(id)s, p_by => repeat('x', 256))", BAD_PARAMETER),
        ("select hold_instance(%(id)s, p_expires_at => 'infinity')", BAD_PARAMETER),
        ("select hold_instance(%(unknown)s)", UNKNOWN_INSTANCE),
        ("select hold_instance(%(dead)s)", FORBIDDEN_TRANSITION),
        ("select release_instance(null)", NULL_GIVEN),
        ("select release_instance(%(unknown)s)", UNKNOWN_INSTANCE),
        ("update registry_instance set holds = '[]' where instance_id = %(id)s", BAD_PARAMETER),
        ("update registry_instance set holds = '{\"whim\": {}}' where instance_id = %(id)s", BAD_TEXT),
        ("update registry_instance set holds = '{\"node\": 7}' where instance_id = %(id)s", BAD_PARAMETER),
    ],
)
def test_bad_hold_is_an_error_and_changes_nothing(db: psycopg.Connection, statement: str, sqlstate: str) -> None:
    ids = {"id": register(db, 1, status="alive"), "dead": register(db, 2, status="dead"), "unknown": iid(9)}
    with refused(sqlstate):
        db.execute(statement, ids)
    assert call(db, "select count(*) from registry_instance where holds <> '{}' or status = 'draining'") == 0


def test_status_that_is_written_directly_is_the_reported_one(db: psycopg.Connection) -> None:
    register(db, status="alive")
    db.execute("update registry_instance set status = 'draining'")
    assert call(db, "select reported_status::text from registry_instance") == "draining"
    db.execute("update registry_instance set holds = '{\"node\": {}}', status = 'alive'")
    row = db.execute("select status::text, reported_status::text, holds -> 'node' from registry_instance").fetchone()
    assert row is not None
    assert row[:2] == ("draining", "alive")
    assert row[2].pop("since")
    assert row[2] == {"reason": None, "by": None, "expires_at": None}


# Beats, epochs, expiry


def test_beat_answers_what_became_of_it(db: psycopg.Connection) -> None:
    assert call(db, "select beat(%s)", register(db, 1)) == "renewed"
    assert call(db, "select beat(%s)", register(db, 2, status="dead")) == "dead"
    assert call(db, "select beat(%s)", iid(9)) == "unknown"
    with refused(NULL_GIVEN):
        db.execute("select beat(null)")
    with refused(BAD_TEXT):
        db.execute("select beat('not-a-uuid')")


def test_batch_of_beats_needs_no_ages(db: psycopg.Connection) -> None:
    ids = [register(db, 1), register(db, 2), iid(9)]
    db.execute("update registry_instance set last_heartbeat = now() - interval '1 hour'")
    lost = db.execute("select instance_id::text, outcome from beat_many(%s::uuid[])", (ids,)).fetchall()
    assert lost == [(iid(9), "unknown")]
    statement = "select count(*) from registry_instance where last_heartbeat > now() - interval '1 minute'"
    assert call(db, statement) == 2


@pytest.mark.parametrize("age_s", ["-1e5", "-1.001", "'nan'", "'infinity'", "'-infinity'", "1e10"])
def test_beat_of_no_possible_age_is_refused(db: psycopg.Connection, age_s: str) -> None:
    instance_id = register(db)
    with refused(BAD_PARAMETER):
        db.execute(f"select * from beat_many(array[%s]::uuid[], array[{age_s}]::double precision[])", (instance_id,))
    assert call(db, "select last_heartbeat <= now() from registry_instance")


def test_beat_is_never_of_the_future(db: psycopg.Connection) -> None:
    instance_id = register(db)
    db.execute("select * from beat_many(array[%s]::uuid[], array[-0.9])", (instance_id,))
    assert call(db, "select last_heartbeat <= now() from registry_instance")
    db.execute("select * from beat_many(array[%s, %s]::uuid[], array[null, 1e9])", (instance_id, instance_id))
    assert call(db, "select last_heartbeat <= now() from registry_instance")


def test_flip_answers_the_number_and_refuses_what_is_no_epoch(db: psycopg.Connection) -> None:
    assert call(db, "select set_current_epoch('green')") == 2
    assert call(db, "select set_current_epoch('green')") == 2
    with refused(RETIRED_EPOCH):
        db.execute("select set_current_epoch('epoch-1')")
    for bad in (None, "", " ", "a\nb", "x" * (MAX_EPOCH_CHARS + 1)):
        with refused(BAD_PARAMETER):
            db.execute("select set_current_epoch(%s)", (bad,))
        with refused(BAD_PARAMETER):
            db.execute("select stage_epoch(%s)", (bad,))
    assert call(db, "select current_epoch from cluster_metadata") == "green"


def test_sweeps_return_what_they_ended_and_keep_their_limit(db: psycopg.Connection) -> None:
    for number in (1, 2, 3):
        register(db, number, f"agent-{number}")
    register(db, 4, "witness")
    db.execute(
        "update registry_instance set last_heartbeat = now() - interval '1 minute' where logical_id <> 'witness'"
    )
    db.execute("update cluster_metadata set beats_seen_at = now()")
    statement = "select instance_id::text, logical_id from expire_stale_instances({})"
    for none in ("null, 0", "3600"):
        assert db.execute(statement.format(none)).fetchall() == []
    for bad, sqlstate in (
        ("null, null", NULL_GIVEN),
        ("null, -1", BAD_PARAMETER),
        ("-5", BAD_PARAMETER),
        ("0", BAD_PARAMETER),
        ("'nan'", BAD_PARAMETER),
        ("'infinity'", BAD_PARAMETER),
    ):
        with refused(sqlstate):
            db.execute(statement.format(bad))
    assert db.execute(statement.format("p_limit => 1")).fetchall() == [(iid(1), "agent-1")]
    assert len(db.execute(statement.format("")).fetchall()) == 2
    db.execute("select set_current_epoch('green')")
    assert db.execute("select * from expire_old_epoch_instances(0)").fetchall() == []
    with refused(NULL_GIVEN):
        db.execute("select * from expire_old_epoch_instances(null)")
    with refused(BAD_PARAMETER):
        db.execute("select * from expire_old_epoch_instances(-1)")
    assert db.execute("select logical_id from expire_old_epoch_instances()").fetchall() == [("witness",)]


# What the database refuses


@pytest.mark.parametrize(
    ("change", "sqlstate"),
    [
        ("status = 'alive'", FORBIDDEN_TRANSITION),
        ("status = 'starting'", FORBIDDEN_TRANSITION),
        ("status = 'draining', stopped_at = null", FORBIDDEN_TRANSITION),
        ("status = null", NOT_NULL),
        ("stopped_at = null", CHECK),
        ("logical_id = 'another'", ANOTHER_AGENT),
        ("instance_id = '00000000-0000-0000-0000-000000000000'", ANOTHER_AGENT),
        ("cluster_epoch = 'never-staged'", FOREIGN_KEY),
    ],
)
def test_direct_update_cannot_revive_or_rename_the_dead(db: psycopg.Connection, change: str, sqlstate: str) -> None:
    register(db, status="dead")
    with refused(sqlstate):
        db.execute(f"update registry_instance set {change}")


@pytest.mark.parametrize(
    ("change", "sqlstate"),
    [
        ("status = 'starting'", FORBIDDEN_TRANSITION),
        ("status = null", NOT_NULL),
        ("stopped_at = now()", CHECK),
        ("logical_id = 'another'", ANOTHER_AGENT),
        ("logical_id = null", NOT_NULL),
    ],
)
def test_direct_update_of_the_living_is_guarded_too(db: psycopg.Connection, change: str, sqlstate: str) -> None:
    register(db, status="alive")
    with refused(sqlstate):
        db.execute(f"update registry_instance set {change}")


def test_direct_update_that_is_allowed_keeps_the_books(db: psycopg.Connection) -> None:
    register(db, status="alive")
    before = db.execute("select status_changed_at, version from registry_instance").fetchone()
    assert before is not None
    db.execute("update registry_instance set status = 'dead', cause_kind = 'operator', cause_detail = 'by hand'")
    row = db.execute("select status_changed_at, version, stopped_at from registry_instance").fetchone()
    assert row is not None
    assert row[0] == row[2] > before[0]
    assert row[1] > before[1]


def test_row_cannot_be_made_dead_without_an_end_or_in_an_unknown_epoch(db: psycopg.Connection) -> None:
    statement = (
        "insert into registry_instance (instance_id, logical_id, cluster_epoch, status) values (%s, 'a', %s, %s)"
    )
    with refused(CHECK):
        db.execute(statement, (iid(1), "epoch-1", "dead"))
    with refused(FOREIGN_KEY):
        db.execute(statement, (iid(1), "unheard-of", "alive"))


def test_metadata_has_one_row_for_ever(db: psycopg.Connection) -> None:
    with refused(CHECK):
        db.execute("insert into cluster_metadata (id, current_epoch, epoch_number) values (2, 'x', 9)")


# Views


async def test_view_of_the_best_agrees_with_the_rules(db: psycopg.Connection, store: PostgresStore) -> None:
    chance = random.Random(11)
    numbers = list(range(300))
    chance.shuffle(numbers)
    for start in range(0, 300, 10):  # ten of a batch start at one moment
        batch = numbers[start : start + 10]
        await store.register_many(
            [
                joins(number, f"agent-{chance.randrange(30)}", actor_name=chance.choice([None, "actor"]))
                for number in batch
            ]
        )
    statuses = [Status.ALIVE, Status.ALIVE, Status.DRAINING, Status.DEAD]
    await store.set_status_many([turns(number, chance.choice(statuses)) for number in numbers[:280]])
    db.execute("update cluster_metadata set beats_seen_at = now()")
    db.execute("update registry_instance set last_heartbeat = now() - interval '1 minute' where random() < 0.2")
    active = list(await store.list_instances(InstanceFilter(), 1000))
    names = {row.logical_id for row in active}
    expected = {name: best(row for row in active if row.logical_id == name) for name in names}
    viewed: dict[str, str] = dict(db.execute("select logical_id, instance_id::text from active_instance").fetchall())
    assert len(names) > 20
    assert viewed == {name: row.instance_id for name, row in expected.items() if row is not None}
    assert (await store.best_instances(sorted(names))).value == expected
    ids = {instance_id for (instance_id,) in db.execute("select instance_id::text from active_instances")}
    assert ids == {row.instance_id for row in active}


def test_views_show_every_column_of_the_table(db: psycopg.Connection) -> None:
    statement = "select column_name from information_schema.columns where table_name = %s"
    columns = set(db.execute(statement, ("registry_instance",)))
    assert set(db.execute(statement, ("active_instance",))) == columns
    assert set(db.execute(statement, ("active_instances",))) == columns


_WITHOUT_COMMENT = """
with named as (
    select c.oid, c.relname, c.reltype, c.relkind from pg_class c
     where c.relnamespace = 'public'::regnamespace
       and c.relname not in ('schema_migration', 'registry_transition_id_seq'))
select 'relation', n.relname::text
  from named n where n.relkind in ('r', 'v', 'S') and obj_description(n.oid, 'pg_class') is null
union all
select 'column', n.relname || '.' || a.attname
  from named n join pg_attribute a on a.attrelid = n.oid and a.attnum > 0
 where n.relkind = 'r' and col_description(n.oid, a.attnum) is null
union all
select 'type', t.typname::text
  from pg_type t
 where t.typnamespace = 'public'::regnamespace and obj_description(t.oid, 'pg_type') is null
   and (t.typtype = 'e' or t.oid in (select n.reltype from named n where n.relkind = 'c'))
union all
select 'function', p.oid::regprocedure::text
  from pg_proc p where p.pronamespace = 'public'::regnamespace and obj_description(p.oid, 'pg_proc') is null
"""


def test_every_table_column_view_type_and_function_has_a_comment(db: psycopg.Connection) -> None:
    assert db.execute(_WITHOUT_COMMENT).fetchall() == []


def test_no_function_stands_twice_in_the_baseline() -> None:
    made = [
        name
        for migration in known_migrations()[:BASELINE]
        for name in re.findall(r"^create (?:or replace )?function (\w+)", migration.sql, re.MULTILINE)
    ]
    assert len(made) > 30
    assert sorted(made) == sorted(set(made))
