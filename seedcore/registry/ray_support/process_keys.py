"""Keys of processes: a key names one process among those of all hosts and all times."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import NamedTuple

from seedcore.registry.ray_support.lookup import own_worker_id

_OUR_NAMESPACE = "/proc/self/ns/pid"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_START_TIME_FIELD = 19  # of /proc/PID/stat, counted behind the process's name in brackets


def own_process_key() -> str | None:
    """The key of this process, which no other process on any host has; None where Linux does not say.

    PROCESS/WORKER/BOOT: PID namespace, id and start time; the id of the Ray worker that it is, if it is one; the boot
    id of its host, where that can be read.
    """
    return _own_key(os.getpid(), own_worker_id())


@functools.lru_cache(maxsize=1)
def _own_key(pid: int, worker_id: str | None) -> str | None:
    # one object for all agents of a process: so it is when they have travelled together
    return _key_of(pid, worker_id)


def process_key_of(pid: int) -> str | None:
    """As `own_process_key` of a process in our PID namespace that is no Ray worker; None where there is none, or where
    /proc does not say."""
    return _key_of(pid, None)


def leader_of(pid: int) -> int | None:
    """The process of a thread id, which is the same for the id of a process; None where /proc does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("Tgid:")), None)


def lives(pid: int, process_key: str) -> bool:
    """Whether the process with a key is there, in our PID namespace."""
    key, there = split_key(process_key), process_key_of(pid)
    return there is not None and split_key(there) == key._replace(worker=None)


def has_ended(pid: int | None, process_key: str | None) -> bool:
    """Whether a process of this host has certainly ended; False also of one that cannot be seen from here."""
    if pid is None or process_key is None or not is_here(process_key):
        return False
    try:
        return read_process(pid) != split_key(process_key).process
    except OSError:
        # /proc may hide the living
        return not _is_there(pid)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def worker_id_of(process_key: str) -> str | None:
    """The id of the Ray worker that a process was, None of one that was none."""
    return split_key(process_key).worker


class Key(NamedTuple):
    """A process key in its parts. `boot` is None where /proc did not show the id of the boot."""

    process: str
    worker: str | None
    boot: str | None


def split_key(process_key: str) -> Key:
    process, _, behind = process_key.partition("/")
    worker, _, boot = behind.partition("/")
    return Key(process, worker or None, boot or None)


def _key_of(pid: int, worker_id: str | None) -> str | None:
    try:
        process = read_process(pid)
    except OSError:
        return None
    if process is None:
        return None
    return "/".join((process, worker_id or "", _boot_id() or "")).rstrip("/")


def _boot_id() -> str | None:
    """The id that the kernel draws when it boots; None where it cannot be read."""
    return _read_once(_BOOT_ID)


@functools.lru_cache(maxsize=2)
def _read_once(path: Path) -> str | None:
    # a relay compares it for every instance that it is to watch
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def read_process(pid: int, *, or_zombie: bool = False) -> str | None:
    """The first part of a process's key; None of a zombie, unless it is wanted. Raises OSError where it cannot be read,
    which is no proof of an end."""
    namespace = os.stat(_OUR_NAMESPACE).st_ino
    fields = stat_fields(pid)
    # a zombie has ended: only its parent has not read that yet
    is_wanted = or_zombie or fields[0] not in "ZX"
    return f"{namespace}-{pid}-{fields[_START_TIME_FIELD]}" if is_wanted else None


def stat_fields(pid: int) -> list[str]:
    # in front of the bracket its name, which may be any bytes
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()


def is_here(key: str) -> bool:
    """Whether a process provably lives, or lived, on this host since it booted, in our PID namespace. The number of a
    namespace proves nothing: that of the first one is the same on every host, and others recur after a boot."""
    try:
        namespace = os.stat(_OUR_NAMESPACE).st_ino
    except OSError:
        return False
    return is_of_this_boot(key) and key.partition("-")[0] == str(namespace)


def is_of_this_boot(key: str) -> bool:
    boot = split_key(key).boot
    return boot is not None and boot == _boot_id()
