"""One registry for many tests, one after the other, as long as each leaves it as it found it.

A registry and its relay are two processes that take a second of a core each to start. Actors that a test leaves are
ended. A test that kills or stops the registry, changes the epoch, or leaves an agent of this process, ends the sharing:
the next test gets a new registry, namespace and database.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import count

import psycopg
import ray
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr

from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import RegistryError
from seedcore.core.lifecycle import Status
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.ray_support.directory import RayDirectory
from seedcore.settings import Settings
from tests.servers import PostgresServer, forget_instances
from tests.waiting import eventually

_serial = count(1)
# also those that have been silent for a lease
_LEFT = InstanceFilter(frozenset({Status.STARTING, Status.ALIVE, Status.DRAINING}), fresh_only=False)
# how long instances may take to be dead at the end of a test; a longer wait would cost as much as another registry
_ENDED_S = 1.5
_GONE_S = 0.3
# of calls: a machine that the tests share with others pauses when it likes
_PATIENCE_S = 15.0


@dataclass(frozen=True)
class Running:
    """A registry that runs: with which settings, in which process, in which cluster (by the id of our node)."""

    settings: Settings
    pid: int
    node_id: str


class Sharing:
    """The registry that the next test may use, if there is one, and the databases of all."""

    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self._databases: set[str] = set()
        self._kept: Running | None = None

    def settings(self, *, is_shared: bool) -> Settings:
        """Those of the registry that runs, or new ones: a namespace and a database; quick beats, not to wait for, and
        the patience of a machine that pauses for seconds."""
        if is_shared and self._kept is not None and self._kept.node_id == own_node():
            return self._kept.settings
        database = self._server.create_database()
        self._databases.add(database)
        return Settings(
            namespace=f"test-{next(_serial)}",
            pg_dsn=SecretStr(self._server.dsn(database)),
            beat_interval_s=1.0,
            flush_interval_s=0.2,
            call_timeout_s=_PATIENCE_S,
        )

    def take(self, settings: Settings) -> Running | None:
        """The registry that runs with these settings, which is not kept for another test any more."""
        if self._kept is None or self._kept.settings.namespace != settings.namespace:
            return None
        taken, self._kept = self._kept, None
        return taken if taken.settings == settings else None

    async def keep(self, registry: Running) -> bool:
        """Keep it for the next test if it is as new; whether it was."""
        if self._kept is not None or _database_of(registry.settings) not in self._databases:
            return False
        if await _is_as_new(registry):
            self._kept = registry
        return self._kept is not None

    def release(self) -> None:
        """After a test: drop the databases, but not that of the registry that is kept."""
        kept = None if self._kept is None else _database_of(self._kept.settings)
        for database in self._databases - {kept}:
            self._server.drop_database(database)
            self._databases.remove(database)

    def end(self) -> None:
        """Keep none, and drop all databases."""
        self._kept = None
        self.release()


def with_short_leases(settings: Settings, beat_interval_s: float) -> Settings:
    """For a test that waits for the end of a lease. It is no earlier than two call timeouts after the registry came."""
    return settings.model_copy(
        update={"beat_interval_s": beat_interval_s, "lease_s": 3 * beat_interval_s, "call_timeout_s": 5.0}
    )


def own_node() -> str | None:
    """The id of this process's node: another one in another cluster."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else None


async def running(settings: Settings) -> Running:
    """Wait until the registry of these settings has joined its database."""
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)

    async def is_ready() -> bool:
        health = await connection.health()
        assert health.is_ready, health
        return True

    await eventually(is_ready)
    return Running(settings, (await connection.hello()).pid, str(own_node()))


async def _is_as_new(registry: Running) -> bool:
    """Whether it is the same process and no actor and no living instance is left, after ending what has no process."""
    settings = registry.settings
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
    try:
        if own_node() != registry.node_id or (await connection.hello()).pid != registry.pid:
            return False
        if not (await connection.health()).is_ready:
            return False
        await _end_actors(settings.namespace)
        left = await connection.page(_LEFT)
        await connection.deregister(instance_ids=[row.instance_id for row in left.items])

        async def are_dead() -> bool:
            return not any((await connection.health()).instances.values())

        async def are_gone() -> bool:
            return not await RayDirectory(settings.namespace).names()

        await eventually(are_dead, within_s=_ENDED_S)
        await eventually(are_gone, within_s=_GONE_S)
    except (RegistryError, AssertionError):
        return False
    assert settings.pg_dsn is not None
    with psycopg.connect(settings.pg_dsn.get_secret_value(), autocommit=True) as database:
        epochs = database.execute("select count(*) from cluster_epoch").fetchone()
        forget_instances(database)
    return epochs == (1,)


async def _end_actors(namespace: str) -> None:
    for name in await RayDirectory(namespace).names():
        # one that ends by itself is gone by now
        with suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace=namespace))


def _database_of(settings: Settings) -> str | None:
    return None if settings.pg_dsn is None else str(conninfo_to_dict(settings.pg_dsn.get_secret_value())["dbname"])
