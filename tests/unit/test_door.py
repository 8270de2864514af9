"""Blocking calls: from any thread, in no running event loop, within their time limit, and in no forked child."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

import seedcore
from seedcore.core.answers import Origin
from seedcore.core.errors import (
    CannotKnowError,
    InvalidInputError,
    RegistryUnavailableError,
    ResolveTimeoutError,
    RunningLoopError,
)
from seedcore.registry.caller.handle_cache import HandleCache
from seedcore.registry.caller.metrics import CallerMetrics
from seedcore.settings import Mode, Settings
from seedcore.tier0 import BlockingManager, Tier0MemoryManager
from seedcore.tier0.hosted import HostedManager, close_process_manager
from tests.builders import instance

THREADS = 8


@pytest.fixture
def hosted() -> Iterator[HostedManager]:
    hosted = HostedManager(Tier0MemoryManager(), Settings())
    yield hosted
    hosted.close()


@pytest.fixture
def no_process_manager() -> Iterator[None]:
    close_process_manager()
    yield
    close_process_manager()


class Handle:
    """A handle that Ray has no news of."""

    _actor_id = b"an actor"


def run(hosted: HostedManager, work: Coroutine[Any, Any, Any], **limits: Any) -> Any:
    return hosted.run(lambda _manager: work, "await it", **limits)


def loop_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "seedcore-loop"]


def public(kind: type[Any]) -> dict[str, Any]:
    return {name: thing for name, thing in inspect.getmembers(kind) if not name.startswith("_")}


def test_blocking_manager_has_every_call_of_the_manager_with_the_same_arguments() -> None:
    calls = {name: thing for name, thing in public(Tier0MemoryManager).items() if inspect.isfunction(thing)}
    own = public(BlockingManager)
    for name, call in calls.items():
        assert name in own, name
        assert not inspect.iscoroutinefunction(own[name]), name
        theirs, ours = inspect.signature(call), inspect.signature(own[name])
        assert ours.parameters == theirs.parameters, name
        returned = "BlockingWatch" if name == "watch" else theirs.return_annotation
        assert ours.return_annotation == returned, name


def test_calls_of_many_threads_run_on_one_thread_and_each_gets_its_own_result(hosted: HostedManager) -> None:
    async def answer(number: int) -> tuple[int, str]:
        await asyncio.sleep(0)
        return number, threading.current_thread().name

    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(lambda number: run(hosted, answer(number)), range(400)))
    assert answers == [(number, "seedcore-loop") for number in range(400)]


def test_a_read_beside_changes_gives_the_agents_own_handle_or_none_and_every_hit_is_counted() -> None:
    handles = {f"agent-{number}": Handle() for number in range(50)}
    cache, metrics = HandleCache(1.0, capacity=40, max_proofs=0), CallerMetrics("manager")
    is_over = threading.Event()

    def read() -> int:
        hits = 0
        for logical_id in itertools.cycle(handles):
            handle = cache.get(logical_id)
            assert handle is None or handle is handles[logical_id]
            if handle is not None:
                hits += 1
                metrics.resolved[Origin.SNAPSHOT.value] += 1
            if is_over.is_set():
                return hits
        raise AssertionError

    with ThreadPoolExecutor(THREADS) as pool:
        reads = [pool.submit(read) for _ in range(THREADS)]
        try:
            for turn in range(20):
                for logical_id, handle in handles.items():
                    cache.evict(logical_id)
                    cache.put(instance(1, logical_id), handle)
                if turn % 10 == 9:
                    cache.clear()
                metrics.export(None)
        finally:
            is_over.set()
        hits = sum(one.result() for one in reads)
    assert Counter({Origin.SNAPSHOT.value: hits}) == metrics.resolved


async def test_a_call_that_would_block_a_running_loop_names_in_one_line_what_to_await(no_process_manager: None) -> None:
    with pytest.raises(RunningLoopError) as refused:
        seedcore.get_actor("a")
    assert str(refused.value) == (
        "this call would block the running event loop: call `await seedcore.get_tier0_manager().resolve('a')`"
    )
    with pytest.raises(RunningLoopError, match=r"call `await seedcore.get_tier0_manager\(\).discover_from_registry"):
        seedcore.list_agents()
    with pytest.raises(RunningLoopError, match=r"call `await seedcore.get_tier0_manager\(\).wait_for"):
        seedcore.wait_for(ids=["a"], timeout_s=1)
    with pytest.raises(RunningLoopError, match="iterate with `async for`"):
        seedcore.watch()
    with BlockingManager() as manager, pytest.raises(RunningLoopError, match=r"call `await manager.resolve\("):
        manager.resolve("a")
    assert loop_threads() == []


def test_several_event_loops_one_after_the_other_and_no_loop_in_between(no_process_manager: None) -> None:
    async def refused() -> None:
        with pytest.raises(RunningLoopError):
            seedcore.get_actor("a")

    for _ in range(2):
        asyncio.run(refused())
        with pytest.raises(CannotKnowError):
            seedcore.get_actor("a")


def test_a_call_ends_at_its_time_limit_and_its_work_with_it(hosted: HostedManager) -> None:
    ended = threading.Event()

    async def hang() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    with pytest.raises(ResolveTimeoutError, match=r"about agent 'a': no answer within 0.01 s") as raised:
        run(hosted, hang(), timeout_s=0.01, late=ResolveTimeoutError("a", "no answer within 0.01 s"))
    assert isinstance(raised.value, CannotKnowError)
    assert ended.wait(10)


def test_what_the_work_raises_arrives_also_if_it_is_a_timeout_of_its_own(hosted: HostedManager) -> None:
    async def fail() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        run(hosted, fail(), timeout_s=30.0, late=RegistryUnavailableError("late"))


@pytest.mark.parametrize("wakes", [True, False], ids=["the waiting thread takes it", "another thread takes it"])
def test_ctrl_c_interrupts_a_wait_at_once_and_ends_its_work(hosted: HostedManager, *, wakes: bool) -> None:
    assert threading.current_thread() is threading.main_thread()
    ended = threading.Event()

    async def hang() -> None:
        taken_by = threading.main_thread() if wakes else threading.current_thread()
        try:
            signal.pthread_kill(taken_by.ident or 0, signal.SIGINT)
            await asyncio.sleep(3600)
        finally:
            ended.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(hosted, hang())
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.wait(10)


def test_closing_breaks_no_call_that_is_under_way_and_a_later_call_starts_again(hosted: HostedManager) -> None:
    began, may_end = threading.Event(), threading.Event()

    async def work() -> str:
        began.set()
        await asyncio.to_thread(may_end.wait, 10)
        return "done"

    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(run, hosted, work())
        assert began.wait(10)
        hosted.close()
        hosted.close()
        assert len(loop_threads()) == 1
        may_end.set()
        assert under_way.result(10) == "done"
    assert loop_threads() == []
    assert run(hosted, asyncio.sleep(0, "again")) == "again"


def test_a_manager_is_not_closed_by_a_call_that_it_runs(hosted: HostedManager) -> None:
    async def close() -> None:
        hosted.close()

    with pytest.raises(RunningLoopError, match="close it on another thread"):
        run(hosted, close())
    assert run(hosted, asyncio.sleep(0, "open")) == "open"


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), "1", True])
def test_a_time_limit_that_is_none_is_refused(no_process_manager: None, timeout_s: Any) -> None:
    with pytest.raises(InvalidInputError, match="timeout_s"):
        seedcore.get_actor("a", timeout_s=timeout_s)
    with pytest.raises(InvalidInputError, match="timeout_s"):
        seedcore.list_agents(timeout_s=timeout_s)
    assert loop_threads() == []


@pytest.mark.parametrize("logical_id", ["", 7, ["a"], None, "seedcore-registry"])
def test_an_id_that_is_none_is_refused(no_process_manager: None, logical_id: Any) -> None:
    with pytest.raises(InvalidInputError):
        seedcore.get_actor(logical_id)


def test_without_ray_no_call_starts_a_cluster_and_each_says_so_in_one_line(no_process_manager: None) -> None:
    began_s = time.monotonic()
    with pytest.raises(CannotKnowError, match="not connected to Ray") as raised:
        seedcore.get_actor("a", timeout_s=float("inf"))
    assert "\n" not in str(raised.value)
    for call in (
        partial(seedcore.list_agents, "vision", "env in (prod), !spot"),
        partial(seedcore.wait_for, ids=["a"], timeout_s=60.0),
        partial(seedcore.watch, ids=["a"]),
    ):
        with pytest.raises(CannotKnowError, match="not connected to Ray"):
            call()
    with pytest.raises(InvalidInputError, match="selector"):
        seedcore.list_agents(selector="env in (")
    with pytest.raises(InvalidInputError, match="organ_id"):
        seedcore.list_agents("")
    assert time.monotonic() - began_s < 10


def test_managers_without_arguments_are_one_and_with_arguments_each_is_its_own(no_process_manager: None) -> None:
    assert BlockingManager().hosted is BlockingManager().hosted
    own = BlockingManager(mode=Mode.RAY)
    assert own.hosted is not BlockingManager().hosted
    assert (own.mode, BlockingManager().mode) == (Mode.RAY, Mode.HYBRID)
    assert own.list_agents() == ()
    assert own.cached("a") is None


_FORKS = """
import os, sys
import seedcore
from seedcore import BlockingManager, Mode
from seedcore.errors import CannotKnowError, ForkedProcessError
from seedcore.tier0 import hosted
used, unused = BlockingManager(mode=Mode.RAY), BlockingManager(mode=Mode.RAY)
def refused(call, error):
    try:
        call()
    except error as raised:
        return "\\n" not in str(raised)
    return False
assert refused(lambda: seedcore.get_actor("a"), CannotKnowError)
assert refused(lambda: used.resolve("a"), CannotKnowError)
child = os.fork()
for manager in (None, unused):
    call = seedcore.get_actor if manager is None else manager.resolve
    assert refused(lambda: call("a"), CannotKnowError)
if child == 0:
    assert refused(lambda: used.resolve("a"), ForkedProcessError)
    used.close()
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert refused(lambda: used.resolve("a"), CannotKnowError)
print("ended")
"""


def test_a_forked_child_has_managers_of_its_own_and_both_processes_end() -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _FORKS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
