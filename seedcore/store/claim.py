"""Whose data folder it is: the registry of one Ray cluster at a time works on an embedded database.

A database with a DSN is handed over to a newer cluster on purpose (blue and green). A folder is not: a second cluster
on it is a mistake, and would end the fleet of the first.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from seedcore.core.errors import StoreUnavailableError
from seedcore.store.embedded import layout_of

_NAME = "registry.lock"


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds the folder, and its Ray cluster."""

    ray_cluster: str
    pid: int


class Claim:
    """Held until the process ends, however it ends: the kernel lets go of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None

    def take(self, ray_cluster: str) -> None:
        """Hold the folder for a Ray cluster; harmless to repeat. Raises StoreUnavailableError where another has it.

        Another process of the same cluster is no obstacle: their terms say who of them writes.
        """
        if self._file is not None:
            return
        descriptor = os.open(self._lock(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(descriptor)
            os.close(descriptor)
            if holder is None or holder.ray_cluster != ray_cluster:
                raise StoreUnavailableError(self._taken_by(holder)) from None
            return
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(asdict(Holder(ray_cluster, os.getpid()))).encode())
        self._file = descriptor

    def require_free_for(self, ray_cluster: str) -> None:
        """Raise StoreUnavailableError where the registry of another Ray cluster holds the folder now. Holds nothing."""
        try:
            descriptor = os.open(self._lock(), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(descriptor)
            if holder is None or holder.ray_cluster != ray_cluster:
                raise StoreUnavailableError(self._taken_by(holder)) from None
        finally:
            os.close(descriptor)

    def _lock(self) -> Path:
        """The lock's file. Raises EmbeddedPostgresError where another user could have laid it."""
        layout_of(self._folder).require_trusted()
        return self._folder / _NAME

    def _taken_by(self, holder: Holder | None) -> str:
        who = f" (pid {holder.pid}, {holder.ray_cluster})" if holder is not None else ""
        return (
            f"the registry of another Ray cluster{who} works on the data in {self._folder}: end that one, "
            "or give this one a folder of its own with SEEDCORE_DATA_DIR"
        )


def _read(descriptor: int) -> Holder | None:
    """What the holder wrote; None where it has not yet."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None
