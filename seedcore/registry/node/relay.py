"""The relay: a small actor on each node with agents: it watches their processes and reports their ends, and it gathers
the messages of the node's agents.

Owns no state of an instance: the registry creates it, sends it the instances to watch, and replaces it when it is lost.
What it cannot forward it refuses, and the agents then send to the registry directly.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence

from seedcore.core.answers import BeatAnswer, InstanceFilter, KnownBefore, Listing, Receipt
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import SequencedChange
from seedcore.core.dependencies import Dependency
from seedcore.core.errors import DirectoryUnavailableError, RegistryError, RegistryUnavailableError
from seedcore.core.feed import FeedBatch
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.limits import check_beats, check_instance_id, check_kind
from seedcore.core.timeouts import within
from seedcore.registry.node.copy import NodeCopy
from seedcore.registry.node.dependency_watch import DependencyWatch
from seedcore.registry.node.process_watch import (
    ActorStateWatch,
    OnExit,
    PidfdWatch,
    Watch,
    take_all_descriptors,
    why_unwatched,
)
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.protocol.messages import Exit, Watched
from seedcore.registry.protocol.outbox import MAX_BEATS_PER_MESSAGE, BeatBox, ChangeBox
from seedcore.registry.ray_support.lookup import why_worker_ended
from seedcore.registry.ray_support.process_keys import worker_id_of

logger = logging.getLogger(__name__)

_CHANGES_LINGER_S = 0.003
_EXPLAIN_S = 5.0
_QUESTIONS_AT_ONCE = 4


class Relay:
    """A plain class; `server/ray_cluster.py` puts it on Ray. Its lists are bounded by the instances that it watches."""

    def __init__(
        self,
        watches: Sequence[Callable[[OnExit], Watch]] = (PidfdWatch, ActorStateWatch),
        registry: RegistryConnection | None = None,
        gather_s: float = 0.25,
        why_ended: Callable[[str, float], Awaitable[Cause | None]] = why_worker_ended,
        copy: NodeCopy | None = None,
    ) -> None:
        """`registry` receives what is gathered for `gather_s` seconds; without one the relay only watches. `why_ended`
        returns what is known of the end of a worker process, within the seconds that it gets. `copy` is what the
        processes of the node follow."""
        self._registry = registry
        self._copy = copy
        self._beats = BeatBox(self._forward_beats, gather_s)
        self._changes = ChangeBox(self._forward_changes, _CHANGES_LINGER_S)
        self._exits: deque[Exit] = deque()
        self._count = 0
        self._news = asyncio.Event()
        self._why_ended = why_ended
        self._unexplained: dict[str, list[Exit]] = {}
        self._explaining: set[asyncio.Task[None]] = set()
        self._may_ask = asyncio.Semaphore(_QUESTIONS_AT_ONCE)
        self._watches = tuple(watch(self._note) for watch in watches)
        self._dependencies = DependencyWatch(self._note_dependency)

    async def watch(self, instances: Sequence[Watched]) -> list[str]:
        """Watch these instances, at most MAX_WATCHED_PER_CALL, and the processes that they depend on. Returns the ids
        of those that cannot be watched here."""
        are_watched = await asyncio.gather(*(self._watch(watched) for watched in instances))
        return [
            watched.instance_id for watched, is_watched in zip(instances, are_watched, strict=True) if not is_watched
        ]

    async def why_unwatched(self, instances: Sequence[Watched]) -> list[str]:
        """The reason why each of these cannot be watched here: a value of messages.Unwatched."""
        return [why_unwatched(watched).value for watched in instances]

    async def unwatch(self, instance_ids: Sequence[str]) -> None:
        """Watch these no longer."""
        for instance_id in instance_ids:
            self._dependencies.discard(instance_id)
            for watch in self._watches:
                watch.discard(instance_id)

    async def exits(self, handled: int, wait_s: float) -> list[Exit]:
        """The exits with numbers above `handled`, as soon as there are any; none after `wait_s` seconds.

        Those up to `handled` are removed. An answer that was lost is thus sent again.
        """
        while self._exits and self._exits[0].number <= handled:
            self._exits.popleft()
        if not self._exits:
            self._news.clear()
            try:
                await within(self._news.wait(), wait_s)
            except TimeoutError:
                return []
        return list(self._exits)

    async def beat_many(
        self, instance_ids: Sequence[str], loads: Mapping[str, float] | None = None, known: KnownBefore | None = None
    ) -> BeatAnswer:
        """See RelayApi.beat_many. Answers when the registry has received the beats, together with others of the node.

        Raises what the registry raises, or RegistryUnavailableError where it does not answer.
        """
        # one caller's mistake must not fail the others' beats
        check_beats(instance_ids, loads if loads is not None else {}, MAX_BEATS_PER_MESSAGE)
        for instance_id in instance_ids:
            check_instance_id(instance_id)
        if known is not None:
            check_kind("known", known, KnownBefore).validated(instance_ids)
        return await self._beats.renew(instance_ids, loads, known)

    async def changes(self, question: FeedQuestion) -> FeedBatch:
        """See NodeCopy.changes."""
        return await self._copied().changes(question)

    async def page(self, wanted: InstanceFilter, limit: int = 100, cursor: str | None = None) -> Listing:
        """See NodeCopy.page."""
        return await self._copied().page(wanted, limit, cursor)

    async def deliver(self, changes: Sequence[SequencedChange]) -> list[Receipt | RegistryError]:
        """See RelayApi.deliver."""
        try:
            return list(await self._changes.take_all(changes))
        except RegistryError as error:
            # raised, it would mean that the relay itself does not work
            return [error] * len(changes)

    async def _forward_beats(
        self, instance_ids: Sequence[str], loads: Mapping[str, float], known: KnownBefore | None
    ) -> BeatAnswer:
        return await self._upstream().beat_many(instance_ids, loads, known)

    async def _forward_changes(self, changes: Sequence[SequencedChange]) -> Sequence[Receipt | RegistryError]:
        return await self._upstream().deliver(changes)

    def _copied(self) -> NodeCopy:
        if self._copy is None:
            raise RegistryUnavailableError("this relay keeps no copy")
        return self._copy

    def _upstream(self) -> RegistryConnection:
        if self._registry is None:
            raise RegistryUnavailableError("this relay only watches")
        return self._registry

    async def _watch(self, watched: Watched) -> bool:
        await self._dependencies.set(watched)
        for watch in self._watches:
            if await watch.add(watched):
                return True
        return False

    def _note_dependency(self, instance_id: str, dependency: Dependency, cause: Cause) -> None:
        self._report(instance_id, cause, dependency=dependency)

    def _note(self, instance_id: str, cause: Cause, process_key: str | None) -> None:
        ended = self._report(instance_id, cause)
        worker_id = None if process_key is None else worker_id_of(process_key)
        if worker_id is None:
            return
        self._unexplained.setdefault(worker_id, []).append(ended)
        if len(self._unexplained[worker_id]) == 1:
            task = asyncio.create_task(self._explain(worker_id), name="exit-explained")
            self._explaining.add(task)
            task.add_done_callback(self._explaining.discard)

    def _report(
        self, instance_id: str, cause: Cause, *, is_explained: bool = False, dependency: Dependency | None = None
    ) -> Exit:
        self._count += 1
        ended = Exit(self._count, instance_id, cause, is_explained, dependency)
        self._exits.append(ended)
        self._news.set()
        return ended

    async def _explain(self, worker_id: str) -> None:
        """Report the end of every instance of a process again, once it is known why the process ended."""
        why: Cause | None = None
        try:
            async with self._may_ask:
                why = await self._why_ended(worker_id, _EXPLAIN_S)
        except DirectoryUnavailableError as error:
            logger.info("not known why a worker ended: %s", error)
        finally:
            ended = self._unexplained.pop(worker_id)
        if why is None:
            return
        for one in ended:
            self._report(one.instance_id, _explained(one.cause, why), is_explained=True)


def _explained(observed: Cause, why: Cause) -> Cause:
    """The observed cause with what Ray knows of it. Its kind stays where Ray knows none."""
    kind = observed.kind if why.kind is CauseKind.UNKNOWN else why.kind
    return Cause(kind, "; ".join(detail for detail in (why.detail, observed.detail) if detail) or None)


class RelayActor(Relay):
    """A Relay that finds the registry of `namespace`."""

    def __init__(self, namespace: str, call_timeout_s: float, gather_s: float) -> None:
        take_all_descriptors()
        registry = RegistryConnection(namespace, call_timeout_s)
        super().__init__(registry=registry, gather_s=gather_s, copy=NodeCopy(registry))
