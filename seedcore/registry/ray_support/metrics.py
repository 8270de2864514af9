"""Prometheus metrics through Ray, whose agent on each node exports them.

Every name begins with `seedcore_` (Ray adds the prefix `ray_`). No label names an agent.
"""

from __future__ import annotations

import sys
from functools import lru_cache

from ray.util import metrics

PERIOD_S = 2.0


@lru_cache(maxsize=64)
def gauge(name: str, description: str, labels: tuple[str, ...] = ()) -> metrics.Gauge:
    return metrics.Gauge(f"seedcore_{name}", description=description, tag_keys=labels)


@lru_cache(maxsize=64)
def counter(name: str, description: str, labels: tuple[str, ...] = ()) -> metrics.Counter:
    return metrics.Counter(f"seedcore_{name}", description=description, tag_keys=labels)


# Ray's counters refuse an increase by zero, and increase() in Prometheus ignores the first value of a series. So a
# series starts with this value, which disappears in every sum
_SMALLEST = sys.float_info.min


class Totals:
    """Exports totals as counters, by their increase since the last export. A total starts at zero with its process."""

    def __init__(self) -> None:
        self._exported: dict[tuple[str, ...], float] = {}

    def export(self, name: str, description: str, total: float, **labels: str) -> None:
        """Export the total of the series `name` with these labels."""
        key = (name, *labels.values())
        grown = total - self._exported[key] if key in self._exported else max(total, _SMALLEST)
        if grown > 0:
            self._exported[key] = total
            counter(name, description, tuple(labels)).inc(grown, labels)
