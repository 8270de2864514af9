"""What can be done to an installation, each with its end. Every process is hit for real."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable

import psutil

from tests.faults.installation import Installation


class Breakage(ABC):
    """A fault: `begin`, some time, `end`."""

    def __init__(self, it: Installation, chance: random.Random) -> None:
        self._it = it
        self._chance = chance
        self._stopped: list[psutil.Process] = []

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    async def begin(self) -> None:
        """Break it."""

    async def end(self) -> None:
        """Mend it: what was stopped goes on."""
        for process in self._stopped:
            _signal(process, signal.SIGCONT)
        self._stopped = []

    def _stop(self, *titles: str) -> None:
        for title in titles:
            for process in self._it.processes(title):
                if _signal(process, signal.SIGSTOP):
                    self._stopped.append(process)

    def _kill(self, title: str) -> None:
        for process in self._it.processes(title):
            _signal(process, signal.SIGKILL)


class AgentKilled(Breakage):
    """One of the fleet; it is made again at the end unless Ray restarts it."""

    async def begin(self) -> None:
        name = self._chance.choice([*self._it.restarting, *self._it.mortal])
        os.kill((await self._it.account_of(name)).pid, signal.SIGKILL)


class AgentStopped(Breakage):
    """One of the fleet hangs, for less than a lease."""

    async def begin(self) -> None:
        name = self._chance.choice([*self._it.restarting, *self._it.mortal])
        process = psutil.Process((await self._it.account_of(name)).pid)
        if _signal(process, signal.SIGSTOP):
            self._stopped.append(process)


class RelayKilled(Breakage):
    async def begin(self) -> None:
        self._kill("ray::Relay")


class RelayStopped(Breakage):
    async def begin(self) -> None:
        self._stop("ray::Relay")


class RegistryKilled(Breakage):
    async def begin(self) -> None:
        self._kill("ray::RegistryActor")


class RegistryStopped(Breakage):
    """It hangs, and goes on."""

    async def begin(self) -> None:
        self._stop("ray::RegistryActor")


class RegistryAway(RegistryStopped):
    """It answers no call, and then is killed: another one takes its place."""

    async def end(self) -> None:
        for process in self._stopped:
            _signal(process, signal.SIGKILL)
        self._stopped = []


class ReplicaKilled(Breakage):
    async def begin(self) -> None:
        self._kill("ray::ServeReplica:seedcore")


class ServeStopped(Breakage):
    """Proxy, controller and replica of Serve hang, and go on."""

    async def begin(self) -> None:
        self._stop("ray::ProxyActor", "ray::ServeController", "ray::ServeReplica:seedcore")


class NodeKilled(Breakage):
    """The far node is lost with all agents on it; another takes its place."""

    async def begin(self) -> None:
        os.kill(self._it.far_node.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    async def end(self) -> None:
        # a node wants to be made in the main thread
        self._it.cluster.remove_node(self._it.far_node)
        self._it.add_far_node()


class GcsKilled(Breakage):
    """Ray's table of actors is away; the head keeps it on disk."""

    async def begin(self) -> None:
        await asyncio.to_thread(self._it.cluster.head_node.kill_gcs_server)

    async def end(self) -> None:
        await asyncio.to_thread(self._it.cluster.head_node.start_gcs_server)


class PostgresKilled(Breakage):
    async def begin(self) -> None:
        await asyncio.to_thread(self._it.server.stop)

    async def end(self) -> None:
        await asyncio.to_thread(self._it.server.start)


class PostgresDeaf(Breakage):
    """Connections are there and carry nothing."""

    async def begin(self) -> None:
        self._it.proxy.go_deaf()

    async def end(self) -> None:
        self._it.proxy.heal()


class PostgresRefuses(Breakage):
    async def begin(self) -> None:
        self._it.proxy.refuse()

    async def end(self) -> None:
        self._it.proxy.heal()


class PostgresCut(Breakage):
    """Every connection is reset; new ones pass."""

    async def begin(self) -> None:
        self._it.proxy.cut()


class PostgresHalfOpen(Breakage):
    """The connections there are carry nothing any more; new ones pass."""

    async def begin(self) -> None:
        self._it.proxy.half_open()


Maker = Callable[[Installation, random.Random], Breakage]

WEIGHTS: dict[Maker, float] = {
    AgentKilled: 3,
    AgentStopped: 2,
    RelayKilled: 1,
    RelayStopped: 1,
    RegistryKilled: 3,
    RegistryStopped: 2,
    RegistryAway: 1,
    ReplicaKilled: 1,
    ServeStopped: 1,
    NodeKilled: 1,
    GcsKilled: 2,
    PostgresKilled: 2,
    PostgresDeaf: 1,
    PostgresRefuses: 1,
    PostgresCut: 1,
    PostgresHalfOpen: 1,
}


def _signal(process: psutil.Process, number: signal.Signals) -> bool:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True
