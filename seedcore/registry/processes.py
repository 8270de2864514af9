"""Watches processes and actors of one node for their end, behind one interface.

`PidfdWatch` is told by the kernel, at once; `ActorStateWatch` asks what Ray knows of the actor, for processes that
this one cannot see. Neither sees a process that hangs: beats do.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from seedcore.core.errors import DirectoryUnavailableError
from seedcore.core.waiting import end
from seedcore.registry.handles import Proof, probe
from seedcore.registry.lookup import ActorHandle, actor_id_of, find_actor

OnExit = Callable[[str, str], None]

_START_TIME_FIELD = 19  # of /proc/PID/stat, counted behind the process's name in brackets
_RESTARTING, _DEAD = 3, 4  # of ray's ActorTableData.ActorState


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
    """Reports each exit once, by a call of `on_exit(instance_id, cause)`; never of one that lives."""

    async def add(self, watched: Watched) -> bool:
        """Watch an instance; False where this watch cannot. One that has ended already is reported."""
        ...

    def discard(self, instance_id: str) -> None:
        """Watch it no more."""
        ...

    async def close(self) -> None:
        """Let go of everything."""
        ...


def own_process_key() -> str | None:
    """What tells this process from any other, also from a later one with its id; None where Linux does not say."""
    return process_key_of(os.getpid())


def process_key_of(pid: int) -> str | None:
    """As `own_process_key` of a process in our PID namespace; None where there is none."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    # a zombie has ended: it waits for nobody but its parent
    return None if fields[0] in "ZX" else f"{namespace}-{pid}-{fields[_START_TIME_FIELD]}"


class PidfdWatch:
    """One descriptor for each process, however many instances live in it (pidfd_open(2), Linux 5.3)."""

    def __init__(self, on_exit: OnExit) -> None:
        self._on_exit = on_exit
        self._descriptors: dict[str, int] = {}
        self._tenants: dict[str, set[str]] = {}
        self._home: dict[str, str] = {}

    async def add(self, watched: Watched) -> bool:
        key, pid = watched.process_key, watched.pid
        if key is None or pid is None or not hasattr(os, "pidfd_open") or not _is_of_our_namespace(key):
            return False
        self.discard(watched.instance_id)
        if key not in self._descriptors:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                descriptor = None
            except OSError:
                return False
            # only now: the id may have passed on before the descriptor held it
            if descriptor is None or process_key_of(pid) != key:
                if descriptor is not None:
                    os.close(descriptor)
                self._on_exit(watched.instance_id, _exited(pid))
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
        tenants = self._close(key)
        for instance_id in sorted(tenants):
            del self._home[instance_id]
            self._on_exit(instance_id, _exited(pid))

    def _close(self, key: str) -> set[str]:
        descriptor = self._descriptors.pop(key)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        return self._tenants.pop(key)


class ActorStateWatch:
    """Polls what Ray tells this process of an actor that it has called once. Holds weak handles only.

    The poll reads memory. It uses a private method of Ray's handle, `_get_local_state`, here and nowhere else;
    where a handle has none (Ray Client) nothing can be watched.
    """

    def __init__(self, on_exit: OnExit, poll_s: float = 0.05, timeout_s: float = 5.0) -> None:
        self._on_exit = on_exit
        self._poll_s = poll_s
        self._timeout_s = timeout_s
        self._handles: dict[str, ActorHandle] = {}
        self._polling: asyncio.Task[None] | None = None

    async def add(self, watched: Watched) -> bool:
        if watched.actor_name is None or watched.namespace is None or watched.actor_id is None:
            return False
        try:
            handle = await find_actor(watched.actor_name, watched.namespace, self._timeout_s)
        except DirectoryUnavailableError:
            return False
        if handle is None or actor_id_of(handle) != watched.actor_id:
            self._on_exit(watched.instance_id, "Ray has no such actor any more")
            return True
        if not hasattr(handle, "_get_local_state"):
            return False
        if await probe(handle, self._timeout_s) is Proof.NO:
            self._on_exit(watched.instance_id, _died())
            return True
        self._handles[watched.instance_id] = handle
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll(), name="actor-states")
        return True

    def discard(self, instance_id: str) -> None:
        self._handles.pop(instance_id, None)

    async def close(self) -> None:
        polling, self._polling = self._polling, None
        await end(polling)
        self._handles.clear()

    async def _poll(self) -> None:
        while True:
            for instance_id, handle in list(self._handles.items()):
                # its process is gone in both: a restarted actor is a new incarnation
                if handle._get_local_state() in {_RESTARTING, _DEAD}:
                    self.discard(instance_id)
                    self._on_exit(instance_id, _died())
            await asyncio.sleep(self._poll_s)


def _is_of_our_namespace(key: str) -> bool:
    ours = own_process_key()
    return ours is not None and ours.partition("-")[0] == key.partition("-")[0]


def _exited(pid: int) -> str:
    return f"its process exited (pid {pid})"


def _died() -> str:
    return "Ray says that its actor died"
