"""Chooses one of the routable instances of an agent.

The SQL view `active_instance` uses the same order as `preference`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum

from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status

_RANK = {Status.ALIVE: 0, Status.DRAINING: 1, Status.STARTING: 2, Status.DEAD: 3}


class Policy(StrEnum):
    """How to choose among several routable instances of one agent. Each policy prefers instances with an actor, and
    breaks ties by `preference`, so that answers do not flap; but LEAST_LOADED and LEAST_OUTSTANDING break them by
    chance, so that many callers spread."""

    NEWEST = "newest"
    """The newest incarnation. This is the default."""
    SAME_NODE = "same_node"
    """The newest instance on the caller's node; if there is none, the newest on any node."""
    LEAST_LOADED = "least_loaded"
    """The instance with the lower load of two that are chosen by chance: a load is some seconds old, and the lowest of
    all would attract every caller at once. An instance that reports no load counts as idle."""
    ROUND_ROBIN = "round_robin"
    """Each instance in turn. Each caller counts its own turns."""
    STICKY = "sticky"
    """The same instance for the same key while it is routable. When an instance ends, only its own keys move."""
    LEAST_OUTSTANDING = "least_outstanding"
    """The instance with the fewest calls of this caller under way."""


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
    outstanding: Mapping[str, int] | None = None,
    chance: Callable[[], float] = random.random,
) -> Instance | None:
    """Return one of the routable instances, or None if there are none. `node_id` is the caller's node, `loads` maps
    instance ids to loads, `turn` counts the caller's choices, `key` is the key of STICKY, `outstanding` maps instance
    ids to the caller's calls under way, and `chance` returns numbers from 0 to below 1."""
    with_actor = [row for row in candidates if row.actor_name is not None]
    eligible = with_actor or list(candidates)
    if policy is Policy.SAME_NODE:
        return best([row for row in eligible if row.node_id == node_id] or eligible)
    if policy is Policy.LEAST_LOADED:
        return _less_loaded_of_two(eligible, loads if loads is not None else {}, chance)
    if policy is Policy.LEAST_OUTSTANDING:
        calls = outstanding if outstanding is not None else {}
        counts = [calls.get(row.instance_id, 0) for row in eligible]
        fewest = min(counts, default=0)
        idlest = [row for row, count in zip(eligible, counts, strict=True) if count == fewest]
        return idlest[int(chance() * len(idlest))] if idlest else None
    if policy is Policy.ROUND_ROBIN:
        return sorted(eligible, key=lambda row: row.instance_id)[turn % len(eligible)] if eligible else None
    if policy is Policy.STICKY:
        # rendezvous hashing: Thaler and Ravishankar, 1998
        return max(eligible, key=lambda row: (_weight(key, row.instance_id), row.instance_id), default=None)
    return best(eligible)


def _less_loaded_of_two(
    rows: Sequence[Instance], loads: Mapping[str, float], chance: Callable[[], float]
) -> Instance | None:
    """Mitzenmacher, 2001: the power of two choices."""
    if len(rows) < 2:
        return rows[0] if rows else None
    first = int(chance() * len(rows))
    second = int(chance() * (len(rows) - 1))
    one, other = rows[first], rows[second + (second >= first)]
    return other if loads.get(other.instance_id, 0.0) < loads.get(one.instance_id, 0.0) else one


def _weight(key: str, instance_id: str) -> bytes:
    return hashlib.blake2b(f"{instance_id}\0{key}".encode(), digest_size=8).digest()
