"""Commands that steer the registry itself, in the cluster: epoch show, stage, flip; registry start, stop, upgrade."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Annotated, TypeVar

import typer

from seedcore import __version__
from seedcore.cli.cluster import join_cluster
from seedcore.cli.output import EXIT_FAILED, JsonOption, echo, fail, out
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

_NameArgument = Annotated[str, typer.Argument(metavar="EPOCH", help="The epoch's name.")]

epoch_app = typer.Typer(help="Fleet generations: blue and green.", no_args_is_help=True)
registry_app = typer.Typer(help="The registry actor.", no_args_is_help=True)


@epoch_app.command("show")
def epoch_show(as_json: JsonOption = False) -> None:
    """The newest epochs: which is shown, which are staged, who lives in each."""
    records = _ask_registry(lambda connection: connection.list_epochs())
    if as_json:
        echo(epochs_json(records))
    else:
        show_epochs(out, records)


@epoch_app.command("stage")
def epoch_stage(name: _NameArgument, as_json: JsonOption = False) -> None:
    """Name an epoch that agents can register in (CLUSTER_EPOCH) before it is shown."""
    is_new = _ask_registry(lambda connection: connection.stage_epoch(name))
    said = f"epoch {name} is staged" if is_new else f"epoch {name} was there already"
    echo(json.dumps({"epoch": name, "is_new": is_new}) if as_json else said)


@epoch_app.command("flip")
def epoch_flip(
    name: _NameArgument,
    force: Annotated[bool, typer.Option("--force", help="Even where it is not staged, or nobody lives in it.")] = False,
    as_json: JsonOption = False,
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
        fail(objection, EXIT_FAILED)
    echo(json.dumps({"epoch": name}) if as_json else f"epoch {name} is shown")


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
def registry_start(as_json: JsonOption = False) -> None:
    """Start the registry actor of the running cluster, unless it runs."""
    settings = load_settings()
    join_cluster(settings)
    hello = answered(start_registry(settings))
    _tell(hello, f"the registry runs: pid {hello.pid} on node {hello.node_id}, version {hello.code_version}", as_json)


@registry_app.command("stop")
def registry_stop(as_json: JsonOption = False) -> None:
    """Let the registry actor commit what waits, then end it. A running discovery starts it again."""
    settings = load_settings()
    join_cluster(settings)
    stopped = answered(stop_registry(settings.namespace))
    said = "the registry has stopped" if stopped else "no registry runs"
    echo(json.dumps({"stopped": stopped}) if as_json else said)


@registry_app.command("upgrade")
def registry_upgrade(
    force: Annotated[bool, typer.Option("--force", help="Also where this version runs already.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Replace the registry actor by one with the code that is installed here.

    A detached actor keeps the code that it was made with. The old one commits what waits and ends; the new one takes
    its memory from the database. Meanwhile, for a second or two, agents keep what they have to say, and callers go on
    with the handles and the copies that they have.
    """
    settings = load_settings()
    join_cluster(settings)
    before, after = answered(upgrade_registry(settings, force=force))
    if before is not None and before.pid == after.pid:
        _tell(after, f"version {after.code_version} runs already (pid {after.pid}); --force replaces it", as_json)
        return
    came_from = "none ran" if before is None else f"version {before.code_version}, pid {before.pid}, is gone"
    _tell(after, f"the registry runs: version {after.code_version}, pid {after.pid} ({came_from})", as_json)


async def upgrade_registry(settings: Settings, *, force: bool = False) -> tuple[Hello | None, Hello]:
    """Who answered before and who does now. Raises RegistryUnavailableError where the old one comes back instead."""
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
        raise _came_back() from error
    if after.code_version != __version__:
        raise _came_back()
    return before, after


def _came_back() -> RegistryUnavailableError:
    return RegistryUnavailableError(
        f"a registry of another version than {__version__} was started first, by a discovery that still runs old code: "
        "deploy that anew (`serve deploy`, `serve run`), then upgrade again"
    )


def _tell(hello: Hello, said: str, as_json: bool) -> None:
    echo(json.dumps(asdict(hello), default=str) if as_json else said)


def _ask_registry(question: Callable[[RegistryConnection], Awaitable[T]]) -> T:
    settings = load_settings()
    join_cluster(settings)
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)

    async def answer() -> T:
        return await question(connection)

    return answered(answer())
