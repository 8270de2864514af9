"""Commands that only look: ls, get, why, watch, health."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, TypeVar

import typer

from seedcore.cli.backend import Backend, Event, ListQuery, backend_of
from seedcore.cli.output import EXIT_FAILED, JsonOption, counted, echo, out, parse_duration, print_json
from seedcore.cli.render import show_agent, show_deaths, show_event, show_listing, show_overview, show_reason
from seedcore.cli.why import reason_of
from seedcore.core.errors import RegistryError
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.core.paging import check_within_s
from seedcore.discovery.api import OverviewAnswer
from seedcore.settings import load_settings

T = TypeVar("T")

AgentArgument = Annotated[str, typer.Argument(metavar="ID", help="Logical id.")]
OrganOption = Annotated[str | None, typer.Option(help="Only this organ.")]
NodeOption = Annotated[str | None, typer.Option(help="Only this Ray node.")]
SelectorOption = Annotated[
    str, typer.Option("--selector", "-l", help="Labels as in kubectl: 'env in (a, b), tier!=x, !spot'.")
]
EpochOption = Annotated[str | None, typer.Option(help="Of this epoch; default: the one that is shown.")]


def answered(question: Coroutine[Any, Any, T]) -> T:
    """The answer to a question, in an event loop of its own."""
    return asyncio.run(question)


def list_command(
    status: Annotated[list[Status] | None, typer.Option(help="Repeatable; default alive.")] = None,
    verdict: Annotated[list[Verdict] | None, typer.Option(help="Repeatable; default any.")] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", "-a", help="Also whose lease is over; every living status, unless --status says which."),
    ] = False,
    organ: OrganOption = None,
    node: NodeOption = None,
    selector: SelectorOption = "",
    label: Annotated[list[str] | None, typer.Option(help="key=value; repeatable, all must hold.")] = None,
    epoch: EpochOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the agents of the current epoch."""
    wanted = ListQuery(
        statuses=tuple(status) if status else () if everything else (Status.ALIVE,),
        verdicts=tuple(verdict or ()),
        organ=organ,
        node=node,
        selector=selector,
        labels=tuple(label or ()),
        epoch=epoch,
        with_lapsed=everything,
    )
    page = answered(backend_of(load_settings()).listing(wanted))
    if as_json:
        print_json(page)
    else:
        show_listing(out, page)


def deaths_command(
    within: Annotated[str | None, typer.Option(help="Only of the last 90s, 15m, 12h, 2d.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=MAX_PAGE, help="How many, the last first.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Who died of late, and why."""
    within_s = parse_duration("--within", within, check_within_s)
    page = answered(backend_of(load_settings()).deaths(limit, within_s))
    if as_json:
        print_json(page)
    else:
        show_deaths(out, page)


def get_command(agent_id: AgentArgument, as_json: JsonOption = False) -> None:
    """Show one agent: who lives under its logical id, who did, and what became of them."""
    agent = answered(backend_of(load_settings()).agent(agent_id))
    if as_json:
        print_json(agent)
    else:
        show_agent(out, agent)


def why_command(agent_id: AgentArgument, as_json: JsonOption = False) -> None:
    """Say why an agent is as it is: why it died, drains, or is silent."""
    agent = answered(backend_of(load_settings()).agent(agent_id))
    reason = reason_of(agent)
    if as_json:
        echo(json.dumps(asdict(reason), indent=2, default=datetime.isoformat))
    else:
        show_reason(out, reason, agent)


def watch_command(
    organ: OrganOption = None,
    node: NodeOption = None,
    selector: SelectorOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each event.")] = False,
) -> None:
    """Print what changes, as it changes, until interrupted."""
    wanted = ListQuery(statuses=(), organ=organ, node=node, selector=selector, with_lapsed=True)
    answered(_watch(backend_of(load_settings()), wanted, as_json=as_json))


async def _watch(source: Backend, wanted: ListQuery, *, as_json: bool) -> None:
    page = await source.listing(wanted)
    known = {item.instance_id: item.status for item in page.items}
    is_current = True
    begin = None if page.stream is None else f"{page.stream}:{page.version}"
    async for name, data, _ in _reconnecting(source, wanted, begin):
        if as_json:
            echo(json.dumps({"event": name, **data}))
        elif name == "state":
            if data["current"] is not is_current:
                is_current = bool(data["current"])
                out.print(
                    "the registry confirms again" if is_current else "the registry does not answer now", style="dim"
                )
        elif name == "reset":
            out.print(f"-- {data['why']}", style="dim")
            items = {item.instance_id: item for item in (await source.listing(wanted)).items}
            for instance_id, item in items.items():
                if known.get(instance_id) != item.status:
                    told = {"instance_id": instance_id, "logical_id": item.logical_id, "cause": item.cause}
                    show_event(out, {**told, "instance": item.model_dump(mode="json")}, known.get(instance_id))
            gone = known.keys() - items.keys()
            if gone:
                out.print(f"-- {counted(len(gone), 'agent')} left the list meanwhile: seedcore deaths", style="dim")
            known = {instance_id: item.status for instance_id, item in items.items()}
        else:
            before = known.get(data["instance_id"])
            instance = data["instance"]
            show_event(out, data, before)
            if instance is None:
                known.pop(data["instance_id"], None)
            else:
                known[data["instance_id"]] = instance["status"]


async def _reconnecting(source: Backend, wanted: ListQuery, after: str | None) -> AsyncIterator[Event]:
    """The events after a position, also after who sends them was away."""
    has_begun = False
    while True:
        pause_s = 1.0
        try:
            async with aclosing(source.watch(wanted, after)) as events:  # type: ignore[type-var]
                async for event in events:
                    # an answer that ends has told as much as one may
                    has_begun, after, pause_s = True, event.at, 0.0
                    yield event
        except RegistryError as error:
            if not has_begun:
                raise
            echo(f"seedcore: {error}; asking again", err=True)
            pause_s = 1.0
        await asyncio.sleep(pause_s)


def health_command(as_json: JsonOption = False) -> None:
    """Show which cluster answers, and how registry, database and fleet are. Exit code 1 where something is wrong."""
    source = backend_of(load_settings())
    overview = answered(source.overview())
    if as_json:
        echo(json.dumps({"cluster": source.place, **overview.model_dump(mode="json")}, indent=2))
    else:
        show_overview(out, overview, source.place)
    if troubles(overview):
        raise typer.Exit(EXIT_FAILED)


def troubles(overview: OverviewAnswer) -> list[str]:
    """What is wrong, a line each."""
    states = overview.sources
    found = [
        f"{name}: {state}"
        for name, state in (
            ("registry", states.registry),
            ("PostgreSQL", states.postgres),
            ("Ray's listing", states.ray),
        )
        if state != "ok"
    ]
    report = overview.registry
    if report is not None and overview.registry_problem is None:
        if report.is_frozen:
            found.append("expiry is frozen: too many agents went silent at once; only deaths that Ray confirms count")
        if report.watch_problem is not None:
            found.append(f"deaths are not pushed everywhere: {report.watch_problem}")
        if report.beats_dropped:
            found.append(f"{report.beats_dropped} beats were dropped")
    return found
