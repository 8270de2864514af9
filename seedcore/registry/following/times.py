"""The times of a follower."""

from __future__ import annotations

from dataclasses import dataclass

MAX_AGE_S = 4.0


@dataclass(frozen=True, slots=True)
class FollowTimes:
    """The times of a follower, in seconds. `wait_s` is how long the registry may wait for a change. `retry_s` grows to
    `retry_longest_s`; `full_s` to `full_longest_s` while the registry has no place for another follower. Loads are
    received at most once per `loads_s`."""

    max_age_s: float = MAX_AGE_S
    wait_s: float = 2.0
    retry_s: float = 0.1
    retry_longest_s: float = 2.0
    full_s: float = 2.0
    full_longest_s: float = 30.0
    loads_s: float = 1.0
