"""PostgreSQL over TLS: a server without a valid certificate is sent nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import trustme
from psycopg import conninfo

from seedcore.core.errors import StoreUnavailableError
from seedcore.store.dsn import is_unverified
from seedcore.store.maintenance import inspect_database
from seedcore.store.postgres import PostgresStore
from seedcore.store.sessions import PoolLimits
from tests.servers import TEMPLATE, PostgresServer, running_server


@pytest.fixture(scope="module")
def secured(postgres15: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """How a server is reached that takes TLS alone, and the authorities that did and did not sign for it. Of the
    system's PostgreSQL: the one in the wheel is built without TLS."""
    folder = tmp_path_factory.mktemp("authorities")
    signed, other = trustme.CA(), trustme.CA()
    signed.cert_pem.write_to_path(str(folder / "signed.pem"))
    other.cert_pem.write_to_path(str(folder / "other.pem"))
    certificate = signed.issue_cert("localhost")
    with running_server(postgres15.binaries) as server:
        chain = b"".join(part.bytes() for part in certificate.cert_chain_pems)
        port = server.take_tls(chain, certificate.private_key_pem.bytes())
        yield {
            "host": "localhost",
            "port": str(port),
            "user": "postgres",
            "dbname": TEMPLATE,
            "signed": str(folder / "signed.pem"),
            "other": str(folder / "other.pem"),
        }


def dsn_of(secured: dict[str, str], authority: str | None, **more: str) -> str:
    place = {name: secured[name] for name in ("host", "port", "user", "dbname")}
    verified = {} if authority is None else {"sslmode": "verify-full", "sslrootcert": secured[authority]}
    return conninfo.make_conninfo(**{**place, **verified, **more})


async def test_a_store_works_over_a_connection_that_is_verified(secured: dict[str, str]) -> None:
    dsn = dsn_of(secured, "signed")
    store = PostgresStore(dsn, PoolLimits(max_size=1))
    try:
        await store.open()
        assert (await store.current_epoch()).name == "epoch-1"
        with psycopg.connect(dsn) as connection:
            assert connection.execute("select bool_and(ssl) from pg_stat_ssl").fetchone() == (True,)
    finally:
        await store.close()
    assert not (await inspect_database(dsn)).missing


@pytest.mark.parametrize(
    ("authority", "more", "expected"),
    [
        ("other", {}, "certificate verify failed"),
        ("signed", {"host": "127.0.0.1"}, "does not match"),
        (None, {"sslmode": "disable"}, "pg_hba.conf rejects"),
    ],
)
async def test_server_without_a_valid_certificate_receives_no_password(
    secured: dict[str, str], authority: str | None, more: dict[str, str], expected: str
) -> None:
    with pytest.raises(StoreUnavailableError, match=expected) as refused:
        await inspect_database(dsn_of(secured, authority, password="hush", **more))
    assert "hush" not in str(refused.value)


async def test_a_root_certificate_that_is_not_there_is_named(secured: dict[str, str], tmp_path: Path) -> None:
    dsn = dsn_of(secured, None, sslmode="verify-full", sslrootcert=str(tmp_path / "none.pem"))
    with pytest.raises(StoreUnavailableError, match=r"none\.pem"):
        await inspect_database(dsn)


@pytest.mark.parametrize(
    ("dsn", "unverified"),
    [
        ("postgresql://me@db.example/x", True),
        ("postgresql://me@db.example/x?sslmode=require", True),
        ("postgresql://me@db.example/x?sslmode=verify-ca", True),
        ("postgresql://me@db.example/x?sslmode=verify-full", False),
        ("postgresql://me@localhost/x", False),
        ("postgresql://me@127.0.0.1,db.example/x", True),
        ("host=/run/postgresql dbname=x", False),
        ("dbname=x", False),
        ("postgresql://me@localhost/x?hostaddr=203.0.113.1", True),
        ("postgresql://me@localhost/x?hostaddr=203.0.113.1&sslmode=verify-full", False),
        ("postgresql://me@db.example/x?hostaddr=127.0.0.1", False),
        ("postgresql://me@localhost,db.example/x?hostaddr=127.0.0.1,", True),
        ("postgresql://me@localhost,localhost/x?hostaddr=,203.0.113.1", True),
        ("hostaddr=203.0.113.1 dbname=x", True),
        ("service=registry", True),
        ("service=registry host=localhost", True),
        ("service=registry sslmode=verify-full", False),
    ],
)
def test_unverified_server_on_a_network_is_noticed(dsn: str, unverified: bool) -> None:
    assert is_unverified(dsn) is unverified
