"""The newcomer's way, as the README tells it: serve run, demo, ls, Ctrl-C, and again on the same data."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from tests.commands import command
from tests.newcomer import Newcomer, a_newcomer, errors_of
from tests.waiting import eventually

_RIVAL = """
import asyncio, os, ray, subprocess, sys
from seedcore.composition import start_registry
from seedcore.settings import get_settings
named = os.environ.pop("RAY_ADDRESS")
ray.init(address="local", include_dashboard=False)
ended = subprocess.run(["seedcore", "drain", "demo-vision-1"], stderr=subprocess.PIPE, text=True)
print(ended.returncode, named in ended.stderr, ray.get_runtime_context().gcs_address in ended.stderr)
asyncio.run(start_registry(get_settings()))
"""


@pytest.fixture(scope="module")
def newcomer() -> Iterator[Newcomer]:
    with a_newcomer() as newcomer:
        yield newcomer


@pytest.mark.slow
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
        "source: registry; it counted 7 words",
        "it is draining",
        "declared dead; cause: process ",
    ):
        assert step in shown
    page = newcomer.get("/v1/instances")
    assert [item["logical_id"] for item in page["items"]] == ["demo-memory-2", "demo-vision-1"]
    listed = json.loads(newcomer.run("seedcore", "ls", "--json", "--label", "app=demo").stdout)
    assert [item["logical_id"] for item in listed["items"]] == ["demo-memory-2", "demo-vision-1"]
    # a cluster of the user's own on this machine is joined with the user's token
    assert "draining" in newcomer.run("seedcore", "ls", "--all", RAY_AUTH_MODE=None).stdout
    health = json.loads(newcomer.run("seedcore", "health", "--json").stdout)
    assert newcomer.environment["RAY_ADDRESS"] in health["cluster"]
    gone = json.loads(newcomer.run("seedcore", "ls", "--all", "--status", "dead", "--json").stdout)
    assert [item["logical_id"] for item in gone["items"]] == ["demo-vision-2"]
    assert "process " in newcomer.run("seedcore", "get", "demo-vision-2").stdout
    absent = newcomer.run("seedcore", "get", "absent", check=False)
    (error,) = errors_of(absent)
    assert absent.returncode == 3
    assert error.startswith("seedcore: no agent has ever registered as 'absent'; Ray knows no actor")

    again = newcomer.run("seedcore", "demo", "--agents", "4").stdout
    assert "Stopped 3 agents of an earlier demo." in again
    assert "declared dead" in again

    assert "(source: ray, incomplete)" in newcomer.run("seedcore", "ls", SEEDCORE_MODE="ray").stdout
    # another cluster on the same data does not take it away
    rival = newcomer.run(sys.executable, "-c", _RIVAL, check=False)
    assert "works on the data in" in rival.stderr
    # beside it a command changes nothing that it was not given by name
    assert rival.stdout.splitlines()[-1] == "2 True True", (rival.stdout, rival.stderr)
    assert [item["logical_id"] for item in newcomer.get("/v1/instances")["items"]] == ["demo-memory-2", "demo-vision-1"]
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

    del newcomer.environment["RAY_ADDRESS"]
    newcomer.serve()
    await newcomer.ready()
    assert newcomer.get("/v1/instances")["items"] == []
    assert newcomer.get("/v1/epoch")["epoch"] == "epoch-2"
    instances = newcomer.get("/v1/agents/demo-memory-2")["instances"]
    assert [(old["status"], old["cause"]["kind"]) for old in instances] == [
        ("dead", "epoch_retired"),
        ("dead", "agent"),
    ]
    newcomer.interrupt()


@pytest.mark.parametrize(
    ("environment", "code", "named"),
    [
        ({"REGISTRY_BEAT_SEC": "soon"}, 2, "REGISTRY_BEAT_SEC"),
        ({"REGISTRY_BEAT_SEC": "-1"}, 2, "REGISTRY_BEAT_SEC"),
        ({"SEEDCORE_LEASE_SEC": "2"}, 2, "SEEDCORE_LEASE_SEC"),
        ({"ENABLE_RUNTIME_REGISTRY": "perhaps"}, 2, "ENABLE_RUNTIME_REGISTRY"),
        ({"SEEDCORE_MODE": "consul"}, 2, "SEEDCORE_MODE"),
        ({"RAY_NAMESPACE": "x" * 300}, 2, "RAY_NAMESPACE"),
        ({"SEEDCORE_PG_DSN": "not a dsn"}, 2, "SEEDCORE_PG_DSN"),
        ({"SEEDCORE_PG_DSN": "postgresql://me:hunter2@127.0.0.1:1/x"}, 4, "database"),
        ({"SEEDCORE_DATA_DIR": "/proc/nowhere"}, 1, "SEEDCORE_DATA_DIR"),
        ({"SEEDCORE_DATA_DIR": "~nouser/x"}, 2, "SEEDCORE_DATA_DIR"),
    ],
)
def test_wrong_setting_is_one_line_that_names_it(environment: dict[str, str], code: int, named: str) -> None:
    answer = command("migrate", **{"REGISTRY_BEAT_SEC": "1", **environment})
    assert answer.code == code
    assert answer.stderr.count("\n") == 1
    assert named in answer.stderr
    assert "hunter2" not in answer.stderr


@pytest.mark.parametrize("word", ["ls", "demo"])
def test_without_the_named_cluster_a_command_prints_how_to_start_one(word: str) -> None:
    answer = command(word, RAY_ADDRESS="127.0.0.1:1")
    assert answer.code == 4
    assert "serve run serve_config.yaml" in answer.stderr
    assert "Traceback" not in answer.stderr
