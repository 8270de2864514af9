"""Watches processes and actors of one node for their end, behind one interface.

`PidfdWatch` gets the kernel's notice at once; `ActorStateWatch` reads what Ray knows of the actor, for processes that
this one cannot see. Neither sees a process that hangs: its missing beats show it.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
import resource
import select
import signal
from collections.abc import Callable
from typing import Protocol

from seedcore.core.backoff import Backoff, supervise
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.errors import DirectoryUnavailableError
from seedcore.core.timeouts import end
from seedcore.registry.protocol.messages import Unwatched, Watched
from seedcore.registry.ray_support.actors import Proof, probe
from seedcore.registry.ray_support.lookup import (
    ActorHandle,
    actor_id_of,
    find_actor,
    is_known_gone,
    is_observable,
)
from seedcore.registry.ray_support.process_keys import (
    is_here,
    is_of_this_boot,
    read_process,
    split_key,
    stat_fields,
)

OnExit = Callable[[str, Cause, str | None], None]
"""Called with an instance's id, the cause of its end, and its process key."""

_EXIT_STATUS_FIELD = 49
_PROBES_AT_ONCE = 100
_PROBE_S = 2.0
_RETRY_MAX_S = 5.0
# for what Ray and this process open themselves, so that a relay at its limit goes on working
_RESERVED_DESCRIPTORS = 256


class Watch(Protocol):
    """Reports each exit once, by a call of its OnExit; never one of a process that lives."""

    async def add(self, watched: Watched) -> bool:
        """Watch an instance. Returns False where this watch cannot. An end before the call is reported, too."""
        ...

    def discard(self, instance_id: str) -> None:
        """Watch an instance no longer."""
        ...

    async def close(self) -> None:
        """Release everything."""
        ...


def why_unwatched(watched: Watched) -> Unwatched:
    """Why no watch of this process can see an instance."""
    key, pid = watched.process_key, watched.pid
    if not has_descriptors():
        return Unwatched.DESCRIPTORS
    if key is None or pid is None or not hasattr(os, "pidfd_open") or not is_here(key):
        if watched.actor_id is not None:
            return Unwatched.RAY
        is_in_another_namespace = key is not None and is_of_this_boot(key) and not is_here(key)
        return Unwatched.NAMESPACE if is_in_another_namespace else Unwatched.ELSEWHERE
    try:
        descriptor = _open(pid, key)
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            return Unwatched.DESCRIPTORS
        return Unwatched.ELSEWHERE if error.errno in {errno.ENOSYS, errno.EPERM} else Unwatched.HIDDEN
    if descriptor is not None:
        os.close(descriptor)
    # it can be seen by now: the next try succeeds
    return Unwatched.DESCRIPTORS


def take_all_descriptors() -> None:
    """Raise the limit of open files of this process as far as possible: it needs one for each process."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def has_descriptors() -> bool:
    """Whether this process may watch one more process: the last of its descriptors are reserved for its own work."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        # the lowest free number: all below it are in use
        free = os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return False
    os.close(free)
    return limit == resource.RLIM_INFINITY or free < limit - min(_RESERVED_DESCRIPTORS, limit // 4)


class PidfdWatch:
    """One descriptor for each process, however many instances live in it (pidfd_open(2), Linux 5.3)."""

    def __init__(self, on_exit: OnExit) -> None:
        self._on_exit = on_exit
        self._descriptors: dict[str, int] = {}
        self._tenants: dict[str, set[str]] = {}
        self._home: dict[str, str] = {}

    async def add(self, watched: Watched) -> bool:
        key, pid = watched.process_key, watched.pid
        if key is None or pid is None or not hasattr(os, "pidfd_open") or not is_here(key):
            return False
        self.discard(watched.instance_id)
        if key not in self._descriptors:
            if not has_descriptors():
                return False
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
    """Polls what Ray has sent to this process about actors that it has called once. Holds weak handles only."""

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
        # each actor that is called takes a connection
        if watched.actor_name is None or watched.namespace is None or watched.actor_id is None or not has_descriptors():
            return False
        try:
            handle = await find_actor(watched.actor_name, watched.namespace, self._timeout_s)
        except DirectoryUnavailableError:
            return False
        if handle is None or actor_id_of(handle) != watched.actor_id:
            self._on_exit(watched.instance_id, Cause(CauseKind.ACTOR_DIED, "Ray no longer has it"), watched.process_key)
            return True
        if not is_observable(handle):
            return False
        self._handles[watched.instance_id] = handle
        self._keys[watched.instance_id] = watched.process_key
        probing = asyncio.create_task(self._probe(watched.instance_id, handle), name="actor-probe")
        self._probing.add(probing)
        probing.add_done_callback(self._probing.discard)
        if self._polling is None:
            polling = supervise(self._poll, Backoff(self._poll_s, _RETRY_MAX_S), "the poll of actor states")
            self._polling = asyncio.create_task(polling, name="actor-states")
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
        """Call an actor once: only then does Ray send its state to this process. The answer of a busy one is not waited
        for."""
        async with self._free:
            if self._handles.get(instance_id) is handle and await probe(handle, _PROBE_S) is Proof.NO:
                self._end(instance_id, handle)

    def _end(self, instance_id: str, handle: ActorHandle) -> None:
        if self._handles.get(instance_id) is handle:
            key = self._keys.get(instance_id)
            self.discard(instance_id)
            self._on_exit(instance_id, Cause(CauseKind.ACTOR_DIED, "Ray reports it"), key)

    async def _poll(self) -> float:
        for instance_id, handle in list(self._handles.items()):
            # a restarted actor is a new incarnation
            if is_known_gone(handle):
                self._end(instance_id, handle)
        return self._poll_s


def _open(pid: int, key: str) -> int | None:
    """A descriptor of the process with this key, also of a zombie, whose exit status can still be read; None if its
    parent has read that. Raises OSError where neither is certain."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        # only now: another process may have got the id before the descriptor was open
        if read_process(pid, or_zombie=True) == split_key(key).process:
            return descriptor
    except OSError:
        # this process may be out of descriptors, or /proc may hide others (hidepid): the kernel knows
        if not _has_ended(descriptor):
            os.close(descriptor)
            raise
    os.close(descriptor)
    return None


def _has_ended(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


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
    """The exit status of the ended process of a pidfd, as wait(2) returns it to the parent; None if it is not known.

    Until the parent has read it, /proc has it; after that the descriptor (Linux 6.15).
    """
    status = _status_of_zombie(pid)
    # the parent may have read it in between: then the id may be another's, but not the descriptor
    return status if status is not None else _status_by_descriptor(descriptor)


def _status_of_zombie(pid: int) -> int | None:
    try:
        fields = stat_fields(pid)
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


def exited(pid: int, status: int | None) -> Cause:
    """The cause of a death by the exit status of the process, as of wait(2); None: the status is not known."""
    if status is None:
        return Cause(CauseKind.PROCESS_EXITED, f"pid {pid}")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        # real-time signals have no names
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return Cause(CauseKind.PROCESS_KILLED, f"{name} (pid {pid})")
    return Cause(CauseKind.PROCESS_EXITED, f"exit code {os.WEXITSTATUS(status)} (pid {pid})")
