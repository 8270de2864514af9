"""Commands that change agents: drain, undrain, deregister."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated

import typer

from seedcore.cli.backend import Backend, ListQuery, backend_of, shown_ids
from seedcore.cli.errors import EXIT_FAILED, NothingSelectedError
from seedcore.cli.output import JsonOption, confirm, echo, out, parse_duration
from seedcore.cli.queries import NodeOption, OrganOption, SelectorOption, answered
from seedcore.cli.render import show_turned
from seedcore.core.errors import InvalidInputError, RegistryError
from seedcore.core.lifecycle import Status
from seedcore.core.limits import check_duration_s
from seedcore.discovery.api import OperationAnswer
from seedcore.settings import load_settings

AgentsArgument = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Logical ids of agents.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", "-r", help="Recorded with the change.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]

_Change = Callable[[str], Awaitable[OperationAnswer]]


def drain_command(
    agents: AgentsArgument = None,
    organ: OrganOption = None,
    node: NodeOption = None,
    selector: SelectorOption = "",
    reason: ReasonOption = None,
    duration: Annotated[
        str | None, typer.Option("--for", help="End the drain after 90s, 15m, 1h, 2d. Default: when undrained.")
    ] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stop routing to agents: to those given, or to all of a node, an organ or a selector. They keep running."""
    duration_s = parse_duration("--for", duration, check_duration_s)
    query = ListQuery((Status.ALIVE, Status.STARTING, Status.DRAINING), (), organ, node, selector)
    backend, chosen = _chosen("drain", agents, query, yes=yes)
    lasts = " until it is undrained" if duration is None else f" for {duration}"
    _change(chosen, lambda agent: backend.drain(agent, reason, duration_s), lasts, as_json=as_json)


def undrain_command(
    agents: AgentsArgument = None,
    organ: OrganOption = None,
    node: NodeOption = None,
    selector: SelectorOption = "",
    reason: ReasonOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Resume routing to agents that an operator drained."""
    query = ListQuery((Status.DRAINING,), (), organ, node, selector)
    backend, chosen = _chosen("undrain", agents, query, yes=yes)
    _change(chosen, lambda agent: backend.undrain(agent, reason), as_json=as_json)


def deregister_command(
    agents: Annotated[list[str], typer.Argument(metavar="ID...", help="Logical ids of agents.")],
    reason: ReasonOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Declare agents dead. An agent that still runs registers again, as a new instance."""
    backend = backend_of(load_settings())
    if not yes:
        confirm(f"Declare {shown_ids(agents)} of {backend.place} dead?")
    _change(agents, lambda agent: backend.deregister(agent, reason), as_json=as_json)


def _chosen(verb: str, agents: list[str] | None, query: ListQuery, *, yes: bool) -> tuple[Backend, list[str]]:
    """Return the backend, and the given agents or those that the options select.

    Raises InvalidInputError or NothingSelectedError.
    """
    is_narrowed = (query.organ, query.node, query.selector) != (None, None, "")
    if bool(agents) is is_narrowed:
        raise InvalidInputError("ID", f"name the agents to {verb}: either by ids, or by --node, --organ or --selector")
    backend = backend_of(load_settings())
    if agents:
        return backend, agents
    selected = sorted({item.logical_id for item in answered(backend.listing(query)).items})
    if not selected:
        # an operator who mistypes a node must not believe that it is drained
        raise NothingSelectedError(verb)
    if not yes:
        confirm(f"{verb} {len(selected)} agents ({shown_ids(selected)}) of {backend.place}?")
    return backend, selected


def _change(agents: Sequence[str], change: _Change, lasts: str = "", *, as_json: bool) -> None:
    """Change agents and print the results. Raises the first error after all results are printed."""
    answers, errors = answered(_change_all(agents, change))
    if as_json:
        echo("[" + ",\n".join(answer.model_dump_json(indent=2) for answer in answers) + "]")
    else:
        show_turned(out, answers, lasts)
    for error in errors[1:]:
        echo(f"seedcore: {error}", err=True)
    if errors:
        raise errors[0]
    if not all(answer.complete for answer in answers):
        raise typer.Exit(EXIT_FAILED)


async def _change_all(agents: Sequence[str], change: _Change) -> tuple[list[OperationAnswer], list[RegistryError]]:
    """Change one agent after the other. A refused change does not stop the others."""
    answers: list[OperationAnswer] = []
    errors: list[RegistryError] = []
    for agent in agents:
        try:
            answers.append(await change(agent))
        except RegistryError as error:
            errors.append(error)
    return answers, errors
