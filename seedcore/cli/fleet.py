"""`seedcore fleet up|down FILE`: creates or stops the agents of a fleet file. Both may be repeated without effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from seedcore.cli.backend import shown_ids
from seedcore.cli.errors import EXIT_FAILED
from seedcore.cli.output import JsonOption, echo
from seedcore.core.limits import Json
from seedcore.settings import load_settings

EpochOption = Annotated[
    str | None,
    typer.Option(metavar="EPOCH", help="A staged epoch or the current one. Default: the `epoch` in FILE, if any."),
]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="YAML, see docs/how-to/fleet.md.")]

fleet_app = typer.Typer(name="fleet", help="The agents of a fleet file.", no_args_is_help=True)


@fleet_app.command("up")
def fleet_up(file: FileArgument, epoch: EpochOption = None, as_json: JsonOption = False) -> None:
    """Create every agent of the file that is not live yet.

    They belong to the given epoch, or else to the one that is current when the command starts.
    """
    from seedcore.cli.fleet_agents import create_fleet
    from seedcore.cli.fleet_file import read_fleet

    fleet = read_fleet(file)
    failures, draining = create_fleet(fleet, epoch, load_settings())
    _show_end(failures, len(fleet.names()), "up", as_json)
    if draining and not as_json:
        echo(f"draining, so not routed to: {shown_ids(draining)}")
    if failures:
        raise typer.Exit(EXIT_FAILED)


@fleet_app.command("down")
def fleet_down(file: FileArgument, epoch: EpochOption = None, as_json: JsonOption = False) -> None:
    """Stop every agent of the file, and no other."""
    from seedcore.cli.fleet_agents import stop_fleet
    from seedcore.cli.fleet_file import read_fleet

    fleet = read_fleet(file)
    failures = stop_fleet(fleet, epoch, load_settings())
    _show_end(failures, len(fleet.names()), "down", as_json)
    if failures:
        raise typer.Exit(EXIT_FAILED)


def _show_end(failures: dict[str, str], total: int, state: str, as_json: bool) -> None:
    if as_json:
        result: dict[str, Json] = {state: total - len(failures), "failures": failures}
        echo(json.dumps(result, indent=2))
    else:
        echo(f"{total - len(failures)} of {total} agents are {state}")
