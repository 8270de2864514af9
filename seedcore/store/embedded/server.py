"""One PostgreSQL server process: its start, its stop, and the end of what an earlier one left running."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from seedcore.store.embedded.layout import (
    DATABASE,
    PORT,
    ROLE,
    SOCKET_NAME,
    EmbeddedPostgresError,
    Layout,
    last_lines,
    last_of,
    open_log,
)
from seedcore.store.embedded.processes import runs, servers_in
from seedcore.store.embedded.programs import ServerUser

logger = logging.getLogger("seedcore.embedded")

_READY_POLL_S = 0.02
# fast shutdown, immediate shutdown, kill; with the seconds that each may take
_STOPS = ((signal.SIGINT, 20.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))

_SETTINGS = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "shared_buffers": "64MB",
    "max_connections": "50",
    "max_wal_size": "256MB",
    # logind removes a user's files in /dev/shm at logout, and a container has little space there
    "dynamic_shared_memory_type": "mmap",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "off",
    "log_destination": "stderr",
    "cluster_name": "seedcore",
}
_CREATE_DATABASE = (
    f"select 'create database {DATABASE}' "  # noqa: S608 - of a constant
    f"where not exists (select from pg_database where datname = '{DATABASE}') \\gexec\n"
)


class Server:
    """One PostgreSQL. Use it from one thread."""

    def __init__(self, user: ServerUser, layout: Layout, programs: Path, socket_dir: Path) -> None:
        self.socket_dir = socket_dir
        self._user = user
        self._layout = layout
        self._programs = programs
        self._process: subprocess.Popen[bytes] | None = None

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, gives_up: Callable[[], bool]) -> None:
        """Start the server, wait until it accepts connections (a recovery may take long), and create the database.

        Raises EmbeddedPostgresError if it ends instead. Returns early if `gives_up` returns true.
        """
        end_leftovers(self._layout, self.socket_dir)
        settings = {**_SETTINGS, "unix_socket_directories": str(self.socket_dir)}
        options = [f"--{name}={value}" for name, value in settings.items()]
        log = open_log(self._layout.postgres_log)
        try:
            log_size = os.fstat(log).st_size
            process = self._user.start(
                [str(self._programs / "postgres"), "-D", str(self._layout.cluster), *options], log
            )
        finally:
            os.close(log)
        self._process = process
        while not self._is_ready(process.pid):
            if process.poll() is not None:
                output = last_lines(self._layout.postgres_log, log_size)
                raise EmbeddedPostgresError(f"postgres ended with {process.returncode}: {output}")
            if gives_up():
                return
            time.sleep(_READY_POLL_S)
        self._create_database()

    def stop(self) -> None:
        """Stop the server: a fast shutdown first, then harder. The write-ahead log protects the data in each case."""
        process = self._process
        if process is None:
            return
        for how, timeout_s in _STOPS:
            process.send_signal(how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)
                return
            logger.warning("postgres did not end within %g s of %s", timeout_s, how.name)

    def _create_database(self) -> None:
        done = self._user.run(
            [
                str(self._programs / "psql"), "-X", "-w", "-q", "-v", "ON_ERROR_STOP=1",
                "-h", str(self.socket_dir), "-p", str(PORT), "-U", ROLE, "-d", "postgres",
            ],
            _CREATE_DATABASE,
        )  # fmt: skip
        if done.returncode:
            raise EmbeddedPostgresError(f"database {DATABASE} cannot be created: {last_of(done.stdout)}")

    def _is_ready(self, pid: int) -> bool:
        try:
            lines = (self._layout.cluster / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"


def end_leftovers(layout: Layout, socket_dir: Path) -> None:
    """End the processes that an earlier server left running, and remove its lock files.

    PostgreSQL takes any live process with the pid in a lock file for the old server and refuses to start. After the
    restart of a container this is likely.
    """
    main_pid = _postmaster_pid(layout)
    for how, timeout_s in _STOPS:
        left = servers_in(layout.cluster)
        # the main process ends the others in a fast shutdown; if there is none, go on to the next signal
        signalled = [process for process in left if process.pid == main_pid] if how is signal.SIGINT else left
        for process in signalled:
            logger.warning("ending process %s of an earlier server with %s", process.pid, how.name)
            with suppress(psutil.NoSuchProcess):
                process.send_signal(how)
        ends_s = time.monotonic() + timeout_s
        while signalled and any(runs(process) for process in left) and time.monotonic() < ends_s:
            time.sleep(_READY_POLL_S)
    # no server is left: a process with the pid in these files is an unrelated one
    with suppress(FileNotFoundError):
        (layout.cluster / "postmaster.pid").unlink()
    for path in socket_dir.glob(f"{SOCKET_NAME}*"):
        path.unlink()


def _postmaster_pid(layout: Layout) -> int | None:
    try:
        return int((layout.cluster / "postmaster.pid").read_text().splitlines()[0])
    except (OSError, ValueError, IndexError):
        return None
