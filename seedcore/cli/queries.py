"""Commands that read: ls, deaths, get, why, watch, health."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import typer

from seedcore.cli.backend import Backend, ListQuery, backend_of
from seedcore.cli.errors import EXIT_FAILED
from seedcore.cli.output import JsonOption, Text, echo, out, parse_duration, print_json
from seedcore.cli.render import show_agent, show_deaths, show_listing, show_overview, show_reason
from seedcore.cli.troubles import troubles
from seedcore.cli.watch import watch
from seedcore.cli.why import reason_of
from seedcore.core.errors import RegistryError
from seedcore.core.instances import Verdict
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.core.paging import check_within_s
from seedcore.discovery.api import AgentAnswer, InstancePage
from seedcore.settings import load_settings

T = TypeVar("T")

AgentArgument = Annotated[str, typer.Argument(metavar="ID", help="Logical id of the agent.")]
OrganOption = Annotated[str | None, typer.Option(help="Only agents of this organ.")]
NodeOption = Annotated[str | None, typer.Option(help="Only agents on this Ray node (full id).")]
SelectorOption = Annotated[
    str, typer.Option("--selector", "-l", help="Labels as in kubectl: 'env in (a, b), tier!=x, !spot'.")
]
EndpointOption = Annotated[str | None, typer.Option(help="Only agents that have an endpoint of this name.")]
EpochOption = Annotated[str | None, typer.Option(help="Only agents of this epoch. Default: the current epoch.")]


def answered(question: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a new event loop and return its result."""
    return asyncio.run(question)


def list_command(
    status: Annotated[list[Status] | None, typer.Option(help="Repeatable. Default: alive.")] = None,
    verdict: Annotated[list[Verdict] | None, typer.Option(help="Repeatable. Default: any.")] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", "-a", help="Include expired leases and, without --status, every status but dead."),
    ] = False,
    organ: OrganOption = None,
    node: NodeOption = None,
    selector: SelectorOption = "",
    label: Annotated[list[str] | None, typer.Option(help="key=value. Repeatable; all must match.")] = None,
    endpoint: EndpointOption = None,
    epoch: EpochOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the agents of the current epoch."""
    query = ListQuery(
        statuses=tuple(status) if status else () if everything else (Status.ALIVE,),
        verdicts=tuple(verdict or ()),
        organ=organ,
        node=node,
        selector=selector,
        labels=tuple(label or ()),
        epoch=epoch,
        with_lapsed=everything,
        endpoint=endpoint,
    )
    page, epoch_problem = answered(_listing_and_epoch(backend_of(load_settings()), query))
    if as_json:
        print_json(page)
    else:
        show_listing(out, page)
        if epoch_problem is not None:
            out.print(Text(f"no agent is listed or resolved: {epoch_problem}", style="red"), soft_wrap=True)


def deaths_command(
    within: Annotated[str | None, typer.Option(help="Only deaths of the last 90s, 15m, 12h, 2d.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=MAX_PAGE, help="Maximum number of deaths.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List recent deaths and their causes, the most recent first."""
    within_s = parse_duration("--within", within, check_within_s)
    page = answered(backend_of(load_settings()).deaths(limit, within_s))
    if as_json:
        print_json(page)
    else:
        show_deaths(out, page)


def get_command(agent_id: AgentArgument, as_json: JsonOption = False) -> None:
    """Show one agent: its live instances, its earlier instances, and their transitions."""
    agent = answered(backend_of(load_settings()).agent(agent_id))
    if as_json:
        print_json(agent)
    else:
        show_agent(out, agent)


def why_command(agent_id: AgentArgument, as_json: JsonOption = False) -> None:
    """Explain the state of an agent: its cause, its start time, and advice."""
    agent, epoch_problem = answered(_agent_and_epoch(backend_of(load_settings()), agent_id))
    reason = reason_of(agent, epoch_problem)
    if as_json:
        print_json(reason)
    else:
        show_reason(out, reason, agent)


async def _listing_and_epoch(backend: Backend, query: ListQuery) -> tuple[InstancePage, str | None]:
    """Return the list and, if it is empty, why no agent is listed if an operator must confirm the epoch."""
    page = await backend.listing(query)
    return page, None if page.items else await _epoch_problem(backend)


async def _agent_and_epoch(backend: Backend, agent_id: str) -> tuple[AgentAnswer, str | None]:
    """Return the agent, and why no agent is resolved, if an operator must confirm the epoch."""
    return await asyncio.gather(backend.agent(agent_id), _epoch_problem(backend))


async def _epoch_problem(backend: Backend) -> str | None:
    try:
        overview = await backend.overview()
    except RegistryError:
        # without a registry the epoch is not known to be unconfirmed
        return None
    return None if overview.registry is None else overview.registry.epoch_problem


def watch_command(
    organ: OrganOption = None,
    node: NodeOption = None,
    selector: SelectorOption = "",
    endpoint: EndpointOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON per event.")] = False,
) -> None:
    """Print changes as they happen, until interrupted."""
    query = ListQuery(statuses=(), organ=organ, node=node, selector=selector, with_lapsed=True, endpoint=endpoint)
    answered(watch(backend_of(load_settings()), query, as_json=as_json))


def health_command(as_json: JsonOption = False) -> None:
    """Show the cluster, its registry, its database and its fleet. Exit code 1 if something is wrong."""
    backend = backend_of(load_settings())
    overview = answered(backend.overview())
    if as_json:
        echo(json.dumps({"cluster": backend.place, **overview.model_dump(mode="json")}, indent=2))
    else:
        show_overview(out, overview, backend.place)
    if troubles(overview):
        raise typer.Exit(EXIT_FAILED)
