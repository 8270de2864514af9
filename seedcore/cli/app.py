"""Commands, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import click
import typer
from rich.console import Console

from seedcore import __version__
from seedcore.bench import NAMES
from seedcore.cli import demo as demo_command
from seedcore.cli.cluster import join_cluster
from seedcore.cli.render import agent_json, epochs_json, listing_json, show_agent, show_epochs, show_listing
from seedcore.core.errors import CannotKnowError, RegistryError
from seedcore.core.lifecycle import Status
from seedcore.core.model import MAX_PAGE, EpochRecord, InstanceFilter, Listing
from seedcore.discovery.app import ladder_of
from seedcore.discovery.ladder import DiscoveryLadder, NameListing
from seedcore.discovery.routes import parse_labels
from seedcore.registry.actor import stop_registry
from seedcore.registry.connection import RegistryConnection
from seedcore.runtime import start_registry, store_recipe
from seedcore.settings import load_settings

T = TypeVar("T")

EXIT_FAILED = 1
EXIT_NOT_FOUND = 3
EXIT_CANNOT_KNOW = 4
_PAGE = 1000

app = typer.Typer(
    name="seedcore",
    help="A runtime registry for fleets of Ray actors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
registry_app = typer.Typer(help="The registry actor.", no_args_is_help=True)
app.add_typer(registry_app, name="registry")
epoch_app = typer.Typer(help="Fleet generations: blue and green.", no_args_is_help=True)
app.add_typer(epoch_app, name="epoch")

# a pipe has no width to respect: rows stay whole
out = Console() if sys.stdout.isatty() else Console(width=200)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command("ls")
def list_command(
    status: Annotated[list[Status] | None, typer.Option(help="Repeatable; default alive.")] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", "-a", help="Also whose lease is over; every live status, unless --status says which."),
    ] = False,
    organ: Annotated[str | None, typer.Option(help="Only this organ.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="key=value; repeatable, all must hold.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the agents of the current epoch."""
    unsaid = frozenset(Status) - {Status.DEAD} if everything else frozenset({Status.ALIVE})
    wanted = InstanceFilter(
        statuses=frozenset(status) if status else unsaid,
        organ_id=organ,
        labels=parse_labels(label or []),
        fresh_only=not everything,
    )
    settings = load_settings()
    join_cluster(settings)
    listing = asyncio.run(_every_page(ladder_of(settings), wanted))
    if as_json:
        typer.echo(listing_json(listing))
    else:
        show_listing(out, listing)


@app.command("get")
def get_command(agent_id: Annotated[str, typer.Argument(help="Logical id.")], as_json: JsonOption = False) -> None:
    """Show one agent: who lives under its logical id, and who did."""
    settings = load_settings()
    join_cluster(settings)
    described = asyncio.run(ladder_of(settings).describe(agent_id))
    if described.complete and not described.live and not described.history:
        typer.echo(f"seedcore: nobody ever registered as {agent_id!r}", err=True)
        raise typer.Exit(EXIT_NOT_FOUND)
    if as_json:
        typer.echo(agent_json(described))
    else:
        show_agent(out, described)


@app.command("migrate")
def migrate_command() -> None:
    """Bring the database's schema up to date."""
    applied = asyncio.run(store_recipe(load_settings()).migrate())
    for name in applied:
        typer.echo(f"applied {name}")
    typer.echo("the schema is up to date")


@app.command("demo")
def demo(
    agents: Annotated[int, typer.Option(min=4, max=50, help="How many agents.")] = 6,
    down: Annotated[bool, typer.Option("--down", help="Stop the demo's agents instead.")] = False,
) -> None:
    """Bring up a small real fleet: registered, resolved, drained and lost."""
    settings = load_settings()
    asyncio.run(demo_command.take_down(settings, out) if down else demo_command.run(settings, out, agents))


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
        _fail(f"not as promised: {'; '.join(broken)}", EXIT_FAILED)


@epoch_app.command("show")
def epoch_show(as_json: JsonOption = False) -> None:
    """The newest epochs: which is shown, which are staged, who lives in each."""
    records = _ask_registry(lambda connection: connection.list_epochs())
    if as_json:
        typer.echo(epochs_json(records))
    else:
        show_epochs(out, records)


@epoch_app.command("stage")
def epoch_stage(name: Annotated[str, typer.Argument(help="The epoch's name.")]) -> None:
    """Name an epoch that agents can register in (CLUSTER_EPOCH) before it is shown."""
    is_new = _ask_registry(lambda connection: connection.stage_epoch(name))
    typer.echo(f"epoch {name} is staged" if is_new else f"epoch {name} was there already")


@epoch_app.command("flip")
def epoch_flip(
    name: Annotated[str, typer.Argument(help="The epoch's name.")],
    force: Annotated[bool, typer.Option("--force", help="Even where it is not staged, or nobody lives in it.")] = False,
) -> None:
    """Show this epoch from now on, in one step. The fleet of the epoch before is ended, and cannot come back.

    Refused where the name is not staged, or nobody lives in it while somebody does in the current one.
    """

    async def flip(connection: RegistryConnection) -> str | None:
        objection = None if force else objection_to_flip(name, await connection.list_epochs(MAX_PAGE))
        if objection is None:
            await connection.set_current_epoch(name)
        return objection

    objection = _ask_registry(flip)
    if objection is not None:
        _fail(objection, EXIT_FAILED)
    typer.echo(f"epoch {name} is shown")


def objection_to_flip(name: str, records: Sequence[EpochRecord]) -> str | None:
    """What speaks against showing this epoch now, and what would happen; None where nothing does."""
    wanted = next((record for record in records if record.name == name), None)
    current = next((record for record in records if record.state == "current"), None)
    if wanted is not None and wanted.state != "staged":
        # it is shown already, or the registry refuses it
        return None
    ended = f"its {current.live} agents" if current is not None and current.live else "whoever starts in it"
    fate = "" if current is None else f", and epoch {current.name} would be retired for good and {ended} ended"
    if wanted is None:
        return (
            f"epoch {name} is not staged: it would be made, and shown with nobody in it{fate}; see `seedcore epoch "
            f"show`, stage it with `seedcore epoch stage {name}`, or say --force"
        )
    if wanted.live == 0 and current is not None and current.live:
        return f"nobody lives in epoch {name}: it would be shown empty{fate}; start its fleet first, or say --force"
    return None


@registry_app.command("start")
def registry_start() -> None:
    """Start the registry actor of the running cluster, unless it runs."""
    settings = load_settings()
    join_cluster(settings)
    hello = asyncio.run(start_registry(settings))
    typer.echo(f"the registry runs: pid {hello.pid} on node {hello.node_id}, version {hello.code_version}")


@registry_app.command("stop")
def registry_stop() -> None:
    """Let the registry actor commit what waits, then end it. A running discovery starts it again."""
    settings = load_settings()
    join_cluster(settings)
    stopped = asyncio.run(stop_registry(settings.namespace))
    typer.echo("the registry has stopped" if stopped else "no registry runs")


def _ask_registry(question: Callable[[RegistryConnection], Awaitable[T]]) -> T:
    settings = load_settings()
    join_cluster(settings)
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)

    async def answer() -> T:
        return await question(connection)

    return asyncio.run(answer())


async def _every_page(ladder: DiscoveryLadder, wanted: InstanceFilter) -> Listing | NameListing:
    page = await ladder.list_instances(wanted, _PAGE, None)
    while page.next_cursor is not None:
        following = await ladder.list_instances(wanted, _PAGE, page.next_cursor)
        if isinstance(page, Listing) and isinstance(following, Listing):
            page = replace(following, items=page.items + following.items)
        elif isinstance(page, NameListing) and isinstance(following, NameListing):
            page = replace(following, names=page.names + following.names)
        else:
            raise CannotKnowError("*", "the source of the list changed on the way; ask again")
    await ladder.close()
    return page


def main() -> None:
    """Run the command. Every error of ours is one line on stderr; no traceback reaches the user."""
    try:
        app()
    except CannotKnowError as error:
        _fail(str(error), EXIT_CANNOT_KNOW)
    except RegistryError as error:
        _fail(str(error), EXIT_FAILED)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"seedcore: {message}", err=True)
    sys.exit(code)
