"""Prints answers as tables and lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from seedcore.cli.output import Text, counted
from seedcore.cli.troubles import is_recent, losses_of
from seedcore.cli.why import Reason, hold_text
from seedcore.core.instances import EpochRecord
from seedcore.discovery.api import (
    AgentAnswer,
    CauseOut,
    EpochOut,
    InstanceOut,
    InstancePage,
    OperationAnswer,
    OverviewAnswer,
    RegistryOut,
    TransitionOut,
)
from seedcore.registry.caller.reasons import age_text

_STYLE = {
    "alive": "green",
    "fresh": "green",
    "starting": "cyan",
    "draining": "yellow",
    "late": "yellow",
    "suspect": "red",
    "dead": "red",
}
_TRANSITIONS_SHOWN = 10


def show_listing(console: Console, page: InstancePage) -> None:
    """Print a table of instances, with the source and completeness of the answer."""
    table = _table("AGENT", "STATUS", "VERDICT", "HOLDS", "ORGAN", "NODE", "PID", "LAST BEAT", "INSTANCE")
    for item in page.items:
        table.add_row(
            Text(item.logical_id),
            _state(item.status),
            _state(item.verdict),
            ",".join(hold.kind.value for hold in item.holds) or "-",
            Text(item.organ_id or "-"),
            _short(item.node_id),
            str(item.pid or "-"),
            "-" if item.last_heartbeat is None else f"{_seconds_since(item.last_heartbeat):.1f} s ago",
            _short(item.instance_id),
        )
    console.print(table)
    console.print(f"{counted(table.row_count, 'agent')} ({_worth(page)})", style="dim")


def show_agent(console: Console, agent: AgentAnswer) -> None:
    """Print one agent: its live instances, its earlier instances, and their transitions."""
    console.print(Text(agent.logical_id, style="bold"))
    live = _table("INSTANCE", "STATUS", "VERDICT", "SILENT", "ACTOR", "NODE", "PID", "EPOCH")
    for observed in agent.live:
        row = observed.instance
        live.add_row(
            row.instance_id,
            _state(row.status),
            _state(observed.verdict),
            f"{observed.silence_s:.1f} s",
            Text(row.actor_name or "-"),
            _short(row.node_id),
            str(row.pid or "-"),
            Text(row.cluster_epoch or "-"),
        )
    if agent.live:
        console.print(live)
        for observed in agent.live:
            _show_details(console, observed.instance)
    past = _table("INSTANCE", "STATUS", "STARTED", "ENDED", "CAUSE", "EPOCH", title="History")
    for row in agent.instances:
        past.add_row(
            row.instance_id,
            _state(row.status),
            _time(row.started_at),
            _time(row.stopped_at),
            _cause(row.cause),
            Text(row.cluster_epoch or ""),
        )
    if agent.instances:
        console.print(past)
    _show_transitions(console, agent.transitions)
    console.print(_worth(agent) if agent.complete else f"source: {agent.source}, history not available", style="dim")


def show_deaths(console: Console, page: InstancePage) -> None:
    """Print a table of deaths, the most recent first."""
    table = _table("DIED", "AGENT", "CAUSE", "ORGAN", "NODE", "PID", "EPOCH")
    for row in page.items:
        table.add_row(
            _time(row.stopped_at),
            Text(row.logical_id),
            _cause(row.cause),
            Text(row.organ_id or "-"),
            _short(row.node_id),
            str(row.pid or "-"),
            Text(row.cluster_epoch or "-"),
        )
    console.print(table)
    more = "" if page.next_cursor is None else "; more exist (raise --limit)"
    console.print(f"{counted(len(page.items), 'death')}{more}", style="dim")


def show_reason(console: Console, reason: Reason, agent: AgentAnswer) -> None:
    """Print the state of an agent, its reason, advice, and the transitions that led to it."""
    line = Text.assemble((reason.logical_id, "bold"), " is ", _state(reason.state), f": {reason.why}")
    console.print(line, soft_wrap=True)
    if reason.since is not None:
        console.print(f"since {_time(reason.since)}, {_ago(reason.since)}", style="dim")
    if reason.advice is not None:
        advice = reason.advice if reason.actor_id is None else reason.advice.replace("ACTOR_ID", reason.actor_id)
        console.print(Text(advice), soft_wrap=True)
    _show_transitions(console, agent.transitions)


def show_missing(console: Console, head: str, missing: Sequence[tuple[str | None, str, datetime | None, str]]) -> None:
    """Print a line, and a table of the agents that are not ready: id, state, since when, why."""
    console.print(Text(head), soft_wrap=True)
    table = _table("AGENT", "STATE", "FOR", "WHY")
    for logical_id, state, since, why in missing:
        age = "-" if since is None else age_text(_seconds_since(since))
        table.add_row(Text(logical_id or "-"), _state(state), age, Text(why))
    console.print(table)


def show_event(console: Console, data: Mapping[str, Any], before: str | None) -> None:
    """Print one change as a line."""
    instance = data["instance"]
    now = instance["status"] if instance is not None else "dead"
    line = Text.assemble((datetime.now().astimezone().strftime("%H:%M:%S "), "dim"), (data["logical_id"], "bold"), " ")
    if before is not None and before != now:
        line.append_text(_state(before)).append(" -> ")
    line.append_text(_state(now))
    if instance is not None and instance["verdict"] not in {None, "fresh"}:
        line.append(" ").append_text(_state(instance["verdict"]))
    cause = None if data["cause"] is None else CauseOut.model_validate(data["cause"])
    line.append("" if cause is None else f": {cause}").append(f"  {_short(data['instance_id'])}", style="dim")
    console.print(line, soft_wrap=True)


def show_overview(console: Console, overview: OverviewAnswer, place: str) -> None:
    """Print a summary of the fleet, the registry and the database; `place` is the cluster or the deployment."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("cluster", Text(place))
    found, report = overview.sources, overview.registry
    unknown = f"{overview.instances}, status unknown" if overview.instances else "none"
    fleet = ", ".join(f"{count} {name}" for name, count in overview.by_status.items() if count) or unknown
    if overview.by_verdict:
        fleet += " (" + ", ".join(f"{count} {name}" for name, count in overview.by_verdict.items()) + ")"
    table.add_row("agents", fleet)
    if overview.epoch is not None:
        table.add_row("epoch", _epoch(overview.epoch, report))
    table.add_row("mode", overview.service.mode)
    for name, state in (
        ("registry", found.registry),
        ("PostgreSQL", found.postgres),
        ("Ray's listing", found.ray),
    ):
        table.add_row(name, Text(state, style="green" if state == "ok" else "red"))
    if report is not None:
        for at, line in losses_of(report):
            table.add_row("lost commits", Text(line, style="yellow" if is_recent(at, overview.as_of_registry) else ""))
        rate = "-" if report.beats_per_s is None else f"{report.beats_per_s:.0f} per second"
        table.add_row("beats", f"{rate}, every {report.beat_interval_s:g} s, lease {report.lease_s:g} s")
        table.add_row(
            "last flush", f"{report.flush_s * 1000:.0f} ms; {counted(report.pending_changes, 'change')} waiting"
        )
        table.add_row("deaths", f"{counted(report.watched, 'agent')} watched by {counted(report.relays, 'relay')}")
        if report.watch_problem is not None:
            table.add_row("", Text(report.watch_problem, style="red"))
        if report.capacity_problem is not None:
            table.add_row("capacity", Text(report.capacity_problem, style="red"))
        table.add_row("expiry", Text("frozen", style="red") if report.is_frozen else "active")
        table.add_row("actor", f"pid {report.pid}, term {report.term}, version {report.code_version}")
        for note in report.notes:
            table.add_row("note", Text(note))
    console.print(table)
    console.print(f"{_worth(overview)}, as of {_time(overview.as_of)}", style="dim")


def _epoch(epoch: EpochOut, report: RegistryOut | None) -> Text:
    if report is None or report.epoch_problem is None:
        return Text(epoch.name)
    return Text(f"{epoch.name}, not confirmed: no agent is resolved", style="red")


def show_turned(console: Console, answers: Sequence[OperationAnswer], lasts: str = "") -> None:
    """Print the result for each agent. `lasts` describes how long the new status lasts."""
    for answer in answers:
        for result in answer.results:
            line = Text.assemble((answer.logical_id, "bold"), " ")
            if result.status is None:
                line.append("is unchanged", style="red")
            else:
                line.append("is ").append_text(_state(result.status)).append(lasts)
            if result.why is not None:
                line.append(
                    f": {result.why}"
                    if result.durable
                    else f"; not committed yet, and lost if the registry ends before it is: {result.why}"
                )
            console.print(line, soft_wrap=True)


def show_epochs(console: Console, records: Sequence[EpochRecord]) -> None:
    """Print a table of epochs, newest first."""
    table = _table("EPOCH", "NUMBER", "STATE", "LIVE", "STAGED", "CURRENT", "RETIRED")
    for record in records:
        table.add_row(
            Text(record.name),
            str(record.number),
            record.state,
            str(record.live),
            _time(record.staged_at),
            _time(record.current_at),
            _time(record.retired_at),
        )
    console.print(table)


def epochs_json(records: Sequence[EpochRecord]) -> str:
    """Return the epochs as a JSON list, with times in ISO 8601."""
    return json.dumps([{**asdict(record), "state": record.state} for record in records], indent=2, default=str)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(*columns, title=title, box=None, pad_edge=False)
    table.title_justify = "left"
    return table


def _show_details(console: Console, row: InstanceOut) -> None:
    if row.reported_status == "draining":
        console.print(Text("draining: reported by the agent", style=_STYLE["draining"]))
    for hold in row.holds:
        since = f"since {_time(hold.since)}"
        console.print(Text(f"{row.status}: {hold_text(hold)}, {since}", style=_STYLE["draining"]), soft_wrap=True)
    for name, values in (("labels", row.labels), ("metadata", row.metadata)):
        if values:
            console.print(Text(f"{name}: {json.dumps(values, ensure_ascii=False)}", style="dim"))


def _show_transitions(console: Console, transitions: Sequence[TransitionOut]) -> None:
    if not transitions:
        return
    table = _table("TIME", "INSTANCE", "TRANSITION", "CAUSE", title="Transitions, newest first")
    for one in transitions[:_TRANSITIONS_SHOWN]:
        came_from = "registered, " if one.from_status is None else f"{one.from_status} -> "
        end = "" if one.expires_at is None else f", until {_time(one.expires_at)}"
        table.add_row(
            _time(one.at),
            _short(one.instance_id),
            Text(came_from).append_text(_state(one.to_status)),
            _cause(one.cause).append(end),
        )
    console.print(table)


def _worth(answer: InstancePage | AgentAnswer | OverviewAnswer) -> str:
    return f"source: {answer.source}{'' if answer.complete else ', incomplete'}"


def _cause(cause: CauseOut | None) -> Text:
    """A cause in words: that of an end that was planned is dim."""
    return Text("") if cause is None else Text(str(cause), style="dim" if cause.kind.is_planned else "")


def _state(state: str | None) -> Text:
    return Text(state or "?", style=_STYLE.get(state or "", ""))


def _short(identity: str | None) -> Text:
    return Text(identity[:8] if identity else "-")


def _seconds_since(at: datetime) -> float:
    return max(0.0, (datetime.now(UTC) - at).total_seconds())


def _ago(at: datetime) -> str:
    seconds = _seconds_since(at)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _time(at: datetime | None) -> str:
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if at is not None else "-"
