"""The questions that the registry answers: most from memory, the history from the database.

Owns the places of those who wait for changes. It changes no instance.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from seedcore.core.answers import Answer, InstanceFilter, Listing, Origin, Resolution
from seedcore.core.clock import Clock
from seedcore.core.errors import (
    InvalidInputError,
    StoreUnavailableError,
    UnknownInstanceError,
)
from seedcore.core.feed import FeedBatch
from seedcore.core.feed_question import FeedQuestion
from seedcore.core.instances import Epoch, EpochRecord, Instance, Transition
from seedcore.core.lease import BeatRate
from seedcore.core.lifecycle import Status
from seedcore.core.limits import (
    MAX_LISTED,
    MAX_PAGE,
    check_instance_id,
    check_key,
    check_kind,
)
from seedcore.core.member_queries import (
    count_by_status,
    loads_since,
    observed,
    page,
    resolve,
    seen_at,
    unconfirmed_epoch,
    verdicts_of,
)
from seedcore.core.members import Members
from seedcore.core.packing import pack
from seedcore.core.paging import check_limit, check_within_s, decode_cursor, decode_death_cursor, encode_cursor
from seedcore.core.timeouts import within
from seedcore.registry.following.serving import FeedBounds, FeedServer
from seedcore.registry.protocol.messages import (
    INSTANCES_LIMIT,
    TRANSITIONS_LIMIT,
    Description,
    Health,
    Hello,
    Observed,
)
from seedcore.registry.server.agents_ahead import AgentsAhead
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.expiry import Expiry
from seedcore.registry.server.fullness import Fullness
from seedcore.registry.server.writer import Writer

logger = logging.getLogger(__name__)

_HISTORY_WAIT_S = 2.0


class Queries:
    """The reading side of the registry. Every method may be called at any time.

    `members`, `writer` and `expiry` are its parts: memory, the write loop, and the deaths.
    """

    def __init__(
        self,
        config: RegistryConfig,
        clock: Clock,
        members: Members,
        writer: Writer,
        expiry: Expiry,
        rate: BeatRate,
        hello: Hello,
    ) -> None:
        self.members = members
        self.writer = writer
        self.expiry = expiry
        self._config = config
        self._clock = clock
        self._rate = rate
        self._hello = hello
        bounds = FeedBounds(config.max_followers, config.max_relays, config.place_kept_s)
        self.feed_server = FeedServer(members.feed, bounds, partial(loads_since, members), clock)
        self.fullness = Fullness(config, members)
        self.agents_ahead = AgentsAhead(members, clock)

    async def hello(self) -> Hello:
        """The handshake: which registry answers."""
        return self._hello

    # Live instances

    async def resolve(self, logical_ids: Sequence[str], *, allow_late: bool = False) -> Answer[list[Resolution]]:
        """The best instance of each agent, or why there is none; at most MAX_PAGE agents. Fresh instances only, unless
        `allow_late` accepts one that has missed a beat where none is fresh."""
        if not isinstance(logical_ids, (list, tuple)) or not 1 <= len(logical_ids) <= MAX_PAGE:
            raise InvalidInputError("logical_ids", f"must be a list of 1 to {MAX_PAGE} ids")
        for logical_id in logical_ids:
            check_key("logical_id", logical_id)
        now_s, at = self.expiry.attentive_now_s(), self._clock.utc()
        found = []
        for logical_id in logical_ids:
            answer = resolve(self.members, logical_id, now_s, allow_late=allow_late)
            if answer.instance is not None:
                answer = replace(answer, instance=observed(self.members, answer.instance, now_s, at))
            found.append(answer)
        return Answer(found, Origin.REGISTRY, at, self.members.feed.version, complete=self.writer.database.is_complete)

    async def page(
        self, wanted: InstanceFilter, limit: int = 100, cursor: str | None = None, packed: bool = False
    ) -> Listing:
        """See RegistryApi.page."""
        check_kind("wanted", wanted, InstanceFilter).validated()
        if wanted.statuses is not None and Status.DEAD in wanted.statuses:
            if wanted.verdicts is not None:
                raise InvalidInputError("verdict", "the dead have none")
            return await self.writer.database.readable().list_instances(wanted, limit, cursor)
        after = decode_cursor(cursor)
        now_s, at = self.expiry.attentive_now_s(), self._clock.utc()
        rows, has_more = page(self.members, wanted, after, check_limit(limit, MAX_LISTED), now_s)
        return Listing(
            items=() if packed else tuple(observed(self.members, row, now_s, at) for row in rows),
            source=Origin.REGISTRY,
            as_of=at,
            version=self.members.feed.version,
            complete=self.writer.database.is_complete,
            next_cursor=encode_cursor(rows[-1]) if has_more else None,
            stream=self.members.feed.stream,
            verdicts=verdicts_of(self.members, rows),
            loads=self.members.loads_of(rows),
            packed=pack(rows, seen_at(self.members, rows, now_s, at)) if packed else None,
        )

    async def changes(self, question: FeedQuestion) -> FeedBatch:
        """See RegistryApi.changes."""
        relay = self._relay_to_follow(check_kind("question", question, FeedQuestion).validated())
        if relay is not None:
            # it needs no place from now on, and so does not wait
            self.feed_server.leave(question.follower)
            question = replace(question, follower=None, wait_s=0.0)
        batch = await self.feed_server.changes(question)
        return replace(batch, complete=self.writer.database.is_complete, relay=relay)

    def _relay_to_follow(self, question: FeedQuestion) -> str | None:
        """The relay that a process follows from now on; None where there is none, or few follow the registry itself."""
        if question.node_id is None or self.feed_server.is_among(question.follower, self._config.direct_followers):
            return None
        return self.expiry.watch.relay_of(question.node_id)

    async def get_instance(self, instance_id: str) -> Answer[Instance]:
        """One instance, dead or alive.

        Raises UnknownInstanceError, or StoreUnavailableError where the database is needed and away.
        """
        check_instance_id(instance_id)
        now_s, at = self.expiry.attentive_now_s(), self._clock.utc()
        known = self.members.get(instance_id)
        if known is not None:
            found: Instance | None = observed(self.members, known, now_s, at)
        else:
            found = await self.writer.database.readable().get_instance(instance_id)
        if found is None:
            raise UnknownInstanceError(instance_id)
        return Answer(found, Origin.REGISTRY, at, self.members.feed.version, complete=True)

    # History

    async def transitions(self, logical_id: str, limit: int = 100) -> list[Transition]:
        """The newest transitions of an agent's instances, newest first. Raises StoreUnavailableError."""
        check_key("logical_id", logical_id)
        return await self.writer.database.readable().transitions(logical_id, check_limit(limit))

    async def deaths(self, limit: int = 100, cursor: str | None = None, within_s: float | None = None) -> Listing:
        """Dead instances of every agent and epoch, the last death first; with `within_s` only deaths within that many
        seconds. Raises InvalidInputError or StoreUnavailableError."""
        decode_death_cursor(cursor)
        return await self.writer.database.readable().deaths(check_limit(limit), cursor, check_within_s(within_s))

    async def describe(self, logical_id: str) -> Description:
        """One agent: its live instances from memory, its history from the database if that answers soon."""
        check_key("logical_id", logical_id)
        instances: list[Instance] = []
        transitions: list[Transition] = []
        complete = False
        try:
            # the live instances are known whatever the database does: they must not wait long for the history
            instances, transitions = await within(self._history_of(logical_id), _HISTORY_WAIT_S)
            complete = True
        except (TimeoutError, StoreUnavailableError) as error:
            logger.debug("history not readable: %s", error)
        now_s, at = self.expiry.attentive_now_s(), self._clock.utc()
        silence = self.members.silence
        live = tuple(
            Observed(
                observed(self.members, row, now_s, at),
                silence.verdict(row.instance_id, now_s),
                silence.silence_s(row.instance_id, now_s),
            )
            for row in self.members.instances_of(logical_id)
        )
        version = self.members.feed.version
        return Description(
            logical_id, live, tuple(instances), Origin.REGISTRY, at, version, complete, tuple(transitions)
        )

    async def _history_of(self, logical_id: str) -> tuple[list[Instance], list[Transition]]:
        return await self.writer.database.readable().history(logical_id, INSTANCES_LIMIT, TRANSITIONS_LIMIT)

    # Epochs, and the registry itself

    async def current_epoch(self) -> Answer[Epoch]:
        """The epoch that listings show. Raises StoreUnavailableError until the database has returned it."""
        try:
            epoch = await self.writer.database.readable().current_epoch()
        except StoreUnavailableError:
            if self.members.epoch == "":
                raise
            # no epoch is flipped while the database is away
            epoch = self.members.shown.known
        return Answer(epoch, Origin.REGISTRY, self._clock.utc(), self.members.feed.version, complete=True)

    async def list_epochs(self, limit: int = 20) -> list[EpochRecord]:
        """The newest epochs, newest first. Raises StoreUnavailableError."""
        return await self.writer.database.readable().list_epochs(limit)

    async def health(self) -> Health:
        """The registry's own state."""
        # instances come from the database too
        self.fullness.look()
        writer, database, expiry, silence = self.writer, self.writer.database, self.expiry, self.members.silence
        return Health(
            hello=self._hello,
            as_of=self._clock.utc(),
            recovered=database.recovered,
            store_problem=writer.problem,
            store_kind=self._config.store_kind,
            term=database.term,
            fenced_by=None if database.fenced_by is None else database.fenced_by.in_force,
            epoch=self.members.epoch or None,
            lease_s=silence.terms.lease_s,
            beat_interval_s=self._rate.asked.beat_interval_s,
            instances={status.value: n for status, n in count_by_status(self.members).items()},
            pending_changes=writer.backlog.pending_changes,
            pending_beats=len(writer.backlog.beats),
            credited_s=expiry.credited_s,
            is_frozen=expiry.is_frozen,
            deaths_reported=expiry.deaths_reported,
            watch_problem=expiry.watch.problem,
            relays=expiry.watch.relays,
            watched=expiry.watch.watched,
            followers=self.feed_server.followers,
            silent=len(silence.known_verdicts),
            became_silent=silence.became_silent,
            healed=writer.comparison.healed,
            pruned=writer.housekeeping.pruned,
            compared_at=writer.comparison.compared_at,
            flush=writer.counts,
            beats_per_s=writer.flusher.beats_per_s,
            fences=database.fences,
            losses=database.restoration.losses,
            lost_commits=database.restoration.lost_commits,
            last_loss=database.restoration.last,
            agents_ahead=self.agents_ahead.count,
            agents_ahead_at=self.agents_ahead.last_at,
            epoch_problem=unconfirmed_epoch(self.members),
            came_back=silence.came_back,
            deaths_declared=expiry.deaths_declared,
            notes=self._config.notes,
            unwatched=expiry.unwatched,
            capacity_problem=self.fullness.problem,
            capacity_used=self.fullness.shares,
            registrations_refused=self.fullness.refused,
            draining_nodes=expiry.drains.nodes,
        )
