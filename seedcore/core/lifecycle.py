"""The transition table of an instance's reported status. No transition leaves `dead`."""

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
    """Whether an instance that reports `current` may report `wanted`. The same status again is not a transition.

    The effective status may also go back to `starting` or `alive` when a hold is released (see core.holds)."""
    return wanted in TRANSITIONS[current]
