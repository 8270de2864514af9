"""RayAgent: a plain class that lives in process or as a Ray actor, and reports its life to the registry."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from seedcore.agents.contract import check_awaitable, check_overrides
from seedcore.core.answers import Receipt
from seedcore.core.errors import AgentCallError, InvalidInputError, NotAcceptingWorkError, RetiredEpochError
from seedcore.core.lifecycle import Status
from seedcore.core.limits import Json, check_detail, check_timeout
from seedcore.core.loops import LoopsEvent, LoopsLock
from seedcore.core.timeouts import within
from seedcore.core.wire import wire
from seedcore.registry.agent.identity import end_own_actor, own_actor, own_actor_has, was_restarted
from seedcore.registry.agent.reporter import Reporter
from seedcore.settings import Settings, get_settings

logger = logging.getLogger(__name__)

_STATE = frozenset({"_agent_id", "_organ_id", "_reporter", "_starting", "_status", "_idle", "_running", "_done"})


@wire
@dataclass(frozen=True, slots=True)
class Heartbeat:
    """An agent's sign of life. Times in seconds."""

    agent_id: str
    instance_id: str
    status: Status
    at: datetime
    uptime_s: float
    tasks_running: int


@wire
@dataclass(frozen=True, slots=True)
class SummaryStats:
    """What an agent has done since it was made. Times in seconds."""

    agent_id: str
    organ_id: str | None
    status: Status
    uptime_s: float
    tasks_running: int
    tasks_done: int
    tasks_failed: int
    task_mean_s: float | None
    is_reported: bool
    report_problem: str | None


class RayAgent:
    """Subclass it and override `handle_task`: `async def handle_task(self, task)`.

    An override of an async method must be async, and be called like it: else the class statement raises
    InvalidInputError. A constructor of your own takes what it does not know itself as `**details` and passes it to
    `super().__init__(agent_id, **details)`.

    In process: `await agent.start()`. As an actor: `ray.remote(MyAgent).options(name=agent_id,
    namespace=..., num_cpus=0).remote(agent_id)` and then `start`, which `Tier0MemoryManager.create_agent`
    does for you; an actor that Ray restarts starts again by itself. It works without registry or database,
    and reports once they are there. Its methods may be called in several concurrency groups.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_overrides(cls, RayAgent)

    def __init__(
        self,
        agent_id: str,
        organ_id: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, Json] | None = None,
        endpoints: Mapping[str, str] | None = None,
        settings: Settings | None = None,
    ) -> None:
        """Raises InvalidInputError for a value beyond its limits, ConfigurationError for a wrong variable."""
        self._agent_id = agent_id
        self._organ_id = organ_id
        self._reporter = Reporter(
            agent_id,
            organ_id=organ_id,
            labels=labels,
            metadata=metadata,
            endpoints=endpoints,
            settings=settings if settings is not None else get_settings(),
            on_retired=self._note_retired,
        )
        self._status = Status.STARTING
        self._drain_reason: str | None = None
        self._starting = LoopsLock()
        self._born_s = time.monotonic()
        self._counting = threading.Lock()
        self._running = 0
        self._done = 0
        self._failed = 0
        self._busy_s = 0.0
        self._idle = LoopsEvent()
        self._idle.set()
        self._restart: asyncio.Task[None] | None = None
        self._retiring: asyncio.Task[None] | None = None
        if was_restarted():
            # Ray re-runs __init__ alone, and does not call start() again
            self._restart = asyncio.get_running_loop().create_task(self._start_again())

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # called for what is missing
            if name in _STATE and "_reporter" not in vars(self):
                why = "does not call super().__init__(agent_id, ...), or uses the agent before"
                raise InvalidInputError(f"{type(self).__name__}.__init__", why)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    @property
    def agent_id(self) -> str:
        """The logical id."""
        return self._agent_id

    @property
    def status(self) -> Status:
        """The status that the agent itself reports."""
        return self._status

    async def start(self) -> None:
        """Take work, register, beat. Idempotent; returns within a bounded time also with no registry at all.

        An agent that was drained before keeps draining, and reports that. Raises what does not heal by waiting, such as
        RetiredEpochError, and then has not started; NotAcceptingWorkError once it is stopped, or a fatal process of
        `watch_process()` has ended.
        """
        async with self._starting:
            if self._status is Status.DEAD:
                raise NotAcceptingWorkError(self._agent_id, str(self._status))
            process = self._reporter.ended_process
            if process is not None:
                raise NotAcceptingWorkError(self._agent_id, str(Status.DEAD), f"its process {process!r} has ended")
            before = self._status
            if before is Status.STARTING:
                # at once: work need not wait for a registry that does not answer
                self._status = Status.ALIVE
            try:
                await self._reporter.start(self._status, self._drain_reason)
            except BaseException:
                # unless it was drained or stopped meanwhile
                if self._status is Status.ALIVE:
                    self._status = before
                raise

    async def set_ready(self, ready: bool, reason: str | None = None) -> bool:
        """Report whether callers may resolve the agent: one that is not ready lives, and still does what it is asked.

        Call it before `start()`, as in an override of that, and no caller gets the agent before it is ready. Returns
        whether it is committed; what is not is sent again. Raises InvalidInputError, or what the registry refuses.
        """
        return _is_committed(await self._reporter.set_ready(ready, reason))

    async def watch_process(
        self,
        pid: int,
        *,
        name: str = "process",
        fatal: bool = True,
        stderr_path: str | os.PathLike[str] | None = None,
    ) -> bool:
        """Depend on another process of this node, as on a child: see RegistryClient.watch_process. Returns and raises
        as `set_ready()`."""
        return _is_committed(await self._reporter.watch_process(pid, name=name, fatal=fatal, stderr_path=stderr_path))

    async def unwatch_process(self, name: str) -> bool:
        """Depend on the process of this name no longer."""
        return _is_committed(await self._reporter.unwatch_process(name))

    async def watch_http(
        self, url: str, *, name: str, every_s: float = 5.0, timeout_s: float = 2.0, failures: int = 3
    ) -> None:
        """Be ready only while a URL answers: see Reporter.watch_http."""
        self._reporter.watch_http(url, name=name, every_s=every_s, timeout_s=timeout_s, failures=failures)

    async def unwatch_http(self, name: str) -> bool:
        """End the probe of this name, and what it has found. Returns and raises as `set_ready()`."""
        return _is_committed(await self._reporter.unwatch_http(name))

    async def drain(self, reason: str | None = None, timeout_s: float | None = None) -> bool:
        """Refuse new work, report `draining`, wait for the running tasks up to `timeout_s` seconds (None: no bound).

        True once nothing runs any more. Raises InvalidInputError, and then nothing has changed, or what the registry
        refuses: the agent drains all the same, and a repeated call reports it again.
        """
        check_detail(reason)
        check_timeout(timeout_s)
        if self._status is Status.DEAD:
            return True
        if self._status is not Status.DRAINING:
            self._status, self._drain_reason = Status.DRAINING, reason
        # the client keeps what it has taken; an earlier call may have ended before that
        if self._reporter.client.status is not Status.DRAINING:
            await self._reporter.drain(reason)
        try:
            await within(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def set_endpoints(self, endpoints: Mapping[str, str]) -> None:
        """Replace the URLs at which other programs reach the agent. What could not be sent is sent later. Raises
        InvalidInputError, and then nothing has changed."""
        await self._reporter.set_endpoints(endpoints)

    async def stop(self, reason: str = "stopped") -> None:
        """Refuse work for good and report `dead`. Running tasks are not waited for: `drain()` does that.

        Idempotent: repeated, it sends what it could not send. Raises InvalidInputError for the reason, and then nothing
        has changed.
        """
        check_detail(reason)
        self._status = Status.DEAD
        await self._reporter.stop(reason)

    async def on_retired(self, epoch: str) -> None:
        """Called once when the agent's epoch is retired: it is dead to the registry, and comes back in no other epoch.

        Refuses new work, waits for the running tasks, and then ends the agent's actor for good; in a process of another
        kind the agent has stopped. Override it to do something else.
        """
        self._status = Status.DEAD
        await self._idle.wait()
        # an agent may also be an object of another actor's, which is not ours to end
        if own_actor_has("get_summary_stats"):
            logger.warning("epoch %s is retired; the actor ends", epoch, extra={"logical_id": self._agent_id})
            end_own_actor()

    def _note_retired(self, epoch: str) -> None:
        self._retiring = asyncio.get_running_loop().create_task(self.on_retired(epoch))

    async def _start_again(self) -> None:
        try:
            await self.start()
        except RetiredEpochError as error:
            await self.on_retired(error.epoch)

    async def ping(self) -> str:
        """Answers "pong"."""
        return "pong"

    async def get_id(self) -> str:
        """The logical id."""
        return self._agent_id

    async def seedcore_instance(self) -> tuple[str, str | None]:
        """The logical id, and the instance that this process reports as; None where it reports none. Callers' handles
        are proven by it: an actor that Ray has restarted is another instance."""
        client = self._reporter.client
        has_reported = client.status is not None or self._restart is not None
        return self._agent_id, client.instance_id if self._reporter.is_enabled and has_reported else None

    async def get_heartbeat(self) -> Heartbeat:
        """A sign of life."""
        return Heartbeat(
            agent_id=self._agent_id,
            instance_id=self._reporter.client.instance_id,
            status=self._status,
            at=datetime.now(UTC),
            uptime_s=time.monotonic() - self._born_s,
            tasks_running=self._running,
        )

    async def get_summary_stats(self) -> SummaryStats:
        """What it has done so far."""
        finished = self._done + self._failed
        return SummaryStats(
            agent_id=self._agent_id,
            organ_id=self._organ_id,
            status=self._status,
            uptime_s=time.monotonic() - self._born_s,
            tasks_running=self._running,
            tasks_done=self._done,
            tasks_failed=self._failed,
            task_mean_s=self._busy_s / finished if finished else None,
            is_reported=self._reporter.is_enabled and self._reporter.problem is None,
            report_problem=self._reporter.problem,
        )

    async def execute_task(self, task: Any) -> Any:
        """Run `handle_task`, counted and timed. Raises NotAcceptingWorkError unless the agent is alive, and
        whatever `handle_task` raises; in an actor AgentCallError for its KeyboardInterrupt or SystemExit."""
        if self._status is not Status.ALIVE:
            raise NotAcceptingWorkError(self._agent_id, str(self._status))
        self._count_begun()
        began_s = time.monotonic()
        has_failed = True
        try:
            work = self.handle_task(task)
            check_awaitable(work, type(self), "handle_task", RayAgent)
            result = await work
        except (KeyboardInterrupt, SystemExit) as error:
            if own_actor()[0] is None:
                raise
            # they would end the actor's event loop, or its process and with it the tasks of others
            raise AgentCallError(self._agent_id, f"its task raised {error!r}; raise an Exception instead") from None
        else:
            has_failed = False
            return result
        finally:
            self._count_ended(time.monotonic() - began_s, has_failed=has_failed)

    def _count_begun(self) -> None:
        with self._counting:
            self._running += 1
            self._idle.clear()
            self._reporter.load = self._running

    def _count_ended(self, busy_s: float, *, has_failed: bool) -> None:
        with self._counting:
            self._busy_s += busy_s
            self._failed += has_failed
            self._done += not has_failed
            self._running -= 1
            self._reporter.load = self._running
            if self._running == 0:
                self._idle.set()

    async def handle_task(self, task: Any) -> Any:
        """Override this: do the work, return what the caller of `execute_task` shall get."""
        raise InvalidInputError("task", f"{type(self).__name__} does no work: override handle_task")


def _is_committed(receipt: Receipt | None) -> bool:
    """Whether a report is committed; None: nothing is reported."""
    return receipt is not None and receipt.durable
