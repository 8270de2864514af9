"""What the registry answers: outcomes, receipts, lists, resolutions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Generic, overload

from seedcore.core.causes import Cause
from seedcore.core.errors import NotDurableError
from seedcore.core.instances import Instance, Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import (
    T,
    check_epoch,
    check_key,
    check_kind,
    check_labels,
)
from seedcore.core.selector import Requirement, Selector
from seedcore.core.wire import wire


class Source(StrEnum):
    """Where an answer came from."""

    REGISTRY = "registry"
    SNAPSHOT = "snapshot"
    POSTGRES = "postgres"
    RAY = "ray"


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
    """Why a beat renewed nothing."""

    UNKNOWN = "unknown"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class LostBeat:
    """A beat that renewed nothing."""

    instance_id: str
    outcome: BeatOutcome


@wire
@dataclass(frozen=True, slots=True)
class Receipt:
    """The answer to `register` and `set_status`. It comes also where the change is **not** committed: look at
    `durable`, or call `raise_unless_durable()`.

    With `durable` False `why` says what keeps the change from the database, or from the registry; the client keeps it
    and sends it again. `registry` names the registry's process that answered: another one knows nothing of what this
    one has only remembered. `beat_interval_s` is how often to beat from now on, and `lease_s` the silence that ends the
    lease, in seconds: the registry decides both. They are None where it has not answered.
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
        """The same receipt, or NotDurableError where the change is not committed yet."""
        if not self.durable:
            raise NotDurableError(self.instance_id, str(self.status), self.why or "the database is slow")
        return self


@wire
@dataclass(frozen=True, slots=True)
class BeatAnswer:
    """The answer to beats: which ids renewed nothing, and how often to beat from now on (seconds).

    `is_fenced` says that a newer registry writes: this one remembers the beat and cannot record it. `relay` names the
    actor on the instances' node that gathers beats and changes, where there is one. `is_recovering` says that some of
    the ids are not known yet, since the registry has not read its database: they are in neither list, and nothing is to
    be done about them. `retired` are those of the dead that ended with their epoch, each with its name: they do not
    come back.
    """

    unknown: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()
    beat_interval_s: float = 5.0
    lease_s: float = 15.0
    is_fenced: bool = False
    relay: str | None = None
    is_recovering: bool = False
    retired: Mapping[str, str] = field(default_factory=dict)

    def with_lost(self, unknown: tuple[str, ...], dead: tuple[str, ...], retired: Mapping[str, str]) -> BeatAnswer:
        """The same answer with other ids that renewed nothing."""
        return replace(self, unknown=unknown, dead=dead, retired=retired)


@wire
@dataclass(frozen=True, slots=True)
class InstanceFilter:
    """Which instances a listing wants. None means any; labels must all be equal.

    `epoch` None means the current one; `fresh_only` leaves out instances whose lease has run out; of `selector` every
    requirement must hold. `verdicts` can be told only where beats are listened to.
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

    def validated(self) -> InstanceFilter:
        """The same filter, or InvalidInputError naming the first bad field."""
        for status in check_kind("statuses", self.statuses, (frozenset, type(None))) or ():
            check_kind("status", status, Status)
        for verdict in check_kind("verdicts", self.verdicts, (frozenset, type(None))) or ():
            check_kind("verdict", verdict, Verdict)
        for requirement in check_kind("selector", self.selector, tuple):
            check_kind("requirement", requirement, Requirement)
        for name, value in (("organ_id", self.organ_id), ("logical_id", self.logical_id), ("node_id", self.node_id)):
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
            and all(instance.labels.get(key) == value for key, value in self.labels.items())
            and all(requirement.holds(instance.labels) for requirement in self.selector)
        )


@wire
@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """A value with where it came from, when it was true, and whether it is the whole truth."""

    value: T
    source: Source
    as_of: datetime
    version: int
    complete: bool


@wire
@dataclass(frozen=True, slots=True)
class Listing(Sequence[Instance]):
    """A page of instances in the order of (logical_id, instance_id), with what the answer is worth.

    `next_cursor` continues the listing and is None on the last page. `complete` False means that the source
    knows it may be missing some (it is recovering, or it is Ray's bare listing). `stream` names the feed that goes on
    from `version`, where there is one. `verdicts` are of those items, by instance id, that the feed does not tell as
    fresh; `loads` what those tell that tell any.
    """

    items: tuple[Instance, ...]
    source: Source
    as_of: datetime
    version: int
    complete: bool
    next_cursor: str | None = None
    stream: str | None = None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    loads: Mapping[str, float] = field(default_factory=dict)

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

    `is_known` tells an agent that is registered and not to be handed out (draining, silent, of another epoch)
    from one that nobody registered. `verdict` is of the instance, or of the one nearest to being handed out;
    `unknown` where the source does not listen to beats.
    """

    logical_id: str
    instance: Instance | None
    why: str | None = None
    is_known: bool = False
    verdict: Verdict = Verdict.UNKNOWN
