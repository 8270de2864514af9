"""The loads that agents send with their beats, and which of them a follower has not received yet.

A load is no change of the feed and wakes no follower. Only loads of agents with several instances are sent: a caller
has no choice among the instances of another agent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile

MAX_LOADS_PER_ANSWER = 10_000


class Loads:
    """Use it from one event loop. Each change of a load that is sent has a number; `number` is the last one."""

    def __init__(self) -> None:
        self.number = 0
        self._loads: dict[str, float] = {}
        # of those that are sent, in the order of their last changes
        self._numbers: dict[str, int] = {}

    def note(self, instance_id: str, load: float, *, is_sent: bool) -> None:
        """Record the load of an instance. `is_sent`: its agent has several instances."""
        if self._loads.get(instance_id) != load:
            self._loads[instance_id] = load
            if is_sent:
                self.send(instance_id)

    def send(self, instance_id: str) -> None:
        """Send the load of an instance, if it has one: its agent has several instances now."""
        if instance_id in self._loads:
            self.number += 1
            self._numbers.pop(instance_id, None)
            self._numbers[instance_id] = self.number

    def repeat(self, loads: Mapping[str, float], number: int) -> None:
        """Take the loads that a registry has sent up to a number, so that they can be sent on under its numbers."""
        for at, (instance_id, load) in enumerate(loads.items(), number - len(loads) + 1):
            self._loads[instance_id] = load
            self._numbers.pop(instance_id, None)
            self._numbers[instance_id] = at
        self.number = number

    @property
    def by_id(self) -> Mapping[str, float]:
        """The load of each instance that has sent one."""
        return self._loads

    def discard(self, instance_id: str) -> None:
        """Remove an instance that lives no longer."""
        self._loads.pop(instance_id, None)
        self._numbers.pop(instance_id, None)

    def of(self, instance_ids: Iterable[str]) -> dict[str, float]:
        """The loads of those instances that have sent one."""
        loads = self._loads
        return {instance_id: loads[instance_id] for instance_id in instance_ids if instance_id in loads}

    def since(
        self, number: int, is_wanted: Callable[[str], bool], limit: int = MAX_LOADS_PER_ANSWER
    ) -> tuple[dict[str, float], int]:
        """The loads that have changed since `number`, at most `limit`, and the number to ask with next time."""
        newest_first = takewhile(lambda entry: entry[1] > number, reversed(self._numbers.items()))
        changed = [entry for entry in newest_first if is_wanted(entry[0])]
        changed.reverse()
        reached = self.number if len(changed) <= limit else changed[limit - 1][1]
        return {instance_id: self._loads[instance_id] for instance_id, _ in changed[:limit]}, reached
