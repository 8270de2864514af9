"""How many bytes of memory the values of a registry use, and their bound.

A weight depends on the value alone, so what is added and what is subtracted later are the same. It is an estimate that
is not below what CPython allocates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from sys import getsizeof

from seedcore.core.causes import Cause
from seedcore.core.changes import Change, HoldChange, RegisterChange, Registration
from seedcore.core.dependencies import Dependency
from seedcore.core.errors import RegistryFullError
from seedcore.core.index import InstanceIndex
from seedcore.core.instances import Instance
from seedcore.core.limits import MAX_METADATA_DEPTH

MIB = 1024 * 1024
MAX_INSTANCE_BYTES = 1024 * MIB
PLACES_BYTES = 256
"""What a live instance uses beside itself: its places in the orders of the members, its entry in the death watch."""
# the instance with texts of usual length
_ROW_BYTES = 1024
_USUAL_CHARS = 448
_CHANGE_BYTES = 640
_CHAR_BYTES = 4
_VALUE_BYTES = 32


class MemoryBound:
    """The bytes that the live instances and the changes that wait for the database use, and their common bound."""

    def __init__(self, limit: int = MAX_INSTANCE_BYTES) -> None:
        self.limit = limit
        self.instances = 0
        self.waiting = 0

    @property
    def used(self) -> int:
        """The bytes of all of them."""
        return self.instances + self.waiting

    def require(self, more: int) -> None:
        """Raise RegistryFullError unless `more` bytes fit. What uses no more than before always fits."""
        if more > 0 and self.used + more > self.limit:
            raise RegistryFullError(
                f"{self.limit // MIB} MiB of instances",
                "raise SEEDCORE_MAX_INSTANCES_MIB, or register with less metadata",
            )


class WeighedIndex(InstanceIndex):
    """An index that counts the bytes of its instances."""

    def __init__(self, memory: MemoryBound) -> None:
        super().__init__()
        self._memory = memory

    def put(self, instance: Instance) -> None:
        known = self.get(instance.instance_id)
        self._memory.instances += growth(known, instance) + (PLACES_BYTES if known is None else 0)
        super().put(instance)

    def pop(self, instance_id: str) -> Instance | None:
        known = super().pop(instance_id)
        if known is not None:
            self._memory.instances -= weight_of(known) + PLACES_BYTES
        return known


def weight_of(instance: Instance) -> int:
    """The bytes that an instance uses."""
    return _texts(instance) + _sizes(instance)


def growth(before: Instance | None, after: Instance) -> int:
    """How many bytes more are used once `after` is in the place of `before`."""
    if before is None:
        return weight_of(after)
    # most changes keep all three: then they need not be looked through
    if before.labels is after.labels and before.metadata is after.metadata and before.endpoints is after.endpoints:
        return _texts(after) - _texts(before)
    return weight_of(after) - weight_of(before)


def weight_of_change(change: Change) -> int:
    """The bytes that a change uses while it is kept."""
    if isinstance(change, RegisterChange):
        registration = change.registration
        return _CHANGE_BYTES + _sizes(registration) + _size_of_dependencies(registration.dependencies)
    cause = change.why if isinstance(change, HoldChange) else change.cause
    return _CHANGE_BYTES + weight_of_cause(cause)


def weight_of_cause(cause: Cause | None) -> int:
    """The bytes that the text of a cause uses."""
    return 0 if cause is None or cause.detail is None else _CHAR_BYTES * len(cause.detail)


def _texts(row: Instance) -> int:
    chars = (
        len(row.instance_id)
        + len(row.logical_id)
        + len(row.cluster_epoch)
        + len(row.actor_name or "")
        + len(row.namespace or "")
        + len(row.actor_id or "")
        + len(row.serve_route or "")
        + len(row.organ_id or "")
        + len(row.node_id or "")
        + len(row.process_key or "")
    )
    if row.cause is not None and row.cause.detail is not None:
        chars += len(row.cause.detail)
    for hold in row.holds:
        chars += _USUAL_CHARS // 4 + len(hold.reason or "") + len(hold.by or "")
    return _ROW_BYTES + _CHAR_BYTES * max(0, chars - _USUAL_CHARS) + _size_of_dependencies(row.dependencies)


def _size_of_dependencies(dependencies: Sequence[Dependency]) -> int:
    return sum(
        4 * _VALUE_BYTES + _CHAR_BYTES * (len(one.name) + len(one.process_key) + len(one.stderr_path or ""))
        for one in dependencies
    )


def _sizes(details: Instance | Registration) -> int:
    return _own_size(details.labels) + _own_size(details.metadata) + _own_size(details.endpoints)


def _own_size(details: Mapping[str, object]) -> int:
    # all instances that have none share one
    return _size(details) if details else 0


def _size(value: object, depth: int = 0) -> int:
    """The bytes of a JSON value with all its parts. What is nested too deeply is refused elsewhere, and counts once."""
    if isinstance(value, str):
        # not getsizeof: a text grows when it is encoded
        return _VALUE_BYTES + 24 + (len(value) if value.isascii() else _CHAR_BYTES * len(value) + _VALUE_BYTES)
    if isinstance(value, Mapping) and depth <= MAX_METADATA_DEPTH:
        return getsizeof(value) + sum(_size(key) + _size(child, depth + 1) for key, child in value.items())
    if isinstance(value, (list, tuple)) and depth <= MAX_METADATA_DEPTH:
        return getsizeof(value) + sum(_size(child, depth + 1) for child in value)
    return max(_VALUE_BYTES, getsizeof(value))
