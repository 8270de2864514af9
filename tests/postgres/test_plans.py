"""What the hot paths cost: no scan of the whole table, no index touched by a beat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from seedcore.store.queries import queries
from tests.servers import PostgresServer
from tests.waiting import eventually

ROWS = 20_000
ALIVE = {"statuses": ["alive"], "fresh_only": True}
PAGE = {
    "statuses": None, "epoch": None, "organ_id": None, "logical_id": None, "labels": "{}", "fresh_only": False,
    "node_id": None, "selector": "[]", "endpoint": None,
    "after_logical_id": "agent-05000", "after_instance_id": "00000000-0000-0000-0000-000000000000", "limit": 101,
}  # fmt: skip
HOT_READS: dict[str, tuple[str, dict[str, Any]]] = {
    "one best": ("best_instances", {"logical_ids": ["agent-07007"]}),
    "many best": ("best_instances", {"logical_ids": [f"agent-{number:05d}" for number in range(7, 10_000, 100)]}),
    "default page": ("list_instances", {**PAGE, **ALIVE}),
    "first page": ("list_instances", {**PAGE, **ALIVE, "after_logical_id": ""}),
    "page of every status": ("list_instances", PAGE),
    "page of an organ": ("list_instances", {**PAGE, **ALIVE, "organ_id": "organ-3"}),
    "page of a selector": (
        "list_instances",
        {**PAGE, **ALIVE, "selector": '[{"key": "gpu", "op": "absent", "values": []}]'},
    ),
    "page of an agent": ("list_instances", {**PAGE, "logical_id": "agent-07000", "after_logical_id": ""}),
    "page of the dead": ("list_instances", {**PAGE, "statuses": ["dead"]}),
    "live": ("load_live", {**{key: PAGE[key] for key in ("after_logical_id", "after_instance_id")}, "limit": 1000}),
    "one": ("get_instance", {"instance_id": "00000000-0000-4000-8000-000000000007"}),
    "instances": ("instances", {"logical_id": "agent-07000", "limit": 20}),
}


@pytest.fixture(scope="module")
def fleet(server: PostgresServer) -> Iterator[psycopg.Connection]:
    """20,000 instances of 10,000 agents, one in ten of them dead."""
    name = server.create_database()
    with psycopg.connect(server.dsn(name), autocommit=True) as connection:
        connection.execute(
            """
            insert into registry_instance (instance_id, logical_id, cluster_epoch, status, stopped_at, organ_id)
            select ('00000000-0000-4000-8000-' || lpad(n::text, 12, '0'))::uuid,
                   'agent-' || lpad((n %% 10000)::text, 5, '0'), 'epoch-1',
                   (case when n %% 10 = 0 then 'dead' else 'alive' end)::instancestatus,
                   case when n %% 10 = 0 then now() end, 'organ-' || n %% 7
              from generate_series(1, %s) as n
            """,
            (ROWS,),
        )
        connection.execute("vacuum analyze registry_instance")
        yield connection
    server.drop_database(name)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def scans_of(db: psycopg.Connection) -> tuple[int, int]:
    """How often this session has scanned the table whole of late, and how many rows that read."""
    row = db.execute(
        "select seq_scan, seq_tup_read from pg_stat_xact_user_tables where relname = 'registry_instance'"
    ).fetchone()
    assert row is not None
    return row


@pytest.mark.parametrize("read", HOT_READS)
def test_hot_read_scans_no_whole_table(fleet: psycopg.Connection, read: str) -> None:
    name, parameters = HOT_READS[read]
    explain = f"explain (format json) {queries()[name]}"
    row = fleet.execute(explain, parameters).fetchone()
    assert row is not None
    whole = [
        node
        for node in nodes(row[0][0]["Plan"])
        if node.get("Relation Name") == "registry_instance" and node["Node Type"] == "Seq Scan"
    ]
    assert not whole, json.dumps(row[0], indent=1)


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("read", HOT_READS)
def test_hot_read_scans_no_whole_table_when_it_is_prepared(fleet: psycopg.Connection, read: str, mode: str) -> None:
    """The pool prepares what it runs often, and the planner may then plan without the values."""
    name, parameters = HOT_READS[read]
    fleet.execute(f"set plan_cache_mode = {mode}")
    with fleet.transaction():
        before = scans_of(fleet)
        cursor = fleet.execute(queries()[name], parameters, prepare=True)
        assert cursor.fetchall()
        assert scans_of(fleet) == before
        fleet.execute("select count(cause_detail) from registry_instance")
        assert scans_of(fleet) == (before[0] + 1, before[1] + ROWS)


async def test_at_least_95_of_100_beats_are_hot(server: PostgresServer) -> None:
    count, rounds = 4000, 12
    name = server.create_database()
    with psycopg.connect(server.dsn(name), autocommit=True) as db:
        db.execute(
            "insert into registry_instance (instance_id, logical_id, cluster_epoch, status, labels, metadata)"
            " select gen_random_uuid(), 'agent-' || n, 'epoch-1', 'alive', '{\"zone\": \"a\"}', '{\"model\": \"m\"}'"
            " from generate_series(1, %s) n",
            (count,),
        )
        ids = [instance_id for (instance_id,) in db.execute("select instance_id::text from registry_instance")]
        for _ in range(rounds):
            for start in range(0, count, 1000):
                batch = "{" + ",".join(ids[start : start + 1000]) + "}"
                db.execute(queries()["beat_many"], {"ids": batch, "ages_s": [0.0] * 1000, "term": None})

    # a session that has ended has published its statistics
    def hot_updates() -> int:
        with psycopg.connect(server.dsn(name)) as db:
            row = db.execute(
                "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'registry_instance'"
            ).fetchone()
        assert row is not None
        assert row[0] == count * rounds
        return int(row[1])

    hot = await eventually(hot_updates)
    server.drop_database(name)
    assert hot >= 0.95 * count * rounds


def test_no_index_holds_what_a_beat_changes(fleet: psycopg.Connection) -> None:
    definitions = [
        text for (text,) in fleet.execute("select indexdef from pg_indexes where tablename like 'registry%'")
    ]
    assert definitions
    assert not [text for text in definitions if "last_heartbeat" in text]
