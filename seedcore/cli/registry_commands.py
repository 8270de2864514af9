"""Commands that control the registry, in its cluster: epoch show, stage, flip; registry start, stop, upgrade."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from seedcore.cli.errors import EXIT_FAILED
from seedcore.cli.output import JsonOption, echo, fail, out
from seedcore.cli.render import epochs_json, show_epochs

_NameArgument = Annotated[str, typer.Argument(metavar="EPOCH", help="Name of the epoch.")]

epoch_app = typer.Typer(name="epoch", help="Generations of the fleet: blue and green.", no_args_is_help=True)
registry_app = typer.Typer(name="registry", help="The registry actor.", no_args_is_help=True)


@epoch_app.command("show")
def epoch_show(as_json: JsonOption = False) -> None:
    """List the newest epochs: the current one, the staged ones, and the live agents of each."""
    from seedcore.cli import control

    records = control.list_epochs()
    if as_json:
        echo(epochs_json(records))
    else:
        show_epochs(out, records)


@epoch_app.command("stage")
def epoch_stage(name: _NameArgument, as_json: JsonOption = False) -> None:
    """Create an epoch in which agents can register (CLUSTER_EPOCH) before it becomes current."""
    from seedcore.cli import control

    is_new = control.stage(name)
    line = f"epoch {name} is staged" if is_new else f"epoch {name} already exists"
    echo(json.dumps({"epoch": name, "is_new": is_new}) if as_json else line)


@epoch_app.command("flip")
def epoch_flip(
    name: _NameArgument,
    force: Annotated[bool, typer.Option("--force", help="Also if the epoch is not staged, or has no agents.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make an epoch current, in one step. The agents of the previous epoch end, for good.

    Refused if the epoch is not staged, or if it has no live agents while the current epoch has some.
    """
    from seedcore.cli import control

    objection = control.flip(name, force=force)
    if objection is not None:
        fail(objection, EXIT_FAILED)
    echo(json.dumps({"epoch": name}) if as_json else f"epoch {name} is current")


@registry_app.command("start")
def registry_start(as_json: JsonOption = False) -> None:
    """Start the registry actor of the running cluster, unless it runs already."""
    from seedcore.cli import control

    hello = control.start()
    line = f"the registry runs: pid {hello.pid} on node {hello.node_id}, version {hello.code_version}"
    echo(control.hello_json(hello) if as_json else line)


@registry_app.command("stop")
def registry_stop(as_json: JsonOption = False) -> None:
    """Commit the pending changes and end the registry actor. A running discovery starts it again."""
    from seedcore.cli import control

    stopped = control.stop()
    line = "the registry has stopped" if stopped else "no registry runs"
    echo(json.dumps({"stopped": stopped}) if as_json else line)


@registry_app.command("upgrade")
def registry_upgrade(
    force: Annotated[bool, typer.Option("--force", help="Also if this version runs already.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Replace the registry actor with one that runs the code installed here.

    A detached actor keeps the code that it was created with. The old actor commits its pending changes and ends; the
    new one reads its state from the database. This takes a second or two. Meanwhile agents keep their changes, and
    callers use their cached handles.
    """
    from seedcore.cli import control

    before, after = control.upgrade(force=force)
    if before is not None and before.pid == after.pid:
        line = f"version {after.code_version} runs already (pid {after.pid}); --force replaces it"
    else:
        former = "none" if before is None else f"version {before.code_version}, pid {before.pid}"
        line = f"the registry runs: version {after.code_version}, pid {after.pid} (before: {former})"
    echo(control.hello_json(after) if as_json else line)
