"""The ladder of sources: each outcome by agent, mode and outage."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from seedcore.core.answers import Answer, InstanceFilter, Listing, NotResolved, Origin
from seedcore.core.errors import CannotKnowError, InvalidInputError
from seedcore.core.instances import Verdict
from seedcore.registry.caller.fallback_sources import RayListing
from seedcore.registry.caller.handle_cache import HandleCache
from seedcore.registry.caller.known_agents import KnownAgent
from seedcore.registry.caller.live_sources import RegistrySource
from seedcore.registry.caller.locator import Locator
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.registry.caller.resolver import Resolver
from seedcore.registry.caller.sources import NameListing
from tests.builders import iid, instance
from tests.unit.callers import AGENTS, World, outcome, world_of


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with world_of() as world:
        yield world


BY_REGISTRY = {
    "alive": ("located", Origin.REGISTRY, "alive", iid(1)),
    "actor-gone": ("not resolvable", NotResolved.DIED),
    "actor-silent": ("not resolvable", NotResolved.UNREACHABLE),
    "no-actor": ("not resolvable", NotResolved.NO_HANDLE),
    "starting": ("not resolvable", NotResolved.STARTING),
    "draining": ("not resolvable", NotResolved.DRAINING),
    "dead": ("not resolvable", NotResolved.DIED),
    "reported-dead": ("not resolvable", NotResolved.REPORTED_DEAD),
    "other-epoch": ("not resolvable", NotResolved.OTHER_EPOCH),
    "first": ("not resolvable", NotResolved.STARTING),
    "unreported": ("not resolvable", NotResolved.NOT_REGISTERED),
    "never-was": ("not resolvable", NotResolved.NOT_REGISTERED),
    "held": ("not resolvable", NotResolved.DRAINING),
    "killed": ("not resolvable", NotResolved.DIED),
    "deregistered": ("not resolvable", NotResolved.DIED),
}


@pytest.mark.parametrize("agent", AGENTS)
async def test_registry_resolves_or_returns_the_reason(world: World, agent: str) -> None:
    assert await outcome(world.strict.locate(agent)) == BY_REGISTRY[agent]


async def test_listing_finds_only_agents_that_never_reported(world: World) -> None:
    found = {agent: await outcome(world.hybrid.locate(agent)) for agent in AGENTS}
    by_listing = {agent: ("located", Origin.RAY, agent, None) for agent in ("unreported", "first")}
    assert found == {**BY_REGISTRY, **by_listing}


async def test_caller_that_finds_an_actor_gone_reports_it(world: World) -> None:
    await outcome(world.strict.locate("actor-gone"))
    (found,) = (await world.registry.resolve(["actor-gone"])).value
    assert found.reason in {NotResolved.REPORTED_DEAD, NotResolved.DIED}


async def test_a_newer_instance_evicts_the_cached_handle_of_the_earlier_one(world: World) -> None:
    cached: Any = "handle of the earlier instance"
    cache = HandleCache(0.01, max_proofs=0)
    cache.put(instance(20, "alive"), cached)
    finder: Any = world.actors
    sources = Resolver(records=[RegistrySource(world.connection)], listing=RayListing(world.listing))
    locator = Locator(sources, finder, cache, CallerMetrics("manager"), known=None, finds_unreported=False)
    assert cache.get("alive") is cached
    assert (await locator.locate("alive")).handle == "alive"
    assert cache.get("alive") is None


async def test_without_the_registry_only_an_actors_own_answer_counts(world: World) -> None:
    world.take_away("connection")
    for locator in (world.hybrid, world.strict):
        found = {agent: await outcome(locator.locate(agent)) for agent in AGENTS}
        answering = {"alive", "starting", "draining", "dead", "reported-dead", "other-epoch", "first", "unreported"}
        answering |= {"held", "deregistered"}
        assert {agent for agent, (kind, *_) in found.items() if kind == "located"} == answering
        # no other agent is certain to be gone
        assert {kind for agent, (kind, *_) in found.items() if agent not in answering} == {"cannot know"}


async def test_known_agent_that_was_draining_is_not_resolved_without_the_registry(world: World) -> None:
    for number in (1, 6):
        row = (await world.registry.get_instance(iid(number))).value
        world.known.remember(KnownAgent.registered(row))
    world.take_away("connection")
    assert await outcome(world.hybrid.locate("alive")) == ("located", Origin.SNAPSHOT, "alive", iid(1))
    assert await outcome(world.hybrid.locate("draining")) == ("cannot know",)


async def test_discovery_asks_the_database_before_rays_listing(world: World) -> None:
    world.take_away("connection")
    answer = await world.reader.resolve(["alive", "draining", "never-was"])
    assert isinstance(answer, Answer)
    assert (answer.source, answer.complete) == (Origin.POSTGRES, True)
    assert [found.instance is not None for found in answer.value] == [True, False, False]
    assert await world.reader.handle_of("alive") == "alive"
    world.take_away("connection", "database")
    names = await world.reader.resolve(["alive", "never-was"])
    assert isinstance(names, NameListing)
    assert names.names == ("alive",)
    assert await world.reader.handle_of("alive") == "alive"
    world.take_away("connection", "database", "listing")
    with pytest.raises(CannotKnowError):
        await world.reader.resolve(["alive"])


async def test_page_is_of_the_first_source_that_knows_the_answer(world: World) -> None:
    everyone = InstanceFilter(statuses=None)
    sources: list[Any] = []
    for away in ((), ("connection",), ("connection", "database")):
        world.take_away(*away)
        sources.append((await world.reader.list_instances(InstanceFilter(), 100, None)).source)
    assert sources == [Origin.REGISTRY, Origin.POSTGRES, Origin.RAY]
    # names alone are no answer to a filter
    with pytest.raises(CannotKnowError):
        await world.reader.list_instances(everyone, 100, None)
    world.take_away("connection")
    # and the database has no verdicts
    with pytest.raises(CannotKnowError):
        await world.reader.list_instances(InstanceFilter(verdicts=frozenset({Verdict.FRESH})), 100, None)
    page = await world.reader.list_instances(everyone, 100, None)
    assert isinstance(page, Listing)
    assert {"alive", "starting", "draining"} <= {row.logical_id for row in page}


async def test_reserved_names_are_no_agents_in_any_mode(world: World) -> None:
    for ask in (world.hybrid.locate, world.strict.locate, world.reader.handle_of):
        with pytest.raises(InvalidInputError):
            await ask("seedcore-registry")
