"""Keeps the manager's known agents current: discoveries on request, comparisons with the registry now and then."""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import replace

from seedcore.core.answers import InstanceFilter, Listing, Origin
from seedcore.core.clock import Clock
from seedcore.core.errors import DirectoryUnavailableError, RegistryUnavailableError
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.core.ports import ActorDirectory
from seedcore.core.selector import parse_selector
from seedcore.core.timeouts import end, is_running
from seedcore.registry.caller.known_agents import KnownAgent, KnownAgents
from seedcore.registry.caller.listing import every_match, every_page
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.settings import Mode
from seedcore.tier0.answers import Fleet

logger = logging.getLogger(__name__)


class Refresher:
    """Refreshes `known` from the registry and from Ray's listing. `compare_every_s` is the time between comparisons
    that happen by themselves, in seconds; there is also one when the registry answers again."""

    def __init__(
        self,
        known: KnownAgents,
        connection: RegistryConnection,
        directory: ActorDirectory,
        mode: Mode,
        *,
        compare_every_s: float = 60.0,
        clock: Clock | None = None,
    ) -> None:
        self._known = known
        self._connection = connection
        self._directory = directory
        self._mode = mode
        self._compare_every_s = compare_every_s
        self._clock = clock if clock is not None else Clock()
        self._compares_at_s = self._clock.monotonic() + compare_every_s
        self._is_due = False
        self._comparing: asyncio.Task[None] | None = None

    async def read_registry(self) -> Listing:
        """Every live instance, added to the known agents. Raises RegistryUnavailableError."""
        if self._mode is Mode.RAY:
            raise RegistryUnavailableError("the mode is ray")
        listing = await every_page(self._connection, statuses=None)
        self._known.take(listing)
        return listing

    async def discover_from_registry(
        self, organ_id: str | None = None, selector: str | None = None, endpoint: str | None = None
    ) -> Listing:
        """See the manager."""
        requirements = () if selector is None else parse_selector(selector)
        wanted = InstanceFilter(organ_id=organ_id, selector=requirements, endpoint=endpoint).validated()
        try:
            if wanted != InstanceFilter():
                return await self._read_matching(wanted)
            listing = await self.read_registry()
        except RegistryUnavailableError as error:
            logger.debug("discovery from the known agents: %s", error)
            known = self._known
            instances = (agent.instance for agent in known.agents() if agent.instance is not None)
            # whichever epoch was current
            items = tuple(row for row in instances if wanted.matches(row, row.cluster_epoch))
            as_of = known.discovered_at if known.discovered_at is not None else self._clock.utc()
            return Listing(items, Origin.SNAPSHOT, as_of, known.version, complete=False)
        return replace(listing, items=tuple(row for row in listing.items if row.status is Status.ALIVE))

    async def _read_matching(self, wanted: InstanceFilter) -> Listing:
        """The matching instances, added to the known agents. Raises RegistryUnavailableError."""
        if self._mode is Mode.RAY:
            raise RegistryUnavailableError("the mode is ray")
        listing = await every_match(self._connection, wanted)
        for row in listing.items:
            self._known.remember(KnownAgent.registered(row))
        return listing

    async def discover_and_refresh(self) -> Fleet:
        """See the manager."""
        problems: list[str] = []
        listing: Listing | None = None
        if self._mode is not Mode.RAY:
            try:
                listing = await self.read_registry()
            except RegistryUnavailableError as error:
                problems.append(str(error))
        registry_answers = listing is not None and listing.complete
        if not (registry_answers and self._mode is Mode.REGISTRY):
            try:
                self._known.take_names(await self._directory.names(), listing)
            except DirectoryUnavailableError as error:
                problems.append(str(error))
        if listing is not None and not listing.complete:
            problems.append("the registry is still recovering, or superseded")
        agents = tuple(
            agent for agent in self._known.agents() if agent.instance is None or agent.instance.status is Status.ALIVE
        )
        return Fleet(
            agents=agents,
            source=Origin.REGISTRY if registry_answers else Origin.RAY,
            as_of=self._clock.utc(),
            version=self._known.version,
            complete=not problems,
            problems=tuple(problems),
        )

    async def reconcile(self) -> int:
        """Compare the known agents with the registry and with Ray's listing. Returns how many were healed. Raises
        RegistryUnavailableError or DirectoryUnavailableError."""
        before = self._known.healed
        if self._mode is not Mode.RAY:
            ids = [agent.logical_id for agent in self._known.agents()]
            for start in range(0, len(ids), MAX_PAGE):
                answer = await self._connection.resolve(ids[start : start + MAX_PAGE], allow_late=True)
                if answer.complete:
                    self._known.compare(answer.value)
        self._known.drop_without_actor(await self._directory.names())
        healed = self._known.healed - before
        if healed:
            logger.info("known agents were corrected", extra={"healed": healed})
        return healed

    def note_outage(self) -> None:
        """The registry did not answer: compare as soon as it does again."""
        self._is_due = True

    def compare_if_due(self) -> None:
        """Compare in the background, if it is time to. Called after an answer of the registry."""
        now_s = self._clock.monotonic()
        if not self._is_due and now_s < self._compares_at_s:
            return
        self._is_due = False
        self._compares_at_s = now_s + self._compare_every_s * random.uniform(0.9, 1.1)
        if not is_running(self._comparing):
            self._comparing = asyncio.create_task(self._compare(), name="manager-compares")

    async def close(self) -> None:
        """End a comparison that is under way."""
        await end(self._comparing)

    async def _compare(self) -> None:
        try:
            await self.reconcile()
        except (RegistryUnavailableError, DirectoryUnavailableError) as error:
            logger.info("the known agents were not compared: %s", error)
