"""What changes an instance: a registration or a status, numbered by its agent."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias

from seedcore.core.errors import InvalidInputError
from seedcore.core.lifecycle import Status
from seedcore.core.limits import (
    MAX_ID_CHARS,
    MAX_TEXT_CHARS,
    Json,
    check_epoch,
    check_instance_id,
    check_ip,
    check_labels,
    check_logical_id,
    check_metadata,
    check_text,
)
from seedcore.core.wire import wire


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
            check_ip(self.ip_address)
        if self.pid is not None and not (type(self.pid) is int and 0 < self.pid < 2**31):
            raise InvalidInputError("pid", f"must be a positive 32-bit integer, not {self.pid!r}")
        check_labels(self.labels)
        check_metadata(self.metadata)
        return self


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


def new_instance_id() -> str:
    """A fresh incarnation: a random UUID in canonical form."""
    return str(uuid.uuid4())


def check_until(change: StatusChange) -> StatusChange:
    """A change of which only a draining ends by itself, or InvalidInputError."""
    if change.until is not None and change.status is not Status.DRAINING:
        raise InvalidInputError("until", f"only draining ends by itself, not {change.status}")
    return change
