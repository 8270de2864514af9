"""The relay's watch of the processes that instances depend on: real processes, real files."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from seedcore.core.causes import Cause, CauseKind
from seedcore.core.dependencies import Dependency
from seedcore.registry.node.dependency_watch import DependencyWatch
from seedcore.registry.node.log_tail import MAX_BYTES, last_lines
from seedcore.registry.node.relay import Relay
from seedcore.registry.protocol.messages import Watched
from seedcore.registry.ray_support.process_keys import process_key_of
from tests.builders import iid
from tests.waiting import eventually

Reported = list[tuple[str, str, Cause]]


class Children:
    """Processes that end with the test."""

    def __init__(self) -> None:
        self._all: list[subprocess.Popen[bytes]] = []

    def make(self, code: str = "import time; time.sleep(600)") -> subprocess.Popen[bytes]:
        self._all.append(
            subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        )
        return self._all[-1]

    def end(self) -> None:
        for child in self._all:
            with suppress(ProcessLookupError):
                child.kill()
            child.wait()
            if child.stdin is not None:
                child.stdin.close()


@pytest.fixture
def children() -> Iterator[Children]:
    children = Children()
    yield children
    children.end()


@pytest.fixture
async def watch() -> AsyncIterator[tuple[DependencyWatch, Reported]]:
    reported: Reported = []
    watch = DependencyWatch(lambda instance_id, one, cause: reported.append((instance_id, one.name, cause)))
    yield watch, reported
    await watch.close()


def on(child: subprocess.Popen[bytes], name: str = "vllm", stderr_path: object = None, **details: bool) -> Dependency:
    key = process_key_of(child.pid)
    assert key is not None
    return Dependency(name, child.pid, key, stderr_path=None if stderr_path is None else str(stderr_path), **details)


def instance(number: int, *dependencies: Dependency) -> Watched:
    return Watched(iid(number), None, None, None, None, None, dependencies)


async def test_an_end_is_reported_once_with_the_process_its_signal_and_the_last_lines_of_its_log(
    watch: tuple[DependencyWatch, Reported], children: Children, tmp_path: Path
) -> None:
    watching, reported = watch
    child, log = children.make(), tmp_path / "stderr"
    log.write_text("".join(f"line {number}\n" for number in range(9)) + "\x1b[31mCUDA error\n\n")
    await watching.set(instance(1, on(child, stderr_path=log)))
    await watching.set(instance(1, on(child, stderr_path=log)))
    child.kill()
    await eventually(lambda: reported)
    [(instance_id, name, cause)] = reported
    assert (instance_id, name, cause.kind) == (iid(1), "vllm", CauseKind.PROCESS_KILLED)
    words = f"vllm: SIGKILL (pid {child.pid}); line 5 | line 6 | line 7 | line 8 | [31mCUDA error"
    assert cause.detail == words
    # a registry that is new asks again
    await watching.set(instance(1))
    await watching.set(instance(1, Dependency("vllm", child.pid, process_key_of(os.getpid()) or "", stderr_path=None)))
    await eventually(lambda: len(reported) == 2)
    assert len(reported) == 2


async def test_exit_codes_are_reported(watch: tuple[DependencyWatch, Reported], children: Children) -> None:
    watching, reported = watch
    child = children.make("input(); raise SystemExit(3)")
    await watching.set(instance(1, on(child)))
    assert child.stdin is not None
    child.stdin.close()
    await eventually(lambda: reported)
    assert reported[0][2] == Cause(CauseKind.PROCESS_EXITED, f"vllm: exit code 1 (pid {child.pid})")


async def test_a_process_that_has_ended_before_and_whose_parent_has_not_read_it_is_reported_with_its_signal(
    watch: tuple[DependencyWatch, Reported], children: Children
) -> None:
    watching, reported = watch
    child = children.make()
    dependency = on(child)
    child.kill()
    # it has ended, and stays a zombie
    await asyncio.to_thread(os.waitid, os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    await watching.set(instance(1, dependency))
    await eventually(lambda: reported)
    assert reported == [(iid(1), "vllm", Cause(CauseKind.PROCESS_KILLED, f"vllm: SIGKILL (pid {child.pid})"))]


async def test_every_instance_is_told_of_each_of_its_processes_alone(
    watch: tuple[DependencyWatch, Reported], children: Children
) -> None:
    watching, reported = watch
    shared, own, left = children.make(), children.make(), children.make()
    await watching.set(instance(1, on(shared, "shared"), on(own, "own")))
    await watching.set(instance(2, on(shared, "shared"), on(left, "left")))
    await watching.set(instance(3, on(shared, "shared")))
    # no longer, by a registration with others, and by an end of the instance
    await watching.set(instance(2, on(shared, "shared")))
    watching.discard(iid(3))
    left.kill()
    shared.kill()
    await eventually(lambda: len(reported) == 2)
    own.kill()
    await eventually(lambda: len(reported) == 3)
    assert sorted((instance_id, name) for instance_id, name, _ in reported) == [
        (iid(1), "own"),
        (iid(1), "shared"),
        (iid(2), "shared"),
    ]


async def test_a_process_that_has_ended_before_is_reported_and_a_reused_pid_is_another_one(
    watch: tuple[DependencyWatch, Reported], children: Children, caplog: pytest.LogCaptureFixture
) -> None:
    watching, reported = watch
    ended, living = children.make(), children.make()
    before = on(ended)
    ended.kill()
    ended.wait()
    await watching.set(instance(1, before))
    # the id of a living process, with the key of an earlier one
    key = on(living).process_key
    process, _, boot = key.partition("/")
    await watching.set(instance(2, Dependency("vllm", living.pid, f"{process}9/{boot}")))
    await watching.set(instance(3, on(living)))
    await eventually(lambda: len(reported) == 2)
    assert [instance_id for instance_id, _, _ in reported] == [iid(1), iid(2)]
    # of another host: nothing is certain, and a warning says so
    await watching.set(instance(4, Dependency("vllm", ended.pid, f"{process}/another")))
    await asyncio.sleep(0)
    assert len(reported) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"the end of process 'vllm', pid {ended.pid}, is not noticed: the relay cannot watch it (elsewhere); "
        "next try in 5 s"
    ]


async def test_the_relay_reports_an_end_until_it_is_acknowledged(children: Children) -> None:
    relay = Relay(watches=())
    child = children.make()
    dependency = on(child, is_fatal=False)
    await relay.watch([instance(1, dependency)])
    child.kill()
    for _ in range(2):
        [ended] = await relay.exits(0, 10.0)
        assert (ended.instance_id, ended.is_explained) == (iid(1), False)
        assert ended.dependency == dependency
    assert await relay.exits(ended.number, 0.0) == []


async def test_a_log_is_read_from_its_end_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 10_000_000 + b"\nlast \xff\x00 one\n")
    lines = await last_lines(str(log), 5.0)
    assert lines[-1].startswith("last")
    assert sum(map(len, lines)) <= MAX_BYTES
    assert all(line.isprintable() for line in lines)


async def test_what_is_no_regular_file_has_no_lines(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("pipe", "nothing", ".", "a\0b"):
        assert await last_lines(str(tmp_path / path), 5.0) == []
    assert await last_lines("/dev/zero", 5.0) == []


async def test_a_file_that_does_not_answer_delays_no_report_and_takes_few_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over = threading.Event()
    monkeypatch.setattr("seedcore.registry.node.log_tail._read", lambda _: [str(is_over.wait(60))])
    before = threading.active_count()
    try:
        answers = await asyncio.gather(*(last_lines("/slow", 0.01) for _ in range(20)))
    finally:
        is_over.set()
    assert answers == [[]] * 20
    assert threading.active_count() <= before + 4
