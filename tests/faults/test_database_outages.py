"""The database fails in many ways under a registry at work. Callers get the reason soon, no agent is declared dead, the
attempts to reconnect are few, and afterwards every change is committed, in order and once, without a restart.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from seedcore.core.errors import StoreUnavailableError
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.maintenance import migrate_database
from seedcore.store.postgres import PostgresStore
from seedcore.store.sessions import PoolLimits
from tests.faults.proxy import Proxy
from tests.faults.stage import (
    BEAT_S,
    CONNECTIONS_PER_TRY,
    DURABLE_WAIT_S,
    FLEET,
    HEALED_WITHIN_S,
    LIMITS,
    OUTAGE_S,
    PAUSE_S,
    RETRY_MAX_S,
    STATEMENTS_PER_TRY,
    Stage,
    timed,
)
from tests.postgres.dumps import dump, restore
from tests.servers import PostgresServer
from tests.traces import short_folder
from tests.waiting import eventually

logger = logging.getLogger(__name__)

# The outages: each begins, and ends when what it left in `mend` is done


def refused(stage: Stage) -> None:
    stage.mend.callback(stage.proxy.heal)
    stage.proxy.refuse()


def reset(stage: Stage) -> None:
    stage.mend.callback(stage.proxy.heal)
    stage.proxy.reset_everyone()


def deaf(stage: Stage) -> None:
    stage.mend.callback(stage.proxy.heal)
    stage.proxy.go_deaf()


def crashed(stage: Stage) -> None:
    stage.mend.callback(stage.server.start)
    stage.server.stop()


def locked(stage: Stage) -> None:
    """Every statement waits for a session that keeps its lock."""
    session = stage.admin()
    stage.mend.callback(session.close)
    session.execute("begin")
    session.execute("lock table registry_instance in access exclusive mode")


def standby(stage: Stage) -> None:
    stage.mend.callback(stage.server.promote)
    stage.server.become_standby(is_hot=True)


def closed_standby(stage: Stage) -> None:
    stage.mend.callback(stage.server.promote)
    stage.server.become_standby(is_hot=False)


def read_only_database(stage: Stage) -> None:
    """Concerns new sessions alone: those that there are go on as they began, then and later."""
    stage.mend.callback(stage.run, f"alter database {stage.database} reset default_transaction_read_only")
    stage.run(f"alter database {stage.database} set default_transaction_read_only = on")
    stage.proxy.cut()


def read_only_server(stage: Stage) -> None:
    stage.mend.callback(
        stage.run, "alter system reset default_transaction_read_only", "select pg_reload_conf()"
    )  # fmt: skip
    stage.run("alter system set default_transaction_read_only = on", "select pg_reload_conf()")


def out_of_connections(stage: Stage) -> None:
    stage.proxy.refuse()
    with stage.admin("postgres") as watch:
        while watch.execute(
            "select count(*) from pg_stat_activity where application_name like 'seedcore%'"
        ).fetchone() != (0,):
            time.sleep(0.01)
    with suppress(psycopg.OperationalError):
        while True:
            stage.mend.enter_context(stage.admin("postgres"))
    stage.proxy.heal()


def out_of_disk(stage: Stage) -> None:
    """The tables move to a disk of their own, which is filled."""
    disk = short_folder("disk-")
    stage.mend.callback(disk.rmdir)
    owner = stage.server.folder.stat().st_uid
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size=4m,mode=0700,uid={owner}", "tmpfs", disk], check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here: it takes root")
    stage.mend.callback(lambda: subprocess.run(["umount", "--lazy", disk], check=True))
    name = f"small_{stage.database}"
    stage.run(f"create tablespace {name} location '{disk}'")
    stage.mend.callback(stage.run, f"drop tablespace {name}")
    tables = ("registry_instance", "registry_transition")
    for table in tables:
        stage.run(f"alter table {table} set tablespace {name}")
        stage.mend.callback(stage.run, f"alter table {table} set tablespace pg_default")
    ballast = disk / "ballast"
    stage.mend.callback(ballast.unlink)
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def stale_sequence(stage: Stage) -> None:
    """A table was restored without its sequence: what the database refuses is no fault of a change."""
    stage.mend.callback(stage.run, "alter table registry_transition alter id restart with 1000000")
    stage.run("alter table registry_transition alter id restart with 1")


def renamed_table(stage: Stage) -> None:
    stage.mend.callback(stage.run, "alter table away rename to registry_instance")
    stage.run("alter table registry_instance rename to away")


OUTAGES: dict[Callable[[Stage], None], str] = {
    refused: "refused",
    reset: "reset by peer|closed the connection|connection to server",
    deaf: "no answer|timeout expired",
    crashed: "closed the connection|reset by peer|connection to server|terminat",
    locked: "statement timeout|busy",
    standby: "read-only",
    closed_standby: "not accepting connections|starting up|not yet accepting",
    read_only_database: "read-only",
    read_only_server: "read-only",
    out_of_connections: "too many clients",
    out_of_disk: "No space left on device",
    renamed_table: '"registry_instance" does not exist .*our schema is missing or damaged',
    stale_sequence: "duplicate key",
}


@pytest.mark.parametrize(("begin", "pattern"), OUTAGES.items(), ids=lambda value: getattr(value, "__name__", ""))
async def test_registry_goes_on_from_memory_and_then_commits_everything_in_order_and_once(
    stage: Stage, begin: Callable[[Stage], None], pattern: str
) -> None:
    await asyncio.to_thread(begin, stage)
    began_s, before, cpu_s = time.monotonic(), stage.effort, time.process_time()

    newcomer = await stage.register_until_not_durable(FLEET)
    await eventually(lambda: stage.names_the_problem(pattern), within_s=3.0)
    # all at once: they do not wait for one another
    newcomers = range(newcomer, newcomer + FLEET)
    answers = await asyncio.gather(
        *(timed(stage.register(number)) for number in newcomers),
        *(timed(stage.turn(number, Status.ALIVE)) for number in newcomers),
        *(timed(stage.turn(number, Status.DRAINING)) for number in (0, 1)),
        timed(stage.repeat(0)),
    )
    for receipt, took_s in answers:
        assert (receipt.durable, took_s < DURABLE_WAIT_S + PAUSE_S) == (False, True), (receipt, took_s)
        assert re.search(pattern, str(receipt.why)), receipt
    while time.monotonic() < began_s + OUTAGE_S:
        await stage.require_fleet()
        await asyncio.sleep(BEAT_S / 3)
    lasted_s, cpu_s = time.monotonic() - began_s, time.process_time() - cpu_s
    connections, statements = (now - then for now, then in zip(stage.effort, before, strict=True))

    await asyncio.to_thread(stage.mend.close)
    ended_s = time.monotonic()
    await eventually(stage.is_ready, within_s=HEALED_WITHIN_S)
    healed_s = time.monotonic() - ended_s
    logger.info(
        "%s: away %.1f s, tried %d connections and %d statements, CPU %.2f s; well %.1f s after its end",
        begin.__name__, lasted_s, connections, statements, cpu_s, healed_s,
    )  # fmt: skip
    tries = most_tries(lasted_s)
    assert connections <= CONNECTIONS_PER_TRY * tries
    assert statements <= STATEMENTS_PER_TRY * tries
    stage.require_history()
    await stage.require_fleet()
    await stage.turn(2, Status.DRAINING)
    await stage.until_durable(2)
    stage.require_history()


def most_tries(lasted_s: float) -> float:
    """How often the back-off lets the database be tried: doubling from 0.1 s, then at least half of its longest."""
    return 4 + lasted_s / (RETRY_MAX_S / 2)


# Losses that end by themselves


async def test_connections_that_were_cut_cost_a_moment(stage: Stage) -> None:
    stage.proxy.cut()
    await asyncio.gather(*(stage.turn(number, Status.DRAINING) for number in range(FLEET)))
    await eventually(stage.is_ready, within_s=1.0 + PAUSE_S)
    stage.require_history()


async def test_connections_that_are_silently_dead_are_given_up_together_and_leave_nothing_behind(stage: Stage) -> None:
    tasks = len(asyncio.all_tasks())
    # the pool grows to its bound, so that several dead connections wait in it
    await asyncio.gather(*(stage.registry.describe(f"agent-{number}") for number in range(FLEET)))
    began_s = time.monotonic()
    stage.proxy.half_open()
    receipt, took_s = await timed(stage.turn(0, Status.DRAINING))
    assert (receipt.durable, took_s < DURABLE_WAIT_S + PAUSE_S) == (False, True), (receipt, took_s)
    assert re.search("waited|no answer", str(receipt.why)), receipt
    await eventually(stage.is_ready, within_s=HEALED_WITHIN_S)
    # one deadline, not one for each connection
    assert time.monotonic() - began_s < LIMITS.answer_s + 1.0 + PAUSE_S
    stage.require_history()
    await stage.require_fleet()
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks)


async def test_readers_that_hold_every_connection_delay_no_writer_for_long(stage: Stage) -> None:
    await asyncio.to_thread(locked, stage)
    reads = [asyncio.create_task(stage.registry.describe("agent-1")) for _ in range(4 * LIMITS.max_size)]
    answers = await asyncio.gather(*(timed(stage.turn(number, Status.DRAINING)) for number in range(FLEET)))
    for receipt, took_s in answers:
        assert (receipt.durable, took_s < DURABLE_WAIT_S + PAUSE_S) == (False, True), (receipt, took_s)
        assert receipt.why
    done, late = await asyncio.wait(reads, timeout=LIMITS.answer_s + LIMITS.connect_timeout_s + PAUSE_S)
    assert not late
    assert not any(read.result().complete for read in done)
    await eventually(lambda: stage.names_the_problem("statement timeout|busy"))
    stage.mend.close()
    await eventually(stage.is_ready, within_s=HEALED_WITHIN_S)
    stage.require_history()


# At the start


@pytest.mark.parametrize("begin", [refused, deaf, crashed, closed_standby], ids=lambda value: value.__name__)
async def test_registry_that_starts_without_its_database_serves_and_joins_it_later(
    idle: Stage, begin: Callable[[Stage], None]
) -> None:
    await asyncio.to_thread(begin, idle)
    idle.open()
    answers = await asyncio.gather(*(timed(idle.register(number)) for number in range(FLEET)))
    answers += await asyncio.gather(*(timed(idle.turn(number, Status.ALIVE)) for number in range(FLEET)))
    for receipt, took_s in answers:
        assert (receipt.durable, took_s < DURABLE_WAIT_S + PAUSE_S) == (False, True), (receipt, took_s)
    await eventually(lambda: idle.names_the_problem(OUTAGES[begin]))
    await asyncio.to_thread(idle.mend.close)
    await eventually(idle.is_ready, within_s=HEALED_WITHIN_S)
    idle.require_history()
    await idle.require_fleet()


async def test_server_that_goes_deaf_while_the_schema_is_looked_at_does_not_hold_the_start(idle: Stage) -> None:
    with idle.admin() as session:
        session.execute("begin")
        session.execute("lock table schema_migration in access exclusive mode")
        idle.open()
        waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
        with idle.admin() as watch:
            await eventually(lambda: watch.execute(waits).fetchone() == (1,))
        idle.proxy.half_open()
        await eventually(lambda: idle.names_the_problem("no answer"))
    await eventually(idle.is_ready, within_s=HEALED_WITHIN_S)


# What is lost with the database


async def test_dropped_table_is_shown_as_the_problem_until_it_is_restored(stage: Stage) -> None:
    stage.run(
        "create table backup (like registry_transition including all)",
        "insert into backup overriding system value table registry_transition",
        "select setval(pg_get_serial_sequence('backup', 'id'), (select max(id) from backup))",
        "drop table registry_transition",
    )
    assert not (await stage.turn(0, Status.DRAINING)).durable
    await eventually(lambda: stage.names_the_problem('"registry_transition" does not exist .*restore it'))
    await stage.require_fleet()
    stage.run("alter table backup rename to registry_transition")
    await eventually(stage.is_ready, within_s=HEALED_WITHIN_S)
    stage.require_history()


@pytest.mark.parametrize("how", ["restored", "reset"])
async def test_emptied_database_is_left_alone_until_it_is_restored_or_reset(
    stage: Stage, tmp_path: Path, how: str
) -> None:
    stage.comes_back = True
    backup = tmp_path / "seedcore.dump"
    dsn = stage.server.dsn(stage.database)
    await asyncio.to_thread(dump, stage.server, dsn, backup, "plain")
    stage.run("drop schema public cascade", "create schema public")
    await eventually(lambda: stage.names_the_problem("the database is empty.* restore a backup, or run `seedcore migr"))
    await stage.require_fleet()
    # tried again and again meanwhile, it made nothing
    tried = stage.attempts.count
    await eventually(lambda: stage.attempts.count > tried)
    with stage.admin() as connection:
        made = connection.execute("select relname from pg_class where relnamespace = 'public'::regnamespace")
        assert made.fetchall() == []
    if how == "restored":
        await asyncio.to_thread(restore, stage.server, dsn, backup, "plain")
    else:
        await migrate_database(dsn)

    def stored() -> set[str]:
        with stage.admin() as connection:
            rows = connection.execute("select instance_id::text from registry_instance where status = 'alive'")
            return {row[0] for row in rows}

    async def the_fleet_is_stored() -> bool:
        assert await asyncio.to_thread(stored) == set(stage.beating)
        return True

    await eventually(the_fleet_is_stored)
    await eventually(stage.is_ready)
    found = await stage.registry.resolve([f"agent-{number}" for number in range(FLEET)])
    assert [resolution.verdict for resolution in found.value] == [Verdict.FRESH] * FLEET
    assert (await stage.registry.health()).fenced_by is None


async def test_database_restored_from_before_our_term_is_joined_again(stage: Stage) -> None:
    stage.run("update cluster_metadata set term = 0")
    await stage.turn(0, Status.DRAINING)
    await eventually(stage.is_ready, within_s=HEALED_WITHIN_S)
    await stage.until_durable(0)
    assert (await stage.registry.health()).fenced_by is None
    await stage.require_fleet()
    stage.require_history()


# Readers beside the registry


async def test_many_readers_of_a_lost_database_get_the_reason_at_once_and_try_it_seldom(
    server: PostgresServer, proxy: Proxy
) -> None:
    store = PostgresStore(proxy.dsn("postgres"), LIMITS, read_only=True)
    await store.open()
    with pytest.raises(StoreUnavailableError, match="does not exist"):
        await store.current_epoch()
    proxy.reset_everyone()
    before, asked, began_s = proxy.accepted, 0, time.monotonic()
    while (lasted_s := time.monotonic() - began_s) < 2.0:
        errors = await asyncio.gather(*(store.current_epoch() for _ in range(10)), return_exceptions=True)
        assert all(isinstance(error, StoreUnavailableError) for error in errors)
        asked += len(errors)
        await asyncio.sleep(0.01)
    await store.close()
    assert asked > 200
    # 0.1, 0.2, 0.4, 0.8, then 1 s apart
    assert proxy.accepted - before <= 5 + lasted_s


# Ten minutes


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("begin", [refused, deaf, standby], ids=lambda value: value.__name__)
async def test_long_outage_costs_less_than_a_healthy_database(
    server: PostgresServer, proxy: Proxy, begin: Callable[[Stage], None]
) -> None:
    """As long as `OUTAGE_SEC` pattern: ten minutes."""
    lasts_s = float(os.environ.get("OUTAGE_SEC", "600"))
    fleet = 900
    database = server.create_database()
    # with the limits and times of an installation
    stage = Stage(server, proxy, database, RegistryConfig(ray_cluster="outages"), PoolLimits())
    stage.parts = 10
    await stage.start(fleet)

    async def cpu_share(seconds: float) -> float:
        """Of one core, over so much time, with the whole fleet at work."""
        cpu_s, ends_s = time.thread_time(), time.monotonic() + seconds
        while time.monotonic() < ends_s:
            await stage.require_fleet()
            await asyncio.sleep(min(30.0, seconds / 3))
        return (time.thread_time() - cpu_s) / seconds

    healthy = await cpu_share(max(30.0, lasts_s / 5))
    await asyncio.to_thread(begin, stage)
    assert not (await stage.turn(0, Status.DRAINING)).durable
    await eventually(lambda: stage.names_the_problem(OUTAGES[begin]), within_s=30)
    before = stage.effort
    away = await cpu_share(lasts_s)
    connections, statements = (now - then for now, then in zip(stage.effort, before, strict=True))
    newcomers = await asyncio.gather(*(stage.register(number) for number in range(fleet, fleet + 10)))
    assert not any(receipt.durable for receipt in newcomers)
    await asyncio.to_thread(stage.mend.close)
    ended_s = time.monotonic()
    await eventually(stage.is_ready, within_s=30)
    logger.info(
        "%s: away %.0f s, tried %d connections and %d statements, CPU %.2f %% of a core, healthy %.2f %%, ratio %.2f;"
        " well %.1f s after its end",
        begin.__name__, lasts_s, connections, statements, 100 * away, 100 * healthy, away / healthy,
        time.monotonic() - ended_s,
    )  # fmt: skip
    stage.require_history()
    await stage.require_fleet()
    await stage.stop()
    server.drop_database(database)
    assert away < healthy
    assert connections <= 4 + CONNECTIONS_PER_TRY * lasts_s / 2.5
