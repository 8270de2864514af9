"""Two versions in one cluster, as in the middle of an upgrade: agents, callers and registries of both understand each
other, the registry rolls on and back, and no agent is declared dead, refused or forgotten."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import shutil
import subprocess
import sys
from datetime import UTC
from pathlib import Path
from typing import Any

import pytest
import ray

from seedcore.cli.control import upgrade_registry
from seedcore.core.answers import BeatAnswer
from seedcore.core.errors import VersionMismatchError
from seedcore.registry.protocol.connection import REGISTRY_NAME, RegistryConnection
from seedcore.settings import Settings
from seedcore.tier0 import Tier0MemoryManager
from seedcore.tier0.answers import AgentSpec
from tests.children import run
from tests.cluster.agents import Worker
from tests.cluster.traffic import Traffic
from tests.releases import Release, releases
from tests.versions import NEXT, NEXT_FIELD, lay_out_next
from tests.waiting import eventually

OURS = ["ours-1", "ours-2"]
THEIRS = ["theirs-1", "theirs-2"]


class Version:
    """Another version in a folder of its own."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        assert settings.pg_dsn is not None
        self.folder = folder
        shutil.copy(Path(__file__).with_name("driver.py"), folder)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "SEEDCORE_NS": settings.namespace,
            "SEEDCORE_PG_DSN": settings.pg_dsn.get_secret_value(),
            "REGISTRY_BEAT_SEC": f"{settings.beat_interval_s:g}",
            "SEEDCORE_LEASE_SEC": f"{settings.effective_lease_s:g}",
        }

    @property
    def name(self) -> str:
        return self._python("-c", "import seedcore; print(seedcore.__version__)").strip()

    async def drive(self, what: str, *words: str) -> Any:
        """What a driver of that version answers."""
        return json.loads(await asyncio.to_thread(self._python, "driver.py", what, *words))

    async def command(self, *words: str) -> str:
        """What the command of that version prints."""
        return await asyncio.to_thread(self._python, "driver.py", "command", *words)

    def _python(self, *words: str) -> str:
        ended = run(sys.executable, *words, cwd=self.folder, env=self.environment, timeout_s=90)
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
        return ended.stdout


@pytest.fixture(params=[None, *releases()[-1:]], ids=lambda release: "next" if release is None else release.version)
def other(request: pytest.FixtureRequest, ray_cluster: None, settings: Settings, tmp_path: Path) -> Version:
    """The next release as it may be, and the newest one that is recorded, if any."""
    release: Release | None = request.param
    if release is None:
        lay_out_next(tmp_path)
    else:
        release.lay_out(tmp_path)
    return Version(tmp_path, settings)


async def test_registry_rolls_on_and_back_under_agents_and_callers_of_both_versions(
    other: Version, registry: RegistryConnection, manager: Tier0MemoryManager, settings: Settings
) -> None:
    made = await manager.create_agents_batch(
        [AgentSpec(name, agent_class=Worker, arguments={"settings": settings}) for name in OURS]
    )
    assert not made.failures
    # agents of the other version on the registry of ours
    assert await other.drive("make", *THEIRS) == {}
    fleet = sorted(OURS + THEIRS)
    before = {row.logical_id: row.instance_id for row in await registry.list_active()}
    assert sorted(before) == fleet
    traffic = Traffic(settings, fleet)

    async def every_agent_beats() -> None:
        """Every agent beats to the registry that runs now, as the instance that was there before."""
        since = (await registry.health()).as_of

        async def has_beaten() -> bool:
            rows = {row.logical_id: row for row in await registry.list_active(fresh_only=True)}
            assert {name: rows[name].instance_id for name in fleet} == before
            return all(rows[name].last_heartbeat > since for name in fleet)

        await eventually(has_beaten)

    async def other_callers_find_every_agent() -> None:
        """By the registry, or by the copy that its feed keeps up to date; not by what callers fall back to."""
        found = await other.drive("find", *fleet)
        assert {answer[0] for answer in found.values()} <= {"registry", "snapshot"}
        assert {name: found[name][1] for name in fleet} == {
            name: "who are you" if name in OURS else ["who are you", other.name] for name in fleet
        }

    await traffic.start()
    try:
        await traffic.goes_on()
        answer = await other.command("registry", "upgrade", "--force", "--json")
        assert json.loads(answer)["code_version"] == other.name
        await traffic.goes_on()
        await every_agent_beats()
        await other_callers_find_every_agent()
        # the release is taken back; its schema stays
        _, after = await upgrade_registry(settings, force=True)
        assert (await registry.health()).hello == after
        await traffic.goes_on()
        await every_agent_beats()
        assert (await registry.health()).is_ready
        await other_callers_find_every_agent()
    finally:
        await traffic.stop()
    assert traffic.refused == []
    await eventually(traffic.is_delivered)
    assert traffic.committed() == traffic.turns
    assert traffic.deaths() == []
    await traffic.end()


def test_next_version_is_another_one(ray_cluster: None, settings: Settings, tmp_path: Path) -> None:
    lay_out_next(tmp_path)
    version = Version(tmp_path, settings)
    assert version.name == NEXT
    script = (
        "import pickle, sys\n"
        "from seedcore.core.answers import BeatAnswer\n"
        f"sys.stdout.buffer.write(pickle.dumps(BeatAnswer(unknown=('a',), {NEXT_FIELD}=8)))\n"
    )
    written = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=version.environment, capture_output=True, check=True
    )
    assert pickle.loads(written.stdout) == BeatAnswer(unknown=("a",))


class Newer:
    """A registry that goes on to understand us, and has no such methods any more, or others."""

    async def hello(self) -> Any:
        from datetime import datetime

        from seedcore.registry.protocol.messages import PROTOCOL, Hello

        return Hello(PROTOCOL + 5, "99.0.0", os.getpid(), "", datetime.now(UTC), oldest_protocol=PROTOCOL)

    async def health(self, must: int) -> None: ...


async def test_call_that_the_other_version_does_not_know_is_refused_with_a_remedy(
    ray_cluster: None, settings: Settings
) -> None:
    actor: Any = ray.remote(Newer)
    handle = actor.options(name=REGISTRY_NAME, namespace=settings.namespace, num_cpus=0).remote()
    connection = RegistryConnection(settings.namespace, settings.call_timeout_s)
    with pytest.raises(VersionMismatchError, match="install the registry's version"):
        await connection.list_epochs()
    with pytest.raises(VersionMismatchError, match="install the registry's version"):
        await connection.health()
    ray.kill(handle)
