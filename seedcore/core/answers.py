"""What the registry answers: outcomes, receipts, lists, resolutions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Generic, overload

from seedcore.core.causes import Cause
from seedcore.core.errors import InvalidInputError, NotDurableError
from seedcore.core.instances import Epoch, Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import (
    MAX_ID_CHARS,
    T,
    check_epoch,
    check_key,
    check_kind,
    check_labels,
    check_seq,
    check_text,
)
from seedcore.core.packing import unpack
from seedcore.core.selector import Requirement, Selector
from seedcore.core.wire import wire


class Origin(StrEnum):
    """The kind of source that an answer came from; a field named `source` has it."""

    REGISTRY = "registry"
    SNAPSHOT = "snapshot"
    POSTGRES = "postgres"
    RAY = "ray"


class NotResolved(StrEnum):
    """Why a source resolves an agent to no instance, or no handle is returned for it."""

    NOT_REGISTERED = "not_registered"
    """No live instance is registered under this logical id."""
    OTHER_EPOCH = "other_epoch"
    """Its instances belong to another epoch than the current one."""
    EPOCH_UNCONFIRMED = "epoch_unconfirmed"
    """The database has lost a flip that agents know of: an operator must confirm which epoch is current."""
    STARTING = "starting"
    """It has registered, and has not reported alive yet."""
    NOT_READY = "not_ready"
    """It reports that it is not ready."""
    DRAINING = "draining"
    """It is draining."""
    LATE = "late"
    """It missed one beat."""
    SUSPECT = "suspect"
    """It missed two beats or more."""
    LEASE_EXPIRED = "lease_expired"
    """Its lease has expired; it is about to be declared dead."""
    REPORTED_DEAD = "reported_dead"
    """A caller found its actor dead, and it has not beaten since."""
    DIED = "died"
    """Its last instance is dead, or its actor is gone."""
    NO_HANDLE = "no_handle"
    """It is registered without an actor that callers can use."""
    UNREACHABLE = "unreachable"
    """Its actor does not answer now."""


_UNKNOWN_TO_THE_SOURCE = frozenset({None, NotResolved.NOT_REGISTERED, NotResolved.DIED})


class OutcomeKind(StrEnum):
    """What the store did with one change of a batch."""

    APPLIED = "applied"
    UNCHANGED = "unchanged"
    UNKNOWN = "unknown"
    DEAD = "dead"
    FORBIDDEN = "forbidden"
    CONFLICT = "conflict"
    RETIRED_EPOCH = "retired_epoch"
    EPOCH_LIMIT = "epoch_limit"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The store's answer to one change: what it did, and the row after it (None: no row)."""

    kind: OutcomeKind
    status: Status | None = None
    cluster_epoch: str | None = None
    cause: Cause | None = None


class BeatOutcome(StrEnum):
    """Why a beat renewed no lease."""

    UNKNOWN = "unknown"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class LostBeat:
    """A beat that renewed no lease."""

    instance_id: str
    outcome: BeatOutcome


@wire
@dataclass(frozen=True, slots=True)
class Receipt:
    """The answer to `register` and `set_status`, also if the change is **not** committed: check `durable`, or call
    `raise_unless_durable()`.

    If `durable` is False, `why` is the problem of the database or the registry; the client keeps the change and sends
    it again. `registry` identifies the registry process that answered: a later one does not have what this one keeps in
    memory only. `beat_interval_s` is the time between beats from now on, and `lease_s` the silence after which the
    lease expires, in seconds. The registry decides both; they are None if it has not answered.
    """

    instance_id: str
    status: Status
    seq: int
    durable: bool
    epoch: str | None = None
    why: str | None = None
    registry: str | None = None
    beat_interval_s: float | None = None
    lease_s: float | None = None

    def raise_unless_durable(self) -> Receipt:
        """The same receipt, or NotDurableError if the change is not committed yet."""
        if not self.durable:
            raise NotDurableError(self.instance_id, str(self.status), self.why or "the database is slow")
        return self


@wire
@dataclass(frozen=True, slots=True)
class BeatAnswer:
    """The answer to beats: the ids that renewed no lease, and the time between beats from now on (seconds).

    `is_fenced`: a newer registry writes, and this one keeps the beat in memory only. `relay` is the name of the actor
    on the instances' node that collects beats and changes, if there is one. `is_recovering`: some of the ids are not
    known yet, because the registry has not read its database. They are in neither list, and nothing is to be done.
    `retired` are the dead ids that ended with their epoch, each with the epoch's name: they do not register again.
    `behind` are the ids of which the sender knows later durable changes (see KnownBefore): it sends them again.
    `registry` identifies the registry process, `database` its database, None before it has joined one, and `epoch` is
    the current one, None where that is not known yet.
    """

    unknown: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()
    beat_interval_s: float = 5.0
    lease_s: float = 15.0
    is_fenced: bool = False
    relay: str | None = None
    is_recovering: bool = False
    retired: Mapping[str, str] = field(default_factory=dict)
    behind: tuple[str, ...] = ()
    registry: str | None = None
    epoch: Epoch | None = None
    database: str | None = None

    def about(self, instance_ids: Set[str]) -> BeatAnswer:
        """The same answer, about these instances only."""
        return replace(
            self,
            unknown=tuple(one for one in self.unknown if one in instance_ids),
            dead=tuple(one for one in self.dead if one in instance_ids),
            retired={one: epoch for one, epoch in self.retired.items() if one in instance_ids},
            behind=tuple(one for one in self.behind if one in instance_ids),
        )

    def joined(self, later: BeatAnswer) -> BeatAnswer:
        """The answer to both of two messages."""
        return replace(
            later,
            unknown=self.unknown + later.unknown,
            dead=self.dead + later.dead,
            retired={**self.retired, **later.retired},
            behind=self.behind + later.behind,
            is_recovering=self.is_recovering or later.is_recovering,
        )


@wire
@dataclass(frozen=True, slots=True)
class KnownBefore:
    """What the sender of beats knows from its last answers: the epoch that was current and, for a registry that has not
    answered it yet, by instance id the number of the last change that was durable. A database that has lost commits
    shows by a lower number. `database` is the database of the registry that answered: one with another database ignores
    it."""

    seqs: Mapping[str, int] = field(default_factory=dict)
    epoch: Epoch | None = None
    database: str | None = None

    def validated(self, instance_ids: Sequence[str]) -> KnownBefore:
        """The same, or InvalidInputError; its instances are some of those that beat."""
        if not check_kind("seqs", self.seqs, Mapping).keys() <= set(instance_ids):
            raise InvalidInputError("seqs", "must be of some of the instance ids")
        for seq in self.seqs.values():
            check_seq(seq)
        if self.epoch is not None:
            check_epoch(check_kind("epoch", self.epoch, Epoch).name)
            check_seq(self.epoch.number)
        if self.database is not None:
            check_text("database", self.database, MAX_ID_CHARS)
        return self

    def joined(self, later: KnownBefore) -> KnownBefore:
        """What two senders know; of two databases, what the later one knows."""
        if self.database != later.database:
            return later
        epochs = [epoch for epoch in (self.epoch, later.epoch) if epoch is not None]
        highest = max(epochs, key=lambda epoch: epoch.number, default=None)
        return KnownBefore({**self.seqs, **later.seqs}, highest, later.database)


@wire
@dataclass(frozen=True, slots=True)
class InstanceFilter:
    """Which instances a listing wants. None means any; labels must all be equal.

    `epoch` None means the current one. `fresh_only` leaves out instances whose lease has expired. Every requirement of
    `selector` must match. Only a source that receives beats knows `verdicts`. `endpoint` names an endpoint that it
    must have.
    """

    statuses: frozenset[Status] | None = frozenset({Status.ALIVE})
    organ_id: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    logical_id: str | None = None
    epoch: str | None = None
    fresh_only: bool = True
    node_id: str | None = None
    selector: Selector = ()
    verdicts: frozenset[Verdict] | None = None
    endpoint: str | None = None

    def validated(self) -> InstanceFilter:
        """The same filter, or InvalidInputError naming the first bad field."""
        for status in check_kind("statuses", self.statuses, (frozenset, type(None))) or ():
            check_kind("status", status, Status)
        for verdict in check_kind("verdicts", self.verdicts, (frozenset, type(None))) or ():
            check_kind("verdict", verdict, Verdict)
        for requirement in check_kind("selector", self.selector, tuple):
            check_kind("requirement", requirement, Requirement)
        for name, value in (
            ("organ_id", self.organ_id),
            ("logical_id", self.logical_id),
            ("node_id", self.node_id),
            ("endpoint", self.endpoint),
        ):
            if value is not None:
                check_key(name, value)
        if self.epoch is not None:
            check_epoch(self.epoch)
        check_labels(self.labels)
        return self

    def matches(self, instance: Instance, current_epoch: str) -> bool:
        """Whether `instance` is wanted, its lease and its verdict apart."""
        return (
            (self.statuses is None or instance.status in self.statuses)
            and instance.cluster_epoch == (self.epoch or current_epoch)
            and (self.organ_id is None or instance.organ_id == self.organ_id)
            and (self.logical_id is None or instance.logical_id == self.logical_id)
            and (self.node_id is None or instance.node_id == self.node_id)
            and (self.endpoint is None or self.endpoint in instance.endpoints)
            and all(instance.labels.get(key) == value for key, value in self.labels.items())
            and all(requirement.holds(instance.labels) for requirement in self.selector)
        )


@wire
@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """A value with its source, its time, and whether it is complete."""

    value: T
    source: Origin
    as_of: datetime
    version: int
    complete: bool


@wire
@dataclass(frozen=True, slots=True)
class Listing(Sequence[Instance]):
    """A page of instances in the order of (logical_id, instance_id), with its source, time and completeness.

    `next_cursor` continues the listing and is None on the last page. `complete` False: the source may be
    missing some (it is recovering, or it is Ray's listing). `stream` names the feed that continues from `version`, if
    there is one. `verdicts` has the verdict of each item that is not fresh according to the feed, by instance id;
    `loads` the load of each item that reports one. In a message `packed` may have the items (see core.packing).
    """

    items: tuple[Instance, ...]
    source: Origin
    as_of: datetime
    version: int
    complete: bool
    next_cursor: str | None = None
    stream: str | None = None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    loads: Mapping[str, float] = field(default_factory=dict)
    packed: bytes | None = None

    def unpacked(self) -> Listing:
        """The same page, with its items."""
        return self if self.packed is None else replace(self, items=unpack(self.packed), packed=None)

    @overload
    def __getitem__(self, index: int) -> Instance: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Instance]: ...
    def __getitem__(self, index: int | slice) -> Instance | Sequence[Instance]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Instance]:
        return iter(self.items)


@wire
@dataclass(frozen=True, slots=True)
class Resolution:
    """What a source knows of one logical id: its best instance, or why there is none.

    `reason` is None if there is an instance, and also if the source cannot know now. `detail` explains it for people:
    no code reads it. `verdict` is that of the instance, or of the one that is nearest to routable; `unknown` if the
    source receives no beats.
    """

    logical_id: str
    instance: Instance | None
    reason: NotResolved | None = None
    detail: str | None = None
    verdict: Verdict = Verdict.UNKNOWN

    @property
    def is_known(self) -> bool:
        """Whether a live instance is registered, routable or not."""
        return self.instance is not None or self.reason not in _UNKNOWN_TO_THE_SOURCE
