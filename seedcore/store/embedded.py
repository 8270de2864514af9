"""A real PostgreSQL from a wheel, for one node: started on demand, stopped when nobody needs it any more.

A process holds the server by a file that names it. A guardian process (`embedded_guard.py`) owns the server
and ends it when no holder has been alive for a while, however the holders ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg

from seedcore.core.errors import RegistryError

MAJOR = "18"
DATABASE = "seedcore"
_POLL_S = 0.05
_CONNECT_TIMEOUT_S = 2


class EmbeddedPostgresError(RegistryError):
    """The embedded server cannot run here; the message says what to do."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"the embedded PostgreSQL cannot run: {self.why}"


@dataclass(frozen=True, slots=True)
class Layout:
    """What lies where in the data folder."""

    data_dir: Path

    @property
    def cluster(self) -> Path:
        return self.data_dir / f"pg{MAJOR}"

    @property
    def owners(self) -> Path:
        return self.data_dir / "owners"

    @property
    def lock(self) -> Path:
        return self.data_dir / "guard.lock"

    @property
    def server(self) -> Path:
        return self.data_dir / "server.json"

    @property
    def failure(self) -> Path:
        return self.data_dir / "guard.error"

    @property
    def guard_log(self) -> Path:
        return self.data_dir / "guard.log"

    def is_guarded(self) -> bool:
        """Whether a guardian lives: it holds the lock as long as it does."""
        try:
            with self.lock.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def dsn(self) -> str | None:
        """The DSN that the guardian has published, or None."""
        try:
            socket_dir = json.loads(self.server.read_text())["socket_dir"]
        except (OSError, ValueError, KeyError):
            return None
        return f"host='{socket_dir}' port=5432 user=postgres dbname={DATABASE}"


class EmbeddedPostgres:
    """This process's hold on the server of a data folder."""

    def __init__(self, data_dir: Path, linger_s: float = 10.0) -> None:
        """`linger_s`: how long the server outlives its last holder, in seconds."""
        self._layout = Layout(data_dir.expanduser().absolute())
        self._linger_s = linger_s
        self._owner_file: Path | None = None
        self._dsn: str | None = None

    @property
    def dsn(self) -> str:
        """The DSN; EmbeddedPostgresError unless held."""
        if self._dsn is None:
            raise EmbeddedPostgresError("it is not held by this process")
        return self._dsn

    def hold(self, timeout_s: float = 60.0) -> str:
        """Start the server or join the one that runs; its DSN. Blocks, idempotent, safe beside other holders."""
        self._prepare_folder()
        self._register()
        ends_s = time.monotonic() + timeout_s
        while time.monotonic() < ends_s:
            # first the guardian, then what it says: what an earlier one left behind is gone before one starts
            if self._layout.is_guarded():
                dsn = self._layout.dsn()
                if dsn is not None and _answers(dsn):
                    self._dsn = dsn
                    return dsn
            else:
                self._raise_failure()
                self._layout.server.unlink(missing_ok=True)
                self._spawn_guard()
            time.sleep(_POLL_S)
        self.release()
        raise EmbeddedPostgresError(f"it did not answer within {timeout_s:g} s; see {self._layout.guard_log}")

    def release(self) -> None:
        """This process needs the server no more. Idempotent."""
        self._dsn = None
        if self._owner_file is not None:
            self._owner_file.unlink(missing_ok=True)
            self._owner_file = None

    def running(self) -> bool:
        """Whether the server answers."""
        return dsn_if_running(self._layout.data_dir) is not None

    def _prepare_folder(self) -> None:
        folder = self._layout.data_dir
        try:
            self._layout.owners.mkdir(mode=0o755, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise EmbeddedPostgresError(
                f"{folder} is not writable ({error.strerror}); set SEEDCORE_DATA_DIR to a folder that is"
            ) from error
        version = self._layout.cluster / "PG_VERSION"
        written_by = version.read_text().strip() if os.access(version, os.R_OK) else MAJOR
        if written_by != MAJOR:
            raise EmbeddedPostgresError(
                f"the data in {self._layout.cluster} was written by PostgreSQL {written_by}, this is {MAJOR}; "
                "dump and restore it, or set SEEDCORE_DATA_DIR to a new folder"
            )

    def _register(self) -> None:
        key = process_key(os.getpid())
        assert key is not None
        self._owner_file = self._layout.owners / key
        self._owner_file.touch()

    def _spawn_guard(self) -> None:
        """The guardian detaches itself: whoever reaps this process's children must not reap it."""
        self._layout.failure.unlink(missing_ok=True)
        with self._layout.guard_log.open("ab") as log:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "seedcore.store.embedded_guard",
                    "--data-dir",
                    str(self._layout.data_dir),
                    "--linger-s",
                    str(self._linger_s),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                check=False,
                env={name: value for name, value in os.environ.items() if not name.startswith(("PG", "RAY_"))},
            )

    def _raise_failure(self) -> None:
        try:
            why = self._layout.failure.read_text()
        except OSError:
            return
        self._layout.failure.unlink(missing_ok=True)
        self.release()
        raise EmbeddedPostgresError(why)


def dsn_if_running(data_dir: Path) -> str | None:
    """The DSN of a server that answers, without holding it."""
    layout = Layout(data_dir.expanduser().absolute())
    dsn = layout.dsn()
    return dsn if dsn is not None and _answers(dsn) else None


def process_key(pid: int) -> str | None:
    """Names a living process for ever: its id and when it started. None for one that is dead."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return f"{pid}-{_start_time(pid, process)}"
    except psutil.Error:
        return None


def _start_time(pid: int, process: psutil.Process) -> str:
    try:
        # in ticks since boot: unlike psutil's, it does not move when the clock is set
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        return str(process.create_time())


def _answers(dsn: str) -> bool:
    try:
        psycopg.connect(dsn, connect_timeout=_CONNECT_TIMEOUT_S).close()
    except psycopg.OperationalError:
        return False
    return True
