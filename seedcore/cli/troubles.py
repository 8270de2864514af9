"""What is wrong according to a summary: one line per problem, and the commits that the database has lost."""

from __future__ import annotations

from datetime import datetime, timedelta

from seedcore.cli.output import counted
from seedcore.discovery.api import LossOut, OverviewAnswer, RegistryOut

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
        found += [line for at, line in losses_of(report) if is_recent(at, overview.as_of_registry)]
        if report.is_frozen:
            found.append("expiry is frozen: too many agents went silent at once; only deaths that Ray confirms count")
        if report.watch_problem is not None:
            found.append(f"deaths are not reported by every node: {report.watch_problem}")
        if report.capacity_problem is not None:
            found.append(f"the registry is nearly full: {report.capacity_problem}")
        if report.beats_dropped:
            found.append(f"{report.beats_dropped} beats were dropped")
    return found


def is_recent(at: datetime, now: datetime | None) -> bool:
    """Whether a loss that was noticed at `at` still counts as a problem. `now` is the registry's clock."""
    return now is None or now - at < LOSS_IS_RECENT


def losses_of(report: RegistryOut) -> list[tuple[datetime, str]]:
    """Return when the database was found to have lost commits, and what became of them."""
    found = []
    if report.last_loss is not None:
        found.append((report.last_loss.at, _loss_text(report.last_loss)))
    if report.agents_ahead_at is not None:
        text = (
            f"the database had lost commits before this registry started, noticed at {_time(report.agents_ahead_at)}; "
            f"{counted(report.agents_ahead, 'agent')} knew later changes and sent them again"
        )
        found.append((report.agents_ahead_at, text))
    return found


def _loss_text(loss: LossOut) -> str:
    """When the loss was noticed, how many commits it was, what was written again, and what was refused."""
    refused = f", {loss.refused} refused (see the registry's log)" if loss.refused else ", none refused"
    missing = "" if loss.has_whole_history else "; the oldest of the lost transitions are missing in the history"
    return (
        f"the database had lost {counted(loss.commits, 'commit')}, noticed at {_time(loss.at)}; "
        f"{counted(loss.written_again, 'change')} written again{refused}{missing}"
    )


def _time(at: datetime) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}"
