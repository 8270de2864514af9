"""Owns the callers: processes that follow the registry, resolve agents and prove their handles, as a manager or a
replica of discovery does. Nothing in them is simulated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

from seedcore.core.answers import Answer, Origin
from seedcore.core.errors import RegistryError
from seedcore.core.feed import START, Feed
from seedcore.core.instances import Instance
from seedcore.registry.caller.awaited import awaited
from seedcore.registry.caller.fallback_sources import PostgresSource, RayListing
from seedcore.registry.caller.handle_cache import ActorTable, HandleCache
from seedcore.registry.caller.handles import HandleFinder
from seedcore.registry.caller.known_agents import KnownAgents
from seedcore.registry.caller.live_sources import RegistrySource, SnapshotSource
from seedcore.registry.caller.locator import Located, Locator
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.registry.caller.resolver import Resolver
from seedcore.registry.caller.sources import Choice, RecordSource
from seedcore.registry.caller.waiting import Wait
from seedcore.registry.caller.watching import Watch, WatchTimes, watched
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.nearby import Nearby
from seedcore.registry.protocol.connection import RegistryConnection
from tests.faults.simulated.caller_laws import FOLLOW, CallerLaws, Followed
from tests.faults.simulated.database import SimReader
from tests.faults.simulated.ray import AgentHandle, SimDirectory
from tests.faults.simulated.world import CALL_TIMEOUT_S, NAMESPACE, World

_PROBE_S = 1.0
_PARTS = 0.6
_WATCH = WatchTimes(start_s=3.0, tick_s=1.0)


class Caller:
    """One process. A manager remembers agents, and finds those that report to no registry; a replica of discovery reads
    the database instead while the registry is away."""

    def __init__(self, world: World, directory: SimDirectory, laws: CallerLaws, *, is_manager: bool) -> None:
        self._world = world
        self._laws = laws
        self.is_manager = is_manager
        self.name = f"caller-{len(world.log)}-{'manager' if is_manager else 'replica'}"
        self._outages = 0
        self._cache = HandleCache(_PROBE_S)
        clock = world.clock
        self._connection = RegistryConnection(
            NAMESPACE, CALL_TIMEOUT_S, by_relay=True, clock=clock, find=directory.find_actor
        )
        node_id = world.random.choice(sorted(world.nodes))
        # of its own: the history of a seed does not depend on it
        self._keeps_part = is_manager and Random(self.name).random() < _PARTS
        self.follower = Follower(
            Nearby(self._connection, lambda: node_id, clock),
            on_change=self._changed,
            on_reset=self._cache.clear,
            feed=None if is_manager else Feed("", 12),
            times=FOLLOW,
            clock=clock,
            most_agents=3 if self._keeps_part else None,
        )
        registry = RegistrySource(self._connection, clock=clock)
        records: list[RecordSource] = [registry]
        if not is_manager:
            records.append(PostgresSource(self._reader, clock=clock))
        self._resolver = Resolver(
            snapshot=SnapshotSource(self.follower, clock), records=records, listing=RayListing(directory, clock)
        )
        self._registry = registry
        finder = HandleFinder(NAMESPACE, _PROBE_S, table=ActorTable(_PROBE_S, clock=clock, find=directory.find_actor))
        known = KnownAgents(100) if is_manager else None

        def locator(on_outage: Callable[[], None]) -> Locator:
            metrics = CallerMetrics("simulated")
            return Locator(
                self._resolver,
                finder,
                self._cache,
                metrics,
                known=known,
                finds_unreported=is_manager,
                on_outage=on_outage,
                clock=clock,
            )

        self._locator = locator(self._note_outage)
        # its outages are not those that a resolution beside it meets
        self._waits = locator(lambda: None)
        world.callers.append(self)
        world.loop.run_in(self.name, self._ask_for_ever())
        world.loop.run_in(self.name, self._watch_for_ever())
        world.loop.run_in(self.name, self._wait_for_ever())
        world.note(f"{self.name} starts")

    def kill(self) -> None:
        self._world.callers.remove(self)
        self._world.loop.kill(self.name)
        self._world.note(f"{self.name} is killed")

    async def resolved(self, logical_id: str) -> Instance | None:
        """The instance that the ladder of sources has for an agent. Raises CannotKnowError."""
        answer = await self._resolver.resolve([logical_id], Choice())
        return answer.value[0].instance if isinstance(answer, Answer) else None

    async def _reader(self) -> Any:
        reader = SimReader(self._world, self._laws.note_instance)
        await reader.open()
        return reader

    def _changed(self, logical_id: str) -> None:
        self._cache.evict(logical_id)
        self._world.counts["changes followed"] += 1

    def _note_outage(self) -> None:
        self._outages += 1

    async def _ask_for_ever(self) -> None:
        world = self._world
        self.follower.start()
        while True:
            await asyncio.sleep(world.random.uniform(0.2, 1.2))
            self._laws.check_cache(self.name, self.follower)
            logical_id = f"agent-{world.random.randrange(world.agents)}"
            ask = self._resolve if world.random.random() < 0.4 else self._find_handle
            with suppress(RegistryError):
                await ask(logical_id)

    async def _until_it_needs_all(self, random: Random) -> None:
        """Who keeps a part keeps all agents from the first watch or wait on. It has to load them then, so the calm is
        not the time for that."""
        if self._keeps_part:
            await asyncio.sleep(random.uniform(5.0, 60.0))
            if self._world.is_calm:
                await asyncio.Event().wait()

    async def _watch_for_ever(self) -> None:
        """Replays the events of one watch after the other, each from the position of the one before; slow at times."""
        # of its own: the history of a seed does not depend on it
        random = Random(self.name)
        await self._until_it_needs_all(random)
        replayed: dict[str, Followed] = {}
        position = START
        while True:
            watch = Watch(
                self.follower,
                self._connection,
                watched(None, None, None),
                position,
                capacity=12,
                times=_WATCH,
                clock=self._world.clock,
            )
            with suppress(RegistryError):
                while random.random() > 0.02:
                    event = await anext(watch)
                    position = event.position
                    self._laws.replay(self.name, replayed, event)
                    if random.random() < 0.1:
                        await asyncio.sleep(random.uniform(0.0, 5.0))
            await asyncio.sleep(random.uniform(0.1, 1.0))

    async def _wait_for_ever(self) -> None:
        random, world = Random(self.name), self._world
        await self._until_it_needs_all(random)
        while True:
            await asyncio.sleep(random.uniform(1.0, 5.0))
            ids = random.sample([f"agent-{number}" for number in range(world.agents)], min(2, world.agents))
            of = awaited(ids, None, None, random.choice([None, 1]))
            wait = Wait(of, self._waits.locate, self._resolver, self.follower, clock=world.clock)
            with suppress(RegistryError):
                for located in await wait.until_ready(random.uniform(0.5, 6.0)):
                    world.counts["waited for"] += 1
                    if located.instance is not None and located.source is not Origin.SNAPSHOT:
                        how = f"{self.name} waited, by {located.source}"
                        handle: AgentHandle = located.handle
                        world.check(handle.actor_id == located.instance.actor_id, 15, f"{how}: another actor's handle")
                    if located.instance is not None and self.follower.is_current:
                        # the cache would have woken the wait
                        self._laws.check_found(located.instance, world.now_s, self.name, is_complete=False)

    async def _resolve(self, logical_id: str) -> None:
        world, asked_s = self._world, self._world.now_s
        answer = await self._resolver.resolve([logical_id], Choice(allow_late=world.random.random() < 0.3))
        if not isinstance(answer, Answer):
            world.counts["resolved: names only"] += 1
            return
        found = answer.value[0].instance
        world.counts[f"resolved: {answer.source if found is not None else 'none'}"] += 1
        if found is not None:
            how = f"{self.name} by {answer.source}"
            self._laws.check_found(found, asked_s, how, is_complete=answer.complete)
            if world.happens(0.1):
                # a call that failed for whatever reason: the registry believes Ray
                await self._registry.report_gone(found)

    async def _find_handle(self, logical_id: str) -> None:
        """As Tier0MemoryManager.resolve."""
        world, asked_s = self._world, self._world.now_s
        if self.follower.is_current:
            handle: AgentHandle | None = self._locator.cached(logical_id)
            if handle is not None:
                world.counts["handles: cached"] += 1
                self._laws.check_handle(logical_id, handle.actor_id, asked_s, f"{self.name} by its cached handle")
                return
        outages = self._outages
        located = await self._locator.locate(logical_id, Choice())
        world.counts[f"handles: {located.source}"] += 1
        self._check_located(located, asked_s, is_outage=self._outages > outages)

    def _check_located(self, located: Located, asked_s: float, *, is_outage: bool) -> None:
        """Law 15: where no source with records answers, and of an agent that reports to none, the actor's own answer
        counts."""
        handle: AgentHandle = located.handle
        how, instance = f"{self.name} by {located.source}", located.instance
        if instance is not None:
            self._world.check(handle.actor_id == instance.actor_id, 15, f"{how}: the handle is not of {instance}")
        if is_outage or located.source is Origin.RAY:
            instance_ids = handle.answered_s if instance is None else (instance.instance_id,)
            answered_s = max((handle.answered_s.get(one, 0.0) for one in instance_ids), default=0.0)
            self._world.check(answered_s >= asked_s, 15, f"{how}: {handle.actor_id} has not answered")
        elif instance is not None:
            self._laws.check_found(instance, asked_s, how, is_complete=located.source is Origin.SNAPSHOT)
