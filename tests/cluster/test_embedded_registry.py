"""The registry on its embedded database, whose processes are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import ray

from seedcore.composition import start_registry
from seedcore.core.causes import Cause, CauseKind
from seedcore.registry import RegistryClient, RegistryConnection
from seedcore.registry.protocol.connection import REGISTRY_NAME
from seedcore.settings import Settings
from tests.traces import short_folder
from tests.waiting import eventually


def processes_of(folder: Path) -> list[str]:
    lines = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [line for line in lines if str(folder) in line]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the server's user can pass through."""
    folder = short_folder("reg-")
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest_asyncio.fixture
async def embedded(ray_cluster: None, folder: Path) -> AsyncIterator[tuple[Settings, Path]]:
    settings = Settings(
        namespace="embedded", data_dir=folder / "data", beat_interval_s=0.5, lease_s=6.0, flush_interval_s=0.2
    )
    await start_registry(settings)
    yield settings, folder
    await eventually(lambda: not processes_of(folder), within_s=40)


async def test_its_database_is_killed_and_comes_back_and_goes_when_the_registry_is_killed_for_good(
    embedded: tuple[Settings, Path],
) -> None:
    settings, folder = embedded
    registry = RegistryConnection(settings.namespace)

    async def is_ready() -> bool:
        health = await registry.health()
        assert health.is_ready, health
        return True

    await eventually(is_ready, within_s=40)
    [note] = (await registry.health()).notes
    assert "SEEDCORE_PG_DSN" in note
    client = RegistryClient("kept", settings=settings)
    assert (await client.set_status("alive")).durable

    # the guardian, and with it the server
    guardian = int(json.loads((folder / "data" / "server.json").read_text())["guardian"].partition("-")[0])
    os.kill(guardian, signal.SIGKILL)
    assert (await client.set_status("draining", "meanwhile")).instance_id

    async def is_stored() -> bool:
        await client.beat()
        described = await registry.describe("kept")
        assert described.complete
        stored = [(row.status.value, row.cause) for row in described.instances]
        return client.pending == 0 and stored == [("draining", Cause(CauseKind.AGENT, "meanwhile"))]

    await eventually(is_stored, within_s=40)

    # the registry, for good: nothing holds the server any more
    ray.kill(ray.get_actor(REGISTRY_NAME, namespace=settings.namespace), no_restart=True)
