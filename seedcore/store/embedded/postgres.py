"""A real PostgreSQL from a wheel, for one node: started on demand, stopped when nobody needs it any more.

A process holds the server by a file that names it. A guardian process (`guardian.py`) owns the server
and ends it when no holder has been alive for a while, however the holders ended. This module is the holder's
side, and what both sides must agree on: the folder's layout, the record, how a process is named.
"""

from __future__ import annotations

import errno
import grp
import json
import os
import pwd
import re
import select
import socket
import stat
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

from seedcore.core.errors import RegistryError

MAJOR = "18"
DATABASE = "seedcore"
ROLE = "postgres"
PORT = 5432
CLAIM_NAME = "registry.lock"
SOCKET_NAME = f".s.PGSQL.{PORT}"
_OUR_FOLDER = re.compile(r"pg\d+|pgsql-\d")
_POLL_S = 0.05
_CONNECT_TIMEOUT_S = 2.0
_GUARD_MODULE = "seedcore.store.embedded.guardian"
# what an interpreter may need to start, and to be measured; nothing of Ray's or libpq's, which would steer us
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
_KEPT_PREFIXES = ("LC_", "LD_LIBRARY_", "DYLD_LIBRARY_", "COVERAGE_")


class EmbeddedPostgresError(RegistryError):
    """The embedded server cannot run here; the message says what to do."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"the embedded PostgreSQL cannot run: {self.why}"


@dataclass(frozen=True, slots=True)
class Layout:
    """What lies where in the data folder. Use `layout_of()`."""

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
    def record(self) -> Path:
        return self.data_dir / "server.json"

    @property
    def socket_dir(self) -> Path:
        return self.data_dir / "socket"

    @property
    def guard_log(self) -> Path:
        return self.data_dir / "guard.log"

    @property
    def postgres_log(self) -> Path:
        return self.data_dir / "postgres.log"

    def is_ours_alone(self) -> bool:
        """Whether the data folder holds nothing but what is made here, as a new one does."""
        names = {path.name for path in (self.owners, self.lock, self.record, self.socket_dir, self.guard_log)}
        names |= {self.postgres_log.name, CLAIM_NAME}
        return all(entry.name in names or _OUR_FOLDER.match(entry.name) for entry in self.data_dir.iterdir())

    def let_pass(self) -> None:
        """Let other users pass through the data folder; they cannot list it."""
        self.data_dir.chmod(stat.S_IMODE(self.data_dir.stat().st_mode) | stat.S_IXGRP | stat.S_IXOTH)

    def check(self) -> None:
        """Refuse a folder that is not ours to use. Changes nothing."""
        self.require_trusted()
        try:
            self._check_owner()
            self._check_version()
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unusable(self.data_dir, error) from error

    def require_trusted(self) -> None:
        """Refuse a folder where another user could have laid what we read, or may swap it. Changes nothing."""
        for folder in (self.data_dir, *self.data_dir.parents):
            try:
                seen = folder.lstat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise _unusable(self.data_dir, error) from error
            problem = _distrust(seen, is_parent=folder != self.data_dir)
            if problem is not None:
                raise EmbeddedPostgresError(f"{folder} {problem}, or set SEEDCORE_DATA_DIR to another folder")

    def require_trusted_socket(self, folder: Path) -> None:
        """Refuse a folder of the socket that another user made: there is no password. It may be gone."""
        owners = {0, os.geteuid()}
        with suppress(OSError):
            # root's server runs as another user, to whom its data belongs
            owners.add(self.cluster.stat().st_uid)
        with suppress(FileNotFoundError):
            seen = folder.lstat()
            if not stat.S_ISDIR(seen.st_mode) or seen.st_uid not in owners or seen.st_mode & 0o022:
                raise EmbeddedPostgresError(
                    f"{folder} belongs to another user; remove it, or set SEEDCORE_DATA_DIR anew"
                )

    def _check_owner(self) -> None:
        uid, owner = os.geteuid(), self.data_dir.stat().st_uid
        if uid != 0 and self.cluster.exists() and self.cluster.stat().st_uid != uid:
            maker = owner if owner != uid else self.cluster.stat().st_uid
            raise EmbeddedPostgresError(
                f"the data in {self.cluster} is another user's; run as user {maker}, "
                "or set SEEDCORE_DATA_DIR to a new folder"
            )

    def _check_version(self) -> None:
        for folder in (self.cluster, self.data_dir, *sorted(self.data_dir.glob("pg[0-9][0-9]"))):
            try:
                written_by = (folder / "PG_VERSION").read_text().strip()
            except FileNotFoundError:
                continue
            if folder == self.cluster and written_by == MAJOR:
                return
            # also beside us: an empty database in place of the one that lies there would look like a loss
            raise EmbeddedPostgresError(
                f"the data in {folder} was written by PostgreSQL {written_by}, this is {MAJOR} with data in "
                f"{self.cluster}; dump and restore it, or set SEEDCORE_DATA_DIR to a new folder"
            )
        if self.cluster.exists() and any(self.cluster.iterdir()):
            raise EmbeddedPostgresError(
                f"{self.cluster} is not empty, yet holds no PostgreSQL data; move it away, "
                "or set SEEDCORE_DATA_DIR to a new folder"
            )


def _distrust(seen: os.stat_result, *, is_parent: bool) -> str | None:
    """Why what lies in a folder may be another user's, and what to do; None where only we and root can change it."""
    uid = os.geteuid()
    if seen.st_uid not in (0, uid):
        us = "root" if uid == 0 else f"user {uid}"
        return f"belongs to user {seen.st_uid}, not to {us}: run as that user"
    # in a sticky folder such as /tmp nobody moves what is ours
    if is_parent and seen.st_mode & stat.S_ISVTX:
        return None
    if seen.st_mode & stat.S_IWOTH:
        return "may be written by everyone: `chmod o-w` it"
    if seen.st_mode & stat.S_IWGRP and not _is_alone_in(seen.st_gid):
        return f"may be written by group {seen.st_gid}: `chmod g-w` it"
    return None


def _is_alone_in(gid: int) -> bool:
    """Whether a group is one user's own, root's, or of a container that has no other users."""
    try:
        group = grp.getgrgid(gid)
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return True
    return set(group.gr_mem) <= {name} and group.gr_name in (name, "root", "wheel")


def layout_of(data_dir: Path) -> Layout:
    """The layout of a folder, by the one path that every process comes to, whatever links lead there."""
    try:
        return Layout(Path(os.path.realpath(data_dir.expanduser())))
    except RuntimeError as error:
        raise EmbeddedPostgresError(f"{data_dir}: {error} Set SEEDCORE_DATA_DIR to another folder.") from error


class State(StrEnum):
    """What the server is about to do. A guardian that has ended leaves no record."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Record:
    """What the guardian tells the other processes, in one file."""

    state: State
    guardian: str
    socket_dir: str
    problem: str | None = None

    @property
    def dsn(self) -> str:
        return f"host={self.socket_dir} port={PORT} user={ROLE} dbname={DATABASE}"

    def write(self, layout: Layout) -> None:
        """Publish it at once. Only the guardian that holds the lock may."""
        # a guardian whose folder was moved away may still write here
        fresh = layout.record.with_suffix(f".new-{os.getpid()}")
        fresh.write_text(
            json.dumps(
                {
                    "state": self.state.value,
                    "guardian": self.guardian,
                    "socket_dir": self.socket_dir,
                    "problem": self.problem,
                }
            )
        )
        fresh.chmod(0o644)
        fresh.replace(layout.record)

    def guardian_lives(self) -> bool:
        pid = self.guardian.partition("-")[0]
        return pid.isdecimal() and process_key(int(pid)) == self.guardian

    def accepts(self) -> bool:
        """Whether a server listens. A socket that is closed to us counts: connecting then says why."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_CONNECT_TIMEOUT_S)
            try:
                client.connect(f"{self.socket_dir}/{SOCKET_NAME}")
            except PermissionError:
                return True
            except OSError:
                return False
        return True


def read_record(layout: Layout) -> Record | None:
    """The record of a guardian that lives, or None. Raises EmbeddedPostgresError where another user could lay one."""
    layout.require_trusted()
    try:
        raw = json.loads(_read_ours(layout.record))
        record = Record(State(raw["state"]), str(raw["guardian"]), str(raw["socket_dir"]), raw.get("problem"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not record.guardian_lives():
        return None
    layout.require_trusted_socket(Path(record.socket_dir))
    return record


def _read_ours(file: Path) -> str:
    """The text of a file of ours or root's. Raises OSError."""
    with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), encoding="utf-8") as opened:
        if os.fstat(opened.fileno()).st_uid not in (0, os.geteuid()):
            raise PermissionError(errno.EPERM, "it belongs to another user", str(file))
        return opened.read()


class EmbeddedPostgres:
    """This process's hold on the server of a data folder. The hold is the process's: any object may release it."""

    def __init__(self, data_dir: Path, linger_s: float = 10.0) -> None:
        """`linger_s`: how long the server outlives its last holder; the holder that starts it decides."""
        self._layout = layout_of(data_dir)
        self._linger_s = linger_s
        self._dsn: str | None = None
        self._holder_pid = 0

    @property
    def dsn(self) -> str:
        """The DSN; EmbeddedPostgresError unless held."""
        # a forked child is another process, which holds nothing
        if self._dsn is None or self._holder_pid != os.getpid():
            raise EmbeddedPostgresError("it is not held by this process; call hold() first")
        return self._dsn

    def hold(self, timeout_s: float = 60.0) -> str:
        """Start the server or join the one that runs; its DSN. Blocks, idempotent, safe beside other holders.

        Call it again when connections fail for long: a killed guardian takes the server along, and only the
        next hold() brings both back. The DSN stays the same.
        """
        self._layout.check()
        ends_s = time.monotonic() + timeout_s
        held_before = os.path.exists(self._owner_file())
        try:
            dsn = self._join(ends_s, timeout_s)
        except EmbeddedPostgresError:
            if not held_before:
                self.release()
            raise
        self._dsn, self._holder_pid = dsn, os.getpid()
        return dsn

    def release(self) -> None:
        """This process needs the server no more. Idempotent."""
        self._dsn = None
        try:
            self._owner_file().unlink(missing_ok=True)
        except OSError as error:
            raise _unusable(self._layout.data_dir, error) from error

    def running(self) -> bool:
        """Whether the server takes connections."""
        return dsn_if_running(self._layout.data_dir) is not None

    def _join(self, ends_s: float, timeout_s: float) -> str:
        while True:
            # first our file, then its word: the guardian looks in the other order before it ends, so one is seen
            self._register()
            record = read_record(self._layout)
            if record is not None and record.state is State.READY and record.accepts():
                return record.dsn
            if time.monotonic() >= ends_s:
                why = record.problem if record is not None and record.problem else "it is not ready yet"
                raise EmbeddedPostgresError(
                    f"no connection within {timeout_s:g} s: {why}; "
                    f"see {self._layout.guard_log} and {self._layout.postgres_log}"
                )
            if record is not None or not self._start_guardian(ends_s):
                time.sleep(_POLL_S)

    def _owner_file(self) -> Path:
        key = process_key(os.getpid())
        assert key is not None
        return self._layout.owners / key

    def _register(self) -> None:
        try:
            _make_folder(self._layout.data_dir)
            # another user may have been quicker
            self._layout.require_trusted()
            self._layout.owners.mkdir(mode=0o700, exist_ok=True)
            self._owner_file().touch(mode=0o600)
        except OSError as error:
            raise _unusable(self._layout.data_dir, error) from error

    def _start_guardian(self, ends_s: float) -> bool:
        """Start a guardian and wait for its word: True where it serves, False where another is at work already.

        Raises what made it fail.
        """
        answer_end, guardian_end = os.pipe()
        try:
            try:
                launched = self._launch(guardian_end)
            finally:
                os.close(guardian_end)
            with launched:
                answer = _read_all(answer_end, ends_s)
                if answer is None:
                    # it has detached itself long since, or hangs before that: then nobody would ever end it
                    launched.kill()
        finally:
            os.close(answer_end)
        if answer in ("ready", "busy", None):
            return answer == "ready"
        if not answer:
            answer = f"the guardian ended at once: {last_lines(self._layout.guard_log)}"
        raise EmbeddedPostgresError(answer)

    def _launch(self, guardian_end: int) -> subprocess.Popen[bytes]:
        """The process detaches itself: Ray kills the children of a worker that dies."""
        command = [
            sys.executable, "-m", _GUARD_MODULE, "--data-dir", str(self._layout.data_dir),
            "--linger-s", str(self._linger_s), "--answer-fd", str(guardian_end),
        ]  # fmt: skip
        try:
            log = os.open(self._layout.guard_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise _unusable(self._layout.data_dir, error) from error
        try:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=_guardian_environment(),
                start_new_session=True, pass_fds=(guardian_end,),
            )  # fmt: skip
        except OSError as error:
            raise EmbeddedPostgresError(f"{sys.executable!r} cannot be started: {error.strerror}") from error
        finally:
            os.close(log)


def dsn_if_running(data_dir: Path) -> str | None:
    """The DSN of a server that takes connections, without holding it."""
    record = read_record(layout_of(data_dir))
    return record.dsn if record is not None and record.state is State.READY and record.accepts() else None


def process_key(pid: int) -> str | None:
    """Names a living process for ever: its id and when it started. None for one that is dead."""
    if sys.platform != "linux":
        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else f"{pid}-{process.create_time()}"
        except psutil.Error:
            return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # the start in ticks since boot: unlike psutil's time, it does not move when the clock is set
    return None if fields[0] in ("Z", "X") else f"{pid}-{fields[19]}"


def last_lines(log: Path, from_byte: int = 0) -> str:
    """The last lines of a log on one line."""
    try:
        with log.open("rb") as file:
            file.seek(max(from_byte, log.stat().st_size - 4000))
            text = file.read().decode(errors="replace")
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:]) if lines else "it said nothing"


def _make_folder(data_dir: Path) -> None:
    """Make the data folder where there is none; as root, so that the server's user can pass but not look."""
    missing = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
        if os.geteuid() == 0:
            folder.chmod(0o711 if folder == data_dir else 0o755)


def _unusable(data_dir: Path, error: OSError) -> EmbeddedPostgresError:
    where = f" at {error.filename}" if error.filename else ""
    return EmbeddedPostgresError(
        f"{data_dir} is not writable for user {os.geteuid()} ({error.strerror}{where}); "
        "set SEEDCORE_DATA_DIR to a folder that is"
    )


def _guardian_environment() -> dict[str, str]:
    environment = {
        name: value for name, value in os.environ.items() if name in _KEPT_VARIABLES or name.startswith(_KEPT_PREFIXES)
    }
    # its working folder is not on its path, but a checkout that we run from must be; site-packages is already,
    # and before the standard library it would hide parts of it
    ours = Path(__file__).resolve().parents[3]
    given = [str(Path(path).absolute()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = given if ours.name in ("site-packages", "dist-packages") else [str(ours), *given]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def _read_all(descriptor: int, ends_s: float) -> str | None:
    """What is written until the other end is closed; None where that takes too long."""
    # not select(): a busy process has descriptors beyond its limit of 1024
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    parts: list[bytes] = []
    while poller.poll(max(0.0, ends_s - time.monotonic()) * 1000):
        part = os.read(descriptor, 4096)
        if not part:
            return b"".join(parts).decode(errors="replace")
        parts.append(part)
    return None
