"""The registry is killed at random while agents change their status: nothing acknowledged is lost or out of order."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from typing import Any

import psycopg
import pytest
import ray

from seedcore.core.errors import RegistryError
from seedcore.core.lifecycle import Status
from seedcore.registry import RegistryClient, RegistryConnection
from seedcore.settings import Settings
from tests.waiting import eventually

TURNS = 10


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """No agent beats while changes are made, and that is not what is tested."""
    return settings.model_copy(update={"lease_s": 600.0})


class Changers:
    """A process with many agents that drain and return at their own pace."""

    def __init__(self, prefix: str, agents: int, settings: Settings) -> None:
        self._clients = [RegistryClient(f"{prefix}-{n}", settings=settings) for n in range(agents)]
        self._acknowledged: list[tuple[str, int, str]] = []

    async def change(self, pause_s: float) -> list[tuple[str, int, str]]:
        """Each agent turns TURNS times; (instance, number, status) of each change acknowledged as durable at once."""
        await asyncio.gather(*(self._change(client, pause_s) for client in self._clients))
        return self._acknowledged

    async def _change(self, client: RegistryClient, pause_s: float) -> None:
        await client.set_status(Status.ALIVE)
        for turn in range(TURNS):
            await asyncio.sleep(random.uniform(0, pause_s))
            wanted = Status.DRAINING if turn % 2 == 0 else Status.ALIVE
            receipt = await client.set_status(wanted, f"turn {turn}")
            if receipt.durable:
                self._acknowledged.append((receipt.instance_id, receipt.seq, wanted.value))

    async def deliver(self) -> int:
        """Beat once; how many changes are still not durable."""
        for answer in await asyncio.gather(*(client.beat() for client in self._clients), return_exceptions=True):
            if isinstance(answer, BaseException) and not isinstance(answer, RegistryError):
                raise answer
        return sum(client.pending for client in self._clients)


@pytest.mark.parametrize(
    ("kills", "processes", "agents", "pause_s"),
    [
        pytest.param(5, 2, 20, 2.0, id="5 kills, 400 changes"),
        pytest.param(20, 4, 50, 10.0, id="20 kills, 2000 changes", marks=[pytest.mark.soak, pytest.mark.timeout(400)]),
    ],
)
async def test_every_acknowledged_change_is_there_in_order_once(
    registry: RegistryConnection, settings: Settings, kills: int, processes: int, agents: int, pause_s: float
) -> None:
    assert settings.pg_dsn is not None
    changers_class: Any = ray.remote(Changers)
    changers = [changers_class.options(num_cpus=0).remote(f"changer-{n}", agents, settings) for n in range(processes)]
    changing = [changer.change.remote(pause_s) for changer in changers]
    pids: set[int] = set()
    while len(pids) < kills:
        await asyncio.sleep(random.uniform(0.1, 1.5))

        async def another() -> int:
            pid = (await registry.hello()).pid
            return pid if pid not in pids else 0

        pid = await eventually(another)
        os.kill(pid, signal.SIGKILL)
        pids.add(pid)
    acknowledged = [change for batch in await asyncio.gather(*changing) for change in batch]

    async def is_delivered() -> bool:
        kept: list[int] = await asyncio.gather(*(changer.deliver.remote() for changer in changers))
        return sum(kept) == 0

    await eventually(is_delivered, within_s=60)
    with psycopg.connect(settings.pg_dsn.get_secret_value(), autocommit=True) as connection:
        steps = connection.execute(
            "select logical_id, instance_id::text, seq, to_status::text, cause_detail"
            " from registry_transition order by id"
        ).fetchall()
    times = Counter((instance_id, seq, status) for _, instance_id, seq, status, _ in steps)
    assert [change for change in acknowledged if times[change] != 1] == []
    lives: dict[str, list[tuple[str, str | None]]] = {}
    for logical_id, _, _, status, cause in steps:
        lives.setdefault(logical_id, []).append((status, cause))
    turns = [("draining" if turn % 2 == 0 else "alive", f"turn {turn}") for turn in range(TURNS)]
    # a start that is repeated to another registry is two changes
    whole = [[("alive", None), *turns], [("starting", None), ("alive", None), *turns]]
    assert len(lives) == processes * agents
    assert {logical_id: life for logical_id, life in lives.items() if life not in whole} == {}
    for changer in changers:
        ray.kill(changer)
