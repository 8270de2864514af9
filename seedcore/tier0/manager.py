"""Tier0MemoryManager: creates agents, finds them, talks to them.

Owns a bounded snapshot of who there is. The ladder of a resolution: the registry; while it is away the
snapshot; then Ray's own listing. Probes prove whatever the registry does not vouch for.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from seedcore.agents.ray_agent import Heartbeat, SummaryStats
from seedcore.core.answers import Listing, Origin
from seedcore.core.clock import utc_now
from seedcore.core.errors import (
    ActorGoneError,
    AgentCallError,
    CannotKnowError,
    DirectoryUnavailableError,
    FencedError,
    InvalidInputError,
    NotResolvableError,
    RegistryError,
    RegistryUnavailableError,
    SessionError,
    VersionMismatchError,
    first_line,
)
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE, Json, check_timeout
from seedcore.core.selection import Policy, best, choose
from seedcore.core.timeouts import end, is_running
from seedcore.core.view import LiveView
from seedcore.registry.agent.identity import own_node_id
from seedcore.registry.caller.follower import Follower
from seedcore.registry.caller.handles import HandleFinder, prove
from seedcore.registry.caller.listing import every_page
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.registry.protocol.connection import RegistryConnection, shared_connection
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.actors import Proof, end_actor, probe
from seedcore.registry.ray_support.directory import RESERVED_PREFIX, RayDirectory
from seedcore.registry.ray_support.lookup import ActorHandle, is_known_gone
from seedcore.registry.ray_support.process_keys import has_ended
from seedcore.settings import Mode, Settings, get_settings
from seedcore.tier0.answers import AgentSpec, Fleet, Gathered, KnownAgent, Located, Pruned, SystemSummary
from seedcore.tier0.calls import bounded_call, gather
from seedcore.tier0.creation import check_agent_id, create_actor
from seedcore.tier0.snapshot import Snapshot, as_known

logger = logging.getLogger(__name__)

_COMPARE_S = 60.0
_RERUNS = 2
_MAX_PROVEN = 5000
_MAX_PROVING = 100
_MAX_TURNS = 10_000
_RESTART_S = 10.0
_RESTART_PAUSE_S = 0.1
_IS_STARTING = f"it is {Status.STARTING}"


class Tier0MemoryManager:
    """`Mode.RAY` never speaks to the registry. Callers of several event loops may share one: the copy of the registry's
    memory is read in the loop that called first, and the registry is asked from the others."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        mode: Mode | None = None,
        connection: RegistryConnection | None = None,
    ) -> None:
        """Tries no connection."""
        self._settings = settings if settings is not None else get_settings()
        wanted = mode if mode is not None else self._settings.mode
        self._mode = wanted if self._settings.registry_enabled else Mode.RAY
        namespace = self._settings.namespace
        self._connection = (
            connection if connection is not None else shared_connection(namespace, self._settings.call_timeout_s)
        )
        self._directory = RayDirectory(namespace, self._settings.call_timeout_s)
        self._finder = HandleFinder(namespace, self._settings.probe_timeout_s)
        self._proven: OrderedDict[str, ActorHandle] = OrderedDict()
        self._known = Snapshot(self._settings.max_instances)
        self._session: session.Session | None = None
        self._cluster: str | None = None
        self._metrics = CallerMetrics("manager")
        self._follower: Follower | None = None
        if self._mode is not Mode.RAY and self._settings.follow:
            self._follower = Follower(
                self._connection, on_change=self._doubt, on_reset=self._proven.clear, metrics=self._metrics
            )
        self._proving: set[asyncio.Task[None]] = set()
        self._turns: Counter[str] = Counter()
        self._registry_was_away = False
        self._compares_at_s = time.monotonic() + _COMPARE_S
        self._comparing: asyncio.Task[None] | None = None

    @property
    def mode(self) -> Mode:
        """Where it looks."""
        return self._mode

    @property
    def _snapshot(self) -> Snapshot:
        """The agents known in the cluster that this process is in, or was in last."""
        entered = session.current()
        if entered is not None and entered is not self._session:
            with suppress(SessionError):
                cluster = session.cluster_name()
                if self._cluster not in {None, cluster}:
                    self._known = Snapshot(self._settings.max_instances)
                self._session, self._cluster = entered, cluster
        return self._known

    @property
    def connection(self) -> RegistryConnection:
        """What it asks the registry through."""
        return self._connection

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
        """The agent's actor, made and started unless it lives already. Its name is its logical id; with an `epoch`,
        which it then insists on as with CLUSTER_EPOCH, `logical_id@epoch`.

        A detached agent (the default) outlives this process; with `is_detached=False` it ends with the process that
        made it, whether or not that keeps the handle. One that has stopped by itself is replaced by a new actor. Raises
        InvalidInputError before an actor is made; AgentCallError where the actor does not come up, or what its start
        raises, and an actor made by this call is then ended. So it is where the call is cancelled.
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
        """Create many at once; one that fails does not stop the others. Where the call is cancelled, those that have
        started stay, and the others are ended."""
        ids = [spec.agent_id for spec in specs]
        if len(set(ids)) != len(ids):
            twice = [agent_id for agent_id, count in Counter(ids).items() if count > 1]
            raise InvalidInputError("specs", f"name each agent once, not {twice[:5]} again")
        by_id = {spec.agent_id: spec for spec in specs}
        return await gather(ids, lambda agent_id: self._create(by_id[agent_id]), Origin.RAY)

    async def attach_existing_actor(self, agent_id: str, actor_name: str | None = None) -> ActorHandle:
        """Know a running actor under a logical id, whatever its own name. This does not keep it alive: an actor that is
        not detached ends with the last handle of its maker. Raises NotResolvableError or CannotKnowError unless it
        answers."""
        check_agent_id(agent_id)
        name = agent_id if actor_name is None else check_agent_id(actor_name, "actor_name")
        handle = await self._finder.of_name(name)
        self._snapshot.remember(KnownAgent(agent_id, name, Origin.RAY, None))
        return handle

    async def _create(self, spec: AgentSpec) -> ActorHandle:
        handle = await create_actor(spec, self._settings.namespace)
        self._snapshot.remember(KnownAgent(spec.agent_id, spec.actor_name, Origin.RAY, None))
        return handle

    # Finding agents

    async def close(self) -> None:
        """Follow the registry no more, and forget every handle that was resolved. Resolving afterwards begins anew.
        Ends no agent: those made with `is_detached=False` live as long as the process."""
        if self._follower is not None:
            await self._follower.stop()
        await end(*self._proving)
        self._proven.clear()

    async def resolve(
        self, logical_id: str, *, allow_late: bool = False, policy: Policy = Policy.NEWEST, key: str = ""
    ) -> ActorHandle:
        """A live, proven handle of the agent. One that has missed a beat must answer first, unless `allow_late`.

        `policy` chooses where an agent has several instances that may be handed out; `key` is what STICKY sticks to.
        A handle that was proven is held until the registry's feed, or Ray, tells that something has changed; then, and
        for the first time, it is found and proven anew. Without a feed (SEEDCORE_FOLLOW=false, or while the registry is
        away) each resolution is.

        Raises NotResolvableError where there is certainly none to hand out, and says why; CannotKnowError
        where nobody who could tell can be asked now; InvalidInputError for what is no agent's id; ForkedProcessError.
        """
        if policy is Policy.NEWEST and self._follower is not None and self._follower.is_current:
            handle = self._proven.get(logical_id)
            if handle is not None and not _is_gone(handle):
                self._metrics.resolved[Origin.SNAPSHOT.value] += 1
                return handle
        return (await self.locate(logical_id, allow_late=allow_late, policy=policy, key=key)).handle

    async def locate(
        self, logical_id: str, *, allow_late: bool = False, policy: Policy = Policy.NEWEST, key: str = ""
    ) -> Located:
        """As `resolve`, with the source of the answer, and looked up anew."""
        resolved = self._metrics.resolved
        try:
            located = await self._locate(logical_id, allow_late, policy, key)
        except NotResolvableError:
            resolved["none"] += 1
            raise
        except CannotKnowError:
            resolved["unknown"] += 1
            raise
        resolved[located.source.value] += 1
        return located

    async def _locate(self, logical_id: str, allow_late: bool, policy: Policy, key: str) -> Located:
        check_agent_id(logical_id, "logical_id")
        self._doubt(logical_id)
        if self._mode is Mode.RAY:
            return await self._locate_without_registry(logical_id, "the mode is ray")
        if policy is Policy.ROUND_ROBIN:
            self._count_turn(logical_id)
        located = await self._locate_in_view(logical_id, allow_late, policy, key)
        if located is not None:
            return located
        try:
            return await self._locate_by_registry(logical_id, allow_late, policy, key)
        except RegistryUnavailableError as error:
            self._registry_was_away = True
            return await self._locate_without_registry(logical_id, str(error))

    async def get_agent(self, agent_id: str) -> ActorHandle | None:
        """As `resolve`, but None where there is certainly none."""
        try:
            return await self.resolve(agent_id)
        except NotResolvableError:
            return None

    def list_agents(self) -> tuple[KnownAgent, ...]:
        """Who is known from creations and discoveries so far, by logical id. Asks nobody."""
        return self._snapshot.agents()

    async def discover_from_registry(self) -> Listing:
        """Every alive instance of the current epoch from the registry.

        While the registry is away, or in mode ray, the snapshot of the last discovery with complete=False.
        """
        try:
            listing = await self._read_registry()
        except RegistryUnavailableError as error:
            logger.debug("discovery from the snapshot: %s", error)
            instances = tuple(agent.instance for agent in self.list_agents() if agent.instance is not None)
            as_of = self._snapshot.discovered_at if self._snapshot.discovered_at is not None else utc_now()
            return Listing(instances, Origin.SNAPSHOT, as_of, self._snapshot.version, complete=False)
        alive = tuple(row for row in listing.items if row.status is Status.ALIVE)
        return replace(listing, items=alive)

    async def discover_and_refresh_agents(self) -> Fleet:
        """Bring the snapshot up to date: the registry first, then Ray's listing for whom it does not know.

        In mode registry the listing is read only while the registry is away. `complete` is False, and
        `problems` says why, where a source that the mode wants could not be read.
        """
        problems: list[str] = []
        listing: Listing | None = None
        if self._mode is not Mode.RAY:
            try:
                listing = await self._read_registry()
            except RegistryUnavailableError as error:
                problems.append(str(error))
        registry_answers = listing is not None and listing.complete
        if not (registry_answers and self._mode is Mode.REGISTRY):
            try:
                self._snapshot.take_names(await self._directory.names(), listing)
            except DirectoryUnavailableError as error:
                problems.append(str(error))
        if listing is not None and not listing.complete:
            problems.append("the registry is still recovering, or superseded")
        agents = tuple(
            agent for agent in self.list_agents() if agent.instance is None or agent.instance.status is Status.ALIVE
        )
        return Fleet(
            agents=agents,
            source=Origin.REGISTRY if registry_answers else Origin.RAY,
            as_of=utc_now(),
            version=self._snapshot.version,
            complete=not problems,
            problems=tuple(problems),
        )

    async def reconcile(self) -> int:
        """Compare whom we know with the registry and with Ray's listing, and heal what differs; how many did.

        Happens by itself once a minute while agents are resolved, and when the registry is back.
        """
        before = self._snapshot.healed
        if self._mode is not Mode.RAY:
            ids = [agent.logical_id for agent in self.list_agents()]
            for start in range(0, len(ids), MAX_PAGE):
                answer = await self._connection.resolve(ids[start : start + MAX_PAGE], allow_late=True)
                if answer.complete:
                    self._snapshot.compare(answer.value)
        self._snapshot.drop_without_actor(await self._directory.names())
        healed = self._snapshot.healed - before
        if healed:
            logger.info("whom the manager knew was brought up to date", extra={"healed": healed})
        return healed

    async def _locate_in_view(self, logical_id: str, allow_late: bool, policy: Policy, key: str) -> Located | None:
        """By our copy of the registry's memory; None where that is not up to date, or has nobody to hand out: the
        registry says why."""
        follower = self._follower
        if follower is None:
            return None
        follower.start()
        # loads come with beats, which are not followed
        if not follower.is_readable_here or policy is Policy.LEAST_LOADED:
            return None
        view = follower.view
        chosen = self._chosen(view.candidates(logical_id, allow_late=allow_late), {}, logical_id, policy, key)
        if chosen is None or chosen.actor_name is None or chosen.actor_name.startswith(RESERVED_PREFIX):
            return None
        try:
            handle = await self._finder.vouched(chosen)
        except (NotResolvableError, CannotKnowError) as error:
            logger.debug("not by the snapshot: %s", error)
            return None
        # the feed may have told something of it while Ray's table was asked
        is_same = follower.view is view and follower.is_current
        if not is_same or _is_gone(handle) or not self._still_stands(view, chosen, allow_late, policy):
            return None
        # on our own host the kernel knows before anybody can tell
        if has_ended(chosen.pid, chosen.process_key):
            return None
        if policy is Policy.NEWEST and view.verdict(chosen.instance_id) is Verdict.FRESH:
            self._hold(logical_id, handle, chosen)
        self._snapshot.remember(as_known(chosen))
        self._compare_if_due()
        as_of = view.as_of if view.as_of is not None else utc_now()
        return Located(logical_id, handle, Origin.SNAPSHOT, as_of, chosen)

    def _chosen(
        self, candidates: Sequence[Instance], loads: Mapping[str, float], logical_id: str, policy: Policy, key: str
    ) -> Instance | None:
        return choose(
            candidates,
            policy,
            node_id=own_node_id() if policy is Policy.SAME_NODE else None,
            loads=loads,
            turn=self._turns.get(logical_id, 0),
            key=key,
        )

    def _count_turn(self, logical_id: str) -> None:
        if len(self._turns) > _MAX_TURNS:
            self._turns.clear()
        self._turns[logical_id] += 1

    def _still_stands(self, view: LiveView, chosen: Instance, allow_late: bool, policy: Policy) -> bool:
        """Whether it may still be handed out, and, where the newest is wanted, is the one."""
        candidates = view.candidates(chosen.logical_id, allow_late=allow_late)
        if policy is Policy.NEWEST:
            newest = choose(candidates, policy)
            return newest is not None and newest.instance_id == chosen.instance_id
        return any(row.instance_id == chosen.instance_id for row in candidates)

    def _hold(self, logical_id: str, handle: ActorHandle, instance: Instance) -> None:
        """Hand it out from now on, until something changes. Its first call makes Ray tell us what becomes of it."""
        self._proven[logical_id] = handle
        if len(self._proven) > _MAX_PROVEN:
            self._proven.popitem(last=False)
        if len(self._proving) < _MAX_PROVING:
            task = asyncio.create_task(self._prove(logical_id, handle, instance), name="handle-proven")
            self._proving.add(task)
            task.add_done_callback(self._proving.discard)

    async def _prove(self, logical_id: str, handle: ActorHandle, instance: Instance) -> None:
        proof = await prove(handle, instance, self._settings.probe_timeout_s)
        if proof in {Proof.NO, Proof.ANOTHER} and self._proven.get(logical_id) is handle:
            self._doubt(logical_id)

    def _doubt(self, logical_id: str) -> None:
        """Something of it changed: its handle is found anew when it is asked for."""
        self._proven.pop(logical_id, None)

    def _compare_if_due(self) -> None:
        now_s = time.monotonic()
        if not self._registry_was_away and now_s < self._compares_at_s:
            return
        self._registry_was_away = False
        self._compares_at_s = now_s + _COMPARE_S * random.uniform(0.9, 1.1)
        if not is_running(self._comparing):
            self._comparing = asyncio.create_task(self._compare(), name="manager-compares")

    async def _compare(self) -> None:
        try:
            await self.reconcile()
        except (RegistryUnavailableError, DirectoryUnavailableError) as error:
            logger.info("not compared: %s", error)

    async def _locate_by_registry(
        self, logical_id: str, allow_late: bool, policy: Policy, key: str, *, is_again: bool = False
    ) -> Located:
        if policy is not Policy.NEWEST:
            located = await self._locate_by_policy(logical_id, allow_late, policy, key)
            if located is not None:
                return located
        failure: NotResolvableError | None = None
        for _ in range(2):
            answer = await self._connection.resolve([logical_id], allow_late=True)
            found = answer.value[0]
            if found.instance is None:
                break
            try:
                self._require_agent(logical_id, found.instance.actor_name)
                is_vouched = allow_late or found.verdict is Verdict.FRESH
                handle = await self._finder.of_instance(
                    found.instance, is_vouched=is_vouched, is_registered=partial(self._is_registered, found.instance)
                )
            except NotResolvableError as error:
                # it died since it was last heard: say so, and ask once more for a newer incarnation
                failure = error
                if isinstance(error, ActorGoneError):
                    await self._report_dead_call(found.instance)
                continue
            self._snapshot.remember(as_known(found.instance))
            self._compare_if_due()
            return Located(logical_id, handle, Origin.REGISTRY, answer.as_of, found.instance)
        if failure is not None:
            raise failure
        if not answer.complete:
            raise RegistryUnavailableError("it is still recovering, or superseded, and does not know this agent")
        told = found.why or "unknown"
        if not found.is_known:
            # what the registry said of it before holds no more
            self._snapshot.compare([found])
        if self._mode is Mode.REGISTRY or (found.is_known and told != _IS_STARTING):
            raise NotResolvableError(logical_id, told)
        history = await self._history(logical_id)
        if not is_again and any(row.status is Status.ALIVE for row in history):
            # it came after we had asked
            return await self._locate_by_registry(logical_id, allow_late, policy, key, is_again=True)
        if found.is_known and not history:
            raise NotResolvableError(logical_id, told)
        self._require_unreported(logical_id, history, told)
        try:
            if history:
                handle = await self._finder.of_name(logical_id)
                return Located(logical_id, handle, Origin.RAY, utc_now(), None)
            return await self._locate_without_registry(logical_id, None)
        except NotResolvableError as error:
            raise NotResolvableError(logical_id, f"{told}; {error.why}") from error

    async def _locate_by_policy(self, logical_id: str, allow_late: bool, policy: Policy, key: str) -> Located | None:
        """One of all the instances that the registry lists; None where it can hand out none."""
        listing = await self._connection.list_active(logical_id=logical_id, limit=MAX_PAGE)
        allowed = (Verdict.FRESH, Verdict.LATE) if allow_late else (Verdict.FRESH,)
        for verdict in allowed:
            rows = [row for row in listing if listing.verdicts.get(row.instance_id, Verdict.FRESH) is verdict]
            chosen = self._chosen(rows, listing.loads, logical_id, policy, key)
            if chosen is None:
                continue
            self._require_agent(logical_id, chosen.actor_name)
            try:
                handle = await self._finder.of_instance(chosen, is_registered=partial(self._is_registered, chosen))
            except NotResolvableError as error:
                if isinstance(error, ActorGoneError):
                    await self._report_dead_call(chosen)
                return None
            return Located(logical_id, handle, Origin.REGISTRY, listing.as_of, chosen)
        return None

    async def _is_registered(self, instance: Instance) -> bool:
        """Whether the registry still has it as alive, by its memory."""
        listing = await self._connection.list_active(logical_id=instance.logical_id, limit=MAX_PAGE)
        return any(row.instance_id == instance.instance_id for row in listing)

    async def _history(self, logical_id: str) -> Sequence[Instance]:
        """Every instance that the registry knows of, the newest first; none where it cannot be read."""
        try:
            described = await self._connection.describe(logical_id)
        except RegistryUnavailableError as error:
            logger.debug("its history is not readable: %s", error, extra={"logical_id": logical_id})
            return ()
        if not described.complete:
            return ()
        committed = {row.instance_id for row in described.history}
        # one that has just registered is in the registry's memory before it is in the database
        newer = (each.instance for each in described.live if each.instance.instance_id not in committed)
        return (*newer, *described.history)

    def _require_unreported(self, logical_id: str, history: Sequence[Instance], told: str) -> None:
        """Ray's listing is for those who do not report: raise NotResolvableError for one who did, and is dead. While
        the first that reports is starting, an actor of the agent's own name that does not report goes on."""
        if not history:
            return
        if history[0].status is not Status.DEAD:
            is_first = all(row.status is Status.STARTING for row in history)
            if is_first and all(row.actor_name != logical_id for row in history):
                return
            raise NotResolvableError(logical_id, told)
        cause = f" ({history[0].cause})" if history[0].cause else ""
        raise NotResolvableError(logical_id, f"no live instance is registered, the last one is dead{cause}")

    def _require_agent(self, logical_id: str, actor_name: str | None) -> None:
        # whoever registers under one of our names must not get our actors handed out, or ended
        if actor_name is not None and actor_name.startswith(RESERVED_PREFIX):
            raise NotResolvableError(logical_id, f"its actor has a name of ours, {actor_name!r}")

    async def _report_dead_call(self, instance: Instance) -> None:
        try:
            await self._connection.report_dead_call(instance.instance_id)
        except (RegistryUnavailableError, FencedError) as error:
            logger.debug("could not report a dead actor: %s", error, extra={"logical_id": instance.logical_id})

    async def _locate_without_registry(self, logical_id: str, why: str | None) -> Located:
        """By the snapshot or by Ray's listing: only the actor's own answer proves it."""
        known = self._snapshot.get(logical_id)
        if known is not None and known.instance is not None and known.instance.status is not Status.ALIVE:
            raise CannotKnowError(logical_id, f"{why}; it was {known.instance.status} when last heard of")
        try:
            if known is None:
                handle = await self._finder.of_name(logical_id)
            elif known.instance is None:
                handle = await self._of_known(known)
            else:
                self._require_agent(logical_id, known.actor_name)
                handle = await self._finder.answering(known.instance)
        except NotResolvableError as error:
            if known is not None and known.instance is not None and not isinstance(error, ActorGoneError):
                # whoever is asked, it has no handle that may be handed out
                raise
            self._snapshot.forget(logical_id)
            if known is not None and self._may_have_a_successor(known):
                return await self._locate_without_registry(logical_id, why)
            if why is None or self._mode is Mode.RAY:
                raise
            # an agent whose actor has another name than its logical id is not in the listing under it
            raise CannotKnowError(logical_id, f"{why}; and {error.why}") from error
        source = Origin.RAY if known is None or known.instance is None else Origin.SNAPSHOT
        if known is None:
            self._snapshot.remember(KnownAgent(logical_id, logical_id, Origin.RAY, None))
        return Located(logical_id, handle, source, utc_now(), known.instance if known is not None else None)

    def _may_have_a_successor(self, known: KnownAgent) -> bool:
        # Ray's listing knows it, if it has the same name in our namespace
        return (
            known.instance is not None
            and known.actor_name == known.logical_id
            and known.instance.namespace in {None, self._settings.namespace}
        )

    async def _of_known(self, known: KnownAgent) -> ActorHandle:
        """Its actor, by its own answer, whichever instance it runs now: the one that registered, where that is known,
        and no other of its name."""
        self._require_agent(known.logical_id, known.actor_name)
        if known.instance is None:
            return await self._finder.of_name(known.actor_name)
        return await self._finder.actor_of(known.instance)

    async def _read_registry(self) -> Listing:
        if self._mode is Mode.RAY:
            raise RegistryUnavailableError("the mode is ray")
        listing = await every_page(self._connection, statuses=None)
        self._snapshot.take(listing)
        return listing

    # Talking to agents

    async def execute_task_on_agent(
        self, agent_id: str, task: Any, timeout_s: float | None = None, *, retries: bool = True
    ) -> Any:
        """Run a task on the agent and return its result; `timeout_s` seconds bound it, None waits as long as it runs.

        Where the actor dies under the task, or Ray restarts it, the agent is resolved again and the task runs again on
        the actor found, twice at most (at least once: pass retries=False for tasks that must not run twice). Raises
        what `resolve` raises, AgentCallError at the time limit, ActorDiedError, ActorUnavailableError where the task
        may have run or not, or what the task raised.
        """
        check_timeout(timeout_s)
        handle = await self.resolve(agent_id)
        if not retries:
            return await bounded_call(agent_id, lambda: session.ask(handle, "execute_task", task), timeout_s)
        return await bounded_call(agent_id, lambda: self._run(agent_id, handle, task), timeout_s)

    async def _run(self, agent_id: str, handle: ActorHandle, task: Any) -> Any:
        for _ in range(_RERUNS):
            try:
                return await session.ask(handle, "execute_task", task)
            except ActorUnavailableError as error:
                self._doubt(agent_id)
                logger.info("runs a task again: %s", first_line(error), extra={"logical_id": agent_id})
                handle = await self._resolve_restarted(agent_id)
            except ActorDiedError:
                self._doubt(agent_id)
                handle = await self.resolve(agent_id)
        return await session.ask(handle, "execute_task", task)

    async def _resolve_restarted(self, agent_id: str) -> ActorHandle:
        """As `resolve`, for an agent whose actor Ray restarts: asked until it answers, for _RESTART_S seconds."""
        ends_s = time.monotonic() + _RESTART_S
        pause_s = _RESTART_PAUSE_S
        while True:
            is_over = time.monotonic() > ends_s
            try:
                handle = await self.resolve(agent_id)
            except (NotResolvableError, CannotKnowError):
                # between its death and its new registration nobody hands it out
                if is_over:
                    raise
            else:
                # a call before it answers would only fail again
                if is_over or await probe(handle, self._settings.probe_timeout_s) is Proof.YES:
                    return handle
            await asyncio.sleep(pause_s)
            pause_s = min(1.0, 2 * pause_s)

    async def collect_heartbeats(self, timeout_s: float | None = None) -> Gathered[Heartbeat]:
        """A heartbeat of every known agent, all at once, each within `timeout_s` seconds (default: the probe's)."""
        return await self._ask_all("get_heartbeat", timeout_s)

    async def collect_agent_stats(self, timeout_s: float | None = None) -> Gathered[SummaryStats]:
        """The statistics of every known agent, as `collect_heartbeats`."""
        return await self._ask_all("get_summary_stats", timeout_s)

    async def prune(self) -> Pruned:
        """Probe every known agent and drop the dead from the snapshot. A probe without an answer drops nobody."""
        dropped: list[str] = []
        silent: list[str] = []

        agents = {agent.logical_id: agent for agent in self.list_agents()}

        async def check(agent_id: str) -> None:
            try:
                await self._of_known(agents[agent_id])
            except CannotKnowError:
                silent.append(agent_id)
            except NotResolvableError as error:
                # who registered without an actor cannot be probed
                is_gone = agents[agent_id].instance is None or isinstance(error, ActorGoneError)
                (dropped if is_gone else silent).append(agent_id)

        await gather(list(agents), check, Origin.RAY)
        for agent_id in dropped:
            self._snapshot.forget(agent_id)
        return Pruned(tuple(sorted(dropped)), tuple(sorted(silent)), len(self._snapshot))

    async def get_system_summary(self) -> SystemSummary:
        """The manager's view of fleet and registry."""
        health, problem = None, "the mode is ray" if self._mode is Mode.RAY else None
        if self._mode is not Mode.RAY:
            try:
                health = await self._connection.health()
            except RegistryUnavailableError as error:
                problem = str(error)
        return SystemSummary(
            mode=self._mode,
            namespace=self._settings.namespace,
            as_of=utc_now(),
            known_agents=len(self._snapshot),
            agents_by_source=dict(Counter(agent.source.value for agent in self.list_agents())),
            registry=health,
            registry_problem=problem,
            last_discovery_at=self._snapshot.discovered_at,
            healed=self._snapshot.healed,
        )

    async def shutdown_agents(self, agent_ids: Sequence[str] | None = None, timeout_s: float = 10.0) -> Gathered[bool]:
        """Stop agents (default: all known) for good: each is asked to stop, then its actor is ended and seen dead.

        Who has registered is known by namespace, name and actor: another of its name is left as it is. Raises
        InvalidInputError for what is no agent's id, and then stops none.
        """
        check_timeout(timeout_s)
        if agent_ids is None:
            ids = [agent.logical_id for agent in self.list_agents()]
        else:
            ids = [check_agent_id(agent_id) for agent_id in agent_ids]
        return await gather(ids, lambda agent_id: self._shut_down(agent_id, timeout_s), Origin.RAY)

    async def shutdown_agents_batch(self, specs: Sequence[AgentSpec], timeout_s: float = 10.0) -> Gathered[bool]:
        """Stop what `create_agents_batch` makes of these. Other actors of their logical ids, as of another epoch, are
        left as they are."""
        check_timeout(timeout_s)
        by_id = {check_agent_id(spec.agent_id): spec for spec in specs}
        return await gather(
            list(by_id),
            lambda agent_id: self._shut_down(agent_id, timeout_s, by_id[agent_id]),
            Origin.RAY,
        )

    async def _shut_down(self, agent_id: str, timeout_s: float, spec: AgentSpec | None = None) -> bool:
        known = await self._to_shut_down(agent_id, spec)
        try:
            handle = await self._of_known(known)
        except CannotKnowError:
            # it hangs: its actor can be ended all the same
            handle = await self._finder.unproven(known.actor_name, known.instance)
        except NotResolvableError as error:
            if known.instance is not None and not isinstance(error, ActorGoneError):
                raise
            self._snapshot.forget(agent_id)
            return False
        try:
            await bounded_call(agent_id, lambda: session.ask(handle, "stop"), timeout_s)
        except (RegistryError, RayError) as error:
            logger.warning("agent did not stop by itself: %s", first_line(error), extra={"logical_id": agent_id})
        if not await end_actor(handle, timeout_s):
            raise AgentCallError(agent_id, f"was ended but is not gone after {timeout_s:g} s")
        self._snapshot.forget(agent_id)
        return True

    async def _to_shut_down(self, agent_id: str, spec: AgentSpec | None) -> KnownAgent:
        """Which actor is meant: the registry's word before ours, and ours before its name alone."""
        epoch, name = (None, None) if spec is None else (spec.epoch, spec.actor_name)
        if self._mode is not Mode.RAY:
            try:
                listing = await self._connection.list_active(None, logical_id=agent_id, epoch=epoch, fresh_only=False)
            except (RegistryUnavailableError, VersionMismatchError) as error:
                logger.debug("ends an agent without the registry: %s", error, extra={"logical_id": agent_id})
            else:
                registered = best(row for row in listing if name in {None, row.actor_name})
                if registered is not None:
                    return as_known(registered)
        known = self._snapshot.get(agent_id)
        if known is not None and name in {None, known.actor_name}:
            return known
        return KnownAgent(agent_id, name if name is not None else agent_id, Origin.RAY, None)

    async def _ask_all(self, method: str, timeout_s: float | None) -> Gathered[Any]:
        check_timeout(timeout_s)
        bound_s = timeout_s if timeout_s is not None else self._settings.probe_timeout_s

        agents = {agent.logical_id: agent for agent in self.list_agents()}

        async def ask(agent_id: str) -> Any:
            known = agents[agent_id]
            handle = await self._finder.unproven(known.actor_name, known.instance)
            return await bounded_call(agent_id, lambda: session.ask(handle, method), bound_s)

        return await gather(list(agents), ask, Origin.RAY)


def _is_gone(handle: ActorHandle) -> bool:
    try:
        return is_known_gone(handle)
    except SessionError:
        # it ended on another thread
        return True


@lru_cache(maxsize=1)
def get_tier0_manager() -> Tier0MemoryManager:
    """The process's manager, with the settings of the environment."""
    return Tier0MemoryManager()
