"""Blocking calls on real Ray: from scripts, threads, actors with blocking methods and Serve, also while agents die."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import ray
from ray import serve

import seedcore
from seedcore.core.answers import Origin
from seedcore.core.errors import CannotKnowError, NotResolvableError, RegistryError, ResolveTimeoutError
from seedcore.core.events import EventKind
from seedcore.core.not_ready import NotReadyError
from seedcore.registry import RegistryConnection
from seedcore.registry.ray_support.lookup import actor_id_of
from seedcore.settings import Settings
from seedcore.tier0 import BlockingManager
from seedcore.tier0.hosted import close_process_manager
from tests.children import run
from tests.cluster.agents import Caller, Worker
from tests.newcomer import errors_of

THREADS = 8


@pytest.fixture
def blocking(registry: RegistryConnection, settings: Settings) -> Iterator[BlockingManager]:
    """A manager whose agents end with the test."""
    with BlockingManager(settings) as manager:
        yield manager
        manager.discover_and_refresh_agents()
        manager.shutdown_agents(timeout_s=5)


@pytest.fixture
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test's settings, as a user sets them: in the environment."""
    monkeypatch.setenv("SEEDCORE_NS", settings.namespace)
    monkeypatch.setenv("SEEDCORE_CALL_TIMEOUT_SEC", str(settings.call_timeout_s))
    seedcore.settings.get_settings.cache_clear()
    close_process_manager()
    yield
    close_process_manager()
    seedcore.settings.get_settings.cache_clear()


def make(manager: BlockingManager, settings: Settings, agent_id: str, organ_id: str | None = None) -> Any:
    return manager.create_agent(agent_id, organ_id, agent_class=Worker, arguments={"settings": settings})


def until(question: Callable[[], Any], within_s: float = 30.0) -> Any:
    """The answer, once it is true; an error of the registry is a no."""
    ends_s = time.monotonic() + within_s
    while True:
        try:
            answer = question()
        except RegistryError as error:
            answer = None
            why: object = error
        else:
            why = answer
        if answer:
            return answer
        assert time.monotonic() < ends_s, why
        time.sleep(0.01)


def test_a_plain_thread_makes_finds_calls_lists_and_ends_agents(
    blocking: BlockingManager, settings: Settings, environment: None
) -> None:
    made = make(blocking, settings, "w", "vision")
    assert actor_id_of(seedcore.get_actor("w", timeout_s=30)) == actor_id_of(made)
    assert blocking.execute_task_on_agent("w", [1, 2], timeout_s=30) == [1, 2]
    until(lambda: blocking.locate("w").source is Origin.SNAPSHOT)
    assert blocking.resolve("w") is blocking.cached("w")
    listing = seedcore.list_agents()
    assert [row.logical_id for row in listing] == ["w"]
    assert (listing.source, listing.complete) == (Origin.REGISTRY, True)
    assert [row.logical_id for row in seedcore.list_agents("vision", "!spot")] == ["w"]
    assert list(seedcore.list_agents("hearing")) == list(seedcore.list_agents(selector="spot")) == []
    assert seedcore.wait_for(organ_id="vision", count=1, timeout_s=30)
    with pytest.raises(NotReadyError, match="'other'"):
        seedcore.wait_for(ids=["w", "other"], timeout_s=0.1)
    with pytest.raises(NotResolvableError):
        seedcore.get_actor("other")
    assert blocking.get_agent("other") is None
    assert blocking.shutdown_agents(["w"]).results == {"w": True}
    with pytest.raises(NotResolvableError):
        seedcore.get_actor("w")


def test_while_the_registry_hangs_a_look_up_ends_at_its_time_limit_and_a_listing_is_of_the_last_one(
    blocking: BlockingManager, settings: Settings, environment: None
) -> None:
    make(blocking, settings, "w", "vision")
    impatient = BlockingManager(settings.model_copy(update={"call_timeout_s": 0.5}))
    assert [row.logical_id for row in impatient.discover_from_registry()] == ["w"]
    pid = blocking.hosted.run(lambda manager: manager.connection.hello(), "").pid
    os.kill(pid, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        with pytest.raises(ResolveTimeoutError, match=r"no answer within 0.2 s"):
            seedcore.get_actor("w", timeout_s=0.2)
        assert time.monotonic() - began_s < settings.call_timeout_s
        listing = impatient.discover_from_registry("vision")
        assert [row.logical_id for row in listing] == ["w"]
        assert (listing.source, listing.complete) == (Origin.SNAPSHOT, False)
        assert list(impatient.discover_from_registry("hearing")) == []
    finally:
        os.kill(pid, signal.SIGCONT)
        impatient.close()


def test_threads_lose_no_task_and_find_the_next_process_while_an_agent_dies_and_comes_back(
    blocking: BlockingManager, settings: Settings
) -> None:
    make(blocking, settings, "w")
    pid = blocking.execute_task_on_agent("w", "pid", timeout_s=30)
    is_over = threading.Event()

    def work(thread: int) -> list[Any]:
        results: list[Any] = []
        while not is_over.is_set():
            # refused between two processes: no task then
            with suppress(NotResolvableError, CannotKnowError):
                results.append(blocking.execute_task_on_agent("w", [thread, len(results)], timeout_s=60))
        return results

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            working = [pool.submit(work, thread) for thread in range(THREADS)]
            for _ in range(2):
                os.kill(pid, signal.SIGKILL)
                pid = until(partial(_other_pid, blocking, pid))
        finally:
            is_over.set()
        for thread, results in enumerate(one.result(60) for one in working):
            assert results == [[thread, number] for number in range(len(results))]
            assert results
    until(lambda: blocking.cached("w") is not None or blocking.resolve("w") is None)
    with ThreadPoolExecutor(THREADS) as pool:
        handles = list(pool.map(lambda _: blocking.resolve("w"), range(1000)))
    assert {actor_id_of(handle) for handle in handles} == {actor_id_of(handles[0])}
    assert ray.get(handles[0].execute_task.remote("pid")) == pid


def _other_pid(manager: BlockingManager, died: int) -> int | None:
    pid: int = manager.execute_task_on_agent("w", "pid", timeout_s=30)
    return None if pid == died else pid


def test_actors_with_blocking_methods_resolve_with_one_thread_and_with_many(
    blocking: BlockingManager, settings: Settings
) -> None:
    caller_class: Any = ray.remote(Caller)
    callers = [
        caller_class.options(num_cpus=0, max_concurrency=threads).remote(settings.namespace) for threads in (1, THREADS)
    ]
    make(blocking, settings, "w")
    answers = [caller.call.remote("w", number) for caller in callers for number in range(40)]
    assert ray.get(answers, timeout=60) == [*range(40), *range(40)]
    for caller in callers:
        assert ray.get(caller.names.remote(), timeout=60) == ["w"]
        ray.kill(caller)


@pytest.mark.slow
def test_a_blocking_handler_of_serve_resolves(blocking: BlockingManager, settings: Settings) -> None:
    make(blocking, settings, "w")
    deployment: Any = serve.deployment(ray_actor_options={"num_cpus": 0})(Caller)
    try:
        handle = serve.run(deployment.bind(settings.namespace), name="caller", route_prefix=None)
        answers = [handle.call.remote("w", number) for number in range(20)]
        assert [answer.result(timeout_s=60) for answer in answers] == list(range(20))
    finally:
        serve.shutdown()


def test_a_watch_is_an_iterator_that_ends_when_it_is_closed_by_another_thread(
    blocking: BlockingManager, settings: Settings, environment: None
) -> None:
    with seedcore.watch(ids=["w"]) as watch, ThreadPoolExecutor(1) as pool:
        made = pool.submit(make, blocking, settings, "w")
        first = next(watch)
        assert (first.kind, first.logical_id) == (EventKind.JOINED, "w")
        assert next(event for event in watch if event.is_ready).logical_id == "w"
        made.result(60)
        os.kill(blocking.execute_task_on_agent("w", "pid", timeout_s=30), signal.SIGKILL)
        assert next(event for event in watch if event.kind is EventKind.DIED).cause is not None
        rest = pool.submit(lambda: list(watch))
        watch.close()
        rest.result(30)
        assert list(watch) == []
    # what happened before its position is not repeated, what happened after it is
    with seedcore.watch(ids=["w"], since=first.position) as later:
        assert next(event for event in later if event.is_ready).logical_id == "w"


def test_a_script_goes_through_loops_forks_and_sessions_and_ends_without_a_word(
    blocking: BlockingManager, settings: Settings
) -> None:
    make(blocking, settings, "w")
    environment = {
        **os.environ,
        "CLUSTER": ray.get_runtime_context().gcs_address,
        "SEEDCORE_NS": settings.namespace,
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }
    done = run(sys.executable, "-m", "tests.cluster.script", timeout_s=120, env=environment)
    assert (done.returncode, done.stdout) == (0, "through\n"), done.stderr
    assert errors_of(done) == []
