"""Tier0MemoryManager: creates agents, finds them, calls them.

A facade: `creation` makes actors, `registry.caller` resolves, `refresh` keeps the known agents current, `tasks` and
`fleet_calls` call them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

from seedcore.agents.ray_agent import Heartbeat, SummaryStats
from seedcore.core.answers import Listing, Origin
from seedcore.core.errors import CannotKnowError, InvalidInputError, NotResolvableError
from seedcore.core.limits import Json, check_timeout
from seedcore.core.selection import Policy
from seedcore.registry.caller.awaited import awaited, check_deadline
from seedcore.registry.caller.fallback_sources import RayListing
from seedcore.registry.caller.handle_cache import HandleCache
from seedcore.registry.caller.handles import HandleFinder
from seedcore.registry.caller.known_agents import KnownAgent, KnownAgents
from seedcore.registry.caller.live_sources import RegistrySource, SnapshotSource
from seedcore.registry.caller.locator import Located, Locator, check_agent_id
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.registry.caller.picks import Picks
from seedcore.registry.caller.resolver import Resolver
from seedcore.registry.caller.waiting import Wait
from seedcore.registry.caller.watching import Watch, watched
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.nearby import Nearby
from seedcore.registry.protocol.connection import RegistryConnection, shared_connection
from seedcore.registry.ray_support.directory import RayDirectory
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.registry.ray_support.session import own_node_id, require_connected
from seedcore.settings import Mode, Settings, get_settings
from seedcore.tier0.answers import AgentSpec, Fleet, Gathered, Pruned, SystemSummary
from seedcore.tier0.calls import gather
from seedcore.tier0.creation import create_actor
from seedcore.tier0.fleet_calls import FleetCalls
from seedcore.tier0.refresh import Refresher
from seedcore.tier0.summary import system_summary
from seedcore.tier0.tasks import TaskRunner


class Tier0MemoryManager:
    """In `Mode.RAY` it never calls the registry. Callers of several event loops may share one manager: the local cache
    is read in the loop that resolved first, and the other loops ask the registry for an agent without a cached handle.
    `async with` closes it."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        mode: Mode | None = None,
        connection: RegistryConnection | None = None,
    ) -> None:
        """Opens no connection."""
        self._settings = settings if settings is not None else get_settings()
        wanted = mode if mode is not None else self._settings.mode
        # the sources that it uses
        self.mode = wanted if self._settings.registry_enabled else Mode.RAY
        namespace, probe_timeout_s = self._settings.namespace, self._settings.probe_timeout_s
        # its connection to the registry
        self.connection = (
            connection if connection is not None else shared_connection(namespace, self._settings.call_timeout_s)
        )
        has_registry = self.mode is not Mode.RAY
        directory = RayDirectory(namespace, self._settings.call_timeout_s)
        metrics = CallerMetrics("manager")
        self._known = KnownAgents(self._settings.max_instances)
        self._cache = HandleCache(probe_timeout_s)
        self.follower: Follower | None = None
        if has_registry and self._settings.follow:
            self.follower = Follower(
                Nearby(self.connection),
                on_change=self._cache.evict,
                on_reset=self._cache.clear,
                export=metrics.export,
                most_agents=self._settings.copied_agents,
                was_used=self._cache.take_use,
            )
        self._refresher = Refresher(self._known, self.connection, directory, self.mode)
        self._finder = HandleFinder(namespace, probe_timeout_s)
        self._resolver = Resolver(
            snapshot=None if self.follower is None else SnapshotSource(self.follower),
            records=[RegistrySource(self.connection)] if has_registry else [],
            listing=RayListing(directory),
        )
        self._watches: WeakSet[Watch] = WeakSet()
        self._locator = Locator(
            self._resolver,
            self._finder,
            self._cache,
            metrics,
            known=self._known,
            finds_unreported=self.mode is Mode.HYBRID,
            on_confirmed=self._refresher.compare_if_due,
            on_outage=self._refresher.note_outage,
        )
        self._picks = Picks(self.follower, self._cache, self._locator, metrics, own_node_id)
        self._tasks = TaskRunner(self._picks.find, self._cache.evict, self._picks.outstanding, probe_timeout_s)
        self._calls = FleetCalls(self._known, self._locator, self._finder, self.connection if has_registry else None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop following the registry, end every watch, and drop every cached handle. A later resolution starts again.
        Ends no agent: those made with `is_detached=False` live as long as the process."""
        for watch in list(self._watches):
            watch.end()
        if self.follower is not None:
            await self.follower.stop()
        await self._refresher.close()
        await self._cache.close()

    # Making agents

    async def create_agent(
        self,
        agent_id: str,
        organ_id: str | None = None,
        *,
        agent_class: type[Any] | None = None,
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, Json] | None = None,
        arguments: Mapping[str, Any] | None = None,
        num_cpus: float = 0,
        resources: Mapping[str, float] | None = None,
        max_restarts: int = -1,
        is_detached: bool = True,
        epoch: str | None = None,
    ) -> ActorHandle:
        """The agent's actor, created and started unless it lives already. Its name is its logical id, or
        `logical_id@epoch` with an `epoch`, in which it then registers as with CLUSTER_EPOCH.

        A detached agent (the default) outlives this process. With `is_detached=False` it ends with the process that
        created it, even if that drops the handle. An agent that has stopped is replaced by a new actor. Raises
        InvalidInputError before an actor is created, AgentCallError if the actor does not start, or what its start
        raises. An actor that this call created is ended then, and also if the call is cancelled.
        """
        return await self._create(
            AgentSpec(
                agent_id,
                organ_id,
                agent_class,
                labels if labels is not None else {},
                metadata if metadata is not None else {},
                arguments if arguments is not None else {},
                num_cpus,
                resources if resources is not None else {},
                max_restarts,
                is_detached,
                epoch,
            )
        )

    async def create_agents_batch(self, specs: Sequence[AgentSpec]) -> Gathered[ActorHandle]:
        """Create many at once; one that fails does not stop the others. If the call is cancelled, the agents that have
        started stay, and the others are ended."""
        ids = [spec.agent_id for spec in specs]
        if len(set(ids)) != len(ids):
            twice = [agent_id for agent_id, count in Counter(ids).items() if count > 1]
            raise InvalidInputError("specs", f"name each agent once, not {twice[:5]} again")
        by_id = {spec.agent_id: spec for spec in specs}
        return await gather(ids, lambda agent_id: self._create(by_id[agent_id]), Origin.RAY)

    async def attach_existing_actor(self, agent_id: str, actor_name: str | None = None) -> ActorHandle:
        """Add a running actor to the known agents under a logical id. This does not keep it alive: an actor that is not
        detached ends with the last handle of the process that created it. Raises NotResolvableError or CannotKnowError
        unless it answers."""
        check_agent_id(agent_id)
        name = agent_id if actor_name is None else check_agent_id(actor_name, "actor_name")
        handle = await self._finder.of_name(name)
        self._known.remember(KnownAgent(agent_id, name, Origin.RAY, None))
        return handle

    async def _create(self, spec: AgentSpec) -> ActorHandle:
        handle = await create_actor(spec, self._settings.namespace)
        self._known.remember(KnownAgent(spec.agent_id, spec.actor_name, Origin.RAY, None))
        return handle

    # Finding agents

    async def resolve(
        self, logical_id: str, *, allow_late: bool = False, policy: Policy = Policy.NEWEST, key: str = ""
    ) -> ActorHandle:
        """A live, proven handle of the agent. An agent that missed a beat must answer first, unless `allow_late`.

        `policy` chooses among several routable instances of an agent; `key` is the key of Policy.STICKY.
        LEAST_OUTSTANDING counts the calls of `execute_task_on_agent` alone. A proven handle is cached until the
        registry's feed, or Ray, reports a change; a first resolution, and one after a change, finds and proves it.
        Without a feed (SEEDCORE_FOLLOW=false, or while the registry is away) every resolution does.

        Raises NotResolvableError, with the reason, if the agent certainly has no routable instance; CannotKnowError if
        no source that could know answers; InvalidInputError for a bad id; ForkedProcessError.
        """
        handle = self.cached(logical_id) if policy is Policy.NEWEST else None
        if handle is not None:
            return handle
        handle, _ = await self._picks.find(logical_id, policy, key, allow_late=allow_late)
        return handle

    def cached(self, logical_id: str) -> ActorHandle | None:
        """The handle that `resolve` would return at once, or None if it would look the agent up. Any thread may ask."""
        if self.follower is None or not self.follower.is_current:
            return None
        return self._locator.cached(logical_id)

    async def locate(
        self, logical_id: str, *, allow_late: bool = False, policy: Policy = Policy.NEWEST, key: str = ""
    ) -> Located:
        """As `resolve`, with the source of the answer, and always looked up."""
        check_agent_id(logical_id, "logical_id")
        choice = self._picks.choice(logical_id, policy, key, allow_late=allow_late)
        return await self._locator.locate(logical_id, choice)

    async def get_agent(self, agent_id: str) -> ActorHandle | None:
        """As `resolve`, but None if the agent is certainly not routable."""
        try:
            return await self.resolve(agent_id)
        except NotResolvableError:
            return None

    async def wait_for(
        self,
        *,
        ids: Sequence[str] | None = None,
        organ_id: str | None = None,
        selector: str | None = None,
        endpoint: str | None = None,
        count: int | None = None,
        timeout_s: float,
    ) -> list[ActorHandle]:
        """Proven handles, as of `resolve`, as soon as `count` agents are ready: of these ids (default: all of them), or
        of an organ, a selector, and those with an endpoint of this name. Raises InvalidInputError, and at the deadline
        NotReadyError with all reasons; without Ray CannotKnowError."""
        of, within_s = awaited(ids, organ_id, selector, count, endpoint), check_deadline(timeout_s)
        require_connected()
        ready = await Wait(of, self._locator.locate, self._resolver, self.follower).until_ready(within_s)
        return [located.handle for located in ready]

    def watch(
        self,
        *,
        ids: Sequence[str] | None = None,
        organ_id: str | None = None,
        selector: str | None = None,
        endpoint: str | None = None,
        since: str | None = None,
    ) -> Watch:
        """The changes as events, from now on: of these ids; or of an organ, a selector, and those with an endpoint of
        this name; or of all agents. `since` is the position of an earlier event, or "start" for an event with the state
        first. Raises InvalidInputError, and CannotKnowError in mode ray and with SEEDCORE_FOLLOW=false."""
        of = watched(ids, organ_id, selector, endpoint)
        if self.follower is None:
            raise CannotKnowError("*", "this manager follows no registry (SEEDCORE_FOLLOW, SEEDCORE_MODE)")
        watch = Watch(self.follower, self.connection, of, since)
        self._watches.add(watch)
        return watch

    def list_agents(self) -> tuple[KnownAgent, ...]:
        """The agents known from creations and discoveries so far, by logical id. Asks no source."""
        return self._known.agents()

    async def discover_from_registry(
        self, organ_id: str | None = None, selector: str | None = None, endpoint: str | None = None
    ) -> Listing:
        """Every alive instance of the current epoch from the registry; of an organ, matching a selector, or with an
        endpoint of this name, if given. While the registry is away, or in mode ray: the known agents of the last
        discovery, with complete=False. Raises InvalidInputError."""
        return await self._refresher.discover_from_registry(organ_id, selector, endpoint)

    async def discover_and_refresh_agents(self) -> Fleet:
        """Refresh the known agents: from the registry, then from Ray's listing for agents that the registry does not
        know.

        In mode registry the listing is read only while the registry is away. If a source that the mode uses did not
        answer, `complete` is False and `problems` names it.
        """
        return await self._refresher.discover_and_refresh()

    async def reconcile(self) -> int:
        """Compare the known agents with the registry and with Ray's listing, and correct them. Returns how many were
        corrected. Also happens once per minute while agents are resolved, and when the registry is back."""
        return await self._refresher.reconcile()

    # Calling agents

    async def execute_task_on_agent(
        self,
        agent_id: str,
        task: Any,
        timeout_s: float | None = None,
        *,
        retries: bool = True,
        policy: Policy = Policy.NEWEST,
        key: str = "",
    ) -> Any:
        """Run a task on the agent and return its result within `timeout_s` seconds (None: without a bound). `policy`
        and `key` choose among several routable instances, as in `resolve`.

        If the actor dies during the task, or Ray restarts it, the agent is resolved again and the task runs again, at
        most twice (at least once: pass retries=False for a task that must not run twice). Raises what `resolve` raises,
        AgentCallError at the time limit, ActorDiedError, ActorUnavailableError if the task may have run or not, or what
        the task raised.
        """
        check_timeout(timeout_s)
        return await self._tasks.execute(agent_id, task, timeout_s, retries=retries, policy=policy, key=key)

    async def collect_heartbeats(self, timeout_s: float | None = None) -> Gathered[Heartbeat]:
        """A heartbeat of every known agent, all at once, each within `timeout_s` seconds (default: the probe's)."""
        return await self._calls.ask_all("get_heartbeat", timeout_s)

    async def collect_agent_stats(self, timeout_s: float | None = None) -> Gathered[SummaryStats]:
        """The statistics of every known agent, as `collect_heartbeats`."""
        return await self._calls.ask_all("get_summary_stats", timeout_s)

    async def prune(self) -> Pruned:
        """Probe every known agent and drop the dead ones. An agent that does not answer is kept."""
        return await self._calls.prune()

    async def shutdown_agents(self, agent_ids: Sequence[str] | None = None, timeout_s: float = 10.0) -> Gathered[bool]:
        """Stop agents for good (default: all known ones): each is asked to stop, then its actor is ended.

        A registered agent is found by namespace, name and actor id: another actor of its name is not touched. Raises
        InvalidInputError for a bad id, and then stops none.
        """
        return await self._calls.shut_down(agent_ids, timeout_s)

    async def shutdown_agents_batch(self, specs: Sequence[AgentSpec], timeout_s: float = 10.0) -> Gathered[bool]:
        """Stop the actors that `create_agents_batch` makes of these specs. Other actors of their logical ids, for
        example of another epoch, are not touched."""
        return await self._calls.shut_down_batch(specs, timeout_s)

    async def get_system_summary(self) -> SystemSummary:
        """The manager's view of fleet and registry."""
        return await system_summary(self.mode, self._settings.namespace, self.connection, self._known)


@lru_cache(maxsize=1)
def get_tier0_manager() -> Tier0MemoryManager:
    """The process's manager, with the settings of the environment."""
    return Tier0MemoryManager()
