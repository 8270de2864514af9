"""The values that travel between agents, registry, store and callers, and the limits they keep."""

from __future__ import annotations

import ipaddress
import json
import math
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from sys import intern
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar, overload
from unicodedata import category

from seedcore.core.errors import InvalidInputError, NotDurableError
from seedcore.core.lifecycle import Status
from seedcore.core.selector import Requirement, Selector
from seedcore.core.text import first_unfit
from seedcore.core.wire import wire

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
T = TypeVar("T")

NOTHING: Mapping[str, Any] = {}
"""The labels and metadata of those that have none: one for all, and like all of them never changed."""

MAX_ID_CHARS = 255
MAX_EPOCH_CHARS = 128
MAX_TEXT_CHARS = 1024
MAX_REASON_CHARS = 512
MAX_LABELS = 64
MAX_LABEL_KEY_CHARS = 63
MAX_LABEL_VALUE_CHARS = 255
MAX_METADATA_BYTES = 16 * 1024
MAX_METADATA_DEPTH = 32
MAX_KEPT_S = 100 * 365 * 86_400.0
MAX_PAGE = 1000
MAX_LEASE_S = 86_400
MAX_DRAIN_S = 365 * 86_400

_NEVER_STORED = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Source(str, Enum):
    """Where an answer came from."""

    REGISTRY = "registry"
    SNAPSHOT = "snapshot"
    POSTGRES = "postgres"
    RAY = "ray"

    def __str__(self) -> str:
        return self.value


class Verdict(str, Enum):
    """What we believe of an instance now, from its beats."""

    FRESH = "fresh"
    LATE = "late"
    SUSPECT = "suspect"
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value


@wire
@dataclass(frozen=True, slots=True)
class Registration:
    """What an agent tells of itself. `validated()` before it goes anywhere.

    `process_key` distinguishes its process from a later one with the same `pid` (see ray_support.process_keys).
    `cluster_epoch` is the epoch that it insists on; one that insists on none belongs to `started_epoch`, the epoch that
    it was started in, and without that to the current one, unless its actor had an instance in another before.
    """

    instance_id: str
    logical_id: str
    actor_name: str | None = None
    namespace: str | None = None
    actor_id: str | None = None
    serve_route: str | None = None
    organ_id: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Json] = field(default_factory=dict)
    node_id: str | None = None
    ip_address: str | None = None
    pid: int | None = None
    process_key: str | None = None
    cluster_epoch: str | None = None
    started_epoch: str | None = None

    def validated(self) -> Registration:
        """The same registration, or InvalidInputError naming the first bad field."""
        check_instance_id(self.instance_id)
        check_logical_id(self.logical_id)
        for name, value in (
            ("actor_name", self.actor_name),
            ("namespace", self.namespace),
            ("actor_id", self.actor_id),
            ("organ_id", self.organ_id),
            ("node_id", self.node_id),
            ("process_key", self.process_key),
        ):
            if value is not None:
                check_text(name, value, MAX_ID_CHARS)
        if self.serve_route is not None:
            check_text("serve_route", self.serve_route, MAX_TEXT_CHARS)
        for epoch in (self.cluster_epoch, self.started_epoch):
            if epoch is not None:
                check_epoch(epoch)
        if self.ip_address is not None:
            _check_ip(self.ip_address)
        if self.pid is not None and not (type(self.pid) is int and 0 < self.pid < 2**31):
            raise InvalidInputError("pid", f"must be a positive 32-bit integer, not {self.pid!r}")
        check_labels(self.labels)
        _check_metadata(self.metadata)
        return self


@wire
@dataclass(frozen=True, slots=True)
class Instance:
    """One incarnation of an agent as a source knows it. Times are the database's, in UTC."""

    instance_id: str
    logical_id: str
    status: Status
    cluster_epoch: str
    started_at: datetime
    status_changed_at: datetime
    last_heartbeat: datetime
    seq: int = 0
    actor_name: str | None = None
    namespace: str | None = None
    actor_id: str | None = None
    serve_route: str | None = None
    organ_id: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Json] = field(default_factory=dict)
    node_id: str | None = None
    ip_address: str | None = None
    pid: int | None = None
    process_key: str | None = None
    stopped_at: datetime | None = None
    cause: str | None = None
    drain_until: datetime | None = None
    held: Status | None = None


@wire
@dataclass(frozen=True, slots=True)
class StatusChange:
    """One step of an instance's life. `seq` is the client's number for it; None is another hand's, or the registry's.

    `number` is the taking registry's for such a change, so that it is applied once however often it is sent. `until`
    says when a draining ends by itself; None: not by itself. `age_s` is how many seconds ago it happened.
    """

    instance_id: str
    status: Status
    seq: int | None = None
    cause: str | None = None
    number: int | None = None
    until: datetime | None = None
    age_s: float = 0.0


@wire
@dataclass(frozen=True, slots=True)
class RegisterChange:
    """A registration on its way to the store, with the client's sequence number."""

    registration: Registration
    seq: int = 0

    @property
    def instance_id(self) -> str:
        return self.registration.instance_id


Change: TypeAlias = RegisterChange | StatusChange


@wire
@dataclass(frozen=True, slots=True)
class SequencedChange:
    """A change on its way to the registry; `after` names the registry process that took the one before it, where that
    may not be durable (see Receipt)."""

    change: Change
    after: str | None = None


class Beat(NamedTuple):
    """A renewal: the agent was heard `age_s` seconds before the statement runs. A tuple: they come by the 10,000."""

    instance_id: str
    age_s: float = 0.0


@wire
@dataclass(frozen=True, slots=True)
class Transition:
    """A committed step of an instance's life. `from_status` None: it was registered. `seq` is the agent's own number
    of the change, None where another hand made it. `until` is when a draining ends by itself."""

    instance_id: str
    logical_id: str
    from_status: Status | None
    to_status: Status
    seq: int | None
    cause: str | None
    at: datetime
    until: datetime | None = None


class LiveState(NamedTuple):
    """What must be the same of a live instance wherever it is known. A tuple: they come by the 100,000."""

    logical_id: str
    instance_id: str
    status: Status
    seq: int
    cluster_epoch: str


class OutcomeKind(str, Enum):
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
    """The store's answer to one change: what it did, and what the row says now (None: no row)."""

    kind: OutcomeKind
    status: Status | None = None
    cluster_epoch: str | None = None
    cause: str | None = None


class BeatOutcome(str, Enum):
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
class Epoch:
    """A fleet generation: its name and its monotonic number."""

    name: str
    number: int


@wire
@dataclass(frozen=True, slots=True)
class EpochRecord:
    """An epoch's story: named at `staged_at`, shown from `current_at` (None: not yet) to `retired_at` (None: still,
    or not yet), with the number of its instances that are not dead."""

    name: str
    number: int
    staged_at: datetime
    current_at: datetime | None
    retired_at: datetime | None
    live: int

    @property
    def state(self) -> str:
        """`staged`, `current` or `retired`."""
        if self.retired_at is not None:
            return "retired"
        return "staged" if self.current_at is None else "current"


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


def one_object(text: str | None) -> str | None:
    """The same text, as the one object of all that are equal: what many instances have in common is held once."""
    return None if text is None else intern(text)


def new_instance_id() -> str:
    """A fresh incarnation: a random UUID in canonical form."""
    return str(uuid.uuid4())


def check_instance_id(value: str) -> str:
    """The canonical form of a UUID, or InvalidInputError."""
    try:
        canonical = str(uuid.UUID(value))
    except (ValueError, AttributeError, TypeError):
        raise InvalidInputError("instance_id", f"must be a UUID, not {_shown(value)}") from None
    if canonical != value:
        raise InvalidInputError("instance_id", f"must be a UUID in lower case with dashes, not {_shown(value)}")
    return value


def check_kind(name: str, value: T, kind: type[Any] | tuple[type[Any], ...]) -> T:
    """The value, or InvalidInputError where it is of another kind."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(one.__name__ for one in kinds)
        raise InvalidInputError(name, f"must be of type {wanted}, not {type(value).__name__}")
    return value


def check_text(name: str, value: str, max_chars: int) -> str:
    """Refuse what is not a string, empty, too long, or has characters that a name cannot have."""
    _check_length(name, value, max_chars)
    char = first_unfit(value)
    if char is not None and category(char) == "Cc":
        raise InvalidInputError(name, "must not contain NUL or control characters")
    if char is not None:
        raise InvalidInputError(name, f"must not contain invisible or unassigned characters: U+{ord(char):04X}")
    return value


def check_key(name: str, value: str) -> str:
    """A text to look for, or InvalidInputError: an older row may have a name that a new one cannot have."""
    _check_length(name, value, MAX_ID_CHARS)
    if _NEVER_STORED.search(value):
        raise InvalidInputError(name, "must not contain NUL or control characters, or broken Unicode")
    return value


def _check_length(name: str, value: str, max_chars: int) -> None:
    if not isinstance(value, str):
        raise InvalidInputError(name, f"must be text, not {type(value).__name__}")
    if not value or not value.strip():
        raise InvalidInputError(name, "must not be empty")
    if len(value) > max_chars:
        raise InvalidInputError(name, f"must have at most {max_chars} characters, not {len(value)}")


def check_logical_id(value: str) -> str:
    """A legal logical id, or InvalidInputError."""
    if check_text("logical_id", value, MAX_ID_CHARS) in {".", ".."}:
        raise InvalidInputError("logical_id", f"must not be {value!r}: no URL can name it")
    return value


def check_epoch(value: str) -> str:
    """A legal epoch name, or InvalidInputError."""
    return check_text("cluster_epoch", value, MAX_EPOCH_CHARS)


def check_status(value: Status | str) -> Status:
    """A Status from its name, or InvalidInputError listing the legal ones."""
    try:
        return Status(value)
    except ValueError:
        legal = ", ".join(status.value for status in Status)
        raise InvalidInputError("status", f"must be one of {legal}, not {_shown(value)}") from None


def operators_cause(reason: str | None, who: str | None = None) -> str:
    """The cause of what an operator does, with the reason that was given for it and the name of who is known."""
    by = "by an operator" if who is None else f"by an operator ({who})"
    return by if reason is None else f"{by}: {check_text('reason', reason, MAX_REASON_CHARS)}"


def check_statuses(values: Sequence[Status | str] | None) -> frozenset[Status] | None:
    """The statuses of a list of names, None for any, or InvalidInputError."""
    if values is None:
        return None
    if not isinstance(values, (list, tuple, set, frozenset)):
        raise InvalidInputError("statuses", f"must be a list of statuses, not {_shown(values)}")
    return frozenset(check_status(value) for value in values)


def check_cause(value: str | None) -> str | None:
    """A short free text, or InvalidInputError."""
    return None if value is None else check_text("cause", value, MAX_TEXT_CHARS)


def check_seq(value: int | None) -> int | None:
    """A sequence number that fits a bigint, or InvalidInputError."""
    if value is not None and not (type(value) is int and 0 <= value < 2**63):
        raise InvalidInputError("seq", f"must be a whole number from 0 to 2^63-1, not {_shown(value)}")
    return value


def check_load(value: float) -> float:
    """A load: any finite number from 0, or InvalidInputError."""
    if type(value) not in {int, float} or not 0 <= value < math.inf:
        raise InvalidInputError("load", f"must be a finite number from 0, not {_shown(value)}")
    return value


def check_timeout(timeout_s: float | None) -> float | None:
    """Seconds to wait, None for as long as it takes, or InvalidInputError."""
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
        raise InvalidInputError("timeout_s", f"must be a number of seconds, not {type(timeout_s).__name__}")
    if math.isnan(timeout_s) or timeout_s < 0:
        raise InvalidInputError("timeout_s", f"must be 0 seconds or more, not {timeout_s:g}")
    return timeout_s


def check_beats(instance_ids: Sequence[str], loads: Mapping[str, float], limit: int) -> None:
    """Refuse beats that are no list of ids, or too many, and loads that are none, or of others."""
    if not isinstance(instance_ids, (list, tuple)) or len(instance_ids) > limit:
        raise InvalidInputError("instance_ids", f"must be a list of at most {limit} ids")
    if not all(isinstance(instance_id, str) for instance_id in instance_ids):
        raise InvalidInputError("instance_ids", "must be UUIDs as text")
    if not isinstance(loads, Mapping) or len(loads) > len(instance_ids):
        raise InvalidInputError("loads", "must be a mapping of some of the instance ids to their loads")
    for load in loads.values():
        check_load(load)


def check_until(change: StatusChange) -> StatusChange:
    """A change of which only a draining ends by itself, or InvalidInputError."""
    if change.until is not None and change.status is not Status.DRAINING:
        raise InvalidInputError("until", f"only draining ends by itself, not {change.status}")
    return change


def check_drain_s(drain_s: float) -> float:
    """How long a draining lasts before it ends by itself, in seconds, or InvalidInputError."""
    if type(drain_s) not in {int, float} or not 0 < drain_s <= MAX_DRAIN_S:
        raise InvalidInputError("for_s", f"must be above 0 and at most {MAX_DRAIN_S} seconds, not {_shown(drain_s)}")
    return drain_s


def check_lease(lease_s: float) -> float:
    """A lease from just above nothing to a day, in seconds, or InvalidInputError."""
    if not 0 < lease_s <= MAX_LEASE_S:
        raise InvalidInputError("lease_s", f"must be above 0 and at most {MAX_LEASE_S} seconds, not {lease_s!r}")
    return lease_s


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuse label sets that are too large or not plain text."""
    if not isinstance(labels, Mapping):
        raise InvalidInputError("labels", f"must be a mapping of text to text, not {type(labels).__name__}")
    if len(labels) > MAX_LABELS:
        raise InvalidInputError("labels", f"must have at most {MAX_LABELS} keys, not {len(labels)}")
    for key, value in labels.items():
        check_text("label key", key, MAX_LABEL_KEY_CHARS)
        if value != "":
            check_text(f"label {key!r}", value, MAX_LABEL_VALUE_CHARS)


def _check_metadata(metadata: Mapping[str, Json]) -> None:
    if not isinstance(metadata, Mapping):
        raise InvalidInputError("metadata", f"must be a mapping, not {type(metadata).__name__}")
    _check_json(metadata, MAX_METADATA_DEPTH)
    try:
        text = json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInputError("metadata", f"must be plain JSON: {error}") from None
    if len(text) > MAX_METADATA_BYTES:
        raise InvalidInputError("metadata", f"must be at most {MAX_METADATA_BYTES} bytes of JSON, not {len(text)}")


def _check_json(value: object, depth_left: int) -> None:
    """Refuse what json.dumps would take and jsonb, or a reader of it, would not give back."""
    if isinstance(value, str):
        if "\x00" in value or _SURROGATE.search(value):
            raise InvalidInputError("metadata", "must not contain NUL or broken Unicode")
    elif isinstance(value, (Mapping, list, tuple)):
        if depth_left == 0:
            raise InvalidInputError("metadata", f"must not be nested deeper than {MAX_METADATA_DEPTH} levels")
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise InvalidInputError("metadata", f"must have text for keys, not {_shown(key)}")
                _check_json(key, depth_left)
        for child in value.values() if isinstance(value, Mapping) else value:
            _check_json(child, depth_left - 1)


def _check_ip(value: str) -> None:
    # to Python numbers and bytes are addresses too, and PostgreSQL knows none with a zone ("%eth0")
    if not isinstance(value, str) or "%" in value or not _is_ip(value):
        raise InvalidInputError("ip_address", f"must be an IP address, not {_shown(value)}")


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
