"""Controls the registry of the Ray cluster that it joins: its epochs, its start, stop and upgrade."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

from seedcore import __version__
from seedcore.cli.cluster import join_cluster
from seedcore.cli.queries import answered
from seedcore.composition import start_registry
from seedcore.core.errors import RegistryUnavailableError, VersionMismatchError
from seedcore.core.instances import EpochRecord
from seedcore.core.limits import MAX_PAGE
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.protocol.messages import Hello
from seedcore.registry.server.actor import stop_registry
from seedcore.settings import Settings, load_settings

T = TypeVar("T")


def list_epochs() -> Sequence[EpochRecord]:
    """Return the newest epochs."""
    return _ask_registry(lambda connection: connection.list_epochs())


def stage(name: str) -> bool:
    """Stage an epoch. Returns whether it is new."""
    return _ask_registry(lambda connection: connection.stage_epoch(name))


def flip(name: str, *, force: bool) -> str | None:
    """Make an epoch current, unless there is an objection, which is returned. `force` ignores objections."""

    async def flip_unless_objected(connection: RegistryConnection) -> str | None:
        objection = None
        if not force:
            health = await connection.health()
            is_lost = health.epoch_problem is not None
            objection = objection_to_flip(name, await connection.list_epochs(MAX_PAGE), is_lost=is_lost)
        if objection is None:
            await connection.set_current_epoch(name)
        return objection

    return _ask_registry(flip_unless_objected)


def objection_to_flip(name: str, records: Sequence[EpochRecord], *, is_lost: bool = False) -> str | None:
    """Return why this epoch should not become current now, and what a flip would do; None if nothing is against it.

    `is_lost`: the database has lost a flip, and perhaps also that the epoch exists and its agents.
    """
    wanted = next((record for record in records if record.name == name), None)
    current = next((record for record in records if record.state == "current"), None)
    if wanted is not None and wanted.state != "staged":
        # it is current already, or the registry refuses it
        return None
    ended = f", and its {current.live} agents would end" if current is not None and current.live else ""
    effect = "" if current is None else f"; epoch {current.name} would be retired for good{ended}"
    if is_lost and (wanted is None or wanted.live == 0):
        return (
            f"the database has lost the agents of epoch {name}: those that live register again in a few beats, then "
            f"repeat the flip; `seedcore epoch show` counts them{effect}; --force flips without them"
        )
    if wanted is None:
        return (
            f"epoch {name} is not staged, so it would become current without agents{effect}; see `seedcore epoch "
            f"show`, stage it with `seedcore epoch stage {name}`, or use --force"
        )
    if wanted.live == 0 and current is not None and current.live:
        return f"epoch {name} has no live agents{effect}; start its fleet first, or use --force"
    return None


def start() -> Hello:
    """Start the registry, unless it runs."""
    settings = load_settings()
    join_cluster(settings)
    return answered(start_registry(settings))


def stop() -> bool:
    """Stop the registry. Returns whether one ran."""
    settings = load_settings()
    join_cluster(settings)
    return answered(stop_registry(settings.namespace))


def upgrade(*, force: bool) -> tuple[Hello | None, Hello]:
    """Replace the registry with one of this version, as `upgrade_registry`."""
    settings = load_settings()
    join_cluster(settings)
    return answered(upgrade_registry(settings, force=force))


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


def hello_json(hello: Hello) -> str:
    """Return the identity of a registry as JSON, with times in ISO 8601."""
    return json.dumps(asdict(hello), default=str)


def _ask_registry(question: Callable[[RegistryConnection], Awaitable[T]]) -> T:
    settings = load_settings()
    join_cluster(settings)
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)

    async def answer() -> T:
        return await question(connection)

    return answered(answer())
