"""Which instance of an agent is the best one. The view `active_instance` follows the same order."""

from __future__ import annotations

from collections.abc import Iterable

from seedcore.core.lifecycle import Status
from seedcore.core.model import Instance

_RANK = {Status.ALIVE: 0, Status.DRAINING: 1, Status.STARTING: 2, Status.DEAD: 3}


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
