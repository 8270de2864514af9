"""Whatever is said to the registry, it answers or refuses: nothing that is said makes it fail, or changes what it must
not change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from seedcore.core.answers import InstanceFilter
from seedcore.core.changes import RegisterChange, Registration, SequencedChange, StatusChange
from seedcore.core.errors import RegistryError
from seedcore.core.feed_question import FeedQuestion
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.registry import Registry
from seedcore.store.memory import Tables
from tests.builders import START, iid
from tests.unit.registries import joined_registry

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=300)
    | st.binary(max_size=5)
    | st.sampled_from(["alive", "dead", "draining", "agent", iid(1), iid(2), "epoch-1", -1, 0, 10**30])
)
JUNK: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
REGISTRATIONS = st.builds(
    Registration, JUNK, JUNK, JUNK, organ_id=JUNK, labels=JUNK, metadata=JUNK, node_id=JUNK, ip_address=JUNK, pid=JUNK
)
CHANGES = st.builds(
    SequencedChange,
    st.builds(StatusChange, JUNK, JUNK, JUNK, JUNK) | st.builds(RegisterChange, REGISTRATIONS | JUNK, JUNK) | JUNK,
    JUNK,
)
FILTERS = st.builds(
    InstanceFilter, statuses=JUNK, organ_id=JUNK, labels=JUNK, logical_id=JUNK, epoch=JUNK, node_id=JUNK
)

QUESTIONS = st.builds(
    FeedQuestion,
    FILTERS | JUNK,
    JUNK,
    JUNK,
    st.just(0.0) | JUNK.filter(lambda value: not isinstance(value, (int, float))),
    follower=JUNK,
    loads_after=JUNK,
    may_compact=JUNK,
    node_id=JUNK,
    is_relay=JUNK,
)
IDS = st.lists(st.sampled_from(["agent", "another"]), max_size=2) | JUNK

WAITS = st.just(0.0) | JUNK.filter(lambda value: not isinstance(value, (int, float)))

CALLS: dict[str, st.SearchStrategy[tuple[Any, ...]]] = {
    "take": st.tuples(CHANGES | JUNK),
    "drain": st.tuples(IDS, JUNK, JUNK, JUNK),
    "undrain": st.tuples(IDS, JUNK, JUNK),
    "deregister": st.tuples(IDS, JUNK, JUNK),
    "deliver": st.tuples(st.lists(CHANGES, max_size=3) | JUNK),
    "beat_many": st.tuples(JUNK, JUNK),
    "report_dead_call": st.tuples(JUNK),
    "set_current_epoch": st.tuples(JUNK.filter(lambda value: value != "epoch-1" and not isinstance(value, str))),
    "stage_epoch": st.tuples(JUNK),
    "list_epochs": st.tuples(JUNK),
    "resolve": st.tuples(JUNK),
    "page": st.tuples(FILTERS | JUNK, JUNK, JUNK),
    "changes": st.tuples(QUESTIONS | JUNK),
    "get_instance": st.tuples(JUNK),
    "describe": st.tuples(JUNK),
    "transitions": st.tuples(JUNK, JUNK),
    "deaths": st.tuples(JUNK, JUNK, JUNK),
}


def test_every_method_that_can_be_called_is_tried() -> None:
    public = {name for name in dir(Registry) if name[0] != "_" and asyncio.iscoroutinefunction(getattr(Registry, name))}
    assert public - {"hello", "health", "current_epoch", "stop"} == CALLS.keys()


async def tried(registry: Registry, name: str, arguments: tuple[Any, ...]) -> None:
    """A call, which may only be refused in our words."""
    method: Callable[..., Awaitable[object]] = getattr(registry, name)
    refusals: list[str] = []
    try:
        await method(*arguments)
    except RegistryError as error:
        refusals.append(str(error))
    assert all(refusals)


@settings(max_examples=60)
@given(st.lists(st.one_of(*(st.tuples(st.just(name), arguments) for name, arguments in CALLS.items())), max_size=8))
async def test_junk_is_refused_in_our_words(calls: list[tuple[str, tuple[Any, ...]]]) -> None:
    config = RegistryConfig(ray_cluster="here", flush_interval_s=0.05)
    async with joined_registry(config, Tables(START)) as registry:
        await registry.take(SequencedChange(RegisterChange(Registration(iid(1), "agent"), 1)))
        for name, arguments in calls:
            await tried(registry, name, arguments)
        health = await registry.health()
        assert health.is_ready
        assert health.flush.failures == 0
        assert (await registry.resolve(["agent"])).complete
