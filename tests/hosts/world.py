"""An installation on hosts: a head, two workers, a database on a host of its own beside the head, and a caller.

head (Ray's head, the registry)   left (agents)   right (agents, the caller)   base (PostgreSQL)
    10.77.0.1                       10.77.0.2       10.77.0.3                    10.77.0.9
        +-------------------------------+---------------+----------------------------+  one bridge
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg import conninfo

from seedcore.core.causes import CauseKind
from seedcore.core.lifecycle import Status
from tests.hosts.caller import MARK
from tests.hosts.host import RAY_PORT, Host, RayState
from tests.hosts.network import NETWORK, Network, address_of
from tests.hosts.records import Call, Ended, Look, Node, Row
from tests.servers import PostgresServer, embedded_binaries, running_server

BEAT_S = 5.0
LEASE_S = 15.0
_NUMBERS = {"head": 1, "left": 2, "right": 3, "base": 9}
_RAY_HOSTS = ("head", "left", "right")
_WORKERS = ("left", "right")
_CALLERS_HOST = "right"
_KINDS = ("one", "two", "reporting")
_DATABASE_PORT = 5432
_LINE_BYTES = 2**26
_COMMAND_S = 60.0
_BEGIN_S = 120.0


@dataclass(frozen=True)
class Restart:
    """A worker host that the supervisor has started again, and the state of its Ray node before."""

    at: float
    host: str
    state: RayState


class NoAnswerError(Exception):
    """The caller has ended, or failed, or did not answer in time."""


class World:
    """The hosts and what runs on them. `restarts` has the hosts that the supervisor has started again. `needs_caller`:
    the host of the caller or its cluster has ended, and the caller with it; if it ends otherwise, the run fails."""

    def __init__(self, folder: Path, server: PostgresServer, network: Network, *, is_tolerant: bool) -> None:
        """`is_tolerant`: Ray's tables are in RocksDB on the head's disk, so that they outlive the head."""
        self.server = server
        self.network = network
        self._database = server.create_database()
        self._folder = folder
        folder.mkdir()
        dsn = conninfo.make_conninfo(host=address_of(_NUMBERS["base"]), user="postgres", dbname=self._database)
        env = {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "SEEDCORE_NS": "hosts",
            "SEEDCORE_PG_DSN": dsn,
            "SEEDCORE_LEASE_SEC": f"{LEASE_S:g}",
            "REGISTRY_BEAT_SEC": f"{BEAT_S:g}",
        }
        on_disk = (
            {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": f"{folder.parent}/r/gcs"} if is_tolerant else {}
        )
        self.is_tolerant = is_tolerant
        self.hosts = {
            name: Host(name, number, folder, network, {**env, **on_disk} if name == "head" else env)
            for name, number in _NUMBERS.items()
        }
        if is_tolerant:
            (folder / "head" / "gcs").mkdir()
        self.fleet = {f"{host}-{kind}": self.hosts[host].address for host in ("left", "right") for kind in _KINDS}
        self._caller: asyncio.subprocess.Process | None = None
        self._asking = asyncio.Lock()
        self.restarts: list[Restart] = []
        self.needs_caller = True

    @property
    def head(self) -> Host:
        """The host with Ray's head and the registry."""
        return self.hosts["head"]

    async def begin(self) -> None:
        """Start the hosts, the database, Ray, the caller and the fleet."""
        for host in self.hosts.values():
            await asyncio.to_thread(host.start)
        await asyncio.gather(asyncio.to_thread(self.move_database), asyncio.to_thread(self.head.start_head))
        await asyncio.gather(*(self._start_worker(self.hosts[name]) for name in _WORKERS))
        await self.start_caller()

    def move_database(self) -> None:
        """Let the server listen on the network of its host."""
        base = self.hosts["base"]
        self.server.listen(base.address, NETWORK)
        self.server.stop()
        base.in_network(self.server.start)

    def end(self) -> None:
        """Kill every host."""
        for host in self.hosts.values():
            host.kill()

    async def supervise(self) -> None:
        """Start each worker host again whose Ray node does not run, or not in Ray's tables, as KubeRay does with a pod.
        The caller ends with its host."""
        for name in _WORKERS:
            host = self.hosts[name]
            state = await asyncio.to_thread(host.ray_state)
            if state is not RayState.RUNS:
                self.restarts.append(Restart(time.time(), name, state))
                if name == _CALLERS_HOST:
                    self.needs_caller = True
                await asyncio.to_thread(host.kill)
                await asyncio.to_thread(host.start)
                await self._start_worker(host)

    async def _start_worker(self, host: Host) -> None:
        await asyncio.to_thread(host.start_worker, self.head.address)

    # The caller

    async def start_caller(self) -> None:
        """Start the caller on the right host, and let it create the fleet and call it."""
        await self.end_caller()
        right = self.hosts[_CALLERS_HOST]
        command = right.inside("python", "-m", "tests.hosts.caller", f"{self.head.address}:{RAY_PORT}")
        log = (self._folder / "caller.log").open("ab")
        pipe = asyncio.subprocess.PIPE
        with log:
            self._caller = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=log, env=right.env, limit=_LINE_BYTES
            )
        await self._answer(_BEGIN_S)
        await self._ask("begin", self.fleet, within_s=_BEGIN_S)
        self.needs_caller = False

    async def end_caller(self) -> None:
        """End the caller, also one that no longer answers."""
        if self._caller is not None:
            if self._caller.returncode is None:
                # the process is the child of the program that entered the host; its pipes stay open as long as it lives
                with suppress(psutil.NoSuchProcess, ProcessLookupError):
                    for process in psutil.Process(self._caller.pid).children(recursive=True):
                        process.kill()
                    self._caller.kill()
            await self._caller.wait()
            self._caller = None

    async def work(self, agent_ids: Sequence[str], work_s: float) -> None:
        """Let the caller begin calls that take so long."""
        await self._ask("work", list(agent_ids), work_s)

    async def take(self) -> tuple[list[Call], list[Ended], list[Node]]:
        """What the caller observed since the last time."""
        taken = await self._ask("take")
        return (
            [Call(**one) for one in taken["calls"]],
            [Ended(**one) for one in taken["ended"]],
            [Node(**one) for one in taken["nodes"]],
        )

    async def look(self) -> Look:
        """What registry and Ray have, and the instances that answer. Raises NoAnswerError."""
        return Look(**await self._ask("look", list(self.fleet)))

    async def _ask(self, name: str, *arguments: object, within_s: float = _COMMAND_S) -> Any:
        async with self._asking:
            caller = self._caller
            if caller is None or caller.stdin is None:
                raise NoAnswerError("there is no caller")
            try:
                caller.stdin.write(f"{json.dumps([name, arguments])}\n".encode())
                await caller.stdin.drain()
                return await self._answer(within_s)
            except (OSError, TimeoutError) as error:
                # a late answer must not be read as the answer to the next command
                await self.end_caller()
                raise NoAnswerError(f"{name}: {error!r}") from error

    async def _answer(self, within_s: float) -> Any:
        assert self._caller is not None
        assert self._caller.stdout is not None
        async with asyncio.timeout(within_s):
            while line := (await self._caller.stdout.readline()).decode():
                if line.startswith(MARK):
                    answer = json.loads(line.removeprefix(MARK))
                    if "problem" in answer:
                        raise NoAnswerError(answer["problem"])
                    return answer["result"]
        *_, last = ["", *(self._folder / "caller.log").read_text().strip().split("\n")]
        raise NoAnswerError(f"the caller has ended: {last}")

    def accepts_connections(self) -> bool:
        """Whether the database's host accepts a connection from the network of the calling thread."""
        try:
            socket.create_connection((self.hosts["base"].address, _DATABASE_PORT), timeout=2.0).close()
        except OSError:
            return False
        return True

    # Truth

    def rows(self) -> list[Row]:
        """Every instance, from the database by its socket, which no fault of the network reaches."""
        with psycopg.connect(self.server.dsn(self._database), autocommit=True) as connection:
            found = connection.execute(
                "select instance_id::text, logical_id, status::text, cause_kind::text, node_id, process_key, stopped_at"
                " from registry_instance"
            ).fetchall()
        return [_row(*columns) for columns in found]

    def living(self) -> set[str]:
        """The part of a process key that names each living process of all hosts."""
        return set().union(*(self.hosts[name].keys() for name in _RAY_HOSTS))


def _row(
    instance_id: str,
    agent_id: str,
    status: str,
    cause: str | None,
    node_id: str | None,
    process_key: str | None,
    stopped_at: datetime | None,
) -> Row:
    kind = None if cause is None else CauseKind(cause)
    return Row(instance_id, agent_id, Status(status), kind, node_id, process_key, stopped_at)


@asynccontextmanager
async def world(folder: Path, *, is_tolerant: bool = True) -> AsyncIterator[World]:
    """An installation for as long as the block lasts; nothing of it is left after it."""
    with ExitStack() as stack:
        server = stack.enter_context(running_server(embedded_binaries()))
        network = Network()
        stack.callback(network.close)
        it = World(folder, server, network, is_tolerant=is_tolerant)
        stack.callback(it.end)
        async with AsyncExitStack() as later:
            later.push_async_callback(it.end_caller)
            await it.begin()
            yield it
