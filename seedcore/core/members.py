"""The registry's memory of the live instances, and what a change does to it.

Owns the instances and the feed of their changes; `silence` has when each was last seen, `deaths` those that died
recently. `member_queries` reads it. It has no clock, no database and no Ray: the caller passes monotonic seconds
(`now_s`) and, for the times that are sent, the wall-clock time (`at`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice

from seedcore.core.answers import Outcome, OutcomeKind
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import HoldChange, RegisterChange, Registration, StatusChange
from seedcore.core.errors import RegistryFullError
from seedcore.core.feed import Feed
from seedcore.core.holds import HoldKind, effective_status
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lease import LeaseTerms
from seedcore.core.lifecycle import Status
from seedcore.core.loads import Loads
from seedcore.core.memory_bound import PLACES_BYTES, MemoryBound, WeighedIndex, growth
from seedcore.core.recent_deaths import RecentDeaths
from seedcore.core.rules import apply_hold, apply_registration, apply_status, first_registration, sorted_holds
from seedcore.core.selection import best
from seedcore.core.shown_epoch import ShownEpoch
from seedcore.core.silence import Silence


@dataclass(frozen=True, slots=True)
class Renewal:
    """The ids of a beat that renewed nothing. `retired` are those of the dead that ended with their epoch, with its
    name."""

    unknown: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()
    retired: Mapping[str, str] = field(default_factory=dict)


class Members:
    """All live instances. Every method is synchronous; use it from one event loop.

    `on_appear` is called with each instance that is new here, and when any of its details change; `on_vanish` with each
    that lives no longer, or moves to another node.
    """

    def __init__(
        self,
        terms: LeaseTerms,
        capacity: int,
        feed: Feed | None = None,
        deaths: RecentDeaths | None = None,
        memory: MemoryBound | None = None,
    ) -> None:
        self.memory = memory if memory is not None else MemoryBound()
        self.feed = feed if feed is not None else Feed("", 0)
        self.shown = ShownEpoch(self.feed)
        self.index = WeighedIndex(self.memory)
        self.silence = Silence(terms, self._publish_verdict)
        self.deaths = deaths if deaths is not None else RecentDeaths()
        self.on_appear: Callable[[Instance], None] = _ignore
        self.on_vanish: Callable[[Instance], None] = _ignore
        self._capacity = capacity
        self._expiring: dict[str, datetime] = {}
        self.loads = Loads()

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self.index

    def __iter__(self) -> Iterator[Instance]:
        return iter(list(self.index.by_id.values()))

    def get(self, instance_id: str) -> Instance | None:
        """The live instance with this id."""
        return self.index.get(instance_id)

    def instances_of(self, logical_id: str) -> list[Instance]:
        """The live instances of one agent, in any epoch."""
        return self.index.of(logical_id)

    # Changes

    def register(self, change: RegisterChange, now_s: float, at: datetime) -> Outcome:
        """Apply a registration. Raises RegistryFullError, and then nothing has changed."""
        instance_id = change.instance_id
        known = self.index.get(instance_id)
        if known is None:
            retired = self.deaths.retired_epoch_of(instance_id)
            if retired is not None:
                return Outcome(OutcomeKind.RETIRED_EPOCH, None, retired)
            if instance_id in self.deaths:
                return Outcome(OutcomeKind.DEAD, Status.DEAD, None, self.deaths.cause_of(instance_id))
            if change.is_update:
                return Outcome(OutcomeKind.UNKNOWN)
            if len(self.index) >= self._capacity:
                raise RegistryFullError(f"{self._capacity} live instances", "raise SEEDCORE_MAX_INSTANCES")
            epoch = _epoch_for(self, change.registration)
            first = first_registration(change, epoch, at)
            self.memory.require(growth(None, first) + PLACES_BYTES)
            self._put(first, now_s)
            return Outcome(OutcomeKind.APPLIED, first.status, epoch)
        outcome, row = apply_registration(known, change, at)
        if outcome.kind is OutcomeKind.UNCHANGED:
            self.memory.require(growth(known, row))
            # a replay shows that the instance lives, too
            self.silence.note_own_message(instance_id)
            self._put(row, now_s)
        return outcome

    def set_status(self, change: StatusChange, now_s: float, at: datetime) -> Outcome:
        """Apply a status change under the lifecycle's rules."""
        instance_id = change.instance_id
        known = self.index.get(instance_id)
        if known is None:
            return _not_live(self, instance_id)
        outcome, row = apply_status(known, change, at)
        seen_s = self.silence.last_seen_s(instance_id)
        if change.seq is not None:
            # the agent's own change, or a replay of it
            seen_s = now_s
            self.silence.note_own_message(instance_id)
        self._put(row, seen_s)
        return outcome

    def hold(self, change: HoldChange, at: datetime, now_s: float | None = None) -> Outcome:
        """Place, replace or release a hold. The agent's own change renews its lease, at `now_s`; others renew none."""
        instance_id = change.instance_id
        known = self.index.get(instance_id)
        if known is None:
            return _not_live(self, instance_id)
        outcome, row = apply_hold(known, change, at)
        seen_s = self.silence.last_seen_s(instance_id)
        if change.seq is not None and now_s is not None:
            seen_s = now_s
            self.silence.note_own_message(instance_id)
        self._put(row, seen_s)
        return outcome

    def adopt(self, instance: Instance, now_s: float) -> None:
        """Take over an instance from the store. A live one gets a whole lease, since no registry received its beats.

        The state in memory wins unless the store is ahead of it. Holds of both count; of a kind that both have,
        memory's. The agent's own readiness is as in the later of the two. An instance that is dead in memory stays
        dead, here and, after the next comparison, in the store.
        """
        instance_id = instance.instance_id
        if instance_id in self.deaths:
            return
        known = self.index.get(instance_id)
        if known is not None and known.logical_id != instance.logical_id:
            self.overwrite(instance, now_s)
            return
        seen_s = self.silence.last_seen_s(instance_id, now_s)
        if known is None or instance.status is Status.DEAD:
            self._put(instance, seen_s)
            if known is None:
                self.silence.note_sql_only(instance)
            return
        newer = replace(known, cluster_epoch=instance.cluster_epoch) if known.seq > instance.seq else instance
        self._put(_held_by_both(newer, known, instance), seen_s)

    def overwrite(self, instance: Instance, now_s: float) -> None:
        """Replace the state of an instance by the store's, whatever it was."""
        instance_id = instance.instance_id
        seen_s = self.silence.last_seen_s(instance_id, now_s)
        is_sql_only = instance_id not in self.index or self.silence.is_sql_only(instance_id)
        self.forget(instance_id)
        self._put(instance, seen_s)
        if is_sql_only:
            self.silence.note_sql_only(instance)

    def bury(self, instance_id: str, cause: Cause) -> None:
        """Apply a death that the store has declared."""
        known = self.index.get(instance_id)
        if known is not None:
            dead = replace(known, status=Status.DEAD, reported_status=Status.DEAD, holds=(), cause=cause)
            self._put(dead, 0.0)

    def retire(self, instance_id: str) -> None:
        """Apply a death with the epoch, which the store has declared: neither the instance nor its actor comes back."""
        known = self.index.get(instance_id)
        if known is not None:
            self.deaths.note_retired(known)
            self.bury(instance_id, Cause(CauseKind.EPOCH_RETIRED, known.cluster_epoch))

    def forget(self, instance_id: str) -> None:
        """Remove an instance that the store does not have: its next beat is answered as unknown."""
        known = self.index.pop(instance_id)
        if known is not None:
            self._unlink(known)
            self.feed.append(known, None)

    def forget_all(self, living: Iterable[str]) -> None:
        """Remove every instance: another registry has written since. `living` are those that the database has, whatever
        was known of their deaths: see RecentDeaths.defer_to."""
        for instance in self:
            self.forget(instance.instance_id)
        self.deaths.defer_to(living)

    def expired_holds(self, at: datetime, limit: int) -> list[tuple[str, HoldKind]]:
        """Up to `limit` holds that have expired: the instance and the kind of each."""
        over = (
            (instance_id, hold.kind)
            for instance_id, expires_at in self._expiring.items()
            if expires_at <= at
            for hold in self.index.by_id[instance_id].holds
            if hold.expires_at is not None and hold.expires_at <= at
        )
        return list(islice(over, limit))

    # Epochs

    @property
    def epoch(self) -> str:
        """The current epoch, as the database returned it last; empty before that."""
        return self.shown.name

    def set_epoch(self, epoch: str, number: int = 0, *, is_reset: bool = False) -> None:
        """Make `epoch` the one that listings and resolution show, in one step: see ShownEpoch.set."""
        if self.epoch == "" and epoch:
            for instance in self:
                if instance.cluster_epoch == "":
                    self.index.put(replace(instance, cluster_epoch=epoch))
        self.shown.set(epoch, number, is_reset=is_reset)

    def move(self, instance_id: str, epoch: str) -> None:
        """Apply the epoch that the store has decided for an instance."""
        known = self.index.get(instance_id)
        if known is not None and known.cluster_epoch != epoch:
            self._put(replace(known, cluster_epoch=epoch), self.silence.last_seen_s(instance_id))

    # Beats

    def renew(self, instance_ids: Sequence[str], now_s: float) -> Renewal:
        """Renew the leases of these instances."""
        lost = self.silence.renew(instance_ids, self.index.by_id, now_s)
        if not lost:
            return Renewal()
        epochs = ((instance_id, self.deaths.retired_epoch_of(instance_id)) for instance_id in lost)
        return Renewal(
            unknown=tuple(instance_id for instance_id in lost if instance_id not in self.deaths),
            dead=tuple(instance_id for instance_id in lost if instance_id in self.deaths),
            retired={instance_id: epoch for instance_id, epoch in epochs if epoch is not None},
        )

    def note_loads(self, loads: Mapping[str, float]) -> None:
        """Record the loads that live instances sent with a beat."""
        for instance_id, load in loads.items():
            known = self.index.get(instance_id)
            if known is not None:
                self.loads.note(known.instance_id, load, is_sent=self.index.has_several(known.logical_id))

    def loads_of(self, instances: Sequence[Instance]) -> dict[str, float]:
        """The loads of those instances that have sent one."""
        return self.loads.of(row.instance_id for row in instances)

    # State

    def _put(self, instance: Instance, seen_s: float) -> None:
        instance_id = instance.instance_id
        if instance.status is Status.DEAD:
            gone = self.index.pop(instance_id)
            if gone is not None:
                self._unlink(gone)
            self.deaths.note(instance)
            if gone is not None:
                self.feed.append(gone, None, cause=instance.cause)
            return
        known = self.index.get(instance_id)
        if instance is not known:
            if known is not None and known.node_id != instance.node_id:
                self.on_vanish(known)
            self.on_appear(instance)
        self.index.put(instance)
        if instance is not known and self.index.has_several(instance.logical_id):
            # another one may be chosen now, or another follower may want it
            for one in self.index.of(instance.logical_id) if known is None else (instance,):
                self.loads.send(one.instance_id)
        ends = [hold.expires_at for hold in instance.holds if hold.expires_at is not None]
        if ends:
            self._expiring[instance_id] = min(ends)
        else:
            self._expiring.pop(instance_id, None)
        self.silence.see(instance_id, seen_s)
        if instance is not known and instance != known:
            self.feed.append(known, instance, self.silence.known_verdicts.get(instance_id, Verdict.FRESH))

    def _unlink(self, instance: Instance) -> None:
        self.silence.discard(instance.instance_id)
        self.loads.discard(instance.instance_id)
        self._expiring.pop(instance.instance_id, None)
        self.on_vanish(instance)

    def _publish_verdict(self, instance_id: str, verdict: Verdict) -> None:
        instance = self.index.by_id[instance_id]
        self.feed.append(instance, instance, verdict)


def _not_live(members: Members, instance_id: str) -> Outcome:
    """The outcome of a change of an instance that does not live here."""
    if instance_id in members.deaths:
        return Outcome(OutcomeKind.DEAD, Status.DEAD, None, members.deaths.cause_of(instance_id))
    return Outcome(OutcomeKind.UNKNOWN)


def _held_by_both(newer: Instance, known: Instance, stored: Instance) -> Instance:
    """`newer` with the holds that memory or the store has; of a kind that both have, memory's. Whether it is ready is
    its own word, so that `newer` has it."""
    if known.holds == stored.holds:
        return newer
    holds = {hold.kind: hold for hold in (*stored.holds, *known.holds)}
    readiness = newer.hold(HoldKind.READINESS)
    if readiness is None:
        holds.pop(HoldKind.READINESS, None)
    else:
        holds[HoldKind.READINESS] = readiness
    if newer is not stored and newer.dependencies != stored.dependencies and known.hold(HoldKind.PROCESS) is None:
        # the agent depends on other processes now, and has released it
        holds.pop(HoldKind.PROCESS, None)
    status = effective_status(newer.reported_status, holds)
    return replace(newer, holds=sorted_holds(holds.values()), status=status)


def _epoch_for(members: Members, registration: Registration) -> str:
    """The epoch of a registration, as far as memory knows; the commit decides it (see Store.epochs_of)."""
    if registration.cluster_epoch is not None:
        return registration.cluster_epoch
    if members.epoch == "":
        # until the store has returned the current epoch, its instances count as current
        return ""
    if registration.started_epoch is not None or registration.actor_id is None:
        return registration.started_epoch or members.epoch
    rows = members.instances_of(registration.logical_id)
    before = best(row for row in rows if row.actor_id == registration.actor_id)
    if before is not None:
        return before.cluster_epoch
    retired = members.deaths.retired_epoch_of_actor(registration.logical_id, registration.actor_id)
    return members.epoch if retired is None else retired


def _ignore(_: object) -> None:
    """The default of a callback."""
