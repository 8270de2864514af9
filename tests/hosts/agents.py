"""The agents that live on the hosts: one by the base class, one that owns a reporter."""

from __future__ import annotations

import asyncio

from seedcore.agents import RayAgent
from seedcore.registry import Reporter
from seedcore.settings import Settings

Answer = tuple[str, str]


class Echo(RayAgent):
    """A task is the seconds that it takes. The answer: logical id and instance id."""

    async def handle_task(self, task: float) -> Answer:
        await asyncio.sleep(task)
        return self.agent_id, self._reporter.client.instance_id


class Reporting:
    """The same, of a class of its own with a reporter."""

    def __init__(self, agent_id: str, settings: Settings) -> None:
        self._agent_id = agent_id
        self._reporter = Reporter(agent_id, settings=settings)
        self._starting = asyncio.get_running_loop().create_task(self._reporter.start())

    async def start(self) -> None:
        await self._starting

    async def execute_task(self, task: float) -> Answer:
        await asyncio.sleep(task)
        return self._agent_id, self._reporter.client.instance_id
