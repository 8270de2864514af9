"""A plain script of a user, run as a process of its own: its settings and the cluster's address in the environment.

It uses every form of the blocking calls one after the other, and writes a line when it is through.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable

import ray

import seedcore
from seedcore.errors import CannotKnowError, ForkedProcessError, RegistryError, RunningLoopError
from seedcore.registry.ray_support.lookup import actor_id_of


def join() -> None:
    ray.init(address=os.environ["CLUSTER"], log_to_driver=False, logging_level="error")


def refused(call: Callable[[], object], kind: type[RegistryError], words: str) -> None:
    """The call raises such an error, of one line."""
    try:
        call()
    except kind as error:
        text = str(error)
        assert words in text, text
        assert "\n" not in text, text
    else:
        raise AssertionError(words)


def until_cached() -> None:
    """The manager follows the registry a moment after its first look-up."""
    for _ in range(1000):
        if seedcore.BlockingManager().cached("w") is not None:
            return
        seedcore.get_actor("w")
        threading.Event().wait(0.01)
    raise AssertionError("never cached")


async def in_a_loop() -> None:
    """As in a notebook: a hit is answered, a miss is not."""
    ray.get(seedcore.get_actor("w").ping.remote())
    refused(lambda: seedcore.get_actor("unknown"), RunningLoopError, "await seedcore.get_tier0_manager().resolve('un")
    manager = seedcore.get_tier0_manager()
    assert actor_id_of(await manager.resolve("w")) == actor_id_of(seedcore.get_actor("w"))
    await manager.close()


def in_a_child() -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            refused(lambda: seedcore.get_actor("w"), ForkedProcessError, "use spawn")
            refused(seedcore.list_agents, ForkedProcessError, "use spawn")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def main() -> None:
    refused(lambda: seedcore.get_actor("w"), CannotKnowError, "not connected to Ray")
    join()
    assert ray.get(seedcore.get_actor("w", timeout_s=30).ping.remote()) == "pong"
    until_cached()
    for _ in range(2):
        asyncio.run(in_a_loop())
    in_a_child()
    old = seedcore.get_actor("w")
    ray.shutdown()
    for call in (
        lambda: seedcore.get_actor("w"),
        seedcore.list_agents,
        lambda: seedcore.wait_for(ids=["w"], timeout_s=60),
        seedcore.watch,
    ):
        refused(call, CannotKnowError, "not connected to Ray")
    assert not ray.is_initialized()
    join()
    found = seedcore.get_actor("w")
    assert found is not old
    assert ray.get(found.ping.remote()) == "pong"
    with seedcore.watch(since="start") as watch:
        assert [row.logical_id for row in next(watch).instances] == ["w"]
    sys.stdout.write("through\n")


if __name__ == "__main__":
    main()
