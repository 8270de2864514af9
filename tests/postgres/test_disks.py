"""PostgreSQL and the embedded server on a disk that is full, or that fails."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from seedcore.core.lifecycle import Status
from seedcore.store.embedded.claim import Claim
from seedcore.store.embedded.layout import EmbeddedPostgresError
from seedcore.store.embedded.postgres import EmbeddedPostgres
from seedcore.store.postgres import PostgresStore
from tests.disks import Disk, FailingDisk, failing_disk, small_disk
from tests.faults.proxy import Proxy
from tests.faults.stage import FLEET, LIMITS, Stage
from tests.postgres.test_embedded import end_all, guardian_of, postmaster_pid, until
from tests.servers import PostgresServer, embedded_binaries
from tests.waiting import eventually

FULL = "No space left on device|free some space|closed the connection|terminat|connection to server|not ready"
FAILED = "Input/output error|the disk of|closed the connection|terminat|connection to server|not ready"
HEALED_WITHIN_S = 60.0
LINGER_S = 0.4
HOLD_S = 3.0


class EmbeddedServer(PostgresServer):
    """An embedded server in the place of a PostgreSQL of the tests: only its databases are used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 5432
        self.holder = EmbeddedPostgres(folder, LINGER_S)

    def dsn(self, database: str = "postgres", user: str = "postgres", password: str | None = None) -> str:
        return conninfo.make_conninfo(host=str(self.folder / "socket"), dbname=database, user=user)


@contextmanager
def server_on(disk: Disk, *settings: str) -> Iterator[PostgresServer]:
    """A PostgreSQL whose whole data folder is on a disk."""
    server = PostgresServer(embedded_binaries(), disk.folder, "--wal-segsize=1")
    with (disk.folder / "data" / "postgresql.conf").open("a") as file:
        file.write("\n".join(settings) + "\n")
    server.start()
    try:
        server.make_template()
        # initdb of the tests syncs nothing
        subprocess.run(["sync", "--file-system", disk.folder], check=True)
        yield server
    finally:
        kill(disk.folder / "data")


def kill(data: Path) -> None:
    """End a postmaster whose folder may not be readable any more."""
    with suppress(OSError, ValueError):
        pid = int((data / "postmaster.pid").read_text().split("\n")[0])
        os.kill(pid, signal.SIGQUIT)
        until(lambda: not _lives(pid))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
async def stages() -> AsyncIterator[ExitStack]:
    """Whatever a test puts in is closed at its end."""
    with ExitStack() as stack:
        yield stack


async def at_work_on(server: PostgresServer, stack: ExitStack) -> Stage:
    """A registry at work on a server, with its fleet."""
    proxy = Proxy(server.socket)
    proxy.start()
    stack.callback(proxy.stop)
    stage = Stage(server, proxy, server.create_database())
    await stage.start()
    return stage


async def at_work_embedded(folder: Path) -> Stage:
    """A registry at work on an embedded server, as the actor has it: with a claim, and a server that it starts."""
    server = EmbeddedServer(folder)
    dsn = await asyncio.to_thread(server.holder.hold)
    hold = partial(asyncio.to_thread, server.holder.hold, HOLD_S)
    store = PostgresStore(dsn, LIMITS, ensure_server=hold, claim=Claim(folder).take)
    proxy = Proxy(server.socket)
    proxy.start()
    stage = Stage(server, proxy, "seedcore", store=store)
    stage.undo.callback(proxy.stop)
    await stage.start()
    return stage


def exhaust(stage: Stage) -> None:
    """Use up what the server has allocated of its log, until it ends its sessions."""
    with suppress(psycopg.Error), stage.admin() as session:
        for _ in range(400):
            session.execute("select pg_logical_emit_message(false, 'filler', repeat('x', 500000))")


async def require_work_from_memory(stage: Stage, problem: str) -> None:
    """The fleet lives on, changes are accepted, and health has the reason."""
    next_one = await stage.register_until_not_durable(FLEET)
    for number in (0, 1):
        assert not (await stage.turn(number, Status.DRAINING)).durable
    assert not (await stage.register(next_one)).durable
    await eventually(lambda: stage.names_the_problem(problem))
    ends_s = time.monotonic() + 2.0
    while time.monotonic() < ends_s:
        await stage.require_fleet()
        await asyncio.sleep(0.1)


async def require_healed(stage: Stage) -> None:
    """Everything that was accepted is committed, in order and once; the fleet has lived on."""
    await eventually(stage.is_ready, within_s=HEALED_WITHIN_S)
    stage.require_history()
    await stage.require_fleet()
    await stage.turn(2, Status.DRAINING)
    await stage.until_durable(2)
    await stage.stop()


# Full


def test_claim_that_cannot_be_written_is_taken_once_there_is_space() -> None:
    with small_disk(0.1) as disk:
        claim = Claim(disk.folder)
        (disk.folder / "registry.lock").touch(mode=0o600)
        disk.fill()
        for _ in range(2):
            with pytest.raises(EmbeddedPostgresError, match=r"no space is left for .*free some space"):
                claim.take("mine")
        disk.free()
        claim.take("mine")
        Claim(disk.folder).take("mine")


@pytest.mark.slow
async def test_registry_survives_a_server_whose_disk_is_full_and_commits_everything_once_it_has_space(
    stages: ExitStack,
) -> None:
    disk = stages.enter_context(small_disk(96))
    server = stages.enter_context(server_on(disk))
    stage = await at_work_on(server, stages)
    disk.fill()
    await asyncio.to_thread(exhaust, stage)
    await require_work_from_memory(stage, FULL)
    disk.free()
    # what a supervisor of the server does, if it has ended
    await asyncio.to_thread(server.start)
    await require_healed(stage)


@pytest.mark.slow
async def test_embedded_server_whose_disk_is_full_starts_again_by_itself_once_it_has_space(stages: ExitStack) -> None:
    disk = stages.enter_context(small_disk(160))
    folder = disk.folder / "data"
    stages.callback(end_all, disk.folder)
    stage = await at_work_embedded(folder)
    guardian = guardian_of(folder)
    disk.fill()
    await asyncio.to_thread(exhaust, stage)
    await require_work_from_memory(stage, FULL)
    await eventually(lambda: stage.names_the_problem("free some space"), within_s=30)
    disk.free()
    await require_healed(stage)
    assert guardian.is_running()


@pytest.mark.slow
def test_log_that_fills_the_disk_is_emptied_and_the_server_lives_on() -> None:
    with small_disk(160) as disk:
        folder = disk.folder / "data"
        server = EmbeddedPostgres(folder, LINGER_S)
        dsn = server.hold()
        guardian, serving = guardian_of(folder), postmaster_pid(folder)
        with suppress(OSError), (folder / "postgres.log").open("ab", buffering=0) as log:
            while True:
                log.write(b"x" * 4095 + b"\n")
        until(lambda: (folder / "postgres.log").stat().st_size < 5_000_000)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("create table made as select generate_series(1, 100000)")
        assert (guardian.is_running(), postmaster_pid(folder)) == (True, serving)
        server.release()
        end_all(folder)


# Failing


@pytest.mark.slow
async def test_nothing_acknowledged_is_lost_with_a_disk_that_fails_and_is_repaired(stages: ExitStack) -> None:
    disk = stages.enter_context(failing_disk(128))
    server = stages.enter_context(server_on(disk, "fsync = on", "full_page_writes = on"))
    stage = await at_work_on(server, stages)
    await fail_and_repair(stage, disk, disk.folder / "data", server)


async def fail_and_repair(stage: Stage, disk: FailingDisk, data: Path, server: PostgresServer | None) -> None:
    pid = int((data / "postmaster.pid").read_text().split("\n")[0])
    disk.fail()
    await require_work_from_memory(stage, FAILED)
    if server is not None and _lives(pid):
        os.kill(pid, signal.SIGKILL)
    disk.repair()
    if server is not None:
        (data / "postmaster.pid").unlink(missing_ok=True)
        # a process that has ended and that its parent has not read yet would count as the owner of the socket
        server.socket.with_name(f"{server.socket.name}.lock").unlink(missing_ok=True)
        await asyncio.to_thread(server.start)
    await require_healed(stage)


@pytest.mark.slow
async def test_embedded_server_on_a_disk_that_fails_starts_again_by_itself_once_it_is_repaired(
    stages: ExitStack,
) -> None:
    disk = stages.enter_context(failing_disk(192))
    folder = disk.folder / "data"
    stages.callback(end_all, disk.folder)
    stage = await at_work_embedded(folder)
    await fail_and_repair(stage, disk, folder / "pg18", None)
