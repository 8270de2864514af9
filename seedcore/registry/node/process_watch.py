"""Watches processes and actors of one node for their end, behind one interface.

`PidfdWatch` is told by the kernel, at once; `ActorStateWatch` asks what Ray knows of the actor, for processes that
this one cannot see. Neither sees a process that hangs: beats do.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import functools
import os
import resource
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Protocol

from seedcore.core.errors import DirectoryUnavailableError
from seedcore.core.timeouts import end
from seedcore.core.wire import wire
from seedcore.registry.caller.handles import Proof, probe
from seedcore.registry.ray_support.lookup import (
    ActorHandle,
    actor_id_of,
    can_be_told,
    find_actor,
    is_told_gone,
    own_worker_id,
)

OnExit = Callable[[str, str, str | None], None]
"""Called with an instance's id, the cause of its end, and its process key."""

_OUR_NAMESPACE = "/proc/self/ns/pid"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_START_TIME_FIELD = 19  # of /proc/PID/stat, counted behind the process's name in brackets
_EXIT_STATUS_FIELD = 49
_PROBES_AT_ONCE = 100
_PROBE_S = 2.0


@wire
@dataclass(frozen=True, slots=True)
class Watched:
    """An instance and where it lives."""

    instance_id: str
    pid: int | None
    process_key: str | None
    actor_name: str | None
    namespace: str | None
    actor_id: str | None


class Watch(Protocol):
    """Reports each exit once, by a call of its OnExit; never of one that lives."""

    async def add(self, watched: Watched) -> bool:
        """Watch an instance; False where this watch cannot. One that has ended already is reported."""
        ...

    def discard(self, instance_id: str) -> None:
        """Watch it no more."""
        ...

    async def close(self) -> None:
        """Let go of everything."""
        ...


class Unwatched(str, Enum):
    """Why the end of an instance's process is noticed by its beats alone."""

    DESCRIPTORS = "descriptors"
    HIDDEN = "hidden"
    NAMESPACE = "namespace"
    RAY = "ray"
    RELAY = "relay"
    ELSEWHERE = "elsewhere"

    @property
    def problem(self) -> str | None:
        """What is wrong, and what helps; None where it is meant to be so."""
        return _PROBLEMS.get(self)


_PROBLEMS = {
    Unwatched.DESCRIPTORS: "the relay there has no file descriptor left: raise `ulimit -n` before `ray start`",
    Unwatched.HIDDEN: "/proc hides their processes from the relay: mount it without hidepid, or run agents as its user",
    Unwatched.NAMESPACE: (
        "their processes have another PID namespace: share one (shareProcessNamespace), or report from named actors"
    ),
    Unwatched.RAY: "Ray does not answer about their actors: it is asked again",
}


def why_unwatched(watched: Watched) -> Unwatched:
    """Why no watch of this process can see an instance."""
    key, pid = watched.process_key, watched.pid
    if key is None or pid is None or not hasattr(os, "pidfd_open") or not _is_here(key):
        if watched.actor_id is not None:
            return Unwatched.RAY
        is_in_another_namespace = key is not None and _is_of_this_boot(key) and not _is_here(key)
        return Unwatched.NAMESPACE if is_in_another_namespace else Unwatched.ELSEWHERE
    try:
        descriptor = _open(pid, key)
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            return Unwatched.DESCRIPTORS
        return Unwatched.ELSEWHERE if error.errno in {errno.ENOSYS, errno.EPERM} else Unwatched.HIDDEN
    if descriptor is not None:
        os.close(descriptor)
    # it can be seen by now: the next try will
    return Unwatched.DESCRIPTORS


def take_all_descriptors() -> None:
    """Let this process open as many files as it may: one for each process that it watches."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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


def lives(pid: int, process_key: str) -> bool:
    """Whether the process with a key is there, in our PID namespace."""
    key, there = _split(process_key), process_key_of(pid)
    return there is not None and _split(there) == key._replace(worker=None)


def has_ended(pid: int | None, process_key: str | None) -> bool:
    """Whether a process of this host has certainly ended; False also of one that cannot be seen from here."""
    if pid is None or process_key is None or not _is_here(process_key):
        return False
    try:
        return _read_key(pid) != _split(process_key).process
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
    return _split(process_key).worker


class _Key(NamedTuple):
    """A process key in its parts. Keys of versions before protocol 9 have no boot id."""

    process: str
    worker: str | None
    boot: str | None


def _split(process_key: str) -> _Key:
    process, _, behind = process_key.partition("/")
    # the boot id stands last: relays of versions before read what is in front of it
    worker, _, boot = behind.partition("/")
    return _Key(process, worker or None, boot or None)


def _key_of(pid: int, worker_id: str | None) -> str | None:
    try:
        process = _read_key(pid)
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


def _read_key(pid: int) -> str | None:
    """The first part of a process's key; None of a zombie. Raises OSError where it cannot be read, which is no proof of
    an end."""
    namespace = os.stat(_OUR_NAMESPACE).st_ino
    fields = _stat_fields(pid)
    # a zombie has ended: it waits for nobody but its parent
    return None if fields[0] in "ZX" else f"{namespace}-{pid}-{fields[_START_TIME_FIELD]}"


def _stat_fields(pid: int) -> list[str]:
    # in front of the bracket its name, which may be any bytes
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()


class PidfdWatch:
    """One descriptor for each process, however many instances live in it (pidfd_open(2), Linux 5.3)."""

    def __init__(self, on_exit: OnExit) -> None:
        self._on_exit = on_exit
        self._descriptors: dict[str, int] = {}
        self._tenants: dict[str, set[str]] = {}
        self._home: dict[str, str] = {}

    async def add(self, watched: Watched) -> bool:
        key, pid = watched.process_key, watched.pid
        if key is None or pid is None or not hasattr(os, "pidfd_open") or not _is_here(key):
            return False
        self.discard(watched.instance_id)
        if key not in self._descriptors:
            try:
                descriptor = _open(pid, key)
            except OSError:
                return False
            if descriptor is None:
                self._on_exit(watched.instance_id, exited(pid, None), key)
                return True
            self._descriptors[key] = descriptor
            asyncio.get_running_loop().add_reader(descriptor, self._ended, key, pid)
        self._tenants.setdefault(key, set()).add(watched.instance_id)
        self._home[watched.instance_id] = key
        return True

    def discard(self, instance_id: str) -> None:
        key = self._home.pop(instance_id, None)
        if key is None:
            return
        self._tenants[key].discard(instance_id)
        if not self._tenants[key]:
            self._close(key)

    async def close(self) -> None:
        for key in list(self._descriptors):
            self._close(key)
        self._home.clear()

    def _ended(self, key: str, pid: int) -> None:
        cause = exited(pid, exit_status(self._descriptors[key], pid))
        tenants = self._close(key)
        for instance_id in sorted(tenants):
            del self._home[instance_id]
            self._on_exit(instance_id, cause, key)

    def _close(self, key: str) -> set[str]:
        descriptor = self._descriptors.pop(key)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        return self._tenants.pop(key)


class ActorStateWatch:
    """Polls what Ray tells this process of an actor that it has called once. Holds weak handles only."""

    def __init__(self, on_exit: OnExit, poll_s: float = 0.05, timeout_s: float = 5.0) -> None:
        self._on_exit = on_exit
        self._poll_s = poll_s
        self._timeout_s = timeout_s
        self._handles: dict[str, ActorHandle] = {}
        self._keys: dict[str, str | None] = {}
        self._polling: asyncio.Task[None] | None = None
        self._probing: set[asyncio.Task[None]] = set()
        self._free = asyncio.Semaphore(_PROBES_AT_ONCE)

    async def add(self, watched: Watched) -> bool:
        if watched.actor_name is None or watched.namespace is None or watched.actor_id is None:
            return False
        try:
            handle = await find_actor(watched.actor_name, watched.namespace, self._timeout_s)
        except DirectoryUnavailableError:
            return False
        if handle is None or actor_id_of(handle) != watched.actor_id:
            self._on_exit(watched.instance_id, "Ray has no such actor any more", watched.process_key)
            return True
        if not can_be_told(handle):
            return False
        self._handles[watched.instance_id] = handle
        self._keys[watched.instance_id] = watched.process_key
        probing = asyncio.create_task(self._probe(watched.instance_id, handle), name="actor-probe")
        self._probing.add(probing)
        probing.add_done_callback(self._probing.discard)
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll(), name="actor-states")
        return True

    def discard(self, instance_id: str) -> None:
        self._handles.pop(instance_id, None)
        self._keys.pop(instance_id, None)

    async def close(self) -> None:
        polling, self._polling = self._polling, None
        await end(polling, *self._probing)
        self._handles.clear()
        self._keys.clear()

    async def _probe(self, instance_id: str, handle: ActorHandle) -> None:
        """Call it once: only then does Ray keep us informed. A busy one answers later, which needs no waiting for."""
        async with self._free:
            if self._handles.get(instance_id) is handle and await probe(handle, _PROBE_S) is Proof.NO:
                self._end(instance_id, handle)

    def _end(self, instance_id: str, handle: ActorHandle) -> None:
        if self._handles.get(instance_id) is handle:
            key = self._keys.get(instance_id)
            self.discard(instance_id)
            self._on_exit(instance_id, "Ray says that its actor died", key)

    async def _poll(self) -> None:
        while True:
            for instance_id, handle in list(self._handles.items()):
                # a restarted actor is a new incarnation
                if is_told_gone(handle):
                    self._end(instance_id, handle)
            await asyncio.sleep(self._poll_s)


def _open(pid: int, key: str) -> int | None:
    """A descriptor of the process with this key, None where it has ended. Raises OSError where neither is certain."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        # only now: the id may have passed on before the descriptor held it
        if _read_key(pid) == _split(key).process:
            return descriptor
    except OSError:
        # we may be out of descriptors, or /proc may hide the living (hidepid): the kernel knows
        if not _has_ended(descriptor):
            os.close(descriptor)
            raise
    os.close(descriptor)
    return None


def _has_ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _is_here(key: str) -> bool:
    """Whether a process provably lives, or lived, on this host since it booted, in our PID namespace. The number of a
    namespace proves nothing: that of the first one is the same on every host, and others recur after a boot."""
    try:
        namespace = os.stat(_OUR_NAMESPACE).st_ino
    except OSError:
        return False
    return _is_of_this_boot(key) and key.partition("-")[0] == str(namespace)


def _is_of_this_boot(key: str) -> bool:
    boot = _split(key).boot
    return boot is not None and boot == _boot_id()


class _PidfdInfo(ctypes.Structure):
    """`struct pidfd_info` of linux/pidfd.h, as far as its first version goes."""

    _fields_ = (
        ("mask", ctypes.c_uint64),
        ("cgroup_id", ctypes.c_uint64),
        ("ids", ctypes.c_uint32 * 11),
        ("exit_status", ctypes.c_int32),
    )


_PIDFD_INFO_EXIT = 1 << 3
_READ_AND_WRITE = 3
# _IOWR(0xFF, 11, struct pidfd_info), as ioctl.h of all our architectures makes it
_PIDFD_GET_INFO = _READ_AND_WRITE << 30 | ctypes.sizeof(_PidfdInfo) << 16 | 0xFF << 8 | 11


def exit_status(descriptor: int, pid: int) -> int | None:
    """How the ended process of a pidfd has ended, as wait(2) tells its parent; None where nobody tells us.

    While its parent has not asked, /proc has it; after that the descriptor (Linux 6.15).
    """
    told = _status_of_zombie(pid)
    # asked in between: its id may be another's by now, but not the descriptor
    return told if told is not None else _status_by_descriptor(descriptor)


def _status_of_zombie(pid: int) -> int | None:
    try:
        fields = _stat_fields(pid)
    except OSError:
        return None
    return int(fields[_EXIT_STATUS_FIELD]) if fields[0] in "ZX" else None


def _status_by_descriptor(descriptor: int) -> int | None:
    info = _PidfdInfo(mask=_PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(descriptor, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    return info.exit_status if info.mask & _PIDFD_INFO_EXIT else None


def exited(pid: int, status: int | None) -> str:
    """The cause of a death: what is known of a process's end. `status` as of wait(2)."""
    if status is None:
        return f"its process exited (pid {pid})"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        # real-time signals have no names
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return f"its process was killed by {name} (pid {pid})"
    return f"its process exited with code {os.WEXITSTATUS(status)} (pid {pid})"
