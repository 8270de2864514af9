"""Commands that control the registry, in its cluster: epoch show, stage, flip; registry start, stop, upgrade."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Annotated, TypeVar

import typer

from seedcore import __version__
from seedcore.cli.cluster import join_cluster
from seedcore.cli.errors import EXIT_FAILED
from seedcore.cli.output import JsonOption, echo, fail, out
from seedcore.cli.queries import answered
from seedcore.cli.render import epochs_json, show_epochs
from seedcore.composition import start_registry
from seedcore.core.errors import RegistryUnavailableError, VersionMismatchError
from seedcore.core.instances import EpochRecord
from seedcore.core.limits import MAX_PAGE
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.protocol.messages import Hello
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Settings, load_settings

T = TypeVar("T")

_NameArgument = Annotated[str, typer.Argument(metavar="EPOCH", help="Name of the epoch.")]

epoch_app = typer.Typer(name="epoch", help="Generations of the fleet: blue and green.", no_args_is_help=True)
registry_app = typer.Typer(name="registry", help="The registry actor.", no_args_is_help=True)


@epoch_app.command("show")
def epoch_show(as_json: JsonOption = False) -> None:
    """List the newest epochs: the current one, the staged ones, and the live agents of each."""
    records = _ask_registry(lambda connection: connection.list_epochs())
    if as_json:
        echo(epochs_json(records))
    else:
        show_epochs(out, records)


@epoch_app.command("stage")
def epoch_stage(name: _NameArgument, as_json: JsonOption = False) -> None:
    """Create an epoch in which agents can register (CLUSTER_EPOCH) before it becomes current."""
    is_new = _ask_registry(lambda connection: connection.stage_epoch(name))
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

    async def flip(connection: RegistryConnection) -> str | None:
        objection = None if force else objection_to_flip(name, await connection.list_epochs(MAX_PAGE))
        if objection is None:
            await connection.set_current_epoch(name)
        return objection

    objection = _ask_registry(flip)
    if objection is not None:
        fail(objection, EXIT_FAILED)
    echo(json.dumps({"epoch": name}) if as_json else f"epoch {name} is current")


def objection_to_flip(name: str, records: Sequence[EpochRecord]) -> str | None:
    """Return why this epoch should not become current now, and what a flip would do; None if nothing is against it."""
    wanted = next((record for record in records if record.name == name), None)
    current = next((record for record in records if record.state == "current"), None)
    if wanted is not None and wanted.state != "staged":
        # it is current already, or the registry refuses it
        return None
    ended = f", and its {current.live} agents would end" if current is not None and current.live else ""
    effect = "" if current is None else f"; epoch {current.name} would be retired for good{ended}"
    if wanted is None:
        return (
            f"epoch {name} is not staged, so it would become current without agents{effect}; see `seedcore epoch "
            f"show`, stage it with `seedcore epoch stage {name}`, or use --force"
        )
    if wanted.live == 0 and current is not None and current.live:
        return f"epoch {name} has no live agents{effect}; start its fleet first, or use --force"
    return None


@registry_app.command("start")
def registry_start(as_json: JsonOption = False) -> None:
    """Start the registry actor of the running cluster, unless it runs already."""
    settings = load_settings()
    join_cluster(settings)
    hello = answered(start_registry(settings))
    _show(hello, f"the registry runs: pid {hello.pid} on node {hello.node_id}, version {hello.code_version}", as_json)


@registry_app.command("stop")
def registry_stop(as_json: JsonOption = False) -> None:
    """Commit the pending changes and end the registry actor. A running discovery starts it again."""
    settings = load_settings()
    join_cluster(settings)
    stopped = answered(stop_registry(settings.namespace))
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
    settings = load_settings()
    join_cluster(settings)
    before, after = answered(upgrade_registry(settings, force=force))
    if before is not None and before.pid == after.pid:
        line = f"version {after.code_version} runs already (pid {after.pid}); --force replaces it"
    else:
        former = "none" if before is None else f"version {before.code_version}, pid {before.pid}"
        line = f"the registry runs: version {after.code_version}, pid {after.pid} (before: {former})"
    _show(after, line, as_json)


async def upgrade_registry(settings: Settings, *, force: bool = False) -> tuple[Hello | None, Hello]:
    """Return the registry before and after. Raises RegistryUnavailableError if a registry with old code took over."""
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
    try:
        before: Hello | None = await connection.hello()
    except RegistryUnavailableError:
        before = None
    if before is not None and before.code_version == __version__ and not force:
        return before, before
    if before is not None:
        await stop_registry(settings.namespace)
    try:
        after = await start_registry(settings)
    except VersionMismatchError as error:
        raise _old_code() from error
    if after.code_version != __version__:
        raise _old_code()
    return before, after


def _old_code() -> RegistryUnavailableError:
    return RegistryUnavailableError(
        f"a discovery with code older or newer than {__version__} started the registry first: deploy discovery again "
        "(`serve deploy`, `serve run`), then repeat the upgrade"
    )


def _show(hello: Hello, line: str, as_json: bool) -> None:
    echo(json.dumps(asdict(hello), default=str) if as_json else line)


def _ask_registry(question: Callable[[RegistryConnection], Awaitable[T]]) -> T:
    settings = load_settings()
    join_cluster(settings)
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)

    async def answer() -> T:
        return await question(connection)

    return answered(answer())
