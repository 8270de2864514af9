"""Answers as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone

from rich.console import Console
from rich.table import Table
from rich.text import Text

from seedcore.core.model import EpochRecord, Instance, Listing
from seedcore.discovery.api import agent_answer, page_of
from seedcore.discovery.ladder import NameListing
from seedcore.registry.answers import Description

_STATUS_STYLE = {"alive": "green", "starting": "cyan", "draining": "yellow", "dead": "red"}


def show_listing(console: Console, listing: Listing | NameListing) -> None:
    """A table of instances, and what the answer is worth."""
    table = Table("AGENT", "STATUS", "ORGAN", "NODE", "PID", "LAST BEAT", "INSTANCE", box=None, pad_edge=False)
    if isinstance(listing, NameListing):
        for name in listing.names:
            table.add_row(Text(name), "?", "", "", "", "", "")
    else:
        for instance in listing.items:
            table.add_row(*_cells(instance))
    console.print(table)
    count = table.row_count
    worth = "" if listing.complete else ", incomplete"
    more = ", more follow" if listing.next_cursor is not None else ""
    console.print(f"{count} agent{'' if count == 1 else 's'} (source: {listing.source}{worth}{more})", style="dim")


def show_agent(console: Console, described: Description) -> None:
    """One agent: the living, then its history."""
    console.print(Text(described.logical_id, style="bold"))
    live = Table("INSTANCE", "STATUS", "VERDICT", "SILENT", "ACTOR", "NODE", "PID", "EPOCH", box=None, pad_edge=False)
    for observed in described.live:
        row = observed.instance
        live.add_row(
            row.instance_id,
            _status(row),
            observed.verdict.value,
            f"{observed.silence_s:.1f} s",
            Text(row.actor_name or "-"),
            _short(row.node_id),
            str(row.pid or "-"),
            Text(row.cluster_epoch),
        )
    if described.live:
        console.print(live)
    past = Table("INSTANCE", "STATUS", "STARTED", "ENDED", "CAUSE", "EPOCH", title="History", box=None, pad_edge=False)
    past.title_justify = "left"
    for row in described.history:
        past.add_row(
            row.instance_id,
            _status(row),
            _time(row.started_at),
            _time(row.stopped_at),
            Text(row.cause or ""),
            Text(row.cluster_epoch),
        )
    if described.history:
        console.print(past)
    worth = "" if described.complete else ", history unknown now"
    console.print(f"source: {described.source}{worth}", style="dim")


def show_epochs(console: Console, records: Sequence[EpochRecord]) -> None:
    """A table of epochs, newest first."""
    table = Table("EPOCH", "NUMBER", "STATE", "LIVE", "STAGED", "SHOWN", "RETIRED", box=None, pad_edge=False)
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
    """The epochs as a JSON list, times in ISO 8601."""
    return json.dumps([{**asdict(record), "state": record.state} for record in records], indent=2, default=str)


def listing_json(listing: Listing | NameListing) -> str:
    """The listing as the HTTP API would say it."""
    return json.dumps(page_of(listing).model_dump(mode="json"), indent=2)


def agent_json(described: Description) -> str:
    """The agent as the HTTP API would say it."""
    return json.dumps(agent_answer(described).model_dump(mode="json"), indent=2)


def _cells(instance: Instance) -> list[Text | str]:
    return [
        Text(instance.logical_id),
        _status(instance),
        Text(instance.organ_id or "-"),
        _short(instance.node_id),
        str(instance.pid or "-"),
        f"{max(0.0, (datetime.now(timezone.utc) - instance.last_heartbeat).total_seconds()):.1f} s ago",
        instance.instance_id[:8],
    ]


def _status(instance: Instance) -> Text:
    return Text(instance.status.value, style=_STATUS_STYLE[instance.status.value])


def _short(node_id: str | None) -> str:
    return node_id[:8] if node_id else "-"


def _time(at: datetime | None) -> str:
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if at is not None else "-"
