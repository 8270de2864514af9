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
from collections.abc import Callable
from typing import Any

import ray

import seedcore

ENGINES = ("engine-1", "engine-2")


class Engine(seedcore.RayAgent):
    """Stands for an inference engine."""

    async def handle_task(self, task: Any) -> Any:
        return os.getpid()


class HealthMonitor:
    """Calls `on_death` with the id of each agent of the organ that dies, and the cause, on a thread."""

    def __init__(self, organ_id: str, on_death: Callable[[str, str], object]) -> None:
        self._on_death = on_death
        self._events = seedcore.watch(organ_id=organ_id)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._events.close()
        self._thread.join()

    def _run(self) -> None:
        for event in self._events:
            if event.kind == "died" and event.logical_id is not None:
                self._on_death(event.logical_id, str(event.cause))


def main() -> None:
    ray.init(address="auto", log_to_driver=False, logging_level="error")
    replaced: queue.Queue[str] = queue.Queue()
    with seedcore.BlockingManager() as manager:

        def create(agent_id: str) -> None:
            manager.create_agent(agent_id, "rollout", agent_class=Engine, max_restarts=0)

        def replace(agent_id: str, cause: str) -> None:
            print(f"{agent_id} died: {cause}")
            create(agent_id)
            replaced.put(agent_id)

        for agent_id in ENGINES:
            create(agent_id)
        monitor = HealthMonitor("rollout", replace)
        os.kill(manager.execute_task_on_agent("engine-1", None, timeout_s=30), signal.SIGKILL)
        print(replaced.get(timeout=120), "is replaced")
        print(len(seedcore.wait_for(organ_id="rollout", count=2, timeout_s=60)), "engines are ready")
        monitor.stop()
        manager.shutdown_agents(ENGINES)


if __name__ == "__main__":
    main()
