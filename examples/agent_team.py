"""A team of LLM agents: each member finds the others by their role, also when one of them was restarted.

Replaces about 40 lines of a driver: a dictionary of handles that it passes to every member, a poll that finds out which
of them died, and a broadcast of the new handle after each restart. `think` stands for the call of a model.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray

import seedcore

TEAM = ("planner", "researcher", "writer")


class Member(seedcore.RayAgent):
    """Works on a task, and asks other members."""

    async def ask(self, role: str, task: str) -> str:
        manager = seedcore.get_tier0_manager()
        await manager.wait_for(ids=[role], timeout_s=60)
        return str(await manager.execute_task_on_agent(role, task, timeout_s=60))

    async def think(self, prompt: str) -> str:
        return f"{self.agent_id}({prompt})"

    async def handle_task(self, task: Any) -> Any:
        return await self.think(task)


class Planner(Member):
    """Has each part of a goal researched, at the same time, and the findings written up."""

    async def handle_task(self, task: Any) -> Any:
        parts = [part.strip() for part in task.split(" and ")]
        findings = await asyncio.gather(*(self.ask("researcher", part) for part in parts))
        return await self.ask("writer", ", ".join(findings))


def main() -> None:
    ray.init(address="auto", log_to_driver=False, logging_level="error")
    with seedcore.BlockingManager() as manager:
        for role in TEAM:
            manager.create_agent(role, "team", agent_class=Planner if role == "planner" else Member)
        print(manager.execute_task_on_agent("planner", "Ray and actors", timeout_s=120))

        with seedcore.watch(ids=["researcher"]) as events:
            # Ray restarts it, under the same name
            ray.kill(seedcore.get_actor("researcher"), no_restart=False)
            died = next(event for event in events if event.kind == "died")
            print("the researcher died:", died.cause)
        seedcore.wait_for(ids=TEAM, timeout_s=120)
        print(manager.execute_task_on_agent("planner", "leases and feeds", timeout_s=120))
        manager.shutdown_agents(TEAM)


if __name__ == "__main__":
    main()
