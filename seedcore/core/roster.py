"""The registry's memory of the living: who there is, when each was last heard, who is best for a logical id.

Owns no clock, no database and no Ray: the caller gives monotonic seconds (`now_s`) and, for the times that
travel, the wall clock (`at`). Of the dead only ids and causes are remembered, a bounded number of them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import islice
from typing import TypeVar

from seedcore.core.answers import InstanceFilter, NotResolved, Outcome, OutcomeKind, Resolution
from seedcore.core.changes import RegisterChange, Registration, StatusChange
from seedcore.core.errors import RegistryFullError
from seedcore.core.feed import Feed
from seedcore.core.index import InstanceIndex
from seedcore.core.instances import Epoch, Instance, Verdict
from seedcore.core.lease import LeaseTerms
from seedcore.core.lifecycle import Status
from seedcore.core.paging import first_page
from seedcore.core.rules import apply_registration, apply_status, first_registration
from seedcore.core.selection import best
from seedcore.core.verdict import Beats, Evidence, Witness, judge

K = TypeVar("K")
T = TypeVar("T")

MAX_REMEMBERED_DEAD = 10_000
_SILENT = {Beats.SUSPECT, Beats.LAPSED}


@dataclass(frozen=True, slots=True)
class Renewal:
    """Which of the beaten ids renewed nothing. `retired` are those of the dead that ended with their epoch, with its
    name."""

    unknown: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()
    retired: Mapping[str, str] = field(default_factory=dict)


class Roster:
    """All live instances. Every method is synchronous; one event loop owns it.

    `on_appear` is called with each instance that comes to live, and when anything of it changes; `on_vanish` with each
    that lives no more, or moves to another node.
    """

    def __init__(self, terms: LeaseTerms, capacity: int, feed: Feed | None = None) -> None:
        self.terms = terms
        self.epoch = ""  # unknown until the store has said it; instances then count as current
        self.feed = feed if feed is not None else Feed("", 0)
        self._capacity = capacity
        self._live = InstanceIndex()
        # longest ago first, but for those that were given a time that is still to come: the silent are found without
        # looking at everybody
        self._heard: dict[str, float] = {}
        self._told: dict[str, Verdict] = {}
        self.became_silent = 0
        self.came_back = 0
        self._dead: OrderedDict[str, str | None] = OrderedDict()
        self._last_dead: OrderedDict[str, str] = OrderedDict()
        self._retired: OrderedDict[str, str] = OrderedDict()
        self._retired_actors: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._drains: dict[str, datetime] = {}
        self._doubted: set[str] = set()
        self._loads: dict[str, float] = {}
        self._strangers: dict[str, datetime] = {}
        self._epoch_number = 0
        self.on_appear: Callable[[Instance], None] = _ignore
        self.on_vanish: Callable[[Instance], None] = _ignore

    @property
    def version(self) -> int:
        """Grows by one with each change."""
        return self.feed.version

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._live

    def get(self, instance_id: str) -> Instance | None:
        """The live instance with this id."""
        return self._live.get(instance_id)

    def ids(self) -> list[str]:
        """Every live instance."""
        return list(self._live.by_id)

    def is_dead(self, instance_id: str) -> bool:
        """Whether it is remembered as dead."""
        return instance_id in self._dead

    def instances_of(self, logical_id: str) -> list[Instance]:
        """The live instances of one agent, in any epoch."""
        return self._live.of(logical_id)

    # Changes

    def register(self, change: RegisterChange, now_s: float, at: datetime) -> Outcome:
        """Take a registration. Raises RegistryFullError, and then nothing has changed."""
        known = self._live.get(change.instance_id)
        if known is None:
            if change.instance_id in self._retired:
                return Outcome(OutcomeKind.RETIRED_EPOCH, None, self._retired[change.instance_id])
            if change.instance_id in self._dead:
                return Outcome(OutcomeKind.DEAD, Status.DEAD, None, self._dead[change.instance_id])
            if len(self._live) >= self._capacity:
                raise RegistryFullError(self._capacity)
            epoch = self._epoch_of(change.registration)
            self._put(first_registration(change, epoch, at), now_s)
            return Outcome(OutcomeKind.APPLIED, Status.STARTING, epoch)
        outcome, row = apply_registration(known, change, at)
        if outcome.kind is OutcomeKind.UNCHANGED:
            # also a replay says that it lives
            self._strangers.pop(known.instance_id, None)
            self._put(row, now_s)
        return outcome

    def set_status(self, change: StatusChange, now_s: float, at: datetime) -> Outcome:
        """Take a status change under the lifecycle's rules."""
        known = self._live.get(change.instance_id)
        if known is None:
            if change.instance_id in self._dead:
                return Outcome(OutcomeKind.DEAD, Status.DEAD, None, self._dead[change.instance_id])
            return Outcome(OutcomeKind.UNKNOWN)
        outcome, row = apply_status(known, change, at)
        heard = self._heard[known.instance_id]
        if change.seq is not None:
            # the agent itself, be it with a replay
            heard = now_s
            self._strangers.pop(known.instance_id, None)
        self._put(row, heard)
        return outcome

    def adopt(self, instance: Instance, now_s: float) -> None:
        """Take over what the store knows. A living instance gets a whole lease: nobody listened to it so far.

        What we hold already wins unless the store is ahead of it; whom we hold for dead stays so, here and, with the
        next comparison, in the store.
        """
        if instance.instance_id in self._dead:
            return
        known = self._live.get(instance.instance_id)
        if known is not None and known.logical_id != instance.logical_id:
            self.overwrite(instance, now_s)
            return
        if known is not None and instance.status is not Status.DEAD and known.seq > instance.seq:
            self._put(replace(known, cluster_epoch=instance.cluster_epoch), self._heard[known.instance_id])
            return
        heard = now_s if known is None else self._heard[known.instance_id]
        self._put(instance, heard)
        if known is None and instance.instance_id in self._live:
            self._strangers[instance.instance_id] = instance.last_heartbeat

    def overwrite(self, instance: Instance, now_s: float) -> None:
        """Take the store's word for an instance, whatever we held."""
        heard = self._heard.get(instance.instance_id, now_s)
        is_stranger = instance.instance_id not in self._live or instance.instance_id in self._strangers
        self.forget(instance.instance_id)
        self._put(instance, heard)
        if is_stranger and instance.instance_id in self._live:
            self._strangers[instance.instance_id] = instance.last_heartbeat

    def bury(self, instance_id: str, cause: str) -> None:
        """Note that the store declared an instance dead."""
        known = self._live.get(instance_id)
        if known is not None:
            self._put(replace(known, status=Status.DEAD, cause=cause), 0.0)

    def retire(self, instance_id: str) -> None:
        """Note that the store declared an instance dead with its epoch: neither it nor its actor comes back."""
        known = self._live.get(instance_id)
        if known is None:
            return
        _remember(self._retired, instance_id, known.cluster_epoch)
        if known.actor_id is not None:
            _remember(self._retired_actors, (known.logical_id, known.actor_id), known.cluster_epoch)
        self.bury(instance_id, f"epoch {known.cluster_epoch} retired")

    def explain(self, instance_id: str, cause: str) -> None:
        """Tell better why one died that is remembered as dead: the cause that is known, and more."""
        if cause.startswith(self._dead.get(instance_id) or "\0"):
            self._dead[instance_id] = cause

    def drained_long_enough(self, at: datetime, limit: int) -> list[str]:
        """Up to `limit` instances whose draining has come to the end that was set for it."""
        over = (instance_id for instance_id, until in self._drains.items() if until <= at)
        return list(islice(over, limit))

    def forget(self, instance_id: str) -> None:
        """Drop an instance that the store does not have; its next beat finds it unknown."""
        known = self._live.pop(instance_id)
        if known is not None:
            self._unlink(known)
            self.feed.append(known, None)

    def forget_everybody(self) -> None:
        """Know nobody any more, dead or alive."""
        for instance_id in self.ids():
            self.forget(instance_id)
        self._dead.clear()
        self._retired.clear()
        self._retired_actors.clear()

    def move(self, instance_id: str, epoch: str) -> None:
        """Take the store's word for the epoch of an instance."""
        known = self._live.get(instance_id)
        if known is not None and known.cluster_epoch != epoch:
            self._put(replace(known, cluster_epoch=epoch), self._heard[known.instance_id])

    @property
    def known_epoch(self) -> Epoch:
        """The epoch that listings show, as the database said it last."""
        return Epoch(self.epoch, self._epoch_number)

    def set_epoch(self, epoch: str, number: int = 0, *, is_reset: bool = False) -> None:
        """Make `epoch` the one that listings and resolution show, in one step.

        An answer that was under way during a flip may come after it: a lower number than the one known is old, unless
        `is_reset`: the database was joined again.
        """
        if number < self._epoch_number and not is_reset:
            return
        self._epoch_number = number
        if epoch == self.epoch:
            return
        if self.epoch == "":
            for instance in [row for row in self._live.by_id.values() if row.cluster_epoch == ""]:
                self._live.put(replace(instance, cluster_epoch=epoch))
        self.epoch = epoch
        self.feed.start_over(epoch)

    # Leases

    def renew(self, instance_ids: Sequence[str], now_s: float) -> Renewal:
        """Note that these were heard."""
        live = self._live.by_id
        lost: list[str] = []
        heard = self._heard
        for instance_id in instance_ids:
            row = live.get(instance_id)
            if row is None:
                lost.append(instance_id)
            else:
                # under the id that we hold already, and behind everybody
                del heard[instance_id]
                heard[row.instance_id] = now_s
        if self._strangers:
            for instance_id in instance_ids:
                self._strangers.pop(instance_id, None)
        if self._doubted:
            self._doubted.difference_update(instance_ids)
        if self._told:
            for instance_id in self._told.keys() & instance_ids:
                self._tell(instance_id, Verdict.FRESH)
        if not lost:
            return Renewal()
        return Renewal(
            unknown=tuple(instance_id for instance_id in lost if instance_id not in self._dead),
            dead=tuple(instance_id for instance_id in lost if instance_id in self._dead),
            retired={instance_id: self._retired[instance_id] for instance_id in lost if instance_id in self._retired},
        )

    def credit(self, absence_s: float, now_s: float) -> None:
        """Count `absence_s` seconds of our own absence to nobody's silence."""
        for instance_id, heard in self._heard.items():
            self._heard[instance_id] = max(heard, min(now_s, heard + absence_s))

    def silence_s(self, instance_id: str, now_s: float) -> float:
        """Seconds since a live instance was heard."""
        return now_s - self._heard[instance_id]

    def is_stranger(self, instance_id: str) -> bool:
        """Whether it is known from the database alone: it has never spoken to us, and may beat in SQL."""
        return instance_id in self._strangers

    def quiet_strangers(self, now_s: float, limit: int) -> list[str]:
        """Up to `limit` strangers that are not fresh, those heard longest ago first."""
        quiet = [
            (self._heard[instance_id], instance_id)
            for instance_id in self._strangers
            if self.terms.beats(now_s - self._heard[instance_id]) is not Beats.FRESH
        ]
        return [instance_id for _, instance_id in sorted(quiet)[:limit]]

    def hear_of(self, instance_id: str, beats: Mapping[str, datetime], now_s: float) -> None:
        """Compare a stranger's last beat in the database with the one known before, and hear it if it is newer.

        Two of the database's own times: no clock of ours is compared with one of its.
        """
        known, now = self._strangers.get(instance_id), beats.get(instance_id)
        if known is not None and now is not None and now > known:
            self._strangers[instance_id] = now
            self._hear(instance_id, now_s)

    def doubt(self, instance_id: str) -> None:
        """Note that a caller found its actor dead: suspect until it is heard again."""
        if instance_id in self._live:
            self._doubted.add(instance_id)
            self._tell(instance_id, Verdict.SUSPECT)

    def verdict(self, instance_id: str, now_s: float) -> Verdict:
        """What we believe of an instance; `unknown` of one that is not live here, `suspect` when its lease is over."""
        if instance_id not in self._heard:
            return Verdict.UNKNOWN
        judgement = judge(
            Evidence(
                beats=self.terms.beats(self.silence_s(instance_id, now_s)),
                caller=Witness.GONE if instance_id in self._doubted else Witness.UNKNOWN,
                is_frozen=True,
            )
        )
        # only a lease that is over could be a death here, and whether it is one the sweep decides
        assert isinstance(judgement, Verdict)
        return judgement

    def lapsed(self, now_s: float, limit: int) -> list[tuple[str, float]]:
        """Up to `limit` instances whose lease is over, the most silent first, with their silence in seconds."""
        over = [
            (instance_id, silence_s)
            for instance_id, silence_s in self._silences(now_s)
            if self.terms.has_lapsed(silence_s)
        ]
        over.sort(key=lambda pair: -pair[1])
        return over[:limit]

    def count_silent(self, now_s: float) -> int:
        """How many have missed two beats or more."""
        return sum(self.terms.beats(silence_s) in _SILENT for _, silence_s in self._silences(now_s))

    def tell_verdicts(self, now_s: float) -> None:
        """Tell those who follow the feed who is fresh no more, and who is again."""
        silent = {instance_id for instance_id, _ in self._silences(now_s)}
        for instance_id in silent | self._told.keys():
            self._tell(instance_id, self.verdict(instance_id, now_s))

    @property
    def silent(self) -> int:
        """How many are not fresh, as far as it was told."""
        return len(self._told)

    def count_by_verdict(self) -> Counter[tuple[Status, Verdict]]:
        """How many live instances there are in each status with each verdict, as far as it was told."""
        counts = Counter({(status, Verdict.FRESH): count for status, count in self._live.statuses.items()})
        for instance_id, verdict in self._told.items():
            status = self._live.by_id[instance_id].status
            counts[status, Verdict.FRESH] -= 1
            counts[status, verdict] += 1
        return counts

    def note_loads(self, loads: Mapping[str, float]) -> None:
        """Note what the living told of their loads with a beat."""
        self._loads.update((instance_id, load) for instance_id, load in loads.items() if instance_id in self._live)

    def loads_of(self, instances: Sequence[Instance]) -> dict[str, float]:
        """The loads of those of them that have told one."""
        loads = self._loads
        return {row.instance_id: loads[row.instance_id] for row in instances if row.instance_id in loads}

    def verdicts_told(self, instances: Sequence[Instance]) -> dict[str, Verdict]:
        """Those of them that are not fresh, as the feed has told it so far."""
        told = self._told
        return {row.instance_id: told[row.instance_id] for row in instances if row.instance_id in told}

    def _silences(self, now_s: float) -> Iterator[tuple[str, float]]:
        """Who is not fresh, with the seconds of silence."""
        terms = self.terms
        for instance_id, heard in self._heard.items():
            if terms.beats(now_s - heard) is Beats.FRESH:
                # all behind were heard later
                return
            yield instance_id, now_s - heard

    def _hear(self, instance_id: str, heard_s: float) -> None:
        if self._heard.get(instance_id) != heard_s:
            self._heard.pop(instance_id, None)
            self._heard[instance_id] = heard_s

    def _tell(self, instance_id: str, verdict: Verdict) -> None:
        if verdict is self._told.get(instance_id, Verdict.FRESH):
            return
        if verdict is Verdict.FRESH:
            del self._told[instance_id]
            self.came_back += 1
        else:
            self.became_silent += instance_id not in self._told
            self._told[instance_id] = verdict
        instance = self._live.by_id[instance_id]
        self.feed.append(instance, instance, verdict)

    # Reading

    def observed(self, instance: Instance, now_s: float, at: datetime) -> Instance:
        """The instance with its last beat as we heard it."""
        silence = timedelta(seconds=max(0.0, self.silence_s(instance.instance_id, now_s)))
        return replace(instance, last_heartbeat=at - silence)

    def resolve(self, logical_id: str, now_s: float, *, allow_late: bool = False) -> Resolution:
        """The best routable instance, or why there is none: alive, of the current epoch, and fresh. With `allow_late`,
        the best late one if none is fresh."""
        rows = [row for row in self.instances_of(logical_id) if row.cluster_epoch == self.epoch]
        for verdict in (Verdict.FRESH, Verdict.LATE) if allow_late else (Verdict.FRESH,):
            chosen = best(
                row for row in rows if row.status is Status.ALIVE and self.verdict(row.instance_id, now_s) is verdict
            )
            if chosen is not None:
                return Resolution(logical_id, chosen, verdict=verdict)
        nearest = best(rows)
        if nearest is None:
            return self._without_rows(logical_id)
        if nearest.status is not Status.ALIVE:
            return Resolution(logical_id, None, NotResolved(nearest.status), f"it is {nearest.status}")
        silence = self.silence_s(nearest.instance_id, now_s)
        verdict = self.verdict(nearest.instance_id, now_s)
        if nearest.instance_id in self._doubted:
            reason = NotResolved.REPORTED_DEAD
            detail = "a caller found its actor dead, and it has not beaten since"
        elif self.terms.has_lapsed(silence):
            reason, detail = NotResolved.LEASE_EXPIRED, f"silent for {silence:.0f} s, its lease has expired"
        else:
            reason = NotResolved.LATE if verdict is Verdict.LATE else NotResolved.SUSPECT
            detail = f"it is {verdict}: silent for {silence:.1f} s"
        return Resolution(logical_id, None, reason, detail, verdict=verdict)

    def _without_rows(self, logical_id: str) -> Resolution:
        """Why an agent without an instance in the current epoch is not resolved."""
        if self._live.has_agent(logical_id):
            return Resolution(logical_id, None, NotResolved.OTHER_EPOCH, "its instances are of another epoch")
        instance_id = self._last_dead.get(logical_id)
        if instance_id is None:
            return Resolution(logical_id, None, NotResolved.NOT_REGISTERED, "no live instance is registered")
        cause = self._dead.get(instance_id)
        why = f" ({cause})" if cause else ""
        detail = f"no live instance is registered, the last one is dead{why}"
        return Resolution(logical_id, None, NotResolved.DIED, detail)

    def page(
        self, wanted: InstanceFilter, after: tuple[str, str], limit: int, now_s: float
    ) -> tuple[list[Instance], bool]:
        """Up to `limit` wanted instances behind `after` in key order, and whether there are more."""
        rows = self._live.wanted(wanted, self.epoch, after)
        if wanted.fresh_only:
            rows = (row for row in rows if not self.terms.has_lapsed(self.silence_s(row.instance_id, now_s)))
        verdicts = wanted.verdicts
        if verdicts is not None:
            rows = (row for row in rows if self.verdict(row.instance_id, now_s) in verdicts)
        return first_page(rows, limit)

    def count_by_status(self) -> dict[Status, int]:
        """How many live instances there are in each status."""
        return {status: self._live.statuses[status] for status in Status if status is not Status.DEAD}

    def _epoch_of(self, registration: Registration) -> str:
        """Where a registration belongs, as far as memory knows; the commit decides it (see Store.epochs_of)."""
        if registration.cluster_epoch is not None:
            return registration.cluster_epoch
        if self.epoch == "":
            # until the store has said which epoch is current, its instances count as current
            return ""
        if registration.started_epoch is not None or registration.actor_id is None:
            return registration.started_epoch or self.epoch
        rows = self.instances_of(registration.logical_id)
        before = best(row for row in rows if row.actor_id == registration.actor_id)
        if before is not None:
            return before.cluster_epoch
        return self._retired_actors.get((registration.logical_id, registration.actor_id), self.epoch)

    def _put(self, instance: Instance, heard_s: float) -> None:
        known = self._live.get(instance.instance_id)
        if instance.status is Status.DEAD:
            self._bury(instance)
            if known is not None:
                self.feed.append(known, None, cause=instance.cause)
            return
        if instance is not known:
            if known is not None and known.node_id != instance.node_id:
                self.on_vanish(known)
            self.on_appear(instance)
        self._live.put(instance)
        if instance.drain_until is not None:
            self._drains[instance.instance_id] = instance.drain_until
        else:
            self._drains.pop(instance.instance_id, None)
        self._hear(instance.instance_id, heard_s)
        if instance is not known and instance != known:
            self.feed.append(known, instance, self._told.get(instance.instance_id, Verdict.FRESH))

    def _bury(self, instance: Instance) -> None:
        known = self._live.pop(instance.instance_id)
        if known is not None:
            self._unlink(known)
        _remember(self._dead, instance.instance_id, instance.cause)
        _remember(self._last_dead, instance.logical_id, instance.instance_id)

    def _unlink(self, instance: Instance) -> None:
        self._heard.pop(instance.instance_id, None)
        self._told.pop(instance.instance_id, None)
        self._loads.pop(instance.instance_id, None)
        self._drains.pop(instance.instance_id, None)
        self._doubted.discard(instance.instance_id)
        self._strangers.pop(instance.instance_id, None)
        self.on_vanish(instance)


def _remember(deaths: OrderedDict[K, T], key: K, told: T) -> None:
    """Note a death as the newest; the oldest one makes room for it."""
    deaths[key] = told
    deaths.move_to_end(key)
    while len(deaths) > MAX_REMEMBERED_DEAD:
        deaths.popitem(last=False)


def _ignore(_: object) -> None:
    """Nobody listens."""
