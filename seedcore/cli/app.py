"""The `seedcore` command: its table of commands, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

from typing import Annotated

import typer

from seedcore import __version__
from seedcore.cli.agent_commands import deregister_command, drain_command, undrain_command
from seedcore.cli.errors import EXIT_INTERRUPTED, exit_code_of, message_of
from seedcore.cli.fleet import fleet_app
from seedcore.cli.output import fail, out
from seedcore.cli.queries import deaths_command, get_command, health_command, list_command, watch_command, why_command
from seedcore.cli.registry_commands import epoch_app, registry_app
from seedcore.cli.setup_commands import bench_command, demo_command, doctor_command, migrate_command
from seedcore.cli.tokens import token_app
from seedcore.cli.wait import wait_command
from seedcore.core.errors import RegistryError

_EPILOG = (
    "The command joins the Ray cluster in RAY_ADDRESS, or else the only one that this user runs on this machine; if "
    "there are several, it refuses and lists them. If SEEDCORE_URL is set (for example http://127.0.0.1:8000), ls, "
    "deaths, get, why, watch, wait, health, drain, undrain and deregister ask that deployment over HTTP instead, and "
    "the other commands refuse. Exit codes: 0 done, 1 failed, 2 wrong usage or setting, 3 no such agent, 4 no source "
    "that could answer is available, or a wait has reached its deadline, 130 interrupted."
)

app = typer.Typer(
    name="seedcore",
    help="A runtime registry for fleets of Ray actors.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in (
    ("ls", list_command),
    ("deaths", deaths_command),
    ("get", get_command),
    ("why", why_command),
    ("watch", watch_command),
    ("wait", wait_command),
    ("health", health_command),
    ("drain", drain_command),
    ("undrain", undrain_command),
    ("deregister", deregister_command),
    ("doctor", doctor_command),
    ("migrate", migrate_command),
    ("demo", demo_command),
    ("bench", bench_command),
):
    app.command(_name)(_command)
for _group in (fleet_app, epoch_app, registry_app, token_app):
    app.add_typer(_group)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command. Each RegistryError becomes one line on stderr, without a traceback."""
    try:
        app()
    except RegistryError as error:
        fail(message_of(error), exit_code_of(error))
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", EXIT_INTERRUPTED)
