"""A registry in this process, its agents' actors, and callers that resolve them; their messages can be reworded."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from seedcore.core.answers import Answer, NotResolved
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Registration
from seedcore.core.errors import (
    ActorGoneError,
    CannotKnowError,
    DirectoryUnavailableError,
    NotResolvableError,
    RegistryError,
    RegistryUnavailableError,
    StoreUnavailableError,
)
from seedcore.core.holds import Hold
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.core.verdict import Death
from seedcore.discovery.reader import DiscoveryReader
from seedcore.registry.caller.fallback_sources import RayListing
from seedcore.registry.caller.handle_cache import HandleCache
from seedcore.registry.caller.known_agents import KnownAgents
from seedcore.registry.caller.live_sources import RegistrySource
from seedcore.registry.caller.locator import Locator
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.registry.caller.resolver import Resolver
from seedcore.registry.server.config import RegistryConfig
from seedcore.store.memory import MemoryStore, Tables
from tests.builders import START, iid
from tests.local import LocalRegistry as Registry
from tests.unit.registries import joined_registry

# no agent beats here: what is found depends on the outage alone, not on the speed of this machine
CONFIG = RegistryConfig(
    "cluster", beat_interval_s=3600.0, lease_s=86_400.0, flush_interval_s=0.01, linger_s=0.0, epoch_check_s=0.01
)
OTHER_WORDS = "completely different words"
_PROSE = frozenset({"why", "detail"})


def reworded(value: Any) -> Any:
    """The value, or the error, with other words wherever it has text for people."""
    if isinstance(value, RegistryError):
        names = list(inspect.signature(type(value)).parameters)
        return type(value)(
            *(OTHER_WORDS if name in _PROSE else arg for name, arg in zip(names, value.args, strict=True))
        )
    if isinstance(value, (list, tuple)):
        return type(value)(reworded(each) for each in value) if type(value) in {list, tuple} else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _reworded_field(value, one.name) for one in dataclasses.fields(value)})
    return value


def _reworded_field(value: Any, name: str) -> Any:
    field_of = getattr(value, name)
    is_prose = name in _PROSE or name.endswith("problem") or (isinstance(value, Hold) and name == "reason")
    return OTHER_WORDS if is_prose and isinstance(field_of, str) else reworded(field_of)


class Plain:
    """Passes every call on, and fails each while `is_away`."""

    def __init__(self, inner: Any, away: type[RegistryError], *, is_reworded: bool) -> None:
        self._inner = inner
        self._away = away
        self._is_reworded = is_reworded
        self.is_away = False

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **options: Any) -> Any:
            try:
                if self.is_away:
                    raise self._away("it does not answer")
                answer = await getattr(self._inner, name)(*args, **options)
            except RegistryError as error:
                raise (reworded(error) if self._is_reworded else error) from None
            return reworded(answer) if self._is_reworded else answer

        return call


@dataclass
class Actors:
    """The actors of a cluster by name, in place of HandleFinder: each is `alive`, `gone` or `silent`."""

    states: dict[str, str] = field(default_factory=dict)
    probe_timeout_s: float = 0.01
    namespace: str = "nowhere"

    async def of_instance(self, instance: Instance, **_options: Any) -> str:
        if instance.actor_name is None:
            raise NotResolvableError(instance.logical_id, NotResolved.NO_HANDLE, "it has no actor")
        state = self.states.get(instance.actor_name, "gone")
        if state == "gone":
            raise ActorGoneError(instance.logical_id, NotResolved.DIED, "its actor is gone")
        if state == "silent":
            raise NotResolvableError(instance.logical_id, NotResolved.UNREACHABLE, "it does not answer")
        return instance.actor_name

    answering = actor_of = vouched = of_instance

    async def of_name(self, name: str) -> str:
        state = self.states.get(name)
        if state is None:
            raise NotResolvableError(name, NotResolved.NOT_REGISTERED, "there is no such actor")
        if state == "gone":
            raise NotResolvableError(name, NotResolved.DIED, "it has died")
        if state == "silent":
            raise CannotKnowError(name, "it does not answer")
        return name

    async def names(self) -> list[str]:
        return sorted(self.states)


@dataclass
class World:
    """A registry, its database, Ray's listing, and the callers."""

    registry: Registry
    connection: Any
    database: Any
    listing: Any
    actors: Actors
    hybrid: Locator
    strict: Locator
    reader: DiscoveryReader
    known: KnownAgents

    def take_away(self, *names: str) -> None:
        """Take these neighbours away, and bring the others back."""
        for name in ("connection", "database", "listing"):
            getattr(self, name).is_away = name in names


async def fill(registry: Registry, actors: Actors) -> None:
    """One agent in every state, each named like it."""

    async def register(number: int, name: str, *steps: Status, actor: str | None = "alive", **details: Any) -> None:
        await registry.register(
            Registration(iid(number), name, actor_name=None if actor is None else name, **details), 1
        )
        for seq, status in enumerate(steps, 2):
            await registry.set_status(iid(number), status, seq, f"it became {status}")
        if actor is not None:
            actors.states[name] = actor

    alive, draining, dead = Status.ALIVE, Status.DRAINING, Status.DEAD
    await register(1, "alive", alive)
    await register(2, "actor-gone", alive, actor="gone")
    await register(3, "actor-silent", alive, actor="silent")
    await register(4, "no-actor", alive, actor=None)
    await register(5, "starting")
    await register(6, "draining", alive, draining)
    await register(7, "dead", alive, dead)
    await register(8, "reported-dead", alive)
    await registry.report_dead_call(iid(8))
    await register(9, "other-epoch", alive, cluster_epoch="later")
    actors.states["unreported"] = "alive"
    # its first instance that reports is another actor, which is starting
    await registry.register(Registration(iid(10), "first", actor_name="first@2"), 1)
    actors.states |= {"first": "alive", "first@2": "alive"}
    await register(11, "held", alive)
    await registry.drain(["held"], "a new disk", "ann", 3600.0)
    await register(12, "killed", alive, actor="gone")
    registry.expiry.declare_dead(iid(12), Death.PROCESS, Cause(CauseKind.PROCESS_KILLED, "SIGKILL (pid 7)"))
    await register(13, "deregistered", alive)
    await registry.deregister(["deregistered"], "no longer needed", "ann")


AGENTS = (
    "alive", "actor-gone", "actor-silent", "no-actor", "starting", "draining", "dead", "reported-dead", "other-epoch",
    "first", "unreported", "never-was", "held", "killed", "deregistered",
)  # fmt: skip


@asynccontextmanager
async def world_of(*, is_reworded: bool = False, follows: bool = False) -> AsyncIterator[World]:
    """Everything up, with one agent in every state. With `follows` the reader has a local copy."""
    tables, actors = Tables(START), Actors()
    async with joined_registry(CONFIG, tables) as registry:
        await fill(registry, actors)
        connection = Plain(registry, RegistryUnavailableError, is_reworded=is_reworded)
        database = Plain(MemoryStore(lambda: START, tables), StoreUnavailableError, is_reworded=is_reworded)
        listing = Plain(actors, DirectoryUnavailableError, is_reworded=is_reworded)
        finder: Any = Finder(actors, is_reworded)
        any_connection: Any = connection
        any_database: Any = database
        any_listing: Any = listing

        async def read() -> Any:
            return any_database

        def locator(known: KnownAgents | None, *, finds_unreported: bool) -> Locator:
            resolver = Resolver(records=[RegistrySource(any_connection)], listing=RayListing(any_listing))
            metrics = CallerMetrics("manager")
            return Locator(resolver, finder, HandleCache(0.01), metrics, known=known, finds_unreported=finds_unreported)

        known = KnownAgents(100)
        reader = DiscoveryReader(any_connection, read, any_listing, finder, CallerMetrics("discovery"), follows=follows)
        yield World(
            registry,
            connection,
            database,
            listing,
            actors,
            locator(known, finds_unreported=True),
            locator(None, finds_unreported=False),
            reader,
            known,
        )
        if reader.follower is not None:
            await reader.follower.stop()


class Finder:
    """The actors, with their messages reworded."""

    def __init__(self, actors: Actors, is_reworded: bool) -> None:
        self._calls = Plain(actors, RegistryUnavailableError, is_reworded=is_reworded)
        self.namespace, self.probe_timeout_s = actors.namespace, actors.probe_timeout_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._calls, name)


async def outcome(located: Any) -> Sequence[Any]:
    """The kind of what a resolution comes to."""
    try:
        found = await located
    except NotResolvableError as error:
        return ("not resolvable", error.reason)
    except CannotKnowError:
        return ("cannot know",)
    if isinstance(found, Answer):
        return [(each.logical_id, _id_of(each.instance), each.reason) for each in found.value]
    if hasattr(found, "handle"):
        return ("located", found.source, found.handle, _id_of(found.instance))
    return (type(found).__name__, getattr(found, "source", None), getattr(found, "complete", None))


def _id_of(instance: Instance | None) -> str | None:
    return None if instance is None else instance.instance_id
