"""`seedcore fleet up|down FILE`: the agents that a file lists, made or stopped. Doing it twice changes nothing."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from seedcore.agents import RayAgent
from seedcore.cli.cluster import join_cluster
from seedcore.cli.output import EXIT_FAILED, JsonOption, echo, out
from seedcore.cli.queries import answered
from seedcore.core.errors import (
    InvalidInputError,
    RegistryUnavailableError,
    RetiredEpochError,
    StoreUnavailableError,
    VersionMismatchError,
    first_line,
)
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE, Json, check_epoch
from seedcore.registry.caller.listing import every_page
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.settings import Settings, load_settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec, Gathered

T = TypeVar("T")

MAX_FILE_BYTES = 10 * 1024 * 1024
MAX_AGENTS = 10_000
# each is a process that has to start: this many at once are quick, and a failure is seen early
_AT_ONCE = 8
_SHOWN = 5

EpochOption = Annotated[
    str | None,
    typer.Option("--epoch", metavar="EPOCH", help="A staged epoch, or the current one. Default: `epoch` in FILE."),
]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="YAML: see docs/how-to/fleet.md.")]

fleet_app = typer.Typer(help="The agents that a file lists.", no_args_is_help=True)


Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class AgentGroup(BaseModel):
    """Agents that are alike. `ids` names them, or `id` one of them; with `count`, `{n}` in `id` counts from 1."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    agent_class: str = Field("seedcore.agents:RayAgent", alias="class")
    id: str | None = None
    ids: list[str] = []
    count: Annotated[int, Field(ge=1, le=MAX_AGENTS)] | None = None
    organ: str | None = None
    labels: dict[str, str] = {}
    metadata: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    num_cpus: Share = 0
    resources: dict[str, Share] = {}
    max_restarts: Annotated[int, Field(ge=-1)] = -1

    def names(self) -> list[str]:
        """The logical ids, or InvalidInputError."""
        if (self.id is None) is not bool(self.ids):
            raise InvalidInputError("agents", "each entry needs either id or ids")
        if self.id is None:
            if self.count is not None:
                raise InvalidInputError("count", "goes with id, and not with ids")
            return self.ids
        if self.count is None:
            return [self.id]
        if "{n}" not in self.id:
            raise InvalidInputError("id", f"must have {{n}} in it where there is a count, not {self.id!r}")
        return [self.id.replace("{n}", str(number)) for number in range(1, self.count + 1)]


class FleetFile(BaseModel):
    """A fleet."""

    model_config = ConfigDict(extra="forbid")

    epoch: str | None = None
    agents: list[AgentGroup]


@fleet_app.command("up")
def fleet_up(file: FileArgument, epoch: EpochOption = None, as_json: JsonOption = False) -> None:
    """Make every agent of the file that does not live yet.

    They belong to the epoch that is current when the command starts, or to the one that is named.
    """
    fleet = read_fleet(file)
    specs = specs_of(fleet, epoch)
    settings = load_settings()
    join_cluster(settings)
    started_epoch = answered(_epoch_to_start_in(settings, _epoch_named(fleet, epoch)))
    answered(_require_no_other_fleet(settings, specs))
    specs = [replace(spec, started_epoch=started_epoch) for spec in specs]
    _work(settings, "making agents", specs, Tier0MemoryManager.create_agents_batch, "up", as_json)
    draining = [] if as_json else answered(_draining_of({spec.agent_id for spec in specs}))
    if draining:
        shown = ", ".join(draining[:_SHOWN]) + (", ..." if len(draining) > _SHOWN else "")
        echo(f"draining, and so not handed out, {'is' if len(draining) == 1 else 'are'} {shown}")


@fleet_app.command("down")
def fleet_down(file: FileArgument, epoch: EpochOption = None, as_json: JsonOption = False) -> None:
    """Stop every agent of the file. Others are left alone."""
    fleet = read_fleet(file)
    named = _epoch_named(fleet, epoch)
    specs = [AgentSpec(name, epoch=named) for name in names_of(fleet)]
    settings = load_settings()
    join_cluster(settings)
    _work(settings, "stopping agents", specs, Tier0MemoryManager.shutdown_agents_batch, "down", as_json)


async def _epoch_to_start_in(settings: Settings, named: str | None) -> str | None:
    """The current epoch, where none is named; None where it cannot be asked now.

    Raises InvalidInputError or RetiredEpochError where the named one is no epoch to start agents in.
    """
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
    if named is not None:
        record = next((record for record in await connection.list_epochs(MAX_PAGE) if record.name == named), None)
        if record is None:
            raise InvalidInputError("epoch", f"{named} is not staged: stage it with `seedcore epoch stage {named}`")
        if record.state == "retired":
            raise RetiredEpochError(named)
        return None
    try:
        return (await connection.current_epoch()).value.name
    except (RegistryUnavailableError, StoreUnavailableError, VersionMismatchError):
        # agents need no registry to start, and belong to the epoch that they register in
        return None


async def _require_no_other_fleet(settings: Settings, specs: Sequence[AgentSpec]) -> None:
    """Raise InvalidInputError if another actor already runs an agent of the file in the epoch to start in, as after a
    flip to the fleet of another file: a second one, being newer, would take over its callers."""
    by_id = {spec.agent_id: spec for spec in specs}
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
    try:
        alive = await every_page(connection, fresh_only=False)
    except RegistryUnavailableError:
        return
    for row in alive:
        spec = by_id.get(row.logical_id)
        is_of_this_epoch = spec is not None and spec.epoch in {None, row.cluster_epoch}
        if spec is not None and is_of_this_epoch and row.actor_name not in {None, spec.actor_name}:
            raise InvalidInputError(
                "FILE",
                f"{row.logical_id} already runs in epoch {row.cluster_epoch}, as actor {row.actor_name!r}: end that "
                f"fleet first, or add to it with --epoch {row.cluster_epoch}",
            )


async def _draining_of(names: set[str]) -> list[str]:
    """Who of these lives and is not handed out; nobody where that cannot be asked now."""
    settings = load_settings()
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
    try:
        draining = await every_page(connection, (Status.DRAINING,), fresh_only=False)
    except RegistryUnavailableError:
        return []
    return sorted({instance.logical_id for instance in draining} & names)


def _work(
    settings: Settings,
    what: str,
    things: Sequence[T],
    work: Callable[[Tier0MemoryManager, Sequence[T]], Awaitable[Gathered[Any]]],
    word: str,
    as_json: bool,
) -> None:
    manager = Tier0MemoryManager(settings)
    failures = answered(_in_chunks(what, things, lambda chunk: work(manager, chunk)))
    _end(failures, len(things), word, as_json)


def read_fleet(file: Path) -> FleetFile:
    """What a file says, or InvalidInputError that names the place."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInputError("FILE", f"{file} has more than {MAX_FILE_BYTES} bytes")
        told = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError("FILE", f"{file} cannot be read: {first_line(error)}") from None
    except yaml.YAMLError as error:
        raise InvalidInputError("FILE", f"{file} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return FleetFile.model_validate(told)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InvalidInputError("FILE", f"{file}: {where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def names_of(fleet: FleetFile) -> list[str]:
    """Every logical id, or InvalidInputError."""
    names = [name for group in fleet.agents for name in group.names()]
    if len(names) > MAX_AGENTS:
        raise InvalidInputError("agents", f"must be at most {MAX_AGENTS}, not {len(names)}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InvalidInputError("agents", f"name each agent once, not {twice[:5]} again")
    return names


def _epoch_named(fleet: FleetFile, epoch: str | None) -> str | None:
    named = epoch if epoch is not None else fleet.epoch
    return None if named is None else check_epoch(named)


def specs_of(fleet: FleetFile, epoch: str | None = None) -> list[AgentSpec]:
    """What to make, or InvalidInputError, before anything is made."""
    names_of(fleet)
    named = _epoch_named(fleet, epoch)
    return [
        AgentSpec(
            name,
            group.organ,
            agent_class,
            group.labels,
            group.metadata,
            group.arguments,
            group.num_cpus,
            group.resources,
            group.max_restarts,
            is_detached=True,
            epoch=named,
        )
        for group in fleet.agents
        for agent_class in [_class_named(group.agent_class)]
        for name in group.names()
    ]


def _class_named(path: str) -> type[Any]:
    """The class that `module:Class` names. Modules beside the caller can be named too."""
    module_name, colon, class_name = path.partition(":")
    if not colon or not module_name or not class_name:
        raise InvalidInputError("class", f"must be written module:Class, not {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # noqa: BLE001 - whatever the module does when it is imported
        raise InvalidInputError("class", f"{path} cannot be imported: {first_line(error)}") from None
    if not (isinstance(found, type) and issubclass(found, RayAgent)):
        raise InvalidInputError("class", f"{path} is no subclass of RayAgent")
    return found


async def _in_chunks(
    what: str, things: Sequence[T], work: Callable[[Sequence[T]], Awaitable[Gathered[Any]]]
) -> dict[str, str]:
    """Do some at a time, with progress; what went wrong, by agent."""
    failures: dict[str, str] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]}")
    # progress is for people: a pipe gets the result alone
    with Progress(*columns, console=out, disable=not out.is_terminal) as progress:
        task = progress.add_task(what, total=len(things), failed="")
        for start in range(0, len(things), _AT_ONCE):
            chunk = things[start : start + _AT_ONCE]
            gathered = await work(chunk)
            for agent, error in gathered.failures.items():
                # at once: the next ones may take long
                failures[agent] = str(error)
                progress.console.file.flush()
                echo(f"seedcore: {agent}: {error}", err=True)
            told = f"{len(failures)} failed" if failures else ""
            progress.update(task, advance=len(chunk), failed=told)
    return failures


def _end(failures: dict[str, str], total: int, word: str, as_json: bool) -> None:
    if as_json:
        told: dict[str, Json] = {word: total - len(failures), "failures": failures}
        echo(json.dumps(told, indent=2))
    else:
        echo(f"{total - len(failures)} of {total} agents are {word}")
    if failures:
        raise typer.Exit(EXIT_FAILED)
