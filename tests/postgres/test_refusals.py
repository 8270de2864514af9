"""One value that the database refuses is refused alone: the writer commits all others, and goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from seedcore.core.answers import Outcome
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Change, HoldChange, RegisterChange, Registration, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.errors import StoreUnavailableError
from seedcore.core.feed import Feed
from seedcore.core.holds import HoldKind
from seedcore.core.lease import BeatRate, LeaseTerms
from seedcore.core.lifecycle import Status
from seedcore.core.members import Members
from seedcore.registry.server.backlog import Key, Settled
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.writer import Writer
from seedcore.store.maintenance import inspect_database, migrate_database
from seedcore.store.postgres import PostgresStore
from seedcore.store.sessions import PoolLimits
from tests.builders import hold, holds, iid, joins, turns
from tests.servers import PostgresServer
from tests.waiting import eventually

one_server = pytest.mark.parametrize("server", ["postgres15"], indirect=True)
CONFIG = RegistryConfig("cluster", flush_interval_s=0.05, linger_s=0.02, durable_wait_s=10.0, retry_max_s=0.2)
TERMS = LeaseTerms(5.0, 15.0)
WORD = "\u043f\u0440\u0438\u0447\u0438\u043d\u0430"


@asynccontextmanager
async def writing(dsn: str) -> AsyncIterator[Writer]:
    """A writer at work on a database, with what stands before it left out: that refuses most of these values itself."""

    async def store() -> PostgresStore:
        return PostgresStore(dsn, PoolLimits(max_size=2))

    writer = Writer(CONFIG, store, Members(TERMS, 1000, Feed("test", 1000)), BeatRate(TERMS, 1e6), Clock())
    running = asyncio.create_task(writer.run())
    try:
        yield writer
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await writer.close()


async def settle(writer: Writer, *changes: Change) -> list[Settled | None]:
    """Give changes in at once, so that they share a batch; what became of each."""
    numbered = [
        replace(change, number=writer.backlog.next_number())
        if isinstance(change, HoldChange) or (isinstance(change, StatusChange) and change.seq is None)
        else change
        for change in changes
    ]
    keys: list[Key] = [writer.backlog.offer(change) for change in numbered]
    settled = await writer.backlog.settled(keys, CONFIG.durable_wait_s)
    return [settled.get(key) for key in keys]


def kinds(settled: list[Settled | None]) -> list[str]:
    return [each.kind.value if isinstance(each, Outcome) else type(each).__name__ for each in settled]


def registration(**details: object) -> RegisterChange:
    return RegisterChange(Registration(iid(2), **{"logical_id": "bad", **details}), 1)  # type: ignore[arg-type]


_CIRCLE: dict[str, object] = {}
_CIRCLE["circle"] = _CIRCLE
BAD: dict[str, Change] = {
    "registration with NUL": registration(logical_id="a\x00b"),
    "registration with half a pair": registration(organ_id="\ud800"),
    "registration with a number that is none": registration(metadata={"load": float("nan")}),
    "registration that is no JSON": registration(metadata={"bytes": b"bytes"}),
    "registration in circles": registration(metadata=_CIRCLE),
    "registration with a pid too large": registration(pid=2**70),
    "registration with an address that is none": registration(ip_address="nowhere"),
    "registration without an id": RegisterChange(Registration("junk", "bad"), 1),
    "status with NUL": turns(1, Status.ALIVE, 2, "a\x00b"),
    "status with half a pair": turns(1, Status.ALIVE, 2, "\udfff"),
    "status with a long cause": turns(1, Status.ALIVE, 2, "x" * 2000),
    "status with a number too large": turns(1, Status.ALIVE, 2**70),
    "status of no id": StatusChange("junk", Status.ALIVE, 2),
    "hold with NUL": holds(1, "a\x00b"),
    "hold with half a pair": holds(1, by="\udfff"),
    "hold with a long reason": holds(1, "x" * 2000),
    "hold of no id": HoldChange("junk", HoldKind.OPERATOR, hold()),
    "status with an operator of another type": turns(1, Status.ALIVE, 2, Cause(CauseKind.OPERATOR, by={"a": 1})),  # type: ignore[arg-type]
}


@one_server
async def test_value_that_cannot_be_stored_is_refused_alone(dsn: str, db: psycopg.Connection) -> None:
    async with writing(dsn) as writer:
        await settle(writer, joins(1, seq=1), joins(3, seq=1), joins(4, seq=1), joins(5, seq=1))
        for turn, (name, bad) in enumerate(BAD.items(), 2):
            status = Status.DRAINING if turn % 2 else Status.ALIVE
            newcomer, turned = joins(100 + turn, f"agent {turn}", seq=1), turns(3, status, turn)
            settled = await settle(
                writer, newcomer, turned, bad, turns(4, status, turn, WORD), holds(5, f"turn {turn}")
            )
            assert kinds(settled) == ["applied", "applied", "StoreRejectedError", "applied", "applied"], name
            assert writer.problem is None
    assert db.execute("select count(*) from registry_instance").fetchone() == (4 + len(BAD),)


@one_server
async def test_beat_and_explanation_that_cannot_be_stored_keep_no_others(dsn: str, db: psycopg.Connection) -> None:
    async with writing(dsn) as writer:
        await settle(writer, *(joins(number, seq=1) for number in (1, 2, 3)))
        ended = Cause(CauseKind.PROCESS_EXITED, "pid 7")
        await settle(writer, *(replace(turns(number, Status.DEAD), cause=ended) for number in (1, 2)))
        db.execute("update registry_instance set last_heartbeat = '2020-01-01'")
        writer.backlog.offer_refined(iid(1), Cause(CauseKind.OUT_OF_MEMORY, "\ud800"))
        writer.backlog.offer_refined(iid(2), Cause(CauseKind.OUT_OF_MEMORY, WORD))
        now_s = Clock().monotonic()
        writer.backlog.offer_beats([iid(3), "junk"], now_s)
        await eventually(lambda: writer.counts.beats_dropped == 1)
        await eventually(lambda: not len(writer.backlog.beats) and writer.problem is None)
    causes = "select cause_kind::text, cause_detail from registry_instance where status = 'dead' order by instance_id"
    assert db.execute(causes).fetchall() == [("process_exited", "pid 7"), ("out_of_memory", WORD)]
    assert db.execute(
        "select last_heartbeat > '2021-01-01' from registry_instance where instance_id = %s", (iid(3),)
    ).fetchone() == (True,)


@one_server
async def test_death_is_stored_without_the_words_that_cannot_be(dsn: str, db: psycopg.Connection) -> None:
    async with writing(dsn) as writer:
        await settle(writer, joins(1, seq=1))
        killed = Cause(CauseKind.PROCESS_KILLED, "\ud800")
        assert kinds(await settle(writer, turns(1, Status.DEAD, None, killed))) == ["applied"]
    row = db.execute("select status::text, cause_kind::text from registry_instance").fetchone()
    assert row == ("dead", "process_killed")


GUARD = """
create function guard_rows() returns trigger language plpgsql as $$ begin {rule} return new; end $$;
create trigger guard_rows before insert or update on registry_instance for each row execute function guard_rows();
"""


@one_server
@pytest.mark.parametrize(
    "rule",
    [
        GUARD.format(rule="if new.logical_id like 'bad%' then raise exception 'not here'; end if;"),
        "create unique index one_of_bad on registry_instance ((logical_id like 'bad%')) where logical_id like 'bad%'",
    ],
    ids=["trigger", "unique index"],
)
async def test_row_that_a_rule_of_the_owner_refuses_is_refused_alone(fresh_dsn: str, rule: str) -> None:
    async with writing(fresh_dsn) as writer:
        await settle(writer, joins(1, "bad-1", seq=1)) if "index" in rule else None
        with psycopg.connect(fresh_dsn, autocommit=True) as owner:
            owner.execute(rule)
        settled = await settle(writer, joins(3, seq=1), joins(2, "bad-2", seq=1), joins(4, seq=1))
        assert kinds(settled) == ["applied", "StoreRejectedError", "applied"]


@one_server
async def test_rule_that_refuses_everything_is_an_outage_in_which_nothing_is_lost(fresh_dsn: str) -> None:
    async with writing(fresh_dsn) as writer:
        await settle(writer, joins(1, seq=1))
        with psycopg.connect(fresh_dsn, autocommit=True) as owner:
            owner.execute(GUARD.format(rule="raise exception 'closed for repair';"))
            changes = joins(2, seq=1), turns(2, Status.ALIVE, 2), joins(3, seq=1), holds(2), holds(3)
            pending = asyncio.create_task(settle(writer, *changes))
            await eventually(lambda: "closed for repair" in str(writer.problem))
            owner.execute("drop trigger guard_rows on registry_instance")
        assert kinds(await pending) == ["applied"] * 5
        assert writer.problem is None


# Encodings


@one_server
@pytest.mark.parametrize("how", ["PGCLIENTENCODING", "the DSN"])
async def test_client_encoding_is_utf8_whatever_asks_for_another(
    dsn: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "the DSN":
        dsn = conninfo.make_conninfo(dsn, client_encoding="LATIN1")
    else:
        monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    async with writing(dsn) as writer:
        settled = await settle(writer, joins(1, WORD, seq=1), turns(1, Status.ALIVE, 2, WORD))
    assert kinds(settled) == ["applied"] * 2


@one_server
@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_database_of_another_encoding_is_refused_by_its_name_in_one_line(
    server: PostgresServer, encoding: str, tmp_path: Path
) -> None:
    name = f"in_{encoding.lower()}"
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        provider = "locale_provider libc" if admin.info.server_version >= 150000 else ""
        admin.execute(
            f"create database {name} template template0 encoding '{encoding}' {provider} lc_collate 'C' lc_ctype 'C'"
        )
    dsn = server.dsn(name)
    expected = (
        f"^the database is away: the encoding of database {name} is {encoding}, and the registry needs UTF8: make .*"
    )
    try:
        for ask in (migrate_database, inspect_database):
            with pytest.raises(StoreUnavailableError, match=expected):
                await ask(dsn)
        reader = PostgresStore(dsn, read_only=True)
        await reader.open()
        with pytest.raises(StoreUnavailableError, match=expected):
            await reader.current_epoch()
        await reader.close()
        async with writing(dsn) as writer:
            await eventually(lambda: f"is {encoding}, and the registry needs UTF8" in str(writer.problem))
    finally:
        server.drop_database(name)
