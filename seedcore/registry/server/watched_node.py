"""One node with instances: the relay that is kept there, what it is asked to watch, and what it reports.

Owns the relay's life: it is made, asked, and replaced when it fails. A lost relay is no evidence on any instance.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from ray.exceptions import RayError

from seedcore.core.backoff import Backoff, supervise
from seedcore.core.clock import Clock
from seedcore.core.errors import DirectoryUnavailableError, SessionError, first_line
from seedcore.core.instances import Instance
from seedcore.core.timeouts import end, is_running, within
from seedcore.registry.protocol.messages import MAX_WATCHED_PER_CALL, Exit, Unwatched, Watched
from seedcore.registry.ray_support.directory import RESERVED_PREFIX
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.registry.server.ray_cluster import Cluster

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WatchTimes:
    """Times of the death watch, in seconds.

    Ray's tables are read every `node_table_s`, so that an agent of a draining node is held within a second.
    A relay that does not answer for `poll_s` and `poll_grace_s` is replaced. The delays between relays grow until one
    has worked for `settled_s`. Instances that a relay cannot watch are tried again after `unwatched_s`, then ever more
    rarely.
    """

    node_table_s: float = 0.8
    poll_s: float = 5.0
    poll_grace_s: float = 5.0
    call_s: float = 10.0
    start_s: float = 60.0
    restart_s: float = 0.1
    restart_max_s: float = 10.0
    settled_s: float = 30.0
    unwatched_s: float = 10.0
    unwatched_max_s: float = 60.0


class _Restarts(Backoff):
    """The delays between relays. A reset counts only once a relay has worked for a while: one that fails as soon as it
    is there must not be made again at once."""

    is_settled = False

    def reset(self) -> None:
        if self.is_settled:
            super().reset()


class WatchedNode:
    """Use it from one event loop. `on_exit` is called with each report of its relay, and must not fail."""

    def __init__(
        self, node_id: str, cluster: Cluster, on_exit: Callable[[Exit], None], times: WatchTimes, clock: Clock
    ) -> None:
        self._node_id = node_id
        self._cluster = cluster
        self._on_exit = on_exit
        self._times = times
        self._clock = clock
        self._restarts = _Restarts(times.restart_s, times.restart_max_s)
        self._serving: asyncio.Task[None] | None = None
        self._to_watch: dict[str, Watched] = {}
        self._to_drop: dict[str, None] = {}
        self._changed = asyncio.Event()
        self._problem: str | None = None
        self.wanted: dict[str, Instance] = {}
        self.unwatched: dict[str, Unwatched] = {}
        self.relay: str | None = None

    # Instances

    def add(self, instance: Instance) -> None:
        """Watch an instance from now on; again when its details change."""
        instance_id = instance.instance_id
        known = self.wanted.get(instance_id)
        # the registry's own object, and no copy of it
        self.wanted[instance_id] = instance
        if self.has_relay and (known is None or _watched(known) != _watched(instance)):
            self._to_watch[instance_id] = _watched(instance)
            self._to_drop.pop(instance_id, None)
            self._changed.set()

    def drop(self, instance_id: str) -> None:
        """Watch an instance no longer."""
        self.unwatched.pop(instance_id, None)
        if self.wanted.pop(instance_id, None) is not None and self.has_relay:
            self._to_watch.pop(instance_id, None)
            self._to_drop[instance_id] = None
            self._changed.set()

    @property
    def has_relay(self) -> bool:
        """Whether a relay is at work."""
        return self.relay is not None

    @property
    def watched(self) -> int:
        """How many instances the relay watches."""
        return len(self.wanted) - len(self.unwatched | self._to_watch.keys()) if self.has_relay else 0

    @property
    def pending(self) -> int:
        """How many instances the relay is still to be asked to watch, or to drop."""
        return len(self._to_watch) + len(self._to_drop)

    def count_unwatched(self) -> Counter[Unwatched]:
        """How many of its instances are not watched, by the reason."""
        return Counter(self.unwatched.values()) if self.has_relay else Counter({Unwatched.RELAY: len(self.wanted)})

    def find_problem(self) -> str | None:
        """Why the node is not watched, or not all of it is."""
        if self._problem is not None:
            return self._problem
        problems = [
            f"{count} of {len(self.wanted)} instances on node {self._node_id} are not watched: {why.problem}"
            for why, count in self.count_unwatched().most_common()
            if why.problem is not None
        ]
        return "; ".join(problems) or None

    # The relay

    @property
    def is_served(self) -> bool:
        """Whether a relay is being made, works, or will be made again."""
        return is_running(self._serving)

    def serve(self) -> None:
        """Keep a relay on the node from now on."""
        if not self.is_served:
            serving = supervise(self._serve_one, self._restarts, "the relay", on_failure=self._note_failure)
            self._serving = asyncio.create_task(serving, name=f"relay-{self._node_id[:8]}")

    async def stop(self) -> None:
        """End the relay."""
        await end(self._serving)

    async def _serve_one(self) -> float:
        """Make a relay, and work with it until it fails. Returns the delay before the next one."""
        relay: ActorHandle | None = None
        began_s: float | None = None
        self._restarts.is_settled = False
        try:
            name = f"{RESERVED_PREFIX}relay-{self._node_id[:12]}-{uuid.uuid4().hex[:8]}"
            relay = await self._cluster.make_relay(self._node_id, name)
            await within(self._cluster.ask(relay, "__ray_ready__"), self._times.start_s)
            began_s = self._clock.monotonic()
            self._take_relay(name)
            await self._converse(relay)
        except TimeoutError:
            self._problem = f"the relay on node {self._node_id} did not answer in time; making another"
            logger.info("%s", self._problem, extra={"node_id": self._node_id})
        except (RayError, DirectoryUnavailableError, SessionError) as error:
            self._note_failure(error)
            logger.info("relay lost, making another: %s", first_line(error), extra={"node_id": self._node_id})
        finally:
            if began_s is not None and self._clock.monotonic() - began_s >= self._times.settled_s:
                self._restarts.is_settled = True
                self._restarts.reset()
            self._lose_relay()
            if relay is not None:
                await self._end(relay)
        return self._restarts.next_s()

    def _note_failure(self, error: Exception) -> None:
        self._problem = f"no relay on node {self._node_id}: {first_line(error)}"

    def _take_relay(self, name: str) -> None:
        """Begin with a new relay, which watches nothing yet."""
        self._to_watch = {instance_id: _watched(instance) for instance_id, instance in self.wanted.items()}
        self._to_drop = {}
        self.relay = name
        self._changed.set()

    def _lose_relay(self) -> None:
        self._to_watch, self._to_drop = {}, {}
        self.unwatched.clear()
        self.relay = None

    async def _end(self, relay: ActorHandle) -> None:
        try:
            await self._cluster.end_relay(relay)
        except (RayError, DirectoryUnavailableError) as error:
            # no handle of it is left: Ray ends it when it can
            logger.info("relay not ended: %s", first_line(error), extra={"node_id": self._node_id})
        except Exception:
            logger.exception("relay not ended", extra={"node_id": self._node_id})

    async def _converse(self, relay: ActorHandle) -> None:
        """Send the relay its instances, and receive its reports, until either fails."""
        sides = asyncio.create_task(self._send(relay)), asyncio.create_task(self._receive(relay))
        try:
            done, _ = await asyncio.wait(sides, return_when=asyncio.FIRST_COMPLETED)
            for side in done:
                side.result()
        finally:
            await end(*sides)

    async def _receive(self, relay: ActorHandle) -> None:
        handled = 0
        while True:
            exits: list[Exit] = await within(
                self._cluster.ask(relay, "exits", handled, self._times.poll_s),
                self._times.poll_s + self._times.poll_grace_s,
            )
            for ended in exits:
                handled = ended.number
                if ended.is_explained or ended.instance_id in self.wanted:
                    self._on_exit(ended)
            self._problem = None

    async def _send(self, relay: ActorHandle) -> None:
        pauses = Backoff(self._times.unwatched_s, self._times.unwatched_max_s, jitter=0.0)
        unseen = 0
        while True:
            self._changed.clear()
            while self._to_drop or self._to_watch:
                await self._send_some(relay)
            # some will never be seen: those are tried ever more rarely
            if len(self.unwatched) != unseen:
                pauses.reset()
            unseen = len(self.unwatched)
            try:
                await within(self._changed.wait(), pauses.next_s() if self.unwatched else None)
            except TimeoutError:
                # the relay may have been short of descriptors, or of Ray
                self._to_watch.update((one, _watched(self.wanted[one])) for one in self.unwatched)

    async def _send_some(self, relay: ActorHandle) -> None:
        dropped = list(islice(self._to_drop, MAX_WATCHED_PER_CALL))
        added = list(islice(self._to_watch.values(), MAX_WATCHED_PER_CALL))
        for instance_id in dropped:
            del self._to_drop[instance_id]
        for watched in added:
            del self._to_watch[watched.instance_id]
        timeout_s = self._times.call_s * (1 + len(added) / 100)
        unwatched = await within(self._exchange(relay, dropped, added), timeout_s)
        self._note_unwatched((watched.instance_id for watched in added), unwatched)

    def _note_unwatched(self, sent: Iterable[str], unwatched: Mapping[str, Unwatched]) -> None:
        for instance_id in sent:
            self.unwatched.pop(instance_id, None)
        self.unwatched.update((one, why) for one, why in unwatched.items() if one in self.wanted)

    async def _exchange(self, relay: ActorHandle, dropped: list[str], added: list[Watched]) -> Mapping[str, Unwatched]:
        """The instances that the relay cannot watch, and why."""
        if dropped:
            await self._cluster.ask(relay, "unwatch", dropped)
        unwatched = frozenset(await self._cluster.ask(relay, "watch", added) if added else ())
        unseen = [watched for watched in added if watched.instance_id in unwatched]
        reasons = await self._cluster.ask(relay, "why_unwatched", unseen) if unseen else []
        return {watched.instance_id: Unwatched(why) for watched, why in zip(unseen, reasons, strict=True)}


def _watched(instance: Instance) -> Watched:
    return Watched(
        instance.instance_id,
        instance.pid,
        instance.process_key,
        instance.actor_name,
        instance.namespace,
        instance.actor_id,
        instance.dependencies,
    )
