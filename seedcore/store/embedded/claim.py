"""The claim on a data folder: the registries of only one Ray cluster at a time use an embedded database.

A newer cluster may take over a database with a DSN on purpose (blue and green). A second cluster on a data folder is a
mistake: it would end the fleet of the first.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from seedcore.core.errors import StoreUnavailableError
from seedcore.store.embedded.layout import CLAIM_NAME, is_of_disk, layout_of, unusable


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds the claim, and its Ray cluster."""

    ray_cluster: str
    pid: int


class Claim:
    """A file lock. The kernel releases it when the process ends, also after a crash."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None

    def take(self, ray_cluster: str) -> None:
        """Claim the folder for a Ray cluster. Idempotent. Raises StoreUnavailableError if another cluster holds it.

        Succeeds if another process of the same cluster holds the claim: the terms decide which of the two writes.
        """
        if self._file is not None:
            return
        lock = self._lock()
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            if not is_of_disk(error):
                raise
            raise unusable(self._folder, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(descriptor)
            os.close(descriptor)
            if holder is None or holder.ray_cluster != ray_cluster:
                raise StoreUnavailableError(self._taken_by(holder)) from None
            return
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(asdict(Holder(ray_cluster, os.getpid()))).encode())
        except OSError as error:
            # the lock of this descriptor would refuse the next try
            os.close(descriptor)
            raise unusable(self._folder, error) from error
        self._file = descriptor

    def require_free_for(self, ray_cluster: str) -> None:
        """Raise StoreUnavailableError if the registry of another Ray cluster holds the claim. Claims nothing."""
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
        """The lock file. Raises EmbeddedPostgresError if another user could have created it."""
        layout_of(self._folder).require_trusted()
        return self._folder / CLAIM_NAME

    def _taken_by(self, holder: Holder | None) -> str:
        process = f" (pid {holder.pid}, {holder.ray_cluster})" if holder is not None else ""
        return (
            f"the registry of another Ray cluster{process} works on the data in {self._folder}: stop that registry, "
            "or set SEEDCORE_DATA_DIR to another folder"
        )


def _read(descriptor: int) -> Holder | None:
    """The content of the lock file; None if its holder has not written it yet."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None
