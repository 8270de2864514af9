"""A thousand agents for a minute: what it costs PostgreSQL, and that no beat is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import ray

from seedcore.registry import RegistryConnection
from seedcore.registry.caller.listing import every_page
from seedcore.settings import Settings
from tests.cluster.agents import Host
from tests.waiting import eventually

HOSTS = 4
AGENTS_PER_HOST = 250


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The defaults: 5 s beats, 15 s leases, 1 s flushes."""
    return settings.model_copy(update={"beat_interval_s": 5.0, "lease_s": 15.0, "flush_interval_s": 1.0})


@pytest.mark.soak
@pytest.mark.timeout(240)
async def test_a_thousand_agents_for_a_minute(
    registry: RegistryConnection, settings: Settings, record_property: Callable[[str, object], None]
) -> None:
    host_class: Any = ray.remote(Host)
    hosts = [host_class.options(num_cpus=0).remote(f"host-{n}", AGENTS_PER_HOST, settings) for n in range(HOSTS)]
    await asyncio.gather(*(host.begin.remote() for host in hosts))
    fleet = await every_page(registry)
    assert len(fleet) == HOSTS * AGENTS_PER_HOST
    before = (await registry.health()).flush
    worst_s = 0.0
    for _ in range(12):
        await asyncio.sleep(5)
        page = await every_page(registry)
        assert {row.instance_id for row in page} == {row.instance_id for row in fleet}
        worst_s = max(worst_s, max((page.as_of - row.last_heartbeat).total_seconds() for row in page))
    after = (await registry.health()).flush
    beats = after.beats_committed - before.beats_committed
    flushes = after.flushes - before.flushes
    statements = after.statements - before.statements
    assert settings.pg_dsn is not None
    dsn = settings.pg_dsn.get_secret_value()

    def hot_share() -> float:
        with psycopg.connect(dsn, autocommit=True) as connection:
            row = connection.execute(
                "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'registry_instance'"
            ).fetchone()
        assert row is not None
        # the statistics arrive late; each row was also updated once when it turned alive, which is no beat and,
        # as indexes depend on the status, not HOT
        updates, hot = row
        return hot / (updates - len(fleet)) if updates >= beats + len(fleet) else 0.0

    share = await eventually(hot_share)
    summary = (
        f"{len(fleet)} agents, 60 s: {beats} beats in {flushes} flushes, {statements / flushes:.2f} statements a "
        f"flush, HOT {share:.3f}, dropped {after.beats_dropped}, longest silence {worst_s:.1f} s"
    )
    record_property("summary", summary)
    logging.getLogger(__name__).info("%s", summary)
    assert statements == flushes
    assert after.beats_dropped == after.failures == 0
    assert after.beats_offered - before.beats_offered - (after.beats_coalesced - before.beats_coalesced) - beats <= len(
        fleet
    )
    assert share >= 0.95
    assert worst_s < 2 * settings.beat_interval_s
    assert [problem for host in hosts for problem in await host.problems.remote()] == []
    await asyncio.gather(*(host.end.remote() for host in hosts))
    for host in hosts:
        ray.kill(host)
