"""A namespace is recorded when a look-up has proven it, and never guessed."""

from __future__ import annotations

from seedcore.registry.identity import identify


async def test_without_ray_nothing_of_a_named_actor_is_proven() -> None:
    named = await identify("an-actor", "default", 0.1)
    assert (named.actor_name, named.namespace, named.actor_id, named.is_proven) == ("an-actor", None, None, False)


async def test_a_process_without_an_actor_has_nothing_to_prove() -> None:
    assert (await identify(None, "default", 0.1)).is_proven
