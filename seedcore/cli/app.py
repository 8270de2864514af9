"""The `seedcore` command, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Annotated

import click
import typer

from seedcore import __version__
from seedcore.bench import NAMES
from seedcore.cli import demo as demo_module
from seedcore.cli.agent_commands import deregister_command, drain_command, undrain_command
from seedcore.cli.backend import HttpProblemError, NobodyError, NobodySelectedError
from seedcore.cli.cluster import NoClusterError, NotServedError, SeveralClustersError, require_no_url
from seedcore.cli.doctor import doctor_command
from seedcore.cli.fleet import fleet_app
from seedcore.cli.output import (
    EXIT_CANNOT_KNOW,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NOT_FOUND,
    EXIT_USAGE,
    JsonOption,
    echo,
    fail,
    out,
)
from seedcore.cli.queries import deaths_command, get_command, health_command, list_command, watch_command, why_command
from seedcore.cli.registry_commands import epoch_app, registry_app
from seedcore.cli.tokens import token_app
from seedcore.composition import store_recipe
from seedcore.core.errors import (
    CannotKnowError,
    InvalidInputError,
    NotResolvableError,
    RegistryError,
    RegistryUnavailableError,
    StoreUnavailableError,
    UnknownInstanceError,
    first_line,
)
from seedcore.discovery.problems import ProblemCode
from seedcore.settings import load_settings

_EPILOG = (
    "Joins the Ray cluster that RAY_ADDRESS names, or else the only one that this user runs on this machine; with "
    "several of them the command refuses and lists them. With SEEDCORE_URL set (for example http://127.0.0.1:8000) "
    "ls, deaths, get, why, watch, health, drain, undrain and deregister ask that deployment over HTTP instead; the "
    "other commands refuse. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 there is no such agent, 4 nobody who could "
    "tell can be asked now, 130 interrupted."
)

app = typer.Typer(
    name="seedcore",
    help="A runtime registry for fleets of Ray actors.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("ls")(list_command)
app.command("deaths")(deaths_command)
app.command("get")(get_command)
app.command("why")(why_command)
app.command("watch")(watch_command)
app.command("health")(health_command)
app.command("drain")(drain_command)
app.command("undrain")(undrain_command)
app.command("deregister")(deregister_command)
app.command("doctor")(doctor_command)
app.add_typer(fleet_app, name="fleet")
app.add_typer(epoch_app, name="epoch")
app.add_typer(registry_app, name="registry")
app.add_typer(token_app, name="token")


_TYPED_AS = {
    "cluster_epoch": "epoch",
    "duration_s": "--for",
    "label": "--label",
    "label key": "--label",
    "labels": "--label",
    "logical_id": "agent",
    "node_id": "--node",
    "organ_id": "--organ",
    "reason": "--reason",
    "selector": "--selector",
    "verdict": "--verdict",
}


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command("migrate")
def migrate_command(
    role: Annotated[
        str | None,
        typer.Option("--grant", metavar="ROLE", help="Let this role do what a registry needs, and no more; make it."),
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option(help="Its password. Without: it keeps what it has, or logs in by certificate.")
    ] = None,
    end_old_calls: Annotated[
        bool,
        typer.Option("--end-old-calls", help="Afterwards drop what was kept for clients of an adopted database."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring the database's schema up to date; adopt a database of the earlier SeedCore. Run as the owner."""
    if password_file is not None and role is None:
        raise InvalidInputError("--password-file", "goes with --grant")
    password = None if password_file is None else _secret_of(password_file)
    settings = load_settings()
    if settings.pg_dsn is None:
        # the embedded one of this machine is not the deployment's
        require_no_url(settings)
    recipe = store_recipe(settings)
    if role is not None:
        asyncio.run(recipe.check_grant(role, with_password=password is not None))
    applied = asyncio.run(recipe.migrate(partial(echo, err=as_json)))
    if end_old_calls and asyncio.run(recipe.end_old_calls()):
        echo("the calls of old clients are dropped", err=as_json)
    if role is not None:
        made = asyncio.run(recipe.grant(role, password))
        echo(f"role {role} {'is made and ' if made else ''}has what a registry needs", err=as_json)
    if as_json:
        echo(json.dumps({"applied": applied}))
        return
    for name in applied:
        echo(f"applied {name}")
    echo("the schema is up to date")


def _secret_of(file: Path) -> str:
    try:
        secret = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError("--password-file", f"{file} cannot be read: {first_line(error)}") from None
    if not secret:
        raise InvalidInputError("--password-file", f"{file} is empty")
    return secret


@app.command("demo")
def demo(
    agents: Annotated[int, typer.Option(min=4, max=50, help="How many agents.")] = 6,
    down: Annotated[bool, typer.Option("--down", help="Stop the demo's agents instead.")] = False,
) -> None:
    """Bring up a small real fleet: registered, resolved, drained and lost."""
    settings = load_settings()
    asyncio.run(demo_module.take_down(settings, out) if down else demo_module.run(settings, out, agents))


@app.command("bench")
def bench_command(
    names: Annotated[list[str] | None, typer.Argument(help=f"Which: {', '.join(NAMES)}. Default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, within a minute; promises nothing.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios here (.png, .svg, .pdf).")] = None,
    dsn: Annotated[
        str | None, typer.Option(help="A PostgreSQL to make databases in. Default: an embedded one.")
    ] = None,
) -> None:
    """Measure on this machine, each figure beside a baseline of the same run. Starts a Ray and a PostgreSQL of its own.

    Exit code 1 where a ratio is not what the project promises, unless it was --quick.
    """
    # of no use to any other command, and slow to import
    from seedcore.bench.environment import machine
    from seedcore.bench.report import require_plot, write_json, write_plot
    from seedcore.bench.run import run_all

    if plot is not None:
        require_plot()
    results = run_all(out, names or [], is_quick=quick, dsn=dsn)
    if json_file is not None:
        write_json(json_file, results, machine())
    if plot is not None:
        write_plot(plot, results)
    broken = [f"{result.name}: {ratio.name}" for result in results for ratio in result.ratios if not ratio.holds]
    if broken and not quick:
        fail(f"not as promised: {'; '.join(broken)}", EXIT_FAILED)


def exit_code_of(error: RegistryError) -> int:
    """What a script is told of an error."""
    if isinstance(error, HttpProblemError):
        if error.code is ProblemCode.NO_SUCH_ROUTE:
            # no such route: what answers there is something else
            return EXIT_CANNOT_KNOW
        return {404: EXIT_NOT_FOUND, 422: EXIT_USAGE, 503: EXIT_CANNOT_KNOW}.get(error.status, EXIT_FAILED)
    if isinstance(error, (NobodyError, NobodySelectedError, NotResolvableError, UnknownInstanceError)):
        return EXIT_NOT_FOUND
    if isinstance(error, (NotServedError, SeveralClustersError)):
        return EXIT_USAGE
    if isinstance(error, (CannotKnowError, NoClusterError, RegistryUnavailableError, StoreUnavailableError)):
        return EXIT_CANNOT_KNOW
    if isinstance(error, InvalidInputError):
        return EXIT_USAGE
    return EXIT_FAILED


def message_of(error: RegistryError) -> str:
    """What a person is told of an error: a wrong value by what was typed, not by what it is in Python."""
    if isinstance(error, InvalidInputError):
        return f"{_TYPED_AS.get(error.field, error.field)}: {error.why}"
    return str(error)


def main() -> None:
    """Run the command. Every error of ours is one line on stderr; no traceback reaches the user."""
    try:
        app()
    except RegistryError as error:
        fail(message_of(error), exit_code_of(error))
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted", EXIT_INTERRUPTED)
