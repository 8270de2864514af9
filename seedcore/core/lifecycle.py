"""The transition table of an instance. No transition leaves `dead`."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """The status of an instance: reported by the instance, or declared by the registry."""

    STARTING = "starting"
    ALIVE = "alive"
    DRAINING = "draining"
    DEAD = "dead"


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.STARTING: frozenset({Status.ALIVE, Status.DRAINING, Status.DEAD}),
    Status.ALIVE: frozenset({Status.DRAINING, Status.DEAD}),
    Status.DRAINING: frozenset({Status.ALIVE, Status.DEAD}),
    Status.DEAD: frozenset(),
}

LIVE_STATUSES = frozenset({Status.STARTING, Status.ALIVE, Status.DRAINING})


def is_allowed(current: Status, wanted: Status) -> bool:
    """Whether an instance may go from `current` to `wanted`. The same status again is not a transition."""
    return wanted in TRANSITIONS[current]
