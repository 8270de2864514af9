"""Instances as columns, for a message that has many of them: a fifth of the work of pickling one after another.

As everywhere between versions, a receiver drops columns that it does not know, and uses the default of a field that it
did not receive.
"""

from __future__ import annotations

import pickle
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from itertools import repeat
from operator import attrgetter
from typing import Any

from seedcore.core.instances import Instance
from seedcore.core.wire import default_of, setters_of

_FIELDS = {field.name: field for field in fields(Instance)}
_values = attrgetter(*_FIELDS)
_SETTERS = setters_of(Instance)
_TIMES = ("started_at", "status_changed_at", "last_heartbeat")


def pack(instances: Sequence[Instance], last_heartbeats_s: Iterable[float] | None = None) -> bytes:
    """The instances in their order, in bytes for `unpack`. `last_heartbeats_s` are the times of their last beats, in
    seconds since 1970, where those that they have are older."""
    columns: dict[str, Any] = dict(zip(_FIELDS, zip(*map(_values, instances), strict=True), strict=bool(instances)))
    known = {} if last_heartbeats_s is None else {"last_heartbeat": last_heartbeats_s}
    for name in _TIMES:
        columns[name] = array("d", known[name] if name in known else [at.timestamp() for at in columns.get(name, ())])
    return pickle.dumps((len(instances), columns), pickle.HIGHEST_PROTOCOL)


def unpack(packed: bytes) -> tuple[Instance, ...]:
    """The instances of `pack`, their times in UTC. Raises TypeError where a field without a default was not sent."""
    # from an actor, whose answers are pickled as well
    count, columns = pickle.loads(packed)  # noqa: S301
    if not count:
        return ()
    instances = tuple(map(object.__new__, repeat(Instance, count)))
    for name, field in _FIELDS.items():
        column = columns.get(name)
        if column is None:
            column = repeat(default_of(Instance, field), count)
        elif name in _TIMES:
            column = map(datetime.fromtimestamp, column, repeat(UTC))
        deque(map(_SETTERS[name], instances, column), maxlen=0)
    return instances
