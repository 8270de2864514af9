"""Which cluster a command asks: the one that is named, or the only one of its user.

The clusters here are processes with a raylet's command line, and sockets that listen where their heads would.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ray
import typer.main
from typer.testing import CliRunner

from seedcore.cli.app import app
from seedcore.cli.errors import NoClusterError, NotServedError, SeveralClustersError, exit_code_of
from seedcore.core.errors import RegistryError
from seedcore.registry.ray_support.clusters import local_clusters

# every command that acts on a cluster, with the least that it has to be given
SERVED_OVER_HTTP = {
    "ls": [],
    "deaths": [],
    "get": ["one"],
    "why": ["one"],
    "watch": [],
    "wait": ["one", "--timeout", "1"],
    "health": [],
    "drain": ["one"],
    "undrain": ["--organ", "eye"],
    "deregister": ["one"],
}
IN_THE_CLUSTER_ALONE = {
    "epoch show": [],
    "epoch stage": ["green"],
    "epoch flip": ["green"],
    "fleet up": ["fleet.yaml"],
    "fleet down": ["fleet.yaml"],
    "registry start": [],
    "registry stop": [],
    "registry upgrade": [],
    "demo": [],
    "demo --down": [],
}
# it reports what it finds, line by line
EXAMINES: dict[str, list[str]] = {"doctor": []}
# these act on a database, on files, or on a cluster of their own
NO_CLUSTER = {"migrate", "bench", "token new", "token check"}
COMMAND: Any = typer.main.get_command(app)


def words_of(table: dict[str, list[str]]) -> list[Any]:
    return [pytest.param([*name.split(), *more], id=name) for name, more in table.items()]


def leaves(command: Any, path: str = "") -> Iterator[str]:
    for name, inner in command.commands.items():
        yield from leaves(inner, f"{path}{name} ") if hasattr(inner, "commands") else [f"{path}{name}"]


Raylet = Callable[..., str]


@pytest.fixture
def raylet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Raylet]:
    """Makes a cluster of this or another user: its raylet's process, and its head's port. Returns the address."""
    made: set[str] = set()
    # whatever else runs on the machine is not of the test
    monkeypatch.setattr(
        "seedcore.cli.cluster.local_clusters",
        lambda: [cluster for cluster in local_clusters() if cluster.address in made],
    )
    with ExitStack() as stack:

        def make(*, user: str | None = None, is_silent: bool = False) -> str:
            head = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            address = f"127.0.0.1:{head.getsockname()[1]}"
            if is_silent:
                head.close()
            words = ["/some/where/raylet", "-c", "echo; read line", f"--gcs-address={address}"]
            process = stack.enter_context(
                subprocess.Popen(words, executable="/bin/sh", stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=user)
            )
            # a process has a command line a moment after it has started
            assert process.stdout is not None
            process.stdout.readline()
            made.add(address)
            return address

        yield make


@pytest.fixture(autouse=True)
def _nothing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the command has joined or started a cluster")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.chdir(tmp_path)
    Path("fleet.yaml").write_text("agents: [{id: one}]")


def refusal_of(words: list[str]) -> RegistryError:
    answer = CliRunner().invoke(app, words)
    assert isinstance(answer.exception, RegistryError), (answer.output, answer.exception)
    assert "\n" not in str(answer.exception)
    return answer.exception


def test_every_command_is_known_here() -> None:
    known = {name.removesuffix(" --down") for name in {**SERVED_OVER_HTTP, **IN_THE_CLUSTER_ALONE, **EXAMINES}}
    assert set(leaves(COMMAND)) == known | NO_CLUSTER


@pytest.mark.parametrize("words", words_of({**SERVED_OVER_HTTP, **IN_THE_CLUSTER_ALONE}))
def test_beside_another_cluster_a_command_refuses_and_lists_both(raylet: Raylet, words: list[str]) -> None:
    addresses = {raylet(), raylet()}
    refusal = refusal_of(words)
    assert isinstance(refusal, SeveralClustersError)
    assert exit_code_of(refusal) == 2
    assert all(address in str(refusal) for address in addresses)
    assert "set RAY_ADDRESS to one of them" in str(refusal)


def test_doctor_reports_several_clusters_and_joins_none(raylet: Raylet) -> None:
    addresses = {raylet(), raylet()}
    answer = CliRunner().invoke(app, ["doctor", "--json"])
    assert answer.exit_code == 1
    assert all(address in answer.output for address in addresses)


@pytest.mark.parametrize("words", words_of({**IN_THE_CLUSTER_ALONE, **EXAMINES, "migrate": []}))
def test_what_is_not_served_over_http_refuses_a_url(
    raylet: Raylet, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", raylet())
    monkeypatch.setenv("SEEDCORE_URL", "http://127.0.0.1:1")
    refusal = refusal_of(words)
    assert isinstance(refusal, NotServedError)
    assert exit_code_of(refusal) == 2


def joined(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address that `ls` gives to Ray."""
    given: list[str] = []

    def init(address: str, **_: object) -> None:
        given.append(address)
        raise ConnectionError("no Ray is there")

    monkeypatch.setattr(ray, "init", init)
    assert isinstance(refusal_of(["ls"]), NoClusterError)
    return given[0]


def test_the_only_cluster_of_a_user_is_joined_by_its_address(raylet: Raylet, monkeypatch: pytest.MonkeyPatch) -> None:
    address = raylet()
    # of one whose head is gone only a node is left
    raylet(is_silent=True)
    assert joined(monkeypatch) == address


def test_a_cluster_that_is_named_is_joined_whatever_runs_beside_it(
    raylet: Raylet, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = [raylet(), raylet()]
    for address in addresses:
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert joined(monkeypatch) == address
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert isinstance(refusal_of(["drain", "one"]), SeveralClustersError)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert "names no running cluster" in str(refusal_of(["drain", "one"]))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process as another user")
def test_a_cluster_of_another_user_is_joined_by_name_alone(raylet: Raylet, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = raylet(user="nobody")
    assert (foreign, "nobody") in [(cluster.address, cluster.user) for cluster in local_clusters()]
    refusal = refusal_of(["drain", "one"])
    assert isinstance(refusal, NoClusterError)
    assert refusal.is_absent
    assert f"{foreign} (of nobody)" in str(refusal)
    own = raylet()
    assert joined(monkeypatch) == own
    monkeypatch.setenv("RAY_ADDRESS", foreign)
    assert joined(monkeypatch) == foreign
