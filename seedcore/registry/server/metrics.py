"""Prometheus metrics of the registry. Ray's agent on each node exports them.

Every name begins with `seedcore_` (Ray adds the prefix `ray_`). No label names an agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from ray.util import metrics

from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import LIVE_STATUSES, Status
from seedcore.registry.protocol.messages import Health, Unwatched
from seedcore.registry.ray_support.metrics import Totals, gauge

_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
_ROWS = [1.0, 10.0, 100.0, 1000.0, 10_000.0, 100_000.0]


@lru_cache(maxsize=8)
def _histogram(name: str, description: str, boundaries: tuple[float, ...]) -> metrics.Histogram:
    return metrics.Histogram(f"seedcore_{name}", description=description, boundaries=list(boundaries))


class RegistryMetrics:
    """Exports the state of a registry, every PERIOD_S seconds."""

    def __init__(self) -> None:
        self._totals = Totals()

    def note_flush(self, seconds: float, rows: int) -> None:
        """Record a flush: its duration in seconds, and the number of rows that it committed."""
        _histogram("flush_seconds", "Duration of a flush", tuple(_SECONDS)).observe(seconds)
        _histogram("flush_rows", "Rows committed by a flush", tuple(_ROWS)).observe(rows)

    def export(self, health: Health, instances: Mapping[tuple[Status, Verdict], int], pool: Mapping[str, int]) -> None:
        """Export every metric once."""
        for status in LIVE_STATUSES:
            for verdict in (Verdict.FRESH, Verdict.LATE, Verdict.SUSPECT):
                gauge("instances", "Living instances", ("status", "verdict")).set(
                    instances.get((status, verdict), 0), {"status": status.value, "verdict": verdict.value}
                )
        gauge("database_up", "1 while the database answers").set(health.store_problem is None)
        gauge("recovered", "1 once the registry has read the database").set(health.recovered)
        gauge("term", "Term of the registry").set(health.term or 0)
        gauge("fenced", "1 while a newer registry writes to the database").set(health.fenced_by is not None)
        gauge("epoch_unconfirmed", "1 while an operator must confirm which epoch is current").set(
            health.epoch_problem is not None
        )
        used = gauge("capacity_used_ratio", "Used share of a bound of the registry", ("bound",))
        for bound, share in health.capacity_used.items():
            used.set(share, {"bound": bound})
        gauge("expiry_frozen", "1 while no lease expires unless Ray confirms the death").set(health.is_frozen)
        gauge("draining_nodes", "Nodes that Ray drains").set(health.draining_nodes)
        gauge("relays", "Running relays").set(health.relays)
        gauge("watched_instances", "Instances whose process a relay watches").set(health.watched)
        unwatched = gauge("unwatched_instances", "Instances whose death only their missing beats show", ("reason",))
        for reason in Unwatched:
            unwatched.set(health.unwatched.get(reason.value, 0), {"reason": reason.value})
        gauge("followers", "Followers of the feed that wait for a change").set(health.followers)
        gauge("beat_interval_seconds", "Beat interval that the registry requests").set(health.beat_interval_s)
        backlog = gauge("backlog", "Changes and beats that are not committed yet", ("kind",))
        backlog.set(health.pending_changes, {"kind": "changes"})
        backlog.set(health.pending_beats, {"kind": "beats"})
        for state, count in pool.items():
            gauge("pool_connections", "Connections of the registry's pool", ("state",)).set(count, {"state": state})
        flush, counter = health.flush, self._totals.export
        beats = "Beats by outcome"
        counter("beats_total", beats, flush.beats_offered, outcome="offered")
        counter("beats_total", beats, flush.beats_committed, outcome="committed")
        counter("beats_total", beats, flush.beats_coalesced, outcome="coalesced")
        counter("beats_total", beats, flush.beats_dropped, outcome="dropped")
        counter("changes_committed_total", "Registrations and status changes committed", flush.changes_committed)
        counter("flush_failures_total", "Rounds of the write loop that failed", flush.failures)
        refused = "Registrations that were refused because the registry was full"
        counter("registrations_refused_total", refused, health.registrations_refused)
        counter("fences_total", "Takeovers by a newer registry", health.fences)
        counter("database_losses_total", "Times that the database had lost commits", health.losses)
        counter("lost_commits_total", "Commits that the database had lost", health.lost_commits)
        ahead = "Instances of which agents knew later changes than the database of a new registry"
        counter("agents_ahead_total", ahead, health.agents_ahead)
        counter("lease_credit_seconds_total", "Seconds of its own absence credited to every lease", health.credited_s)
        counter("deaths_pushed_total", "Deaths reported by relays or by Ray's node table", health.deaths_reported)
        counter("deaths_declared_total", "Deaths declared by the registry, for any cause", health.deaths_declared)
        counter("became_silent_total", "Instances that became late", health.became_silent)
        counter("came_back_total", "Late instances that became fresh again", health.came_back)
        counter("healed_total", "Differences between memory and database that were repaired", health.healed)
        counter("pruned_total", "Rows of history that were pruned", health.pruned)
