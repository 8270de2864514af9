"""Engines of an RL rollout that are replaced when they die.

Replaces `RolloutHealthMonitor` of slime (slime/utils/health_monitor.py), about 200 lines: a thread that calls every
engine once per interval, kills the engine at a timeout or an error, and starts another one. Here the kernel reports the
end of an engine's process at once, missing heartbeats report a hung one, and no engine is called for that.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray

import seedcore
from seedcore.errors import RegistryError

ENGINES = ("engine-1", "engine-2")


class Engine(seedcore.RayAgent):
    """Stands for an inference engine."""

    async def handle_task(self, task: Any) -> Any:
        return os.getpid()


class HealthMonitor:
    """Calls `on_death` with each of the agents that dies, and the cause, on a thread, until `stop()`."""

    def __init__(self, agent_ids: Sequence[str], on_death: Callable[[str, str], object]) -> None:
        self._agent_ids = agent_ids
        self._on_death = on_death
        self._events = seedcore.watch(ids=agent_ids)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._events.close()
        self._thread.join()

    def _run(self) -> None:
        for event in self._events:
            if event.kind == "died" and event.logical_id is not None:
                self._on_death(event.logical_id, str(event.cause))
            elif event.is_whole:
                # after a gap: those that are not there have died in it
                living = {instance.logical_id for instance in event.instances}
                for agent_id in (one for one in self._agent_ids if one not in living):
                    self._on_death(agent_id, "unknown")


def main() -> None:
    ray.init(address="auto", log_to_driver=False, logging_level="error")
    replaced: queue.Queue[str] = queue.Queue()
    engines: dict[str, Any] = {}
    with seedcore.BlockingManager() as manager:

        def create(agent_id: str) -> None:
            engines[agent_id] = manager.create_agent(agent_id, "rollout", agent_class=Engine, max_restarts=0)

        def replace(agent_id: str, cause: str) -> None:
            print(f"{agent_id} died: {cause}")
            # one that hangs is dead for callers, and its process is still there
            ray.kill(engines[agent_id])
            try:
                create(agent_id)
            except RegistryError as error:
                print(f"{agent_id} is not replaced: {error}")
            replaced.put(agent_id)

        for agent_id in ENGINES:
            create(agent_id)
        monitor = HealthMonitor(ENGINES, replace)
        # one ends, and one hangs
        for agent_id, number in zip(ENGINES, (signal.SIGKILL, signal.SIGSTOP), strict=True):
            os.kill(manager.execute_task_on_agent(agent_id, None, timeout_s=30), number)
            print(replaced.get(timeout=120), "is replaced")
        print(len(seedcore.wait_for(organ_id="rollout", count=2, timeout_s=60)), "engines are ready")
        monitor.stop()
        manager.shutdown_agents(ENGINES)


if __name__ == "__main__":
    main()
