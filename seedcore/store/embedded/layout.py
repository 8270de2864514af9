"""The data folder of an embedded server: its files, and the checks that no other user can change them."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from seedcore.core.errors import RegistryError

MAJOR = "18"
DATABASE = "seedcore"
ROLE = "postgres"
PORT = 5432
CLAIM_NAME = "registry.lock"
SOCKET_NAME = f".s.PGSQL.{PORT}"
# PostgreSQL needs a new file of 16 MiB for its log, and some more to recover
_MIN_FREE_BYTES = 32 * 1024**2
_FREE_SPACE = "free some space there: the server then starts again by itself, and nothing is lost"
_OUR_FOLDER = re.compile(r"pg\d+|pgsql-\d")


class EmbeddedPostgresError(RegistryError):
    """The embedded server cannot run here. The message contains the remedy."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"the embedded PostgreSQL cannot run: {self.why}"


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths in a data folder. Use `layout_of()`."""

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

    def create(self) -> None:
        """Create the data folder and the folder of its holders. Raises EmbeddedPostgresError."""
        try:
            self._create_data_dir()
            # another user may have created it first
            self.require_trusted()
            self.owners.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise unusable(self.data_dir, error) from error

    def is_ours_alone(self) -> bool:
        """Whether the data folder contains only files of this package."""
        names = {path.name for path in (self.owners, self.lock, self.record, self.socket_dir, self.guard_log)}
        names |= {self.postgres_log.name, CLAIM_NAME}
        return all(entry.name in names or _OUR_FOLDER.match(entry.name) for entry in self.data_dir.iterdir())

    def let_pass(self) -> None:
        """Let other users pass through the data folder. They cannot list it."""
        self.data_dir.chmod(stat.S_IMODE(self.data_dir.stat().st_mode) | stat.S_IXGRP | stat.S_IXOTH)

    def check(self) -> None:
        """Raise EmbeddedPostgresError if the folder or the data in it cannot be used. Changes nothing."""
        self.require_trusted()
        try:
            self._check_owner()
            self._check_version()
        except FileNotFoundError:
            return
        except OSError as error:
            raise unusable(self.data_dir, error) from error

    def require_trusted(self) -> None:
        """Raise EmbeddedPostgresError if another user can create or replace files in the folder. Changes nothing."""
        for folder in (self.data_dir, *self.data_dir.parents):
            try:
                found = folder.lstat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise unusable(self.data_dir, error) from error
            problem = _distrust(found, is_parent=folder != self.data_dir)
            if problem is not None:
                raise EmbeddedPostgresError(f"{folder} {problem}, or set SEEDCORE_DATA_DIR to another folder")

    def require_trusted_socket(self, folder: Path) -> None:
        """Raise EmbeddedPostgresError if another user created the folder of the socket: there is no password.

        The folder may be missing.
        """
        owners = {0, os.geteuid()}
        with suppress(OSError):
            # a server started by root runs as the user who owns its data
            owners.add(self.cluster.stat().st_uid)
        with suppress(FileNotFoundError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid not in owners or found.st_mode & 0o022:
                raise EmbeddedPostgresError(
                    f"{folder} belongs to another user; remove it, or set SEEDCORE_DATA_DIR to another folder"
                )

    def _create_data_dir(self) -> None:
        missing = [folder for folder in (self.data_dir, *self.data_dir.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(mode=0o700, exist_ok=True)
            if os.geteuid() == 0:
                # the user of root's server must pass through, and need not list the data folder
                folder.chmod(0o711 if folder == self.data_dir else 0o755)

    def _check_owner(self) -> None:
        uid, owner = os.geteuid(), self.data_dir.stat().st_uid
        if uid != 0 and self.cluster.exists() and self.cluster.stat().st_uid != uid:
            creator = owner if owner != uid else self.cluster.stat().st_uid
            raise EmbeddedPostgresError(
                f"the data in {self.cluster} is another user's; run as user {creator}, "
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
            # an empty new database beside data of another version would look like a loss
            raise EmbeddedPostgresError(
                f"the data in {folder} was written by PostgreSQL {written_by}, this is {MAJOR} with data in "
                f"{self.cluster}; dump and restore it, or set SEEDCORE_DATA_DIR to a new folder"
            )
        if self.cluster.exists() and any(self.cluster.iterdir()):
            raise EmbeddedPostgresError(
                f"{self.cluster} is not empty, yet holds no PostgreSQL data; move it away, "
                "or set SEEDCORE_DATA_DIR to a new folder"
            )


def layout_of(data_dir: Path) -> Layout:
    """Return the layout of a folder by its real path, which is the same for every process."""
    try:
        return Layout(Path(os.path.realpath(data_dir.expanduser())))
    except RuntimeError as error:
        raise EmbeddedPostgresError(f"{data_dir}: {error} Set SEEDCORE_DATA_DIR to another folder.") from error


def is_of_disk(error: OSError) -> bool:
    """Whether the disk is full, or fails."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def unusable(data_dir: Path, error: OSError) -> EmbeddedPostgresError:
    """Return the error for a data folder that cannot be written."""
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EmbeddedPostgresError(f"no space is left for {data_dir} ({error.strerror}{where}); {_FREE_SPACE}")
    if error.errno == errno.EIO:
        return EmbeddedPostgresError(
            f"the disk of {data_dir} fails ({error.strerror}{where}): see the kernel's log, and repair the disk"
        )
    return EmbeddedPostgresError(
        f"{data_dir} is not writable for user {os.geteuid()} ({error.strerror}{where}); "
        "set SEEDCORE_DATA_DIR to a folder that is"
    )


def space_problem(data_dir: Path) -> str | None:
    """Return that the disk of the data folder is full; None if PostgreSQL can write there."""
    try:
        free = shutil.disk_usage(data_dir).free
    except OSError:
        return None
    return f"only {free // 1024**2} MiB are free for {data_dir}; {_FREE_SPACE}" if free < _MIN_FREE_BYTES else None


def open_log(log: Path) -> int:
    """Open a log file for appending and return its descriptor. Follows no link. Raises OSError."""
    return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def last_lines(log: Path, from_byte: int = 0) -> str:
    """Return the last three lines of a log on one line."""
    try:
        with log.open("rb") as file:
            file.seek(max(from_byte, log.stat().st_size - 4000))
            text = file.read().decode(errors="replace")
    except OSError:
        text = ""
    return last_of(text)


def last_of(text: str) -> str:
    """Return the last three lines of a text on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-3:]) if lines else "it printed nothing"


def _distrust(found: os.stat_result, *, is_parent: bool) -> str | None:
    """Return why another user could change a folder, and the remedy; None if only this user and root can."""
    uid = os.geteuid()
    if found.st_uid not in (0, uid):
        us = "root" if uid == 0 else f"user {uid}"
        return f"belongs to user {found.st_uid}, not to {us}: run as that user"
    # in a sticky folder such as /tmp only the owner can rename or remove an entry
    if is_parent and found.st_mode & stat.S_ISVTX:
        return None
    if found.st_mode & stat.S_IWOTH:
        return "is writable for all users: `chmod o-w` it"
    if found.st_mode & stat.S_IWGRP and not _is_alone_in(found.st_gid):
        return f"is writable for group {found.st_gid}: `chmod g-w` it"
    return None


def _is_alone_in(gid: int) -> bool:
    """Whether this user is the only member of a group. True for root's group, and for an unknown group or user."""
    try:
        group = grp.getgrgid(gid)
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return True
    return set(group.gr_mem) <= {name} and group.gr_name in (name, "root", "wheel")
