"""One gate to Ray: no call without a session, a handle is of one session, a forked child has none."""

from __future__ import annotations

import ast
import asyncio
import os
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import seedcore
from seedcore.core.answers import BeatAnswer
from seedcore.core.errors import (
    AgentCallError,
    CannotKnowError,
    DirectoryUnavailableError,
    RegistryUnavailableError,
    SessionError,
)
from seedcore.registry.agent.identity import identify, own_actor
from seedcore.registry.agent.reporter import Reporter
from seedcore.registry.agent.thread_reporter import ThreadReporter
from seedcore.registry.caller.handle_cache import ActorTable
from seedcore.registry.caller.handles import HandleFinder
from seedcore.registry.protocol.connection import RegistryConnection
from seedcore.registry.protocol.messages import PROTOCOL, Hello
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.actors import Proof, probe
from seedcore.registry.ray_support.lookup import in_thread
from seedcore.settings import Settings
from seedcore.tier0.calls import bounded_call
from tests.builders import START, iid
from tests.unit.conftest import Membership
from tests.unit.test_relay_client import Actor

SETTINGS = Settings(beat_interval_s=0.1, namespace="nowhere")
PACKAGE = Path(seedcore.__file__).parent

# what calls nothing of a cluster: classes, values, the decorator
_HARMLESS = {"remote", "exceptions", "util", "util.get_node_ip_address", "WorkerID", "WORKER_MODE", "__version__"}
_MODULES = {
    "ray.exceptions",
    "ray.serve.context",
    "ray.util.scheduling_strategies",
}
# start-up code that joins or starts Ray by the user's word, and programs that measure Ray itself
_STARTS_RAY = {"cli/cluster.py", "registry/ray_support/clusters.py"}
_MEASURES_RAY = "bench/"
# Ray's private tables, which are read in a session
_READS_TABLES = {
    "registry/ray_support/private_tables.py": {"ray._private.state", "ray._private.worker", "ray.core.generated"}
}


def _calls_of_ray(path: Path) -> Iterator[str]:
    """Whatever in a file may call Ray."""
    relative = path.relative_to(PACKAGE).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            name = dotted.removeprefix("ray.")
            if dotted.startswith("ray.") and name not in _HARMLESS:
                yield f"{relative}:{node.lineno} {dotted}"
            if node.attr in {"remote", "_remote"} and dotted != "ray.remote":
                yield f"{relative}:{node.lineno} {dotted}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ray":
            names = {alias.name for alias in node.names}
            is_known = node.module in _MODULES | _READS_TABLES.get(relative, set())
            if not is_known and (node.module, names) not in (("ray", {"serve"}), ("ray.util", {"metrics"})):
                yield f"{relative}:{node.lineno} from {node.module} import {', '.join(sorted(names))}"


def test_the_gate_alone_calls_ray() -> None:
    files = [
        path
        for path in PACKAGE.rglob("*.py")
        if (relative := path.relative_to(PACKAGE).as_posix()) not in {"registry/ray_support/session.py", *_STARTS_RAY}
        and not relative.startswith(_MEASURES_RAY)
    ]
    assert len(files) > 50
    assert [call for path in files for call in _calls_of_ray(path)] == []


def test_the_gate_would_be_seen_to_be_passed_by() -> None:
    # the gate itself is full of calls
    assert len(list(_calls_of_ray(PACKAGE / "registry" / "ray_support" / "session.py"))) > 5


def test_a_session_lasts_as_long_as_its_connection(connected: Membership) -> None:
    first = session.current()
    assert first is not None
    assert session.current() is first
    connected.leave()
    assert session.current() is None
    connected.join()
    assert session.current() not in {None, first}


def test_threads_that_meet_a_connection_at_once_are_of_one_session(connected: Membership) -> None:
    found: list[session.Session | None] = []
    together = threading.Barrier(8)

    def look() -> None:
        together.wait()
        found.append(session.current())

    for _ in range(20):
        connected.join()
        found.clear()
        threads = [threading.Thread(target=look) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 1


class Silent:
    """An actor that never answers."""

    def __init__(self) -> None:
        self.ping = self
        self.__ray_ready__ = self

    async def remote(self) -> None:
        await asyncio.Event().wait()


async def test_a_call_without_a_session_is_refused_and_calls_nothing() -> None:
    actor = Actor(None)
    reads: list[str] = []
    with pytest.raises(SessionError, match="not connected to Ray"):
        await session.ask(actor, "anything")
    with pytest.raises(AgentCallError, match="not connected to Ray"):
        await bounded_call("agent", lambda: actor.anything.remote(), 1.0)
    with pytest.raises(DirectoryUnavailableError, match="not connected to Ray"):
        await in_thread(lambda: reads.append("read"), 1.0)
    for call in (
        lambda: session.create(ray.remote(Silent), {}),
        lambda: session.kill(actor),
        lambda: session.get_actor("name", "namespace"),
        session.nodes,
        session.list_named_actors,
        session.context,
        session.cluster_name,
    ):
        with pytest.raises(SessionError, match="not connected to Ray"):
            call()
    assert await probe(actor, 1.0) is Proof.NOT_YET
    assert session.own_node_id() is None
    assert own_actor() == (None, None)
    assert (await identify("actor", "namespace", 1.0)).node_id is None
    assert (actor.calls, reads) == ([], [])


@pytest.mark.parametrize(
    "call",
    [
        # ray.init is refused in unit tests: Ray would call it
        lambda: session.create(ray.remote(Silent), {"num_cpus": 0}),
        lambda: session.get_actor("name", "namespace"),
        lambda: session.kill(Actor(None)),
        session.nodes,
        session.list_named_actors,
        session.cluster_name,
    ],
)
def test_a_session_that_ends_behind_the_check_starts_nothing(connected: Membership, call: Callable[[], Any]) -> None:
    with pytest.raises((SessionError, ray.exceptions.RaySystemError, RuntimeError)):
        call()


async def test_what_ray_raises_for_a_handle_of_another_session_is_an_error_of_ours(connected: Membership) -> None:
    def refuse() -> None:
        raise Exception("Can't find actor")  # noqa: TRY002 - as Ray has it

    def refuse_to_kill() -> None:
        raise ray.exceptions.ActorHandleNotFoundError("not valid across Ray sessions")

    for call in (refuse, refuse_to_kill):
        with pytest.raises(SessionError, match="find the actor again"), session.passing():
            call()
    for error in (KeyError("its own"), ray.exceptions.ActorDiedError(), RegistryUnavailableError("ours")):
        with pytest.raises(type(error)), session.passing():
            raise error

    def fail_without_ray() -> None:
        connected.leave()
        raise AttributeError("'Worker' object has no attribute 'core_worker'")

    with pytest.raises(SessionError, match="ended during the call"), session.passing():
        fail_without_ray()


async def test_a_call_ends_with_its_session(connected: Membership) -> None:
    for leave in (connected.leave, connected.join):
        answer: Awaitable[None] = Silent().remote()
        asked = asyncio.create_task(session.in_session(answer, session.require(), check_s=0.01))
        await asyncio.sleep(0.03)
        assert not asked.done()
        leave()
        with pytest.raises(SessionError, match="ended during the call"):
            await asked
        connected.join()


async def test_what_is_found_in_one_session_is_not_kept_in_the_next(connected: Membership) -> None:
    go = threading.Event()
    looking = asyncio.create_task(in_thread(lambda: go.wait(10), 10.0))
    await asyncio.sleep(0.02)
    connected.join()
    go.set()
    with pytest.raises(DirectoryUnavailableError, match="ended during the call"):
        await looking


class Answering:
    """The registry actor, as far as a connection needs it."""

    async def hello(self) -> Hello:
        return Hello(PROTOCOL, "test", 1, "node", START)

    async def beat_many(self, instance_ids: list[str], loads: object = None) -> BeatAnswer:
        return BeatAnswer()

    async def current_epoch(self) -> str:
        return "epoch"


async def test_a_connection_finds_the_registry_again_in_each_session(connected: Membership) -> None:
    found: list[Actor] = []

    async def find(name: str, namespace: str, timeout_s: float) -> Actor:
        found.append(Actor(Answering()))
        return found[-1]

    connection = RegistryConnection("nowhere", 1.0, find=find)
    await connection.beat(iid(1))
    await connection.beat(iid(1))
    assert [actor.calls for actor in found] == [["hello", "beat_many", "beat_many"]]
    connected.leave()
    with pytest.raises(RegistryUnavailableError, match="not connected to Ray"):
        await connection.beat(iid(1))
    connected.join()
    await connection.beat(iid(1))
    assert [actor.calls for actor in found] == [["hello", "beat_many", "beat_many"], ["hello", "beat_many"]]


async def test_a_silence_of_one_session_is_not_the_nexts(connected: Membership) -> None:
    actor = Actor(Answering())

    async def find(name: str, namespace: str, timeout_s: float) -> Actor:
        return actor

    connection = RegistryConnection("nowhere", 0.05, find=find)
    actor.is_hung = True
    with pytest.raises(RegistryUnavailableError, match="no answer to hello"):
        await connection.health()
    with pytest.raises(RegistryUnavailableError, match="no answer to hello"):
        await connection.current_epoch()
    assert actor.calls == ["hello"]
    connected.join()
    actor.is_hung = False
    assert str(await connection.current_epoch()) == "epoch"


async def test_a_handle_held_for_an_outage_of_rays_table_is_of_its_session(
    connected: Membership,
) -> None:
    is_away = False
    actor = Actor(None)

    async def find(name: str, namespace: str, timeout_s: float) -> Actor:
        if is_away:
            raise DirectoryUnavailableError("for the test")
        return actor

    finder = HandleFinder("nowhere", 1.0, table=ActorTable(1.0, find=find))
    assert await finder.of_name("agent") is actor
    is_away = True
    assert await finder.of_name("agent") is actor
    connected.join()
    with pytest.raises(CannotKnowError, match="for the test"):
        await finder.of_name("agent")


def _in_child(call: Callable[[], Any]) -> tuple[str, float]:
    """What a call comes to in a forked child, and how many seconds that takes."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of a fork beside threads, which is what is tested
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        began_s = time.monotonic()
        try:
            said = repr(call())
        except BaseException as error:  # noqa: BLE001 - the parent looks at it
            said = f"{type(error).__name__}: {error}"
        os.write(writing, f"{time.monotonic() - began_s} {said}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        took_s, _, said = answer.read().decode().partition(" ")
    os.waitpid(child, 0)
    return said, float(took_s)


@pytest.mark.parametrize(
    "call",
    [
        session.require,
        lambda: ThreadReporter("child", settings=SETTINGS).start(),
        lambda: asyncio.run(Reporter("child", settings=SETTINGS).start()),
        lambda: asyncio.run(Reporter("child", settings=SETTINGS).drain()),
        lambda: asyncio.run(RegistryConnection("nowhere", 5.0).beat(iid(1))),
        lambda: asyncio.run(RegistryConnection("nowhere", 5.0, by_relay=True).health()),
        lambda: asyncio.run(in_thread(lambda: "read", 5.0)),
        lambda: asyncio.run(HandleFinder("nowhere").of_name("agent")),
    ],
)
def test_a_child_forked_from_a_connected_process_is_refused_in_its_own_words(
    connected: Membership, call: Callable[[], Any]
) -> None:
    said, took_s = _in_child(call)
    assert said.startswith("ForkedProcessError: this process was forked from one that is connected to Ray: use spawn")
    assert took_s < 1
    assert session.current() is not None


def test_a_child_of_a_process_without_ray_may_join_it(connected: Membership) -> None:
    connected.leave()

    def join() -> bool:
        assert session.current() is None
        connected.join()
        return session.current() is session.require()

    assert _in_child(join)[0] == "True"


def test_a_reporter_of_the_parent_is_refused_in_the_child_at_once_and_works_on_in_the_parent() -> None:
    made, started = ThreadReporter("made", settings=SETTINGS), ThreadReporter("started", settings=SETTINGS)
    started.start()
    try:
        for call in (started.drain, started.undrain, started.stop, started.start):
            said, took_s = _in_child(call)
            assert said.startswith(
                "ForkedProcessError: this reporter runs in the process that this one was forked from"
            )
            assert took_s < 1
        with made._turn:
            # held by a thread that the child does not have
            assert _in_child(made.start)[0] == "None"
        receipt = started.drain()
        assert receipt is not None
    finally:
        started.stop()
