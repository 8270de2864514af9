"""Agents and actors that the cluster tests bring up.

Their processes import this module: a class in a module of tests would make them import all that those tests need.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from datetime import UTC
from pathlib import Path
from typing import Any

import ray

import seedcore
from seedcore.agents import RayAgent
from seedcore.registry import RegistryClient, Reporter, ThreadReporter
from seedcore.registry.agent.identity import Identity, identify
from seedcore.registry.protocol.messages import Hello
from seedcore.registry.ray_support.process_keys import own_process_key
from seedcore.settings import Settings, use_namespace
from tests.waiting import eventually


class Worker(RayAgent):
    """Answers with what it was given, its process id, a long sleep, or an error."""

    async def handle_task(self, task: Any) -> Any:
        if task == "pid":
            return os.getpid()
        if task == "sleep":
            await asyncio.sleep(3600)
        if task == "fail":
            raise KeyError("no such thing")
        if task == "die":
            os._exit(1)
        if task == "interrupt":
            raise KeyboardInterrupt
        if task == "exit":
            sys.exit(3)
        return task


_LOADS = """
import sys, time
print('loading', file=sys.stderr)
print('CUDA error', file=sys.stderr, flush=True)
print('there', flush=True)
time.sleep(600)
"""


class Engine(Worker):
    """Depends on a child, whose stderr goes to a file."""

    child: subprocess.Popen[bytes] | None = None

    async def handle_task(self, task: Any) -> Any:
        """The event loop is stuck for so many seconds."""
        _sleep(task)

    async def begin(self, stderr_path: str, fatal: bool) -> int:
        """Start the child, and depend on it. Returns its process id."""
        self.child = await asyncio.to_thread(_begin_child, stderr_path)
        assert await self.watch_process(self.child.pid, name="vllm", fatal=fatal, stderr_path=stderr_path)
        return self.child.pid


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _begin_child(stderr_path: str) -> subprocess.Popen[bytes]:
    with Path(stderr_path).open("wb") as stderr:
        child = subprocess.Popen([sys.executable, "-S", "-c", _LOADS], stdout=subprocess.PIPE, stderr=stderr)
    assert child.stdout is not None
    assert child.stdout.readline() == b"there\n"
    return child


class Mortal(Worker):
    """Dies under its first runs. A task is a file and how many runs kill it; every run leaves a line in the file."""

    async def handle_task(self, task: Any) -> Any:
        path, deadly_runs = task
        runs = _note_run(Path(path))
        if runs <= deadly_runs:
            os._exit(1)
        return runs


def _note_run(file: Path) -> int:
    with file.open("a") as lines:
        lines.write(f"{os.getpid()}\n")
    return len(file.read_text().splitlines())


class Late(Worker):
    """Its work raises a TimeoutError of its own."""

    async def handle_task(self, task: Any) -> Any:
        raise TimeoutError("the work itself took too long")


class Unmakeable(Worker):
    """Its constructor raises."""

    def __init__(self, *_arguments: Any, **_details: Any) -> None:
        raise ValueError("not like this")


class Unstartable(Worker):
    """Its start raises."""

    async def start(self) -> None:
        raise RuntimeError("not today")


class SlowToStart(Worker):
    """Its start takes for ever."""

    async def start(self) -> None:
        await asyncio.sleep(3600)


class Narrow(Worker):
    """Its constructor takes less than an agent is made with."""

    def __init__(self, agent_id: str) -> None:
        super().__init__(agent_id)


class Forgetful(Worker):
    """Its constructor does not call that of RayAgent."""

    def __init__(self, agent_id: str, **details: Any) -> None:
        self.details = details


class Grouped(Worker):
    """Its tasks run in a concurrency group, and so in an event loop, of their own."""

    @ray.method(concurrency_group="work")  # type: ignore[misc, untyped-decorator, unused-ignore]
    async def execute_task(self, task: Any) -> Any:
        return await super().execute_task(task)

    async def handle_task(self, task: Any) -> Any:
        path = Path(task)
        _note_run(path)
        await eventually(lambda: not path.exists())
        return "done"


class Patient(Worker):
    """Its work ends once there is a file."""

    async def handle_task(self, task: Any) -> Any:
        await eventually(Path(task).exists, within_s=60)
        return "finished"


class Stays(Worker):
    """Goes on when its epoch is retired."""

    async def on_retired(self, epoch: str) -> None:
        self.retired = epoch

    async def handle_task(self, task: Any) -> Any:
        return self.retired


class SlowToAnswer(Worker):
    """Its heartbeat takes for ever."""

    async def get_heartbeat(self) -> Any:
        await asyncio.sleep(3600)


class Blocking:
    """An existing class with blocking methods that owns a reporter in two lines."""

    def __init__(self, agent_id: str, settings: Settings) -> None:
        self.reporter = ThreadReporter(agent_id, organ_id="blocking", settings=settings)
        self.reporter.start()

    def pid(self) -> int:
        return os.getpid()

    def finish(self) -> None:
        self.reporter.drain("enough")
        self.reporter.stop("done")


class Async:
    """An existing async class that owns a reporter in two lines."""

    def __init__(self, agent_id: str, settings: Settings) -> None:
        self.reporter = Reporter(agent_id, settings=settings)

    async def begin(self) -> str:
        await self.reporter.start()
        return self.reporter.client.instance_id

    async def pid(self) -> int:
        return os.getpid()


class Caller:
    """A class with blocking methods that calls agents."""

    def __init__(self, namespace: str) -> None:
        use_namespace(namespace)

    def call(self, agent_id: str, task: Any) -> Any:
        return ray.get(seedcore.get_actor(agent_id, timeout_s=30).execute_task.remote(task))

    def names(self) -> list[str]:
        return [row.logical_id for row in seedcore.list_agents()]


class Stranger:
    """An actor that knows nothing of us."""

    def pid(self) -> int:
        return os.getpid()


class Identifier:
    """An actor that identifies itself, or another."""

    async def identify(self, actor_name: str | None) -> Identity:
        return await identify(actor_name, "watched", 5.0)


class Quiet:
    """An actor that does nothing."""

    async def whereabouts(self) -> tuple[int, str | None]:
        return os.getpid(), own_process_key()


class Busy:
    """An actor that works on one long task and answers no call meanwhile."""

    def pid(self) -> int:
        return os.getpid()

    def work(self, seconds: float) -> None:
        time.sleep(seconds)


class OldRegistry:
    """A registry of long ago."""

    async def hello(self) -> Hello:
        from datetime import datetime

        return Hello(0, "0.0.1", os.getpid(), "", datetime.now(UTC))


class Host:
    """A process that hosts many logical agents."""

    def __init__(self, prefix: str, agents: int, settings: Settings) -> None:
        self._clients = [RegistryClient(f"{prefix}-{n}", settings=settings) for n in range(agents)]
        self._reporters = [Reporter(client.logical_id, settings=settings, client=client) for client in self._clients]

    async def begin(self) -> int:
        await asyncio.gather(*(reporter.start() for reporter in self._reporters))
        return len(self._reporters)

    async def problems(self) -> list[str]:
        return [reporter.problem for reporter in self._reporters if reporter.problem is not None]

    async def end(self) -> None:
        await asyncio.gather(*(reporter.stop() for reporter in self._reporters))
