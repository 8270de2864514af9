"""The newcomer's way, as the README tells it: serve run, demo, ls, Ctrl-C, and again on the same data."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.serving import free_port
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent


_RIVAL = """
import asyncio, ray
from seedcore.runtime import start_registry
from seedcore.settings import get_settings
ray.init(address="local", include_dashboard=False)
asyncio.run(start_registry(get_settings()))
"""

# somebody's own agent, which the demo has no business with
_MINE = """
import asyncio, ray, sys
from seedcore.tier0 import get_tier0_manager
ray.init(address="auto", namespace="seedcore")
asyncio.run(get_tier0_manager().create_agent(sys.argv[1], labels={"app": "demo"}))
"""


class Newcomer:
    """A shell of his own: a data folder, a port, commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        assert config["http_options"] == {"host": "127.0.0.1", "port": 8000}
        config["http_options"]["port"] = port
        self.config = folder / "serve_config.yaml"
        self.config.write_text(yaml.safe_dump(config))
        self.environment = {
            **os.environ,
            "SEEDCORE_DATA_DIR": str(self.data_dir),
            "REGISTRY_BEAT_SEC": "1",
            "SEEDCORE_LEASE_SEC": "3",
            "RAY_TMPDIR": str(folder / "ray"),
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
        }
        self.serving: subprocess.Popen[bytes] | None = None

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env={**self.environment, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=150,
            check=check,
        )

    def serve(self) -> None:
        with (self.folder / "serve.log").open("ab") as log:
            self.serving = subprocess.Popen(
                ["serve", "run", str(self.config)], env=self.environment, cwd=self.folder, stdout=log, stderr=log
            )

    def find_cluster(self) -> None:
        """Name our cluster to the commands: beside another one on the machine, they would have to guess."""
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if any(str(self.folder) in word for word in line):
                for word in line:
                    if word.startswith("--gcs-address="):
                        self.environment["RAY_ADDRESS"] = word.partition("=")[2]
                        return
        raise AssertionError("no raylet of ours")

    def get(self, path: str) -> dict[str, Any]:
        return dict(httpx.get(self.url + path, timeout=20).raise_for_status().json())

    async def ready(self) -> None:
        def is_ready() -> bool:
            rungs = self.get("/readyz")["rungs"]
            assert set(rungs.values()) == {"ok"}, rungs
            return True

        await eventually(is_ready, within_s=90, every_s=0.3)

    def interrupt(self) -> None:
        assert self.serving is not None
        self.serving.send_signal(signal.SIGINT)
        self.serving.wait(60)

    def processes(self) -> list[str]:
        """Everything that still works in this newcomer's folder."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            if str(self.folder) in line:
                found.append(line[:120])
        return found


@pytest.fixture(scope="module")
def newcomer() -> Iterator[Newcomer]:
    folder = Path(tempfile.mkdtemp(prefix="new-", dir="/tmp"))
    folder.chmod(0o755)
    newcomer = Newcomer(folder)
    yield newcomer
    if newcomer.serving is not None and newcomer.serving.poll() is None:
        newcomer.interrupt()
    ended(lambda: not newcomer.processes())
    shutil.rmtree(folder)


def ended(question: Callable[[], bool], within_s: float = 60) -> None:
    deadline_s = time.monotonic() + within_s
    while not question():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


@pytest.mark.timeout(300)
async def test_serve_demo_list_interrupt_and_serve_again(newcomer: Newcomer) -> None:
    newcomer.serve()
    await newcomer.ready()
    assert newcomer.get("/v1/instances")["items"] == []
    assert newcomer.get("/healthz")["registry"]["store_kind"] == "embedded"
    newcomer.find_cluster()

    shown = newcomer.run("seedcore", "demo", "--agents", "4").stdout
    for step in (
        "register",
        "resolved by registry; it counted 8 words",
        "it is draining",
        "declared dead; cause: its process was killed by SIGKILL",
    ):
        assert step in shown
    page = newcomer.get("/v1/instances")
    assert [item["logical_id"] for item in page["items"]] == ["demo-memory-2", "demo-vision-1"]
    listed = json.loads(newcomer.run("seedcore", "ls", "--json", "--label", "app=demo").stdout)
    assert [item["logical_id"] for item in listed["items"]] == ["demo-memory-2", "demo-vision-1"]
    assert "draining" in newcomer.run("seedcore", "ls", "--all").stdout
    gone = json.loads(newcomer.run("seedcore", "ls", "--all", "--status", "dead", "--json").stdout)
    assert [item["logical_id"] for item in gone["items"]] == ["demo-vision-2"]
    assert "its process was killed by SIGKILL" in newcomer.run("seedcore", "get", "demo-vision-2").stdout
    nobody = newcomer.run("seedcore", "get", "nobody", check=False)
    assert (nobody.returncode, nobody.stderr) == (3, "seedcore: nobody ever registered as 'nobody'\n")

    again = newcomer.run("seedcore", "demo", "--agents", "4").stdout
    assert "Stopped 3 agents of an earlier demo." in again
    assert "declared dead" in again

    assert "(source: ray, incomplete)" in newcomer.run("seedcore", "ls", SEEDCORE_MODE="ray").stdout
    # another cluster on the same data does not take it away
    rival = newcomer.run(sys.executable, "-c", _RIVAL, check=False)
    assert "works on the data in" in rival.stderr
    assert newcomer.get("/healthz")["registry"]["fenced_by"] is None

    # a registry that is stopped for good is started again by discovery
    pid = newcomer.get("/healthz")["registry"]["hello"]["pid"]
    assert "has stopped" in newcomer.run("seedcore", "registry", "stop").stdout

    def is_another() -> bool:
        registry = newcomer.get("/healthz")["registry"]
        return bool(registry and registry["recovered"] and registry["hello"]["pid"] != pid)

    await eventually(is_another, within_s=40)
    assert [item["logical_id"] for item in newcomer.get("/v1/instances")["items"]] == ["demo-memory-2", "demo-vision-1"]

    newcomer.interrupt()
    ended(lambda: not newcomer.processes())

    del newcomer.environment["RAY_ADDRESS"]
    newcomer.serve()
    await newcomer.ready()
    assert newcomer.get("/v1/instances")["items"] == []
    assert newcomer.get("/v1/epoch")["epoch"] == "epoch-2"
    history = newcomer.get("/v1/agents/demo-memory-2")["history"]
    assert [(old["status"], old["cause"]) for old in history] == [
        ("dead", "epoch epoch-1 retired"),
        ("dead", "stopped"),
    ]
    newcomer.interrupt()
    ended(lambda: not newcomer.processes())


@pytest.mark.timeout(300)
async def test_the_readmes_agents_join_the_running_cluster_and_the_demo_leaves_others_alone(
    newcomer: Newcomer,
) -> None:
    newcomer.serve()
    await newcomer.ready()
    newcomer.find_cluster()
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    for number, snippet in enumerate(snippets):
        # RAY_ADDRESS, which names our cluster here, hides that a newcomer's Ray would start one of its own
        assert 'ray.init(address="auto", namespace="seedcore")' in snippet
        script = newcomer.folder / f"snippet_{number}.py"
        script.write_text(snippet)
        # Ray may have something to say too
        said = newcomer.run(sys.executable, str(script)).stdout.splitlines()
        assert ("3" in said) == (number == 0), said

    # both outlive their scripts
    def listed() -> list[str]:
        return [item["logical_id"] for item in newcomer.get("/v1/instances")["items"]]

    await eventually(lambda: listed() == ["counter-1", "existing-1"])

    newcomer.run("seedcore", "demo", "--agents", "4")
    newcomer.run(sys.executable, "-c", _MINE, "demo-mine")
    assert "stopped 3 agents" in newcomer.run("seedcore", "demo", "--down").stdout
    assert listed() == ["counter-1", "demo-mine", "existing-1"]
    newcomer.run(sys.executable, "-c", _MINE, "demo-vision-2")
    refused = newcomer.run("seedcore", "demo", "--agents", "4", check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "'demo-vision-2': is not of the demo" in refused.stderr
    assert listed() == ["counter-1", "demo-mine", "demo-vision-2", "existing-1"]

    newcomer.interrupt()
    ended(lambda: not newcomer.processes())
    del newcomer.environment["RAY_ADDRESS"]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"REGISTRY_BEAT_SEC": "soon"}, "REGISTRY_BEAT_SEC"),
        ({"REGISTRY_BEAT_SEC": "-1"}, "REGISTRY_BEAT_SEC"),
        ({"SEEDCORE_LEASE_SEC": "2"}, "SEEDCORE_LEASE_SEC: must be at least 3 x REGISTRY_BEAT_SEC"),
        ({"ENABLE_RUNTIME_REGISTRY": "perhaps"}, "ENABLE_RUNTIME_REGISTRY"),
        ({"SEEDCORE_MODE": "consul"}, "SEEDCORE_MODE"),
        ({"RAY_NAMESPACE": "x" * 300}, "RAY_NAMESPACE"),
        ({"SEEDCORE_PG_DSN": "not a dsn"}, "SEEDCORE_PG_DSN"),
        ({"SEEDCORE_PG_DSN": "postgresql://me:hunter2@127.0.0.1:1/x"}, "the database is away"),
        ({"SEEDCORE_DATA_DIR": "/proc/nowhere"}, "SEEDCORE_DATA_DIR"),
        ({"SEEDCORE_DATA_DIR": "~nouser/x"}, "SEEDCORE_DATA_DIR: begins with the home folder of a user"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(newcomer: Newcomer, environment: dict[str, str], says: str) -> None:
    answer = newcomer.run("seedcore", "migrate", check=False, **environment)
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert says in answer.stderr
    assert "hunter2" not in answer.stderr


@pytest.mark.parametrize("command", ["ls", "demo"])
def test_without_the_cluster_that_is_named_a_command_says_how_to_start_one(newcomer: Newcomer, command: str) -> None:
    answer = newcomer.run("seedcore", command, check=False, RAY_ADDRESS="127.0.0.1:1")
    assert answer.returncode == 1
    assert "serve run serve_config.yaml" in answer.stderr
    assert "Traceback" not in answer.stderr
