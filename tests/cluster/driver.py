"""A driver of another version: run as a script in the folder of that version, its settings in the environment.

python driver.py make NAME...    agents of that version, which outlive it; prints whom it could not make, and why
python driver.py find NAME...    what a manager of that version finds, as JSON: each agent's answer to a call
python driver.py command ...     the `seedcore` command of that version
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import ray

import seedcore
from seedcore.agents import RayAgent
from seedcore.cli import main
from seedcore.settings import load_settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec


class Foreign(RayAgent):
    """Tells which version it runs."""

    async def handle_task(self, task: Any) -> Any:
        return [task, seedcore.__version__]


async def make(names: list[str]) -> Any:
    manager = Tier0MemoryManager()
    arguments = {"settings": load_settings()}
    made = await manager.create_agents_batch(
        [AgentSpec(name, agent_class=Foreign, arguments=arguments) for name in names]
    )
    await manager.close()
    return {name: str(error) for name, error in made.failures.items()}


async def find(names: list[str]) -> Any:
    manager = Tier0MemoryManager()
    found = {}
    for name in names:
        located = await manager.locate(name)
        found[name] = [str(located.source), await manager.execute_task_on_agent(name, "who are you")]
    await manager.close()
    return found


if __name__ == "__main__":
    _, what, *names = sys.argv
    if what == "command":
        sys.argv[1:] = names
        main()
    else:
        settings = load_settings()
        address = os.environ["RAY_ADDRESS"]
        ray.init(address=address, namespace=settings.namespace, log_to_driver=False, logging_level="error")
        sys.stdout.write(json.dumps(asyncio.run({"make": make, "find": find}[what](names))))
