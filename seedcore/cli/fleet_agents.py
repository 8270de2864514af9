"""Creates and stops the agents of a fleet file in the Ray cluster."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from seedcore.cli.cluster import join_cluster
from seedcore.cli.fleet_file import FleetFile
from seedcore.cli.output import echo, out
from seedcore.cli.queries import answered
from seedcore.core.errors import (
    InvalidInputError,
    RegistryUnavailableError,
    RetiredEpochError,
    StoreUnavailableError,
    VersionMismatchError,
)
from seedcore.core.instances import Instance
from seedcore.core.lifecycle import Status
from seedcore.core.limits import MAX_PAGE
from seedcore.registry.caller.listing import every_page
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec, Gathered

T = TypeVar("T")

# each agent is a process that starts: this many at once are fast, and a failure is shown early
_AT_ONCE = 8


def create_fleet(fleet: FleetFile, epoch: str | None, settings: Settings) -> tuple[dict[str, str], list[str]]:
    """Create the agents that are not live. Returns the failures by agent, and the ids of the draining agents."""
    specs = fleet.specs(epoch)
    join_cluster(settings)
    started_epoch = answered(_epoch_to_start_in(settings, fleet.epoch_or(epoch)))
    live = answered(_live(settings))
    _require_no_other_fleet(specs, live)
    specs = [replace(spec, started_epoch=started_epoch) for spec in specs]
    failures = answered(_in_chunks("creating agents", specs, Tier0MemoryManager(settings).create_agents_batch))
    ids = {spec.agent_id for spec in specs}
    return failures, sorted({row.logical_id for row in live if row.status is Status.DRAINING} & ids)


def stop_fleet(fleet: FleetFile, epoch: str | None, settings: Settings) -> dict[str, str]:
    """Stop the agents. Returns the failures by agent."""
    named = fleet.epoch_or(epoch)
    specs = [AgentSpec(name, epoch=named) for name in fleet.names()]
    join_cluster(settings)
    return answered(_in_chunks("stopping agents", specs, Tier0MemoryManager(settings).shutdown_agents_batch))


async def _epoch_to_start_in(settings: Settings, named: str | None) -> str | None:
    """Return the current epoch, or None if an epoch is named or the registry cannot answer.

    Raises InvalidInputError or RetiredEpochError if agents cannot start in the named epoch.
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
        # agents need no registry to start; they belong to the epoch in which they register
        return None


async def _live(settings: Settings) -> Sequence[Instance]:
    """Return the instances that are alive or draining; none if the registry cannot answer."""
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
    try:
        return await every_page(connection, (Status.ALIVE, Status.DRAINING), fresh_only=False)
    except RegistryUnavailableError:
        return ()


def _require_no_other_fleet(specs: Sequence[AgentSpec], live: Sequence[Instance]) -> None:
    """Raise InvalidInputError if another actor already runs an agent of the file in the same epoch, for example after a
    flip to the fleet of another file. Callers would use the newer one of the two."""
    by_id = {spec.agent_id: spec for spec in specs}
    for row in live:
        spec = by_id.get(row.logical_id)
        if row.status is Status.DRAINING or spec is None or row.actor_name in {None, spec.actor_name}:
            continue
        if spec.epoch in {None, row.cluster_epoch}:
            raise InvalidInputError(
                "FILE",
                f"{row.logical_id} already runs in epoch {row.cluster_epoch}, as actor {row.actor_name!r}: stop that "
                f"fleet first, or add to it with --epoch {row.cluster_epoch}",
            )


async def _in_chunks(
    title: str, things: Sequence[T], work: Callable[[Sequence[T]], Awaitable[Gathered[Any]]]
) -> dict[str, str]:
    """Work on a few things at a time, with a progress bar. Returns the failures by agent."""
    failures: dict[str, str] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]}")
    with Progress(*columns, console=out, disable=not out.is_terminal) as progress:
        bar = progress.add_task(title, total=len(things), failed="")
        for start in range(0, len(things), _AT_ONCE):
            chunk = things[start : start + _AT_ONCE]
            gathered = await work(chunk)
            for agent, error in gathered.failures.items():
                # at once, because the remaining chunks may take long
                failures[agent] = str(error)
                progress.console.file.flush()
                echo(f"seedcore: {agent}: {error}", err=True)
            progress.update(bar, advance=len(chunk), failed=f"{len(failures)} failed" if failures else "")
    return failures
