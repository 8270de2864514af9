"""The record: the state of the server, which the guardian publishes in a file of the data folder."""

from __future__ import annotations

import errno
import json
import os
import socket
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from seedcore.store.embedded.layout import DATABASE, PORT, ROLE, SOCKET_NAME, Layout
from seedcore.store.embedded.processes import is_alive

_CONNECT_TIMEOUT_S = 2.0


class State(StrEnum):
    """The state of the server. A guardian that has ended leaves no record."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Record:
    """The state of the server, the process key of its guardian, its socket, and its last problem."""

    state: State
    guardian: str
    socket_dir: str
    problem: str | None = None

    @property
    def dsn(self) -> str:
        return f"host={self.socket_dir} port={PORT} user={ROLE} dbname={DATABASE}"

    def write(self, layout: Layout) -> None:
        """Replace the record atomically. Only the guardian that holds the lock may do this. Raises OSError."""
        # a guardian whose folder was renamed may still write to the same path
        fresh = layout.record.with_suffix(f".new-{os.getpid()}")
        try:
            fresh.write_text(json.dumps(asdict(self)))
            fresh.chmod(0o644)
            fresh.replace(layout.record)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise

    def accepts(self) -> bool:
        """Whether a server listens. True also if this user may not connect: the connection then fails with a reason."""
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
    """Return the record of a live guardian, or None. Raises EmbeddedPostgresError if another user could write one."""
    layout.require_trusted()
    try:
        raw = json.loads(_read_own(layout.record))
        record = Record(State(raw["state"]), str(raw["guardian"]), str(raw["socket_dir"]), raw.get("problem"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not is_alive(record.guardian):
        return None
    layout.require_trusted_socket(Path(record.socket_dir))
    return record


def _read_own(file: Path) -> str:
    """Return the text of a file that belongs to this user or to root. Raises OSError."""
    with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), encoding="utf-8") as opened:
        if os.fstat(opened.fileno()).st_uid not in (0, os.geteuid()):
            raise PermissionError(errno.EPERM, "it belongs to another user", str(file))
        return opened.read()
