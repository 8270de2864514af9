"""What Prometheus reads, by way of Ray's metrics agent on each node: the registry's state, and what callers ask.

Every name begins with `seedcore_` (Ray puts `ray_` in front), and no label names an agent.
"""

from __future__ import annotations

import sys
from collections import Counter as Tally
from collections.abc import Mapping
from functools import lru_cache

from ray.util import metrics

from seedcore.core.lifecycle import LIVE_STATUSES, Status
from seedcore.core.model import Verdict
from seedcore.registry.answers import Health
from seedcore.registry.processes import Unwatched

PERIOD_S = 2.0
_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
_ROWS = [1.0, 10.0, 100.0, 1000.0, 10_000.0, 100_000.0]


@lru_cache(maxsize=64)
def _gauge(name: str, told: str, labels: tuple[str, ...] = ()) -> metrics.Gauge:
    return metrics.Gauge(f"seedcore_{name}", description=told, tag_keys=labels)


@lru_cache(maxsize=64)
def _counter(name: str, told: str, labels: tuple[str, ...] = ()) -> metrics.Counter:
    return metrics.Counter(f"seedcore_{name}", description=told, tag_keys=labels)


@lru_cache(maxsize=8)
def _histogram(name: str, told: str, boundaries: tuple[float, ...]) -> metrics.Histogram:
    return metrics.Histogram(f"seedcore_{name}", description=told, boundaries=list(boundaries))


# Ray's counters take no zero, and whoever asks what a series has grown by does not see what it begins with. This one
# disappears in every sum
_NEXT_TO_NOTHING = sys.float_info.min


class Totals:
    """Tells a counter what a total has grown by. Totals begin at zero with their process, and are told from then on."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, ...], float] = {}

    def tell(self, name: str, told: str, total: float, **labels: str) -> None:
        """`total` is of those of `name` that have these labels."""
        key = (name, *labels.values())
        grown = total - self._told[key] if key in self._told else max(total, _NEXT_TO_NOTHING)
        if grown > 0:
            self._told[key] = total
            _counter(name, told, tuple(labels)).inc(grown, labels)


class RegistryMetrics:
    """Tells what a registry says of itself, every PERIOD_S seconds."""

    def __init__(self) -> None:
        self._totals = Totals()

    def note_flush(self, seconds: float, rows: int) -> None:
        """A flush has committed so many rows in so many seconds."""
        _histogram("flush_seconds", "Duration of a flush", tuple(_SECONDS)).observe(seconds)
        _histogram("flush_rows", "Rows that a flush has committed", tuple(_ROWS)).observe(rows)

    def tell(self, health: Health, instances: Mapping[tuple[Status, Verdict], int], pool: Mapping[str, int]) -> None:
        """Everything once."""
        for status in LIVE_STATUSES:
            for verdict in (Verdict.FRESH, Verdict.LATE, Verdict.SUSPECT):
                _gauge("instances", "Living instances", ("status", "verdict")).set(
                    instances.get((status, verdict), 0), {"status": status.value, "verdict": verdict.value}
                )
        _gauge("database_up", "1 while the database answers").set(health.store_problem is None)
        _gauge("recovered", "1 once the registry has read the database").set(health.recovered)
        _gauge("term", "The registry's writer number").set(health.term or 0)
        _gauge("fenced", "1 while a newer registry writes the database").set(health.fenced_by is not None)
        _gauge("expiry_frozen", "1 while no lease expires unless Ray confirms the death").set(health.is_frozen)
        _gauge("relays", "Relays at work").set(health.relays)
        _gauge("watched_instances", "Instances whose death is pushed").set(health.watched)
        unwatched = _gauge("unwatched_instances", "Instances whose death shows by their beats alone", ("reason",))
        for reason in Unwatched:
            unwatched.set(health.unwatched.get(reason.value, 0), {"reason": reason.value})
        _gauge("followers", "Followers of the feed that wait for a change").set(health.followers)
        _gauge("beat_interval_seconds", "What agents are asked for").set(health.beat_interval_s)
        backlog = _gauge("backlog", "What is not committed yet", ("kind",))
        backlog.set(health.pending_changes, {"kind": "changes"})
        backlog.set(health.pending_beats, {"kind": "beats"})
        for state, count in pool.items():
            _gauge("pool_connections", "Connections of the registry's pool", ("state",)).set(count, {"state": state})
        flush, tell = health.flush, self._totals.tell
        beats = "Beats by what became of them"
        tell("beats_total", beats, flush.beats_offered, outcome="offered")
        tell("beats_total", beats, flush.beats_committed, outcome="committed")
        tell("beats_total", beats, flush.beats_coalesced, outcome="coalesced")
        tell("beats_total", beats, flush.beats_dropped, outcome="dropped")
        tell("changes_committed_total", "Registrations and status changes committed", flush.changes_committed)
        tell("flush_failures_total", "Rounds of the write loop that failed", flush.failures)
        tell("fences_total", "How often a newer registry took over", health.fences)
        tell("lease_credit_seconds_total", "Seconds of its own absence credited to every lease", health.credited_s)
        tell("deaths_pushed_total", "Deaths that relays or Ray's node table told", health.deaths_reported)
        tell("deaths_declared_total", "Deaths that the registry declared, for whatever cause", health.deaths_declared)
        tell("became_silent_total", "How often an instance was found late", health.became_silent)
        tell("came_back_total", "How often one that was found late was heard again", health.came_back)
        tell("healed_total", "Instances that memory and database knew differently", health.healed)
        tell("pruned_total", "Rows of history that were forgotten", health.pruned)


class CallerMetrics:
    """What a manager, or a deployment, has resolved, and how far its copy is behind."""

    def __init__(self, component: str) -> None:
        """`component` tells managers from discovery."""
        self.resolved: Tally[str] = Tally()
        self._component = component
        self._totals = Totals()

    def tell(self, lag_s: float | None) -> None:
        """Everything once; `lag_s` is how long ago the registry confirmed the copy, None where it never did."""
        told = "Resolutions by where the answer came from"
        for source, total in self.resolved.items():
            self._totals.tell("resolves_total", told, total, component=self._component, source=source)
        if lag_s is not None:
            lag = _gauge("feed_lag_seconds", "Since the registry confirmed the copy", ("component",))
            lag.set(lag_s, {"component": self._component})
