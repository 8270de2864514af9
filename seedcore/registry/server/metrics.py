"""Prometheus metrics: the state of the registry, and the resolutions of callers. Ray's agent on each node exports them.

Every name begins with `seedcore_` (Ray adds the prefix `ray_`). No label names an agent.
"""

from __future__ import annotations

import sys
from collections import Counter as Tally
from collections.abc import Mapping
from functools import lru_cache

from ray.util import metrics

from seedcore.core.lifecycle import LIVE_STATUSES, Status
from seedcore.core.model import Verdict
from seedcore.registry.node.process_watch import Unwatched
from seedcore.registry.protocol.messages import Health

PERIOD_S = 2.0
_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
_ROWS = [1.0, 10.0, 100.0, 1000.0, 10_000.0, 100_000.0]


@lru_cache(maxsize=64)
def _gauge(name: str, description: str, labels: tuple[str, ...] = ()) -> metrics.Gauge:
    return metrics.Gauge(f"seedcore_{name}", description=description, tag_keys=labels)


@lru_cache(maxsize=64)
def _counter(name: str, description: str, labels: tuple[str, ...] = ()) -> metrics.Counter:
    return metrics.Counter(f"seedcore_{name}", description=description, tag_keys=labels)


@lru_cache(maxsize=8)
def _histogram(name: str, description: str, boundaries: tuple[float, ...]) -> metrics.Histogram:
    return metrics.Histogram(f"seedcore_{name}", description=description, boundaries=list(boundaries))


# Ray's counters refuse an increase by zero, and increase() in Prometheus ignores the first value of a series. So a
# series starts with this value, which disappears in every sum
_SMALLEST = sys.float_info.min


class Totals:
    """Exports totals as counters, by their increase since the last export. A total starts at zero with its process."""

    def __init__(self) -> None:
        self._exported: dict[tuple[str, ...], float] = {}

    def tell(self, name: str, description: str, total: float, **labels: str) -> None:
        """Export the total of the series `name` with these labels."""
        key = (name, *labels.values())
        grown = total - self._exported[key] if key in self._exported else max(total, _SMALLEST)
        if grown > 0:
            self._exported[key] = total
            _counter(name, description, tuple(labels)).inc(grown, labels)


class RegistryMetrics:
    """Exports the state of a registry, every PERIOD_S seconds."""

    def __init__(self) -> None:
        self._totals = Totals()

    def note_flush(self, seconds: float, rows: int) -> None:
        """Record a flush: its duration in seconds, and the number of rows that it committed."""
        _histogram("flush_seconds", "Duration of a flush", tuple(_SECONDS)).observe(seconds)
        _histogram("flush_rows", "Rows committed by a flush", tuple(_ROWS)).observe(rows)

    def tell(self, health: Health, instances: Mapping[tuple[Status, Verdict], int], pool: Mapping[str, int]) -> None:
        """Export every metric once."""
        for status in LIVE_STATUSES:
            for verdict in (Verdict.FRESH, Verdict.LATE, Verdict.SUSPECT):
                _gauge("instances", "Living instances", ("status", "verdict")).set(
                    instances.get((status, verdict), 0), {"status": status.value, "verdict": verdict.value}
                )
        _gauge("database_up", "1 while the database answers").set(health.store_problem is None)
        _gauge("recovered", "1 once the registry has read the database").set(health.recovered)
        _gauge("term", "Term of the registry").set(health.term or 0)
        _gauge("fenced", "1 while a newer registry writes to the database").set(health.fenced_by is not None)
        _gauge("expiry_frozen", "1 while no lease expires unless Ray confirms the death").set(health.is_frozen)
        _gauge("relays", "Running relays").set(health.relays)
        _gauge("watched_instances", "Instances whose process a relay watches").set(health.watched)
        unwatched = _gauge("unwatched_instances", "Instances whose death only their missing beats show", ("reason",))
        for reason in Unwatched:
            unwatched.set(health.unwatched.get(reason.value, 0), {"reason": reason.value})
        _gauge("followers", "Followers of the feed that wait for a change").set(health.followers)
        _gauge("beat_interval_seconds", "Beat interval that the registry requests").set(health.beat_interval_s)
        backlog = _gauge("backlog", "Changes and beats that are not committed yet", ("kind",))
        backlog.set(health.pending_changes, {"kind": "changes"})
        backlog.set(health.pending_beats, {"kind": "beats"})
        for state, count in pool.items():
            _gauge("pool_connections", "Connections of the registry's pool", ("state",)).set(count, {"state": state})
        flush, tell = health.flush, self._totals.tell
        beats = "Beats by outcome"
        tell("beats_total", beats, flush.beats_offered, outcome="offered")
        tell("beats_total", beats, flush.beats_committed, outcome="committed")
        tell("beats_total", beats, flush.beats_coalesced, outcome="coalesced")
        tell("beats_total", beats, flush.beats_dropped, outcome="dropped")
        tell("changes_committed_total", "Registrations and status changes committed", flush.changes_committed)
        tell("flush_failures_total", "Rounds of the write loop that failed", flush.failures)
        tell("fences_total", "Takeovers by a newer registry", health.fences)
        tell("lease_credit_seconds_total", "Seconds of its own absence credited to every lease", health.credited_s)
        tell("deaths_pushed_total", "Deaths reported by relays or by Ray's node table", health.deaths_reported)
        tell("deaths_declared_total", "Deaths declared by the registry, for any cause", health.deaths_declared)
        tell("became_silent_total", "Instances that became late", health.became_silent)
        tell("came_back_total", "Late instances that became fresh again", health.came_back)
        tell("healed_total", "Differences between memory and database that were repaired", health.healed)
        tell("pruned_total", "Rows of history that were pruned", health.pruned)


class CallerMetrics:
    """Exports the resolutions of a manager or of discovery, and the age of its cache."""

    def __init__(self, component: str) -> None:
        """`component` is the value of the label: "manager" or "discovery"."""
        self.resolved: Tally[str] = Tally()
        self._component = component
        self._totals = Totals()

    def tell(self, lag_s: float | None) -> None:
        """Export every metric once. `lag_s`: seconds since the registry confirmed the cache; None if it never did."""
        description = "Resolutions by the source of the answer"
        for source, total in self.resolved.items():
            self._totals.tell("resolves_total", description, total, component=self._component, source=source)
        if lag_s is not None:
            lag = _gauge("feed_lag_seconds", "Seconds since the registry confirmed the cache", ("component",))
            lag.set(lag_s, {"component": self._component})
