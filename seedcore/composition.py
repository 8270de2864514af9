"""The composition root: the only module that combines settings, store and registry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from seedcore.core.errors import RegistryUnavailableError, SessionError, StoreUnavailableError
from seedcore.core.memory_bound import MIB
from seedcore.core.ports import Store
from seedcore.core.wire import wire
from seedcore.registry.agent.identity import was_restarted
from seedcore.registry.node.relay import RelayActor
from seedcore.registry.protocol.messages import Hello
from seedcore.registry.ray_support.session import cluster_name
from seedcore.registry.server.actor import ensure_registry
from seedcore.registry.server.config import RegistryConfig
from seedcore.settings import Settings
from seedcore.store.dsn import checked_dsn
from seedcore.store.embedded.claim import Claim
from seedcore.store.embedded.postgres import EmbeddedPostgres, dsn_if_running
from seedcore.store.maintenance import (
    ServerState,
    check_grant_on_database,
    end_old_calls_of_database,
    grant_on_database,
    inspect_database,
    migrate_database,
)
from seedcore.store.postgres import PostgresStore
from seedcore.store.sessions import PoolLimits

_ANSWER_MARGIN_S = 1.0
_SERVER_AGAIN_S = 10.0
_EMBEDDED_NOTE = (
    "embedded PostgreSQL: it serves one node, the head node, where its data and the registry are; "
    "set SEEDCORE_PG_DSN before you add nodes"
)


@wire
@dataclass(frozen=True, slots=True)
class StoreRecipe:
    """Creates the store of a process. It is sent to the registry actor; its repr does not contain the DSN."""

    dsn: SecretStr | None
    data_dir: Path
    pool_size: int

    async def __call__(self) -> Store:
        """Return a store that can write. Starts the embedded server, which may take seconds."""
        return PostgresStore(
            await self._writable_dsn(),
            PoolLimits(max_size=self.pool_size),
            # a restarted actor has used this database before: without a schema, its data is gone
            makes_schema=self.dsn is None or not was_restarted(),
            ensure_server=self._ensure_server if self.dsn is None else None,
            claim=Claim(self.data_dir).take if self.dsn is None else None,
        )

    def require_free_for(self, ray_cluster: str) -> None:
        """Raise StoreUnavailableError if the registry of another Ray cluster uses the data folder."""
        if self.dsn is None:
            Claim(self.data_dir).require_free_for(ray_cluster)

    async def reader(self) -> PostgresStore:
        """Return a store that reads, beside the registry. Starts no server.

        Raises StoreUnavailableError if the embedded server does not run on this node.
        """
        store = PostgresStore(await self._readable_dsn(), PoolLimits(max_size=2, connect_timeout_s=2.0), read_only=True)
        await store.open()
        return store

    async def inspect(self) -> ServerState:
        """Return the state of the database. Changes nothing, and starts no server. Raises as `reader`."""
        return await inspect_database(await self._readable_dsn())

    async def migrate(self, report: Callable[[str], None]) -> list[str]:
        """Bring the schema up to date, also that of an earlier SeedCore. Returns the applied files.

        `report` is called with each step of an adoption.
        """
        return await migrate_database(await self._writable_dsn(), adopting=report)

    async def end_old_calls(self) -> bool:
        """Drop the functions that an adoption kept for old clients. Returns whether there were any."""
        return await end_old_calls_of_database(await self._writable_dsn())

    async def check_grant(self, role: str, *, with_password: bool) -> None:
        """Raise as `grant` would, and change nothing. For use before a migration that may take long."""
        await check_grant_on_database(await self._writable_dsn(), role, with_password=with_password)

    async def grant(self, role: str, password: str | None) -> bool:
        """Grant a role what a registry needs. Returns whether the role was created. Needs the owner's rights."""
        return await grant_on_database(await self._writable_dsn(), role, password)

    async def _readable_dsn(self) -> str:
        if self.dsn is not None:
            return self.dsn.get_secret_value()
        found = await asyncio.to_thread(dsn_if_running, self.data_dir)
        if found is None:
            raise StoreUnavailableError(
                f"no embedded PostgreSQL runs on this node with data in {self.data_dir}; "
                "set SEEDCORE_PG_DSN to use one from several nodes"
            )
        return found

    async def _ensure_server(self) -> str:
        # repeated by the registry: soon, so that its health has the reason
        return await asyncio.to_thread(EmbeddedPostgres(self.data_dir).hold, _SERVER_AGAIN_S)

    async def _writable_dsn(self) -> str:
        if self.dsn is not None:
            return self.dsn.get_secret_value()
        return await asyncio.to_thread(EmbeddedPostgres(self.data_dir).hold)


def store_recipe(settings: Settings) -> StoreRecipe:
    """Return the recipe for the settings. Raises ConfigurationError if the DSN is malformed."""
    if settings.pg_dsn is not None:
        checked_dsn(settings.pg_dsn.get_secret_value())
    return StoreRecipe(settings.pg_dsn, settings.data_dir, settings.pg_pool_size)


async def start_registry(settings: Settings, *, epoch_check_s: float = 5.0) -> Hello:
    """Start the registry actor of this cluster, unless it runs. Ray must be initialised.

    It sees within `epoch_check_s` seconds that an epoch was changed in the database without it.

    Raises ConfigurationError, VersionMismatchError, RegistryUnavailableError, or StoreUnavailableError if the registry
    of another cluster uses the embedded database.
    """
    recipe = store_recipe(settings)
    try:
        ray_cluster = cluster_name()
    except SessionError as error:
        raise RegistryUnavailableError(error.why) from None
    recipe.require_free_for(ray_cluster)
    # a change is answered after durable_wait_s even if the database is away
    agent_call_s = max(settings.call_timeout_s, settings.durable_wait_s + _ANSWER_MARGIN_S)
    config = RegistryConfig(
        ray_cluster=ray_cluster,
        store_kind="embedded" if recipe.dsn is None else "postgres",
        epoch=settings.cluster_epoch,
        beat_interval_s=settings.beat_interval_s,
        lease_s=settings.effective_lease_s,
        max_beats_per_s=settings.max_beats_per_s,
        flush_interval_s=settings.flush_interval_s,
        durable_wait_s=settings.durable_wait_s,
        reconnect_grace_s=2 * agent_call_s,
        call_timeout_s=settings.call_timeout_s,
        max_instances=settings.max_instances,
        keep_history_s=settings.keep_history_days * 86_400,
        notes=(_EMBEDDED_NOTE,) if recipe.dsn is None else (),
        log_format=settings.log_format,
        agent_call_s=agent_call_s,
        epoch_check_s=epoch_check_s,
        direct_followers=settings.direct_followers,
        max_instance_bytes=settings.max_instances_mib * MIB,
    )
    return await ensure_registry(config, recipe, RelayActor, settings.namespace)
