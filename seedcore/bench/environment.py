"""The environment of the benchmarks: their own Ray and PostgreSQL, with a registry and a database per benchmark."""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

import psutil
import ray
from pydantic import SecretStr

from seedcore.bench import bare
from seedcore.core.errors import RegistryUnavailableError
from seedcore.core.ports import Store
from seedcore.registry.node.relay import RelayActor
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.server.actor import ensure_registry, stop_registry
from seedcore.registry.server.config import RegistryConfig
from seedcore.settings import Settings
from seedcore.store.dsn import checked_dsn
from seedcore.store.embedded.postgres import EmbeddedPostgres
from seedcore.store.postgres import PostgresStore

READY_S = 60.0


@dataclass(frozen=True)
class Recipe:
    """Creates the registry's store. Sent to the registry actor."""

    dsn: str

    async def __call__(self) -> Store:
        return PostgresStore(self.dsn)


@dataclass(frozen=True)
class Place:
    """A running registry and its database."""

    namespace: str
    dsn: str
    connection: RegistryConnection

    @property
    def settings(self) -> Settings:
        """The settings of callers and agents of this registry."""
        return Settings(
            namespace=self.namespace, pg_dsn=SecretStr(self.dsn), call_timeout_s=30.0, http_max_requests_per_s=1e6
        )

    async def process(self) -> psutil.Process:
        """The registry's process."""
        return psutil.Process((await self.connection.hello()).pid)

    def ask(self, query: LiteralString) -> tuple[Any, ...]:
        """Execute a query on the database and return its first row."""
        return bare.first_row(self.dsn, query)


class Bench:
    """Creates databases and registries for a run. `is_quick`: small sizes, for a first impression."""

    def __init__(self, dsn: str, is_quick: bool) -> None:
        self._dsn = dsn
        self.is_quick = is_quick

    def new_database(self) -> str:
        """Create an empty database and return its DSN."""
        return bare.new_database(self._dsn, f"bench_{uuid.uuid4().hex[:12]}")

    async def place(self, name: str, dsn: str | None = None, **details: Any) -> Place:
        """Start a registry and wait until it is ready. `details` are fields of its configuration."""
        dsn = dsn if dsn is not None else self.new_database()
        namespace = f"bench-{name}-{uuid.uuid4().hex[:6]}"
        config = RegistryConfig(ray_cluster=ray.get_runtime_context().get_session_name(), **details)
        await ensure_registry(config, Recipe(dsn), RelayActor, namespace)
        place = Place(namespace, dsn, RegistryConnection(namespace, 30.0))
        await until_ready(place)
        return place

    async def leave(self, place: Place) -> None:
        """Stop the registry."""
        await stop_registry(place.namespace, 30.0)


async def until_ready(place: Place) -> None:
    """Wait until the registry is ready. Raises RegistryUnavailableError after READY_S seconds."""
    ends_s = time.monotonic() + READY_S
    while True:
        try:
            if (await place.connection.health()).is_ready:
                return
        except RegistryUnavailableError:
            pass
        if time.monotonic() > ends_s:
            raise RegistryUnavailableError(f"the registry is not ready within {READY_S:g} s")
        await asyncio.sleep(0.02)


@contextmanager
def environment(dsn: str | None, is_quick: bool) -> Iterator[Bench]:
    """Start a Ray cluster and, without a DSN, an embedded PostgreSQL. Both end with the context. Raises
    ConfigurationError."""
    if dsn is not None:
        checked_dsn(dsn, "--dsn")
    with tempfile.TemporaryDirectory(prefix="seedcore-bench-") as folder:
        embedded = None
        if dsn is None:
            Path(folder).chmod(0o755)
            embedded = EmbeddedPostgres(Path(folder) / "data")
        try:
            found = embedded.hold() if embedded is not None else dsn
            assert found is not None
            ray.init(
                address="local",
                num_cpus=max(4, os.cpu_count() or 1),
                dashboard_port=0,
                log_to_driver=False,
                logging_level="error",
            )
            try:
                yield Bench(found, is_quick)
            finally:
                ray.shutdown()
        finally:
            if embedded is not None:
                embedded.release()


def machine() -> dict[str, object]:
    """Describe the machine that the figures were measured on."""
    return {
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "ray": ray.__version__,
    }


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that nothing listens on now."""
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in sockets]
