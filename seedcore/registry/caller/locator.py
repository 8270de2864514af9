"""From a logical id to a proven handle, by the ladder of sources.

What a source is worth decides how its answer is proven:

- the followed cache is confirmed by the registry: Ray's table must name the same actor, which is not asked;
- the registry or its database: the actor proves its instance, or its beats vouch for it while it is busy;
- the manager's memory and Ray's listing: only the actor's own answer counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

from seedcore.core.answers import Answer, InstanceFilter, Listing, NotResolved, Origin, Resolution
from seedcore.core.clock import Clock
from seedcore.core.errors import ActorGoneError, CannotKnowError, NotResolvableError
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_ID_CHARS, MAX_PAGE, check_text
from seedcore.core.selection import Policy
from seedcore.registry.caller.handle_cache import HandleCache, is_gone
from seedcore.registry.caller.handles import HandleFinder
from seedcore.registry.caller.known_agents import KnownAgent, KnownAgents
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.registry.caller.resolver import Resolver
from seedcore.registry.caller.sources import Choice, NoAnswerError, RecordSource, Source
from seedcore.registry.caller.unreported import recorded_instances, require_unreported
from seedcore.registry.ray_support.directory import RESERVED_PREFIX, check_not_ours
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.registry.ray_support.process_keys import has_ended

logger = logging.getLogger(__name__)

_ATTEMPTS = 2
_NEWEST = Choice()


@dataclass(frozen=True, slots=True)
class Located:
    """A proven handle and the source that named it. `instance` is None if only Ray's listing has the actor."""

    logical_id: str
    handle: ActorHandle
    source: Origin
    as_of: datetime
    instance: Instance | None


def check_agent_id(agent_id: str, field: str = "agent_id") -> str:
    """A logical id, or the name of its actor, that an agent may have, or InvalidInputError."""
    return check_not_ours(field, check_text(field, agent_id, MAX_ID_CHARS))


class Locator:
    """Finds and proves the handles of agents. `cached` answers from memory."""

    def __init__(
        self,
        resolver: Resolver,
        finder: HandleFinder,
        cache: HandleCache,
        metrics: CallerMetrics,
        *,
        known: KnownAgents | None = None,
        finds_unreported: bool = False,
        on_confirmed: Callable[[], None] = lambda: None,
        on_outage: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
    ) -> None:
        """`known` is used while no source with records answers. `finds_unreported`: Ray's listing also finds agents
        that do not report to the registry. `on_confirmed` is called after each handle that the registry confirmed,
        `on_outage` each time that no source with records answers."""
        self._resolver = resolver
        self._finder = finder
        self._cache = cache
        self._resolved = metrics.resolved
        self._known = known
        self._finds_unreported = finds_unreported
        self._on_confirmed = on_confirmed
        self._on_outage = on_outage
        self._clock = clock if clock is not None else Clock()

    def cached(self, logical_id: str) -> ActorHandle | None:
        """The proven handle of an agent that has not changed since, from any thread. Only for a caller whose follower
        is current."""
        handle = self._cache.get(logical_id)
        if handle is not None:
            self._resolved[Origin.SNAPSHOT.value] += 1
        return handle

    async def locate(self, logical_id: str, choice: Choice = _NEWEST) -> Located:
        """A proven handle, found now. The cached handle stays, unless the agent is certainly not routable or has a
        newer instance.

        Raises NotResolvableError, CannotKnowError or InvalidInputError.
        """
        check_agent_id(logical_id, "logical_id")
        try:
            located = await self._locate(logical_id, choice)
        except NotResolvableError:
            self._cache.evict(logical_id)
            self._resolved["none"] += 1
            raise
        except CannotKnowError:
            self._resolved["unknown"] += 1
            raise
        self._resolved[located.source.value] += 1
        return located

    async def _locate(self, logical_id: str, choice: Choice) -> Located:
        snapshot = [self._resolver.snapshot] if self._resolver.snapshot is not None else []
        records = self._resolver.records
        if not records:
            return await self.by_actor(logical_id, None)
        try:
            return await self._resolver.first(partial(self._by_snapshot, logical_id, choice), snapshot)
        except NoAnswerError as error:
            logger.debug("not by the cache: %s", error)
        try:
            return await self._resolver.first(partial(self._by_record, logical_id, choice), records)
        except NoAnswerError as error:
            self._on_outage()
            return await self.by_actor(logical_id, error.why)

    async def _by_snapshot(self, logical_id: str, choice: Choice, source: Source) -> Located:
        """By the followed cache. Raises NoAnswerError for every doubt: the registry resolves it."""
        found, answer = await _asked_for(source, logical_id, choice)
        chosen = found.instance
        if chosen is None or chosen.actor_name is None or chosen.actor_name.startswith(RESERVED_PREFIX):
            raise NoAnswerError("it has no handle")
        try:
            handle = await self._finder.vouched(chosen)
        except (NotResolvableError, CannotKnowError) as error:
            raise NoAnswerError(str(error)) from error
        same = replace(choice, instance_id=chosen.instance_id) if choice.is_by_chance else choice
        again, _ = await _asked_for(source, logical_id, same)
        is_same = again.instance is not None and again.instance.instance_id == chosen.instance_id
        # on this host the kernel knows of an ended process before Ray and the registry do
        if not is_same or is_gone(handle) or has_ended(chosen.pid, chosen.process_key):
            raise NoAnswerError("it changed while Ray's table was asked")
        if again.verdict is Verdict.FRESH and choice.policy is Policy.NEWEST:
            self._cache.put(chosen, handle)
        elif again.verdict is Verdict.FRESH and again.instance is chosen:
            self._cache.put_picked(chosen, handle)
        return self._confirmed(Located(logical_id, handle, answer.source, answer.as_of, chosen))

    async def _by_record(
        self, logical_id: str, choice: Choice, source: RecordSource, *, is_again: bool = False
    ) -> Located:
        """By a source with records. A handle whose actor is gone is reported, and the source asked once more: a newer
        incarnation may be there, or the reason why there is none."""
        failure: NotResolvableError | None = None
        for _ in range(_ATTEMPTS):
            # a late instance is taken if it answers
            found, answer = await _asked_for(source, logical_id, replace(choice, allow_late=True))
            if found.instance is None:
                break
            try:
                _require_usable(logical_id, found.instance.actor_name)
                handle = await self._finder.of_instance(
                    found.instance,
                    is_vouched=choice.allow_late or found.verdict is not Verdict.LATE,
                    is_registered=partial(_is_registered, source, found.instance),
                )
            except NotResolvableError as error:
                failure = error
                if isinstance(error, ActorGoneError):
                    await source.report_gone(found.instance)
                continue
            if choice.policy is Policy.NEWEST:
                self._cache.evict_other(found.instance)
            return self._confirmed(Located(logical_id, handle, answer.source, answer.as_of, found.instance))
        if failure is not None:
            raise failure
        if not answer.complete:
            raise NoAnswerError("the registry is still recovering, or superseded, and does not know this agent")
        if not found.is_known and self._known is not None:
            # what the registry answered earlier is outdated
            self._known.compare([found])
        return await self._without_record(logical_id, choice, source, found, is_again=is_again)

    async def _without_record(
        self, logical_id: str, choice: Choice, source: RecordSource, found: Resolution, *, is_again: bool
    ) -> Located:
        """An agent without a routable instance: Ray's listing may find one that does not report."""
        reason = found.reason if found.reason is not None else NotResolved.NOT_REGISTERED
        refusal = NotResolvableError(logical_id, reason, found.detail or "no live instance is registered")
        if not self._finds_unreported or (found.is_known and reason is not NotResolved.STARTING):
            raise refusal
        instances = await recorded_instances(source, logical_id)
        if not is_again and any(row.status is Status.ALIVE for row in instances):
            # it registered after the source had answered
            return await self._by_record(logical_id, choice, source, is_again=True)
        if found.is_known and not instances:
            raise refusal
        require_unreported(refusal, instances)
        try:
            if not instances:
                return await self.by_actor(logical_id, None)
            handle = await self._finder.of_name(logical_id)
        except NotResolvableError as error:
            raise NotResolvableError(logical_id, reason, f"{refusal.detail}; {error.detail}") from error
        return Located(logical_id, handle, Origin.RAY, self._clock.utc(), None)

    async def by_actor(self, logical_id: str, why: str | None) -> Located:
        """By the manager's memory, or by Ray's listing: only the actor's own answer proves it. `why` no source with
        records answers; None if that there is no record is certain."""
        known = None if self._known is None else self._known.get(logical_id)
        if known is not None and known.instance is not None and known.instance.status is not Status.ALIVE:
            last = f"its last known status is {known.instance.status}"
            raise CannotKnowError(logical_id, last if why is None else f"{why}; {last}")
        try:
            handle = await self._of_memory(logical_id, known)
        except NotResolvableError as error:
            is_certain = isinstance(error, ActorGoneError)
            if known is not None and known.instance is not None and not is_certain:
                # it has no usable handle, whichever source is asked
                raise
            if known is not None and self._known is not None:
                self._known.forget(logical_id)
                if self._may_have_a_successor(known):
                    return await self.by_actor(logical_id, why)
            if why is None:
                raise
            # an agent whose actor has another name than its logical id is not in the listing under it
            raise CannotKnowError(logical_id, f"{why}; and {error.detail}") from error
        if known is not None and known.instance is not None:
            return Located(logical_id, handle, Origin.SNAPSHOT, self._clock.utc(), known.instance)
        if known is None and self._known is not None:
            self._known.remember(KnownAgent(logical_id, logical_id, Origin.RAY, None))
        return Located(logical_id, handle, Origin.RAY, self._clock.utc(), None)

    async def _of_memory(self, logical_id: str, known: KnownAgent | None) -> ActorHandle:
        if known is None:
            return await self._finder.of_name(logical_id)
        if known.instance is None:
            return await self.of_known(known)
        _require_usable(logical_id, known.actor_name)
        return await self._finder.answering(known.instance)

    async def of_known(self, known: KnownAgent) -> ActorHandle:
        """The actor of a known agent, proven by its own answer, whichever instance it runs now. If the agent has
        registered, it is the actor that registered, and no other one of its name."""
        _require_usable(known.logical_id, known.actor_name)
        if known.instance is None:
            return await self._finder.of_name(known.actor_name)
        return await self._finder.actor_of(known.instance)

    def _may_have_a_successor(self, known: KnownAgent) -> bool:
        # Ray's listing has it, if it has the same name in our namespace
        return (
            known.instance is not None
            and known.actor_name == known.logical_id
            and known.instance.namespace in {None, self._finder.namespace}
        )

    def _confirmed(self, located: Located) -> Located:
        if self._known is not None and located.instance is not None:
            self._known.remember(KnownAgent.registered(located.instance))
        self._on_confirmed()
        return located


async def _asked_for(source: Source, logical_id: str, choice: Choice) -> tuple[Resolution, Answer[list[Resolution]]]:
    answer = await source.resolve([logical_id], choice)
    if not isinstance(answer, Answer):
        raise NoAnswerError("it lists names only")
    return answer.value[0], answer


async def _is_registered(source: RecordSource, instance: Instance) -> bool:
    """Whether the source still has it as alive."""
    found = await source.page(InstanceFilter(logical_id=instance.logical_id), MAX_PAGE, None)
    return isinstance(found, Listing) and any(row.instance_id == instance.instance_id for row in found)


def _require_usable(logical_id: str, actor_name: str | None) -> None:
    # an agent that registers one of our actors must not make callers use it, or end it
    if actor_name is not None and actor_name.startswith(RESERVED_PREFIX):
        detail = f"its actor has a reserved name, {actor_name!r}"
        raise NotResolvableError(logical_id, NotResolved.NO_HANDLE, detail)
