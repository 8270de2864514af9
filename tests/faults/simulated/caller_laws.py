"""Owns the laws of callers (9, 15, 16, 18): what a follower's cache may have, and which instances a caller may get."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from seedcore.core.answers import InstanceFilter
from seedcore.core.events import AgentEvent
from seedcore.core.feed import FeedBatch, Position
from seedcore.core.holds import Hold
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.core.members import Members
from seedcore.core.paging import decode_cursor
from seedcore.core.view import LiveView
from seedcore.registry.following.follower import Follower
from seedcore.registry.following.times import FollowTimes
from tests.faults.simulated.registries import Office
from tests.faults.simulated.world import World

if TYPE_CHECKING:
    from tests.faults.simulated.callers import Caller

FOLLOW = FollowTimes(max_age_s=2.0, wait_s=1.0)
STALE_S = FOLLOW.max_age_s
"""A caller gets what some source answered at most so long ago, in seconds."""

_ANY = InstanceFilter(statuses=None, fresh_only=False)

Followed = tuple[Status, tuple[Hold, ...], Verdict]
"""What a follower has of an instance."""


class CallerLaws:
    """Each check raises Violation."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._held_at: dict[tuple[str, int], dict[str, Followed]] = {}
        self._named_s: dict[str, float] = {}
        self._known_s: dict[str, float] = {}

    # What the sources have

    def note_feed(self, office: Office, batch: FeedBatch) -> None:
        """A registry answers a follower, and so confirms all that it has at that version."""
        held = self._held_at[batch.stream, batch.version] = _of_members(office.registry.members)
        if held:
            self.note_shown(office, office.registry.members.epoch)
        for instance_id, (status, _, verdict) in held.items():
            office.check_lives(instance_id)
            if status is Status.ALIVE and verdict in {Verdict.FRESH, Verdict.LATE}:
                self._note(instance_id, is_complete=batch.complete)

    def note_instance(self, instance: Instance, *, is_complete: bool = True) -> None:
        """A registry or the database names an instance to a caller. `is_complete`: it knows every agent."""
        if instance.status is Status.ALIVE:
            self._note(instance.instance_id, is_complete=is_complete)

    def _note(self, instance_id: str, *, is_complete: bool) -> None:
        self._named_s[instance_id] = self._world.now_s
        if is_complete:
            self._known_s[instance_id] = self._world.now_s

    # Laws

    def note_shown(self, office: Office, epoch: str) -> None:
        """Law 18, where a registry names an instance of this epoch to a caller."""
        check, database = self._world.check, office.registry.writer.database
        known = office.registry.members.shown.known
        if database.fenced_by is None and office.shown_fences != database.fences:
            # it has read its database again, whose flips another registry made, or which has lost some
            office.shown_before.clear()
            office.shown_fences = database.fences
            office.note_doubt(office.shown)
        if office.doubt is not None:
            is_confirmed = epoch == office.doubt.name or known.number > office.doubt.number
            check(is_confirmed, 18, f"{office.name} names instances of {epoch}, and {office.doubt} is known")
            office.doubt = None
        office.shown = known
        office.shown_before.setdefault(epoch)
        check(next(reversed(office.shown_before)) == epoch, 18, f"{office.name} names instances of {epoch} again")

    def check_one_epoch(self, office: Office, instances: Iterable[Instance]) -> None:
        """Law 18, for one answer of a registry."""
        epochs = {row.cluster_epoch for row in instances if row.status is not Status.DEAD}
        self._world.check(len(epochs) <= 1, 18, f"{office.name} names instances of {epochs}")
        for epoch in epochs:
            self.note_shown(office, epoch)

    def check_found(self, instance: Instance, asked_s: float, how: str, *, is_complete: bool) -> None:
        """Law 15, for an instance that a caller got. `is_complete`: by an answer that claims to know every agent."""
        last_s = (self._known_s if is_complete else self._named_s).get(instance.instance_id, -math.inf)
        self._world.check(
            last_s >= asked_s - STALE_S,
            15,
            f"{how}: got {instance.instance_id}, which no source has named since {last_s:.3f}",
        )

    def check_handle(self, logical_id: str, actor_id: str, asked_s: float, how: str) -> None:
        """Law 15, for a cached handle: of an instance that the actor ran."""
        last_s = max(
            (
                self._known_s.get(instance_id, -math.inf)
                for process in self._world.processes
                if process.actor_id == actor_id and process.logical_id == logical_id
                for instance_id in process.instance_ids
            ),
            default=-math.inf,
        )
        self._world.check(
            last_s >= asked_s - STALE_S,
            15,
            f"{how}: got actor {actor_id}, which no source has named since {last_s:.3f}",
        )

    def check_cache(self, name: str, follower: Follower) -> None:
        """Law 9: a cache that is trusted is the state of the registry that it follows, at the version that it has."""
        if not follower.is_current:
            return
        view = follower.view
        assert view.stream is not None
        there, held = self._held_at[view.stream, view.version], _of_view(view)
        if not view.is_whole:
            there, held = self._learned(view, there), self._learned(view, held)
            self._world.counts["agents of a part compared"] += len(there)
        epochs = {row.cluster_epoch for row in _rows_of(view)}
        self._world.check(len(epochs) <= 1, 18, f"{name} has instances of {epochs}")
        if held != there:
            self._world.check(False, 9, f"{name} has {held} at {view.version}, the registry had {there}")
        self._world.counts["caches compared"] += 1

    def replay(self, name: str, replayed: dict[str, Followed], event: AgentEvent) -> None:
        """Law 9, for a watch: its events, applied in order, are the state of the registry at the position of each."""
        self._world.counts[f"watched: {event.kind}"] += 1
        if event.is_whole:
            replayed.clear()
            for row in event.instances:
                verdict = event.verdicts.get(row.instance_id, Verdict.FRESH)
                replayed[row.instance_id] = (row.status, row.holds, verdict)
        elif event.instance is not None:
            replayed[event.instance.instance_id] = (event.instance.status, event.instance.holds, event.verdict)
        elif event.instance_id is not None:
            replayed.pop(event.instance_id, None)
        at = Position.parsed(event.position)
        there = self._held_at.get((at.stream, at.version))
        if there is not None:
            self._world.counts["watches compared"] += 1
            if replayed != there:
                self._world.check(False, 9, f"{name} replayed {replayed} at {at}, the registry had {there}")

    def unsettled(self) -> str | None:
        """Why a follower is not yet as law 9 wants it when all is quiet; None when all are."""
        office = self._world.office()
        if office is None:
            return "no registry"
        there = _of_members(office.registry.members)
        for caller in self._world.callers:
            view = caller.follower.view
            if not caller.follower.is_current:
                return f"the cache of {caller.name} is not current"
            if _of_view(view) != (there if view.is_whole else self._learned(view, there)):
                return f"{caller.name} has {_of_view(view)}, the registry has {there}"
        return None

    def _learned(self, view: LiveView, held: dict[str, Followed]) -> dict[str, Followed]:
        """Of the agents that a cache had learned at its version."""
        version = view.version
        agents = {one: row.logical_id for row in self._world.processes for one in row.instance_ids}
        return {
            instance_id: followed
            for instance_id, followed in held.items()
            for learned_at in [view.learned_at(agents[instance_id])]
            if learned_at is not None and learned_at <= version
        }

    async def check_answers(self, caller: Caller) -> None:
        """Law 15, when all is quiet: every agent is found exactly where it is routable."""
        world = self._world
        rows = world.tables.rows.values()
        epoch = world.tables.current_epoch
        office = world.office()
        silent = set() if office is None else world.losses.silent_retired(office)
        routable = {
            row.logical_id
            for row in rows
            if row.status is Status.ALIVE and row.cluster_epoch == epoch and row.instance_id not in silent
        }
        for number in range(world.agents):
            logical_id = f"agent-{number}"
            found = await caller.resolved(logical_id)
            is_found = found is not None
            world.check(is_found == (logical_id in routable), 15, f"{caller.name} has {found} for {logical_id}")


def _of_view(view: LiveView) -> dict[str, Followed]:
    return {row.instance_id: (row.status, row.holds, view.verdict(row.instance_id)) for row in _rows_of(view)}


def _rows_of(view: LiveView) -> Sequence[Instance]:
    rows, _ = view.page(_ANY, decode_cursor(None), MAX_PAGE)
    return rows


def _of_members(members: Members) -> dict[str, Followed]:
    verdicts = members.silence.known_verdicts
    return {
        row.instance_id: (row.status, row.holds, verdicts.get(row.instance_id, Verdict.FRESH))
        for row in members
        if row.cluster_epoch == members.shown.listed
    }
