"""Tasks on agents: run again on the next actor if the first one dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError

from seedcore.core.backoff import Backoff
from seedcore.core.clock import Clock
from seedcore.core.errors import CannotKnowError, NotResolvableError, first_line
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.actors import Proof, probe
from seedcore.registry.ray_support.lookup import ActorHandle
from seedcore.tier0.calls import bounded_call

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TaskTimes:
    """`reruns` of a task whose actor dies. A restarted actor is tried for `restart_s` seconds, with pauses from
    `pause_s` to `longest_pause_s`."""

    reruns: int = 2
    restart_s: float = 10.0
    pause_s: float = 0.1
    longest_pause_s: float = 1.0


class TaskRunner:
    """Runs tasks. `resolve` finds an agent's handle, `evict` drops the cached one."""

    def __init__(
        self,
        resolve: Callable[[str], Awaitable[ActorHandle]],
        evict: Callable[[str], None],
        probe_timeout_s: float,
        *,
        times: TaskTimes | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._resolve = resolve
        self._evict = evict
        self._probe_timeout_s = probe_timeout_s
        self._times = times if times is not None else TaskTimes()
        self._clock = clock if clock is not None else Clock()

    async def execute(self, agent_id: str, task: Any, timeout_s: float | None, *, retries: bool) -> Any:
        """See the manager."""
        handle = await self._resolve(agent_id)
        if not retries:
            return await bounded_call(agent_id, lambda: session.ask(handle, "execute_task", task), timeout_s)
        return await bounded_call(agent_id, lambda: self._run(agent_id, handle, task), timeout_s)

    async def _run(self, agent_id: str, handle: ActorHandle, task: Any) -> Any:
        for _ in range(self._times.reruns):
            try:
                return await session.ask(handle, "execute_task", task)
            except ActorUnavailableError as error:
                self._evict(agent_id)
                logger.info("runs a task again: %s", first_line(error), extra={"logical_id": agent_id})
                handle = await self._restarted(agent_id)
            except ActorDiedError:
                self._evict(agent_id)
                handle = await self._resolve(agent_id)
        return await session.ask(handle, "execute_task", task)

    async def _restarted(self, agent_id: str) -> ActorHandle:
        """The handle of an agent whose actor Ray restarts: tried until it answers, for a bounded time."""
        ends_s = self._clock.monotonic() + self._times.restart_s
        backoff = Backoff(self._times.pause_s, self._times.longest_pause_s)
        while True:
            is_over = self._clock.monotonic() > ends_s
            try:
                handle = await self._resolve(agent_id)
            except (NotResolvableError, CannotKnowError):
                # between its death and its new registration it is not routable
                if is_over:
                    raise
            else:
                # a call before it answers would only fail again
                if is_over or await probe(handle, self._probe_timeout_s) is Proof.YES:
                    return handle
            await asyncio.sleep(backoff.next_s())
