"""What changes an instance: a registration, a status, or a hold."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from seedcore.core.causes import Cause
from seedcore.core.dependencies import Dependency, check_dependencies
from seedcore.core.errors import InvalidInputError
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.lifecycle import Status
from seedcore.core.limits import (
    MAX_ID_CHARS,
    MAX_TEXT_CHARS,
    Json,
    check_age,
    check_cause,
    check_endpoints,
    check_epoch,
    check_hold,
    check_instance_id,
    check_ip,
    check_kind,
    check_labels,
    check_logical_id,
    check_metadata,
    check_seq,
    check_text,
)
from seedcore.core.wire import wire


@wire
@dataclass(frozen=True, slots=True)
class Registration:
    """What an agent registers with. Call `validated()` before it is sent.

    `process_key` distinguishes its process from a later one with the same `pid` (see ray_support.process_keys).
    `endpoints` are URLs by name.
    `cluster_epoch` is the epoch that it requires. Without one it belongs to `started_epoch`, the epoch in which its
    process started, and without that to the current epoch, unless its actor had an instance in another one before.
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
    endpoints: Mapping[str, str] = field(default_factory=dict)
    dependencies: tuple[Dependency, ...] = ()

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
            check_ip(self.ip_address)
        if self.pid is not None and not (type(self.pid) is int and 0 < self.pid < 2**31):
            raise InvalidInputError("pid", f"must be a positive 32-bit integer, not {self.pid!r}")
        check_labels(self.labels)
        check_metadata(self.metadata)
        check_endpoints(self.endpoints)
        check_dependencies(self.dependencies)
        return self


@wire
@dataclass(frozen=True, slots=True)
class StatusChange:
    """A change of an instance's reported status.

    `seq` is the agent's number of the change. Where it is None the registry made the change, and `number` is the number
    of the registry process that sends it, so that a repeated change counts once. It happened `age_s` seconds ago.
    """

    instance_id: str
    status: Status
    seq: int | None = None
    cause: Cause | None = None
    number: int | None = None
    age_s: float = 0.0

    def validated(self) -> StatusChange:
        """The same change, or InvalidInputError naming the first bad field."""
        check_seq(self.seq)
        check_cause(self.cause)
        check_age(self.age_s)
        return self


@wire
@dataclass(frozen=True, slots=True)
class HoldChange:
    """A change of one hold of an instance: `hold` replaces the hold of `kind`, None releases it.

    `cause` None: the reason of the hold is the cause. `seq`, `number` and `age_s` are as in StatusChange.
    """

    instance_id: str
    kind: HoldKind
    hold: Hold | None = None
    number: int | None = None
    cause: Cause | None = None
    age_s: float = 0.0
    seq: int | None = None

    @property
    def why(self) -> Cause | None:
        """The cause of the change."""
        return self.hold.cause if self.cause is None and self.hold is not None else self.cause

    def validated(self) -> HoldChange:
        """The same change, or InvalidInputError naming the first bad field."""
        check_kind("kind", self.kind, HoldKind)
        if self.hold is not None:
            check_hold(self.hold)
            if self.hold.kind is not self.kind:
                raise InvalidInputError("hold", f"must be of kind {self.kind}, not {self.hold.kind}")
        check_seq(self.seq)
        check_cause(self.cause)
        check_age(self.age_s)
        return self


@wire
@dataclass(frozen=True, slots=True)
class RegisterChange:
    """A registration on its way to the store, with the client's sequence number. It happened `age_s` seconds ago.

    `is_update`: it changes the details of an instance that is registered, and never makes one: where the instance is
    unknown, its status is unknown too, and the agent registers it again with both. `is_alive`: the agent also reports
    `alive`, which takes two numbers; `seq` is the later one.
    """

    registration: Registration
    seq: int = 0
    age_s: float = 0.0
    is_update: bool = False
    is_alive: bool = False

    @property
    def instance_id(self) -> str:
        return self.registration.instance_id

    def alone(self) -> RegisterChange:
        """The registration without the status that it may have."""
        return replace(self, seq=self.seq - 1, is_alive=False) if self.is_alive else self

    def status_change(self) -> StatusChange:
        """The status of a registration that is alive, as the change that follows `alone()`."""
        return StatusChange(self.instance_id, Status.ALIVE, self.seq)


Change: TypeAlias = RegisterChange | StatusChange | HoldChange


@wire
@dataclass(frozen=True, slots=True)
class SequencedChange:
    """A change on its way to the registry. `after` names the registry process that received the change before it:
    another one may not have that, though it was durable, and refuses this one (see Receipt)."""

    change: Change
    after: str | None = None


def new_instance_id() -> str:
    """A fresh incarnation: a random UUID in canonical form."""
    return str(uuid.uuid4())
