"""A script without an event loop creates agents, waits for them, and calls them.

Replaces about 30 lines that such scripts have around `ray.get_actor`: a loop with `except ValueError` and a pause until
the name exists, a ping with a timeout to find out whether its process lives, and the same again after a failed call.
"""

from __future__ import annotations

from typing import Any

import ray

import seedcore


class Counter(seedcore.RayAgent):
    """Counts words."""

    async def handle_task(self, task: Any) -> Any:
        return len(task.split())


def main() -> None:
    ray.init(address="auto", log_to_driver=False, logging_level="error")
    with seedcore.BlockingManager() as manager:
        for number in (1, 2):
            manager.create_agent(f"script-{number}", "script", agent_class=Counter)
        ready = seedcore.wait_for(organ_id="script", count=2, timeout_s=60)
        print(len(ready), "agents are ready")

        # as ray.get_actor, for the registered, living actor
        agent = seedcore.get_actor("script-1", timeout_s=30)
        print(ray.get(agent.execute_task.remote("three short words")), "words")
        # the same in one call: it is repeated if the actor dies under it
        print(manager.execute_task_on_agent("script-2", "two words", timeout_s=30), "words")

        for instance in seedcore.list_agents("script"):
            print(instance.logical_id, instance.status)
        manager.shutdown_agents(["script-1", "script-2"])
        try:
            seedcore.get_actor("script-1")
        except seedcore.errors.NotResolvableError as error:
            print("script-1:", error.reason)


if __name__ == "__main__":
    main()
