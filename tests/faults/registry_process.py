"""Real registries in processes of their own without Ray: forked in milliseconds, called over a socket, and killed.

    python -m tests.faults.registry_process     # reads a JSON object per line, and answers each with a process id

Owns the processes and how they are called. Each is the real registry over the real store and a real database.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seedcore.core.answers import Outcome, OutcomeKind
from seedcore.core.changes import StatusChange
from seedcore.core.errors import RegistryReplacedError, RegistryUnavailableError
from seedcore.core.timeouts import end, within
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.postgres import PostgresStore
from seedcore.store.sessions import PoolLimits
from tests.faults.stage import NoWitness
from tests.local import LocalRegistry

LIMITS = PoolLimits(max_size=3, connect_timeout_s=0.5, statement_timeout_s=0.5)
CALL_TIMEOUT_S = 1.0
CONFIG = RegistryConfig(
    ray_cluster="histories",
    beat_interval_s=1.0,
    lease_s=20.0,
    flush_interval_s=0.1,
    durable_wait_s=0.3,
    reconnect_grace_s=1.0,
    retry_max_s=0.3,
    epoch_check_s=0.5,
    term_idle_s=1.0,
    compare_s=0.5,
    agent_call_s=CALL_TIMEOUT_S,
)
_EARLY_S = 0.15
_LENGTH = struct.Struct("!I")


class EarlyStore(PostgresStore):
    """A fault, put in on purpose: it acknowledges a status before it commits it."""

    async def set_status_many(self, changes: Any) -> list[Outcome]:
        self._late = asyncio.create_task(self._commit_later(list(changes)))
        return [Outcome(OutcomeKind.APPLIED, change.status) for change in changes]

    async def _commit_later(self, changes: list[StatusChange]) -> None:
        await asyncio.sleep(_EARLY_S)
        await super().set_status_many(changes)


STORES: dict[str, type[PostgresStore]] = {"real": PostgresStore, "early": EarlyStore}


# In the process of a registry


async def _serve(socket: str, dsn: str, store: str) -> None:
    async def make_store() -> PostgresStore:
        return STORES[store](dsn, LIMITS)

    registry = LocalRegistry(CONFIG, make_store, watch_factory=lambda on_death: NoWitness())
    registry.start()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks: set[asyncio.Task[None]] = set()
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                number, method, args, kwargs = pickle.loads(await _message(reader))
                answering = asyncio.create_task(_answer(registry, writer, number, method, args, kwargs))
                tasks.add(answering)
                answering.add_done_callback(tasks.discard)

    server = await asyncio.start_unix_server(connected, socket)
    await server.serve_forever()


async def _answer(
    registry: LocalRegistry, writer: asyncio.StreamWriter, number: int, method: str, args: Any, kwargs: Any
) -> None:
    stream = registry.members.feed.stream
    try:
        is_answer, value = True, await getattr(registry, method)(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets it
        is_answer, value = False, error
    origin = (stream, registry.writer.database.term) if stream == registry.members.feed.stream else None
    with contextlib.suppress(OSError):
        _send(writer, (number, is_answer, value, origin))
        await writer.drain()


async def _message(reader: asyncio.StreamReader) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return await reader.readexactly(length)


def _send(writer: asyncio.StreamWriter, value: object) -> None:
    text = pickle.dumps(value)
    writer.write(_LENGTH.pack(len(text)) + text)


def main() -> None:
    """Fork a registry for each line, until the input ends; then kill them all."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    pids = []
    for line in sys.stdin:
        wanted = json.loads(line)
        pid = os.fork()
        if pid == 0:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                asyncio.run(_serve(**wanted))
            os._exit(0)
        pids.append(pid)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# In the process that calls them


@dataclass(frozen=True, slots=True)
class Origin:
    """The registry that has answered: its stream, and its term, None before it has joined the database."""

    stream: str
    term: int | None


class Registries:
    """Starts registry processes."""

    def __init__(self, folder: Path, forker: subprocess.Popen[str]) -> None:
        self._folder = folder
        self._forker = forker
        self._serial = itertools.count(1)
        # one after the other: each answer belongs to the question before it
        self._asking = asyncio.Lock()

    async def start(self, dsn: str, store: str = "real") -> RegistryProcess:
        """A new one, which serves as soon as it can be reached."""
        socket = self._folder / f"registry-{next(self._serial)}.sock"
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        async with self._asking:
            self._forker.stdin.write(f"{json.dumps({'socket': str(socket), 'dsn': dsn, 'store': store})}\n")
            self._forker.stdin.flush()
            pid = int(await asyncio.to_thread(self._forker.stdout.readline))
        return RegistryProcess(pid, socket)


class RegistryProcess:
    """One registry process."""

    def __init__(self, pid: int, socket: Path) -> None:
        self._pid = pid
        self.socket = socket
        self.is_up = True

    def signal(self, number: signal.Signals) -> None:
        """Stop it, let it go on, or kill it."""
        if self.is_up:
            self.is_up = number is not signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)


@contextmanager
def registries(folder: Path) -> Iterator[Registries]:
    """A process that forks registries, for as long as the block lasts. `folder` takes their sockets."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.faults.registry_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as forker:
        yield Registries(folder, forker)


class _Connection:
    """A connection to one registry process, with the calls that wait for their answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.is_open = True
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                number, is_answer, value, origin = pickle.loads(await _message(reader))
                waiting = self.waiting.get(number)
                if waiting is not None and not waiting.done():
                    if is_answer:
                        waiting.set_result((value, None if origin is None else Origin(*origin)))
                    else:
                        waiting.set_exception(value)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.is_open = False
            self.writer.close()
            for waiting in self.waiting.values():
                if not waiting.done():
                    waiting.set_exception(RegistryReplacedError("the registry's process has ended"))


class Wire:
    """One client's connection to the registry that runs, over a network that repeats calls and loses answers."""

    def __init__(self, chance: random.Random, lost_share: float) -> None:
        """So large a share of the answers is lost, after the call was carried out; as many calls arrive twice."""
        self._chance = chance
        self._lost_share = lost_share
        self._process: RegistryProcess | None = None
        self._connection: _Connection | None = None
        self._opened: list[_Connection] = []
        self._numbers = itertools.count(1)

    def use(self, process: RegistryProcess | None) -> None:
        """Call this process from now on. Calls under way stay where they are."""
        self._process, self._connection = process, None

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method. Raises what it raises, or RegistryUnavailableError."""
        return (await self.ask(method, *args, **kwargs))[0]

    async def ask(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, Origin | None]:
        """Call a method: the answer, and the registry that gave it; None where that changed meanwhile."""
        number = next(self._numbers)
        try:
            connection = await self._connected()
            answer = connection.waiting[number] = asyncio.get_running_loop().create_future()
            try:
                for _ in range(2 if self._is_unlucky() else 1):
                    _send(connection.writer, (number, method, args, kwargs))
                found: tuple[Any, Origin | None] = await within(answer, CALL_TIMEOUT_S + kwargs.get("wait_s", 0.0))
            finally:
                del connection.waiting[number]
        except (OSError, TimeoutError) as error:
            raise RegistryUnavailableError(f"no answer to {method}: {error!r}") from None
        if self._is_unlucky():
            raise RegistryUnavailableError(f"the answer to {method} was lost")
        return found

    async def close(self) -> None:
        """End every connection."""
        self.use(None)
        await end(*(connection.reading for connection in self._opened))

    def _is_unlucky(self) -> bool:
        return self._chance.random() < self._lost_share

    async def _connected(self) -> _Connection:
        while (connection := self._connection) is None or not connection.is_open:
            process = self._process
            if process is None:
                raise OSError("no registry runs")
            connection = _Connection(*await asyncio.open_unix_connection(process.socket))
            self._opened.append(connection)
            # another process may have got the name meanwhile
            if process is self._process:
                self._connection = connection
        return connection


if __name__ == "__main__":
    main()
