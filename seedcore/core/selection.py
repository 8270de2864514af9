"""Which instance of an agent is the best one, and other ways to choose among those that may be handed out.

The view `active_instance` follows the order of `preference`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

from seedcore.core.lifecycle import Status
from seedcore.core.model import Instance

_RANK = {Status.ALIVE: 0, Status.DRAINING: 1, Status.STARTING: 2, Status.DEAD: 3}


class Policy(str, Enum):
    """How to choose among several instances of one agent that may be handed out. In each, whoever has an actor to call
    comes before whoever has none, and ties go by `preference`, so that an answer never flaps."""

    NEWEST = "newest"
    """The newest incarnation: the default."""
    SAME_NODE = "same_node"
    """One on the caller's node where there is any; among those, the newest."""
    LEAST_LOADED = "least_loaded"
    """The one whose last beat told the lowest load; who tells none counts as idle."""
    ROUND_ROBIN = "round_robin"
    """One after the other, each caller for itself."""
    STICKY = "sticky"
    """The same for the same key, as long as it may be handed out; its end moves only its own keys."""

    def __str__(self) -> str:
        return self.value


def preference(instance: Instance) -> tuple[int, bool, float, str]:
    """Sort key, best first: by status, then whoever has an actor to call, then the newest incarnation, then
    the id, so that ties never flap."""
    return (
        _RANK[instance.status],
        instance.actor_name is None,
        -instance.started_at.timestamp(),
        instance.instance_id,
    )


def best(instances: Iterable[Instance]) -> Instance | None:
    """The preferred instance of those given, or None of none."""
    return min(instances, key=preference, default=None)


def choose(
    candidates: Sequence[Instance],
    policy: Policy = Policy.NEWEST,
    *,
    node_id: str | None = None,
    loads: Mapping[str, float] | None = None,
    turn: int = 0,
    key: str = "",
) -> Instance | None:
    """One of those that may be handed out, or None of none. `node_id` is the caller's, `loads` are by instance id,
    `turn` counts a caller's choices, `key` is what sticks."""
    callable_ones = [row for row in candidates if row.actor_name is not None]
    some = callable_ones or list(candidates)
    if policy is Policy.SAME_NODE:
        return best([row for row in some if row.node_id == node_id] or some)
    if policy is Policy.LEAST_LOADED:
        told = loads if loads is not None else {}
        return min(some, key=lambda row: (told.get(row.instance_id, 0.0), preference(row)), default=None)
    if policy is Policy.ROUND_ROBIN:
        return sorted(some, key=lambda row: row.instance_id)[turn % len(some)] if some else None
    if policy is Policy.STICKY:
        # rendezvous hashing: Thaler and Ravishankar, 1998
        return max(some, key=lambda row: (_weight(key, row.instance_id), row.instance_id), default=None)
    return best(some)


def _weight(key: str, instance_id: str) -> bytes:
    return hashlib.blake2b(f"{instance_id}\0{key}".encode(), digest_size=8).digest()
