"""Passwords are changed and certificates renewed under a registry at work."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
import trustme
from psycopg import conninfo, sql

from seedcore.core.lifecycle import Status
from seedcore.store.maintenance import grant_on_database
from seedcore.store.postgres import PostgresStore
from tests.faults.proxy import Proxy
from tests.faults.stage import FLEET, HEALED_WITHIN_S, LIMITS, Stage
from tests.servers import GUARDED_PASSWORD, GUARDED_ROLE, PostgresServer, running_server
from tests.waiting import eventually

pytestmark = pytest.mark.slow

NEW_PASSWORD = "another-battery"
# as in an installation, where it is a minute
SHORT_LIVED = replace(LIMITS, connection_life_s=0.5)


def change_password(server: PostgresServer, password: str) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(sql.SQL("alter role {} password {}").format(sql.Identifier(GUARDED_ROLE), password))


def write_password(file: Path, password: str) -> None:
    fresh = file.with_suffix(".new")
    fresh.touch(mode=0o600)
    fresh.write_text(f"*:*:*:{GUARDED_ROLE}:{password}\n")
    fresh.rename(file)


@pytest.fixture
async def granted(server: PostgresServer) -> AsyncIterator[str]:
    """A database in which a role with a password has the rights of a registry."""
    name = server.create_database()
    await grant_on_database(server.dsn(name), GUARDED_ROLE, None)
    yield name
    server.drop_database(name)
    change_password(server, GUARDED_PASSWORD)


async def at_work(server: PostgresServer, name: str, dsn: str) -> Stage:
    proxy = Proxy(server.socket)
    proxy.start()
    stage = Stage(server, proxy, name, store=PostgresStore(dsn, SHORT_LIVED))
    stage.undo.callback(proxy.stop)
    await stage.start()
    return stage


async def require_work_from_memory(stage: Stage, problem: str) -> None:
    await eventually(lambda: stage.names_the_problem(problem))
    for number in range(FLEET):
        assert not (await stage.turn(number, Status.DRAINING)).durable
    for _ in range(20):
        await stage.require_fleet()
        await asyncio.sleep(0.1)


async def require_healed(stage: Stage) -> None:
    await eventually(stage.is_ready, within_s=HEALED_WITHIN_S)
    stage.require_history()
    await stage.require_fleet()


async def test_new_password_in_the_password_file_is_used_by_the_registry_at_work(
    server: PostgresServer, granted: str, tmp_path: Path
) -> None:
    file = tmp_path / "passwords"
    write_password(file, GUARDED_PASSWORD)
    dsn = conninfo.make_conninfo(server.dsn(granted, GUARDED_ROLE), passfile=str(file))
    stage = await at_work(server, granted, dsn)
    change_password(server, NEW_PASSWORD)
    await require_work_from_memory(stage, "password authentication failed.*was it changed")
    write_password(file, NEW_PASSWORD)
    await require_healed(stage)
    await stage.stop()


async def test_registry_that_is_started_again_with_a_new_password_commits_what_agents_repeat(
    server: PostgresServer, granted: str
) -> None:
    stage = await at_work(server, granted, server.dsn(granted, GUARDED_ROLE, GUARDED_PASSWORD))
    change_password(server, NEW_PASSWORD)
    await require_work_from_memory(stage, "password authentication failed.*new DSN")
    await stage.replace_registry(PostgresStore(server.dsn(granted, GUARDED_ROLE, NEW_PASSWORD), SHORT_LIVED))
    for number in range(FLEET):
        await stage.until_durable(number)
    await require_healed(stage)
    await stage.stop()


# Certificates: of the system's PostgreSQL, because the one in the wheel is built without TLS


def certificate(authority: trustme.CA, *, is_expired: bool = False) -> tuple[bytes, bytes]:
    """A certificate for localhost, and its key."""
    ends_at = dt.datetime(2021, 1, 1, tzinfo=dt.UTC) if is_expired else None
    issued = authority.issue_cert("localhost", not_after=ends_at)
    return b"".join(part.bytes() for part in issued.cert_chain_pems), issued.private_key_pem.bytes()


async def test_certificates_are_renewed_under_a_registry_at_work(postgres15: PostgresServer, tmp_path: Path) -> None:
    first, second = trustme.CA(), trustme.CA()
    trusted = tmp_path / "authority.pem"
    first.cert_pem.write_to_path(str(trusted))
    with running_server(postgres15.binaries) as server:
        port = server.take_tls(*certificate(first))
        name = server.create_database()
        dsn = conninfo.make_conninfo(
            host="localhost", port=port, user="postgres", dbname=name, sslmode="verify-full", sslrootcert=str(trusted)
        )
        stage = await at_work(server, name, dsn)
        # renewed in time: the registry notices nothing
        failures = (await stage.registry.health()).flush.failures
        server.renew_tls(*certificate(first))
        for status, number in itertools.product((Status.DRAINING, Status.ALIVE) * 3, range(3)):
            assert (await stage.turn(number, status)).durable
            await asyncio.sleep(0.1)
        assert (await stage.registry.health()).flush.failures == failures
        # expired, and then renewed
        server.renew_tls(*certificate(first, is_expired=True))
        await require_work_from_memory(stage, "certificate verify failed.*renew")
        server.renew_tls(*certificate(first))
        await require_healed(stage)
        # of another authority: the file of trusted ones is read for each connection
        server.renew_tls(*certificate(second))
        await eventually(lambda: stage.names_the_problem("certificate verify failed.*sslrootcert"))
        second.cert_pem.write_to_path(str(trusted))
        await require_healed(stage)
        await stage.stop()
