"""What a wait is for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from seedcore.core.answers import InstanceFilter
from seedcore.core.errors import InvalidInputError
from seedcore.core.limits import MAX_PAGE
from seedcore.registry.caller.watching import check_filter, check_ids


@dataclass(frozen=True, slots=True)
class AwaitedAgents:
    """What a wait is for: `count` of the agents with these ids, or of those that the filter matches. `about` describes
    them."""

    ids: tuple[str, ...] | None
    wanted: InstanceFilter
    count: int
    about: str


def awaited(
    ids: Sequence[str] | None,
    organ_id: str | None,
    selector: str | None,
    count: int | None,
    endpoint: str | None = None,
) -> AwaitedAgents:
    """What a wait is for, or InvalidInputError."""
    wanted = check_filter(ids, organ_id, selector, endpoint)
    if count is not None and (type(count) is not int or not 1 <= count <= MAX_PAGE):
        raise InvalidInputError("count", f"must be a whole number from 1 to {MAX_PAGE}, not {count!r}")
    if ids is not None:
        checked = check_ids(ids)
        if count is not None and count > len(checked):
            raise InvalidInputError("count", f"must be at most the number of ids, {len(checked)}, not {count}")
        return AwaitedAgents(checked, wanted, len(checked) if count is None else count, "agents")
    if organ_id is None and selector is None and endpoint is None:
        raise InvalidInputError("ids", "name the agents to wait for, by ids, organ_id, selector or endpoint")
    if count is None:
        raise InvalidInputError("count", "must be given where no ids are: how many agents to wait for")
    organ = "" if organ_id is None else f" of organ {organ_id!r}"
    labels = f" with {selector!r}" if selector else ""
    at = "" if endpoint is None else f" with endpoint {endpoint!r}"
    return AwaitedAgents(None, wanted, count, f"agents{organ}{labels}{at}")


def check_deadline(timeout_s: float) -> float:
    """Seconds until the deadline of a wait, or InvalidInputError."""
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)):
        raise InvalidInputError("timeout_s", f"must be a number of seconds, not {type(timeout_s).__name__}")
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise InvalidInputError("timeout_s", f"must be finite and more than 0 seconds, not {timeout_s:g}")
    return float(timeout_s)
