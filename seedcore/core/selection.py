"""Chooses one of the routable instances of an agent.

The SQL view `active_instance` uses the same order as `preference`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status

_RANK = {Status.ALIVE: 0, Status.DRAINING: 1, Status.STARTING: 2, Status.DEAD: 3}


class Policy(StrEnum):
    """How to choose among several routable instances of one agent. Each policy prefers instances with an actor, and
    breaks ties by `preference`, so that answers do not flap."""

    NEWEST = "newest"
    """The newest incarnation. This is the default."""
    SAME_NODE = "same_node"
    """The newest instance on the caller's node; if there is none, the newest on any node."""
    LEAST_LOADED = "least_loaded"
    """The instance with the lowest load in its last beat. An instance that reports no load counts as idle."""
    ROUND_ROBIN = "round_robin"
    """Each instance in turn. Each caller counts its own turns."""
    STICKY = "sticky"
    """The same instance for the same key while it is routable. When an instance ends, only its own keys move."""


def preference(instance: Instance) -> tuple[int, bool, float, str]:
    """Sort key, best first: status, then instances with an actor, then the newest incarnation. The id breaks ties, so
    that the order is total."""
    return (
        _RANK[instance.status],
        instance.actor_name is None,
        -instance.started_at.timestamp(),
        instance.instance_id,
    )


def best(instances: Iterable[Instance]) -> Instance | None:
    """Return the preferred instance, or None if there are no instances."""
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
    """Return one of the routable instances, or None if there are none. `node_id` is the caller's node, `loads` maps
    instance ids to loads, `turn` counts the caller's choices, and `key` is the key of STICKY."""
    with_actor = [row for row in candidates if row.actor_name is not None]
    eligible = with_actor or list(candidates)
    if policy is Policy.SAME_NODE:
        return best([row for row in eligible if row.node_id == node_id] or eligible)
    if policy is Policy.LEAST_LOADED:
        known_loads = loads if loads is not None else {}
        return min(eligible, key=lambda row: (known_loads.get(row.instance_id, 0.0), preference(row)), default=None)
    if policy is Policy.ROUND_ROBIN:
        return sorted(eligible, key=lambda row: row.instance_id)[turn % len(eligible)] if eligible else None
    if policy is Policy.STICKY:
        # rendezvous hashing: Thaler and Ravishankar, 1998
        return max(eligible, key=lambda row: (_weight(key, row.instance_id), row.instance_id), default=None)
    return best(eligible)


def _weight(key: str, instance_id: str) -> bytes:
    return hashlib.blake2b(f"{instance_id}\0{key}".encode(), digest_size=8).digest()
