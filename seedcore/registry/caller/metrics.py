"""The metrics of a caller: its resolutions by source, and the age of its cache."""

from __future__ import annotations

from collections import Counter as Tally

from seedcore.registry.ray_support.metrics import Totals, gauge


class CallerMetrics:
    """Exports the resolutions of a manager or of discovery, and the age of its cache."""

    def __init__(self, component: str) -> None:
        """`component` is the value of the label: "manager" or "discovery"."""
        self.resolved: Tally[str] = Tally()
        self._component = component
        self._totals = Totals()

    def export(self, lag_s: float | None) -> None:
        """Export every metric once. `lag_s`: seconds since the registry confirmed the cache; None if it never did."""
        # copied at once: other threads count meanwhile
        description = "Resolutions by the source of the answer"
        for source, total in self.resolved.copy().items():
            self._totals.export("resolves_total", description, total, component=self._component, source=source)
        if lag_s is not None:
            lag = gauge("feed_lag_seconds", "Seconds since the registry confirmed the cache", ("component",))
            lag.set(lag_s, {"component": self._component})
