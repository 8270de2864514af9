"""Commands that change what agents are: drain, undrain, deregister."""

from __future__ import annotations

from typing import Annotated

import typer

from seedcore.cli.backend import Backend, ListQuery, NobodySelectedError, backend_of, shown_ids
from seedcore.cli.output import EXIT_FAILED, JsonOption, confirm, echo, out, parse_duration
from seedcore.cli.queries import NodeOption, OrganOption, SelectorOption, answered
from seedcore.cli.render import show_turned
from seedcore.core.errors import InvalidInputError, RegistryError
from seedcore.core.lifecycle import Status
from seedcore.core.limits import check_duration_s
from seedcore.discovery.api import OperationAnswer
from seedcore.settings import load_settings

AgentsArgument = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Logical ids.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", "-r", help="Kept in the history.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def drain_command(
    agents: AgentsArgument = None,
    organ: OrganOption = None,
    node: NodeOption = None,
    selector: SelectorOption = "",
    reason: ReasonOption = None,
    duration: Annotated[
        str | None, typer.Option("--for", help="Alive again by itself after this long: 90s, 15m, 1h, 2d.")
    ] = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Hand agents out no more: those named, or all of a node, an organ or a selector. They go on with what they do."""
    duration_s = parse_duration("--for", duration, check_duration_s)
    _turn(
        "drain",
        Status.DRAINING,
        agents,
        ListQuery((Status.ALIVE, Status.STARTING, Status.DRAINING), (), organ, node, selector),
        reason,
        duration_s,
        yes=yes,
        as_json=as_json,
        lasts=" until it is undrained" if duration is None else f" for {duration}",
    )


def undrain_command(
    agents: AgentsArgument = None,
    organ: OrganOption = None,
    node: NodeOption = None,
    selector: SelectorOption = "",
    reason: ReasonOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Hand draining agents out again."""
    _turn(
        "undrain",
        Status.ALIVE,
        agents,
        ListQuery((Status.DRAINING,), (), organ, node, selector),
        reason,
        None,
        yes=yes,
        as_json=as_json,
    )


def deregister_command(
    agents: Annotated[list[str], typer.Argument(metavar="ID...", help="Logical ids.")],
    reason: ReasonOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Declare agents dead, for good. One that still runs registers again, as a new instance."""
    _turn("deregister", Status.DEAD, agents, None, reason, None, yes=yes, as_json=as_json)


def _turn(
    verb: str,
    status: Status,
    agents: list[str] | None,
    wanted: ListQuery | None,
    reason: str | None,
    duration_s: float | None,
    *,
    yes: bool,
    as_json: bool,
    lasts: str = "",
) -> None:
    is_narrowed = wanted is not None and (wanted.organ, wanted.node, wanted.selector) != (None, None, "")
    if bool(agents) is is_narrowed:
        raise InvalidInputError("ID", f"say whom to {verb}: either ids, or --node, --organ or --selector")
    source = backend_of(load_settings())
    if not agents:
        assert wanted is not None
        agents = sorted({item.logical_id for item in answered(source.listing(wanted)).items})
        if not agents:
            # who names a node by a slip must not believe that it is drained
            raise NobodySelectedError(verb)
        if not yes:
            confirm(f"{verb} {len(agents)} agents ({shown_ids(agents)}) of {source.place}?")
    elif status is Status.DEAD and not yes:
        confirm(f"Declare {shown_ids(agents)} of {source.place} dead?")
    turned, failures = answered(_turn_all(source, agents, status, reason, duration_s))
    if as_json:
        echo("[" + ",\n".join(answer.model_dump_json(indent=2) for answer in turned) + "]")
    else:
        show_turned(out, turned, lasts)
    for failure in failures[1:]:
        echo(f"seedcore: {failure}", err=True)
    if failures:
        raise failures[0]
    if not all(answer.complete for answer in turned):
        raise typer.Exit(EXIT_FAILED)


async def _turn_all(
    source: Backend, agents: list[str], status: Status, reason: str | None, duration_s: float | None
) -> tuple[list[OperationAnswer], list[RegistryError]]:
    """One after the other; one that is refused does not stop the others."""
    turned: list[OperationAnswer] = []
    failures: list[RegistryError] = []
    for agent in agents:
        try:
            turned.append(await source.turn(agent, status, reason, duration_s))
        except RegistryError as error:
            failures.append(error)
    return turned, failures
