"""What is recorded of a process is proven, and never guessed."""

from __future__ import annotations

import os
from dataclasses import replace

from seedcore.registry.agent.identity import identify
from seedcore.registry.ray_support.process_keys import own_process_key, process_key_of, worker_id_of


async def test_without_ray_nothing_of_a_named_actor_is_proven() -> None:
    named = await identify("an-actor", "default", 0.1)
    assert (named.actor_name, named.namespace, named.actor_id, named.is_proven) == ("an-actor", None, None, False)


async def test_a_process_without_an_actor_has_nothing_to_prove() -> None:
    assert (await identify(None, "default", 0.1)).is_proven


async def test_process_that_is_not_connected_is_asked_again() -> None:
    alone = await identify(None, "default", 0.1)
    assert (alone.node_id, alone.is_complete) == (None, False)
    assert replace(alone, node_id="node").is_complete
    # a Ray Client process runs on no node of the cluster, and never will
    assert replace(alone, is_guest=True).is_complete
    assert not replace(alone, is_guest=True, is_proven=False).is_complete


def test_process_key_names_the_worker_where_there_is_one() -> None:
    process, worker, boot = (own_process_key() or "").split("/")
    assert (worker, own_process_key()) == ("", process_key_of(os.getpid()))
    assert worker_id_of(f"{process}/ab12/{boot}") == worker_id_of(f"{process}/ab12") == "ab12"
    assert worker_id_of(f"{process}//{boot}") is worker_id_of(process) is None
