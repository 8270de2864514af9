"""Processes that host many agents, which are real reporters; and the health of their registry while they work."""

from __future__ import annotations

import asyncio
from typing import Any

import ray

from seedcore.bench.environment import Place
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.protocol.messages import Health

AT_ONCE = 500
SAMPLE_S = 1.0


class Host:
    """A process that hosts many agents."""

    def __init__(self, settings: Any, first: int, count: int) -> None:
        self._reporters = [
            Reporter(f"agent-{number:06}", organ_id=f"organ-{number % 10}", settings=settings)
            for number in range(first, first + count)
        ]

    async def start(self) -> None:
        """Start all agents, AT_ONCE at a time."""
        waiting = iter(self._reporters)

        async def lane() -> None:
            for reporter in waiting:
                await reporter.start()

        await asyncio.gather(*(lane() for _ in range(AT_ONCE)))

    async def problems(self) -> int:
        """The number of agents whose last report failed."""
        return sum(reporter.problem is not None for reporter in self._reporters)


async def hosts_of(place: Place, agents: int, hosts: int, **settings: object) -> list[Any]:
    """Start processes with so many agents in all, none of them started yet. `settings` replace those of the place."""
    host_class: Any = ray.remote(Host)
    count = agents // hosts
    theirs = place.settings.model_copy(update=settings)
    made = [host_class.options(num_cpus=0).remote(theirs, number * count, count) for number in range(hosts)]
    await asyncio.gather(*(host.__ray_ready__.remote() for host in made))
    return made


class Meter:
    """Samples the health of a registry."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.samples: list[Health] = []

    async def run(self) -> None:
        """Take a sample every SAMPLE_S seconds, until cancelled."""
        while True:
            self.samples.append(await self._place.connection.health())
            await asyncio.sleep(SAMPLE_S)
