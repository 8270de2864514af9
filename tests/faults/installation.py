"""A whole installation of real processes, to break: a Ray cluster of two nodes whose table is on disk, Serve with
discovery, PostgreSQL behind a proxy, a fleet, and somebody who calls it.

Ray reads some of this from the environment when it is imported: `in_own_environment()` comes first.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import psycopg
import ray
from pydantic import SecretStr
from ray import serve
from ray.cluster_utils import Cluster
from ray.exceptions import RayError

from seedcore.agents import RayAgent
from seedcore.composition import start_registry
from seedcore.core.answers import Receipt
from seedcore.core.causes import CauseKind
from seedcore.core.errors import RegistryError
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.core.timeouts import end, within
from seedcore.discovery.app import Discovery
from seedcore.discovery.routes import api
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.caller.listing import every_page
from seedcore.registry.caller.live_sources import SnapshotSource
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.registry.ray_support.process_keys import lives
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec
from tests.faults.history import Step
from tests.faults.proxy import Proxy
from tests.faults.recording import (
    EVERY,
    Journal,
    RecordedConnection,
    read_cache,
    with_http_page,
    with_located,
)
from tests.servers import PostgresServer, embedded_binaries, running_server
from tests.traces import short_folder

_MARK = "SEEDCORE_TEST_FAULTS_FOLDER"
_HEAD = {"node:__internal_head__": 0.001}
_FAR = {"far": 0.001}
_SETTLED_S = 90.0
_POLL_S = 0.25
_CALL_S = 0.3
_CAUSES_OF_THE_LIVING = {CauseKind.AGENT, CauseKind.EPOCH_RETIRED}


def in_own_environment(module: str) -> Path:
    """The folder of this run; starts the module again where the environment is not ours yet."""
    if _MARK not in os.environ:
        folder = str(short_folder("sc-"))
        ours = {
            name: value
            for name, value in os.environ.items()
            if name == "RAY_TMPDIR" or not name.startswith(("RAY_", "SEEDCORE_"))
        }
        ours |= {
            _MARK: folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            # Ray's table outlives its server, and the outages here are shorter than the wait for that server
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": f"{folder}/gcs",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
            "PYTHONWARNINGS": "ignore",
        }
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], ours)
    folder_path = Path(os.environ[_MARK])
    folder_path.mkdir(exist_ok=True)
    (folder_path / "gcs").mkdir(exist_ok=True)
    return folder_path


# Who lives in it


@dataclass(frozen=True)
class Account:
    """What an agent answers about itself."""

    instance_id: str
    status: Status
    undelivered: int
    pid: int


class Teller(RayAgent):
    """Takes the status that the test asks for. Its calls are recorded."""

    def __init__(self, agent_id: str, *, history: Path, settings: Settings, **details: Any) -> None:
        super().__init__(agent_id, settings=settings, **details)
        connection = _recorded(history, agent_id, settings, by_relay=True)
        client = RegistryClient(agent_id, settings=settings, connection=connection)
        self._reporter = Reporter(agent_id, settings=settings, client=client, on_retired=self._note_retired)

    async def say(self, status: str, cause: str) -> Receipt | None:
        """Change the status; the answer."""
        self._status = Status(status)
        said = self._reporter.drain if self._status is Status.DRAINING else self._reporter.undrain
        return await said(cause)

    async def account(self) -> Account:
        client = self._reporter.client
        return Account(client.instance_id, self._status, client.pending, os.getpid())


@dataclass
class Calls:
    """What callers got. `failed` counts refusals by agent and reason; `slowest_s` is of those that got an answer."""

    asked: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    def note(self, agent_id: str, said: str, source: str, took_s: float) -> None:
        """The answer of the actor that `source` resolved an agent to. Another agent's answer counts as a failure."""
        if said != agent_id:
            self.failed[f"{agent_id}: a wrong handle, of {said}, by {source}"] += 1
            return
        self.answered[source] += 1
        self.slowest_s = max(self.slowest_s, took_s)


class Caller:
    """Another process that resolves agents all the time, and calls each; and that lists all, by the registry and by its
    own cache. What it is answered is recorded."""

    def __init__(self, settings: Settings, history: Path) -> None:
        self._connection = _recorded(history, "caller", settings, by_relay=True)
        self._manager = Tier0MemoryManager(settings, connection=self._connection)
        self._calls = Calls()
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, ids: list[str]) -> None:
        """Call these from now on, each in its own loop."""
        await end(*self._tasks)
        self._tasks = [asyncio.create_task(self._call_for_ever(agent_id)) for agent_id in ids]
        self._tasks.append(asyncio.create_task(self._list_for_ever()))

    async def take(self) -> Calls:
        """What became of the calls since the last time."""
        taken, self._calls = self._calls, Calls()
        return taken

    async def _call_for_ever(self, agent_id: str) -> None:
        while True:
            calls, began_s = self._calls, time.monotonic()
            calls.asked += 1
            try:
                async with self._connection.journal.call("locate", logical_id=agent_id) as called:
                    located = await self._manager.locate(agent_id)
                    called[0] = with_located(called[0], located)
                said = await within(_answer(located.handle), 2.0)
                calls.note(agent_id, said, str(located.source), time.monotonic() - began_s)
            except (TimeoutError, RegistryError, RayError) as error:
                calls.failed[f"{agent_id}: {type(error).__name__}: {str(error)[:160]}"] += 1
            await asyncio.sleep(_CALL_S)

    async def _list_for_ever(self) -> None:
        assert self._manager.follower is not None
        cache = SnapshotSource(self._manager.follower)
        while True:
            with suppress(RegistryError):
                await self._connection.page(EVERY, MAX_PAGE)
            with suppress(RegistryError):
                await read_cache(self._connection.journal, cache)
            await asyncio.sleep(_CALL_S)


async def _answer(handle: ActorHandle) -> str:
    return str(await handle.get_id.remote())


@dataclass(frozen=True)
class Row:
    """An instance as the database has it."""

    instance_id: str
    logical_id: str
    status: Status
    seq: int
    pid: int
    process_key: str
    cause: CauseKind | None
    stopped_at: datetime | None

    @property
    def lives(self) -> bool:
        """Whether its process does, by the kernel's word."""
        return lives(self.pid, self.process_key)


@dataclass(frozen=True)
class Said:
    """A change that was acknowledged as durable."""

    instance_id: str
    seq: int
    status: Status


def false_deaths(rows: Iterable[Row]) -> dict[str, str]:
    """By instance id: who is dead in the database and lives."""
    return {
        row.instance_id: f"false death: {row.logical_id} (pid {row.pid}) lives, and is dead: {row.cause}"
        for row in rows
        if row.status is Status.DEAD
        and row.cause not in _CAUSES_OF_THE_LIVING
        and row.lives
        and not _hangs_on_a_dead_node(row)
    }


def _hangs_on_a_dead_node(row: Row) -> bool:
    # it ends as soon as it notices; who is stopped, as soon as it goes on
    if row.cause is not CauseKind.NODE_DIED:
        return False
    try:
        process = psutil.Process(row.pid)
        parent = process.parent()
        return process.status() == psutil.STATUS_STOPPED or parent is None or parent.name() != "raylet"
    except psutil.NoSuchProcess:
        return True


class Watch:
    """Looks for false deaths all the time: one that a real death follows is not seen at the end of a run."""

    def __init__(self, rows: Callable[[], Iterable[Row]], every_s: float = 1.0) -> None:
        self._rows = rows
        self._every_s = every_s
        self._suspected: dict[str, str] = {}
        self._watching: asyncio.Task[None] | None = None
        self.found: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        await end(self._watching)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                seen = false_deaths(await asyncio.to_thread(self._rows))
            except psycopg.Error:
                # the database is away: the next round looks again
                continue
            # twice: a process that has just lost its node may still be ending
            self.found |= {key: text for key, text in seen.items() if key in self._suspected}
            self._suspected = seen


class Installation:
    """Everything, and what must be true of it. `bystanders` are never touched by a fault."""

    def __init__(
        self, server: PostgresServer, proxy: Proxy, settings: Settings, cluster: Cluster, history: Path
    ) -> None:
        """Every process records its calls in the folder `history`."""
        self.server = server
        self.history = history
        self.proxy = proxy
        self.settings = settings
        self.cluster = cluster
        self.far_node: Any = None
        self.registry = _recorded(history, "test", settings)
        self.manager = Tier0MemoryManager(settings, connection=_recorded(history, "manager", settings, by_relay=True))
        self.bystanders = ["steady-0", "steady-1"]
        self.restarting = ["near-0", "far-0"]
        self.mortal = ["near-1", "near-2", "far-1", "far-2"]
        self.handles: dict[str, ActorHandle] = {}
        self.caller: Any = None
        self.said: list[Said] = []
        self.http = Calls()
        self._polling: asyncio.Task[None] | None = None
        self.url = ""

    @property
    def fleet(self) -> list[str]:
        return [*self.bystanders, *self.restarting, *self.mortal]

    async def begin(self) -> None:
        """The far node, Serve, the registry, the fleet, the callers."""
        self.add_far_node()
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deployment: Any = serve.deployment(name="Discovery", ray_actor_options={"num_cpus": 0, "resources": _HEAD})(
            serve.ingress(api)(Discovery)
        )
        serve.run(deployment.bind(self.settings, True), name="seedcore", route_prefix="/")
        await start_registry(self.settings)
        await self.man()
        caller_class: Any = ray.remote(Caller)
        self.caller = caller_class.options(num_cpus=0, resources=_HEAD).remote(self.settings, self.history)
        await self.caller.begin.remote(self.bystanders)
        self._polling = asyncio.create_task(self._poll())

    async def close(self) -> None:
        await end(self._polling)

    def add_far_node(self) -> None:
        self.far_node = self.cluster.add_node(num_cpus=2, resources={"far": 1000})

    async def man(self) -> None:
        """Make the agents of the fleet that are missing."""
        made = await self.manager.create_agents_batch(
            [
                AgentSpec(
                    name,
                    agent_class=Teller,
                    arguments={"settings": self.settings, "history": self.history},
                    resources=_FAR if name.startswith("far") else _HEAD,
                    max_restarts=-1 if name in self.restarting else 0,
                )
                for name in self.fleet
            ]
        )
        if made.failures:
            raise RuntimeError(f"agents were not made: {dict(made.failures)}")
        self.handles = dict(made.results)

    # Processes

    def processes(self, title: str) -> list[psutil.Process]:
        """The workers of this cluster with such a title, below whichever node."""
        nodes = [self.cluster.head_node, *self.cluster.worker_nodes]
        found = []
        for node in nodes:
            for raylet in node.all_processes.get("raylet", []):
                try:
                    children = psutil.Process(raylet.process.pid).children(recursive=True)
                except psutil.NoSuchProcess:
                    continue
                found += [child for child in children if _title(child).startswith(title)]
        return found

    async def account_of(self, agent_id: str) -> Account:
        """What an agent of the fleet answers about itself."""
        return await within(_account(self.handles[agent_id]), 5.0)

    # Truth

    def query(self, text: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Straight from the database, past the proxy."""
        with psycopg.connect(self.server.dsn(self.database), autocommit=True) as connection:
            return connection.execute(text, parameters).fetchall()

    @property
    def database(self) -> str:
        assert self.settings.pg_dsn is not None
        return str(psycopg.conninfo.conninfo_to_dict(self.settings.pg_dsn.get_secret_value())["dbname"])

    def rows(self) -> list[Row]:
        found = self.query(
            "select instance_id::text, logical_id, status::text, seq, pid, process_key, cause_kind::text, stopped_at"
            " from registry_instance"
        )
        return [
            Row(
                instance_id,
                logical_id,
                Status(status),
                seq,
                pid,
                process_key,
                None if cause is None else CauseKind(cause),
                stopped_at,
            )
            for instance_id, logical_id, status, seq, pid, process_key, cause, stopped_at in found
        ]

    def last_transition(self) -> int:
        """The place of the newest row of the history."""
        return int(self.query("select coalesce(max(id), 0) from registry_transition")[0][0])

    def steps(self, after: int) -> tuple[Step, ...]:
        """The rows of the history behind a place."""
        found = self.query(
            "select instance_id::text, seq, to_status::text, hold is not null from registry_transition"
            " where id > %s order by id",
            after,
        )
        return tuple(Step(one, seq, Status(status), is_hold) for one, seq, status, is_hold in found)

    async def say(self, agent_id: str, status: Status, cause: str) -> Receipt | None:
        """Let an agent change its status; what was acknowledged is remembered."""
        receipt: Receipt | None = await within(_say(self.handles[agent_id], status.value, cause), 10.0)
        if receipt is not None and receipt.durable:
            self.said.append(Said(receipt.instance_id, receipt.seq, status))
        return receipt

    # Laws

    def violations(self) -> list[str]:
        """What has happened that never may."""
        rows = self.rows()
        found = list(false_deaths(rows).values())
        for row in rows:
            if row.status is Status.DEAD and row.cause is None:
                found.append(f"{row.logical_id} is dead without a cause")
        numbers_of = {row.instance_id: row.seq for row in rows}
        steps: dict[str, list[tuple[int | None, Status]]] = {}
        for instance_id, seq, status in self.query(
            "select instance_id::text, seq, to_status::text from registry_transition order by id"
        ):
            life = steps.setdefault(instance_id, [])
            if life and life[-1][1] is Status.DEAD:
                found.append(f"{instance_id} became {status} after it was dead")
            numbers = [number for number, _ in life if number is not None]
            if seq is not None and numbers and seq <= numbers[-1]:
                found.append(f"{instance_id}: change {seq} after {numbers[-1]}")
            life.append((seq, Status(status)))
        for said in self.said:
            life = steps.get(said.instance_id, [])
            there = life.count((said.seq, said.status))
            before = [status for number, status in life if number is not None and number < said.seq]
            if there == 0 and before[-1:] == [said.status] and numbers_of.get(said.instance_id, 0) >= said.seq:
                # one that Ray had restarted was asked for the status that it had: a number and no transition
                continue
            if there != 1:
                found.append(f"acknowledged and {there} times in the database: {said}")
        return found

    async def unsettled(self) -> str | None:
        """What is not yet as it shall be some time after the last fault; None when everything is."""
        health = await self.registry.health()
        if not health.is_ready or health.is_frozen or health.pending_changes:
            return f"the registry is not ready: {health}"
        accounts = {name: await self.account_of(name) for name in self.handles}
        wanted = {account.instance_id: account.status for account in accounts.values()}
        for name, account in accounts.items():
            if account.undelivered:
                return f"{name} keeps {account.undelivered} changes"
        rows = {row.instance_id: row for row in self.rows() if row.status is not Status.DEAD}
        for row in rows.values():
            if not row.lives:
                return f"{row.logical_id} (pid {row.pid}) has ended, and is {row.status}"
        if {instance_id: row.status for instance_id, row in rows.items()} != wanted:
            return f"live in the database are {sorted((row.logical_id, row.status) for row in rows.values())}"
        listing = await every_page(self.registry, statuses=None, fresh_only=False)
        if {(one.instance_id, one.status, one.seq) for one in listing} != {
            (row.instance_id, row.status, row.seq) for row in rows.values()
        }:
            return "memory and database differ"
        for name, account in accounts.items():
            if account.status is Status.ALIVE:
                await self.manager.resolve(name)
        async with httpx.AsyncClient(timeout=10) as client:
            page = (await client.get(f"{self.url}/v1/instances")).json()
        alive = {name for name, account in accounts.items() if account.status is Status.ALIVE}
        if page["source"] not in {"registry", "snapshot"} or {item["logical_id"] for item in page["items"]} != alive:
            return f"HTTP lists {page}"
        return None

    async def settle(self) -> tuple[float, str | None]:
        """Wait until everything is as it shall be: how long that took, and what still is not at the end."""
        began_s = time.monotonic()
        problem: str | None = "never asked"
        while problem is not None and time.monotonic() - began_s < _SETTLED_S:
            try:
                problem = await self.unsettled()
            except (TimeoutError, RegistryError, RayError, httpx.HTTPError, psycopg.Error) as error:
                problem = f"{type(error).__name__}: {error}"
            if problem is not None:
                await asyncio.sleep(_POLL_S)
        return time.monotonic() - began_s, problem

    async def _poll(self) -> None:
        journal = Journal(self.history, "http")
        async with httpx.AsyncClient(timeout=5) as client:
            while True:
                calls, began_s = self.http, time.monotonic()
                calls.asked += 1
                try:
                    async with journal.call("http") as called:
                        answer = await client.get(f"{self.url}/v1/instances")
                        answer.raise_for_status()
                        called[0] = with_http_page(called[0], answer.json())
                    calls.answered[answer.json()["source"]] += 1
                    calls.slowest_s = max(calls.slowest_s, time.monotonic() - began_s)
                except httpx.HTTPError as error:
                    calls.failed[type(error).__name__] += 1
                await asyncio.sleep(_POLL_S)

    def take_http(self) -> Calls:
        taken, self.http = self.http, Calls()
        return taken


@asynccontextmanager
async def installed(folder: Path, beat_s: float, lease_s: float, **settings: Any) -> AsyncIterator[Installation]:
    """An installation for as long as the block lasts."""
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 1000}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        server = stack.enter_context(running_server(embedded_binaries()))
        proxy = Proxy(server.folder / ".s.PGSQL.5432")
        proxy.start()
        stack.callback(proxy.stop)
        known = Settings(
            namespace="faults",
            pg_dsn=SecretStr(proxy.dsn(server.create_database())),
            beat_interval_s=beat_s,
            lease_s=lease_s,
            **settings,
        )
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 4,
                "include_dashboard": False,
                "_system_config": {**quick, "health_check_failure_threshold": 5},
            },
        )
        stack.callback(cluster.shutdown)
        ray.init(address=cluster.address, namespace="faults", log_to_driver=False, logging_level="error")
        stack.callback(ray.shutdown)
        history = folder / "calls"
        history.mkdir()
        it = Installation(server, proxy, known, cluster, history)
        await it.begin()
        try:
            yield it
        finally:
            await it.close()
            serve.shutdown()


def _recorded(history: Path, process: str, settings: Settings, *, by_relay: bool = False) -> RecordedConnection:
    journal = Journal(history, process)
    return RecordedConnection(journal, settings.namespace, settings.call_timeout_s, by_relay=by_relay)


async def _account(handle: ActorHandle) -> Account:
    account: Account = await handle.account.remote()
    return account


async def _say(handle: ActorHandle, status: str, cause: str) -> Receipt | None:
    receipt: Receipt | None = await handle.say.remote(status, cause)
    return receipt


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
