"""What is wrong according to a summary: one line per problem, and the commits that the database has lost."""

from __future__ import annotations

from datetime import datetime, timedelta

from seedcore.cli.output import counted
from seedcore.discovery.api import LossOut, OverviewAnswer

LOSS_IS_RECENT = timedelta(minutes=15)
"""How long a loss counts as a problem: as long as the alert SeedcoreDatabaseLostCommits."""


def troubles(overview: OverviewAnswer) -> list[str]:
    """Return one line per problem."""
    sources = overview.sources
    found = [
        f"{name}: {state}"
        for name, state in (
            ("registry", sources.registry),
            ("PostgreSQL", sources.postgres),
            ("Ray's listing", sources.ray),
        )
        if state != "ok"
    ]
    report = overview.registry
    if report is not None and overview.registry_problem is None:
        if report.last_loss is not None and is_recent(report.last_loss, overview.as_of_registry):
            found.append(f"the database had lost commits: {loss_text(report.last_loss)}")
        if report.is_frozen:
            found.append("expiry is frozen: too many agents went silent at once; only deaths that Ray confirms count")
        if report.watch_problem is not None:
            found.append(f"deaths are not reported by every node: {report.watch_problem}")
        if report.capacity_problem is not None:
            found.append(f"the registry is nearly full: {report.capacity_problem}")
        if report.beats_dropped:
            found.append(f"{report.beats_dropped} beats were dropped")
    return found


def is_recent(loss: LossOut, now: datetime | None) -> bool:
    """Whether a loss still counts as a problem. `now` is the registry's clock."""
    return now is None or now - loss.at < LOSS_IS_RECENT


def loss_text(loss: LossOut) -> str:
    """When the loss was noticed, how many commits it was, what was written again, and what was refused."""
    refused = f", {loss.refused} refused (see the registry's log)" if loss.refused else ", none refused"
    missing = "" if loss.has_whole_history else "; the oldest of the lost transitions are missing in the history"
    return (
        f"{counted(loss.commits, 'commit')} lost, noticed at {loss.at.astimezone():%Y-%m-%d %H:%M:%S}; "
        f"{counted(loss.written_again, 'change')} written again{refused}{missing}"
    )
