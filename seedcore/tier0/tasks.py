"""Tasks on agents: run again on the next actor if the first one dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError

from seedcore.core.backoff import Backoff
from seedcore.core.clock import Clock
from seedcore.core.errors import CannotKnowError, NotResolvableError, first_line
from seedcore.core.selection import Policy
from seedcore.registry.caller.picks import Found, Outstanding
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.actors import Proof, probe
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
    """Runs tasks. `find` finds an agent's handle by a policy and its key, `evict` drops the cached one, `outstanding`
    counts the calls."""

    def __init__(
        self,
        find: Callable[[str, Policy, str], Awaitable[Found]],
        evict: Callable[[str], None],
        outstanding: Outstanding,
        probe_timeout_s: float,
        *,
        times: TaskTimes | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._find = find
        self._evict = evict
        self._outstanding = outstanding
        self._probe_timeout_s = probe_timeout_s
        self._times = times if times is not None else TaskTimes()
        self._clock = clock if clock is not None else Clock()

    async def execute(
        self, agent_id: str, task: Any, timeout_s: float | None, *, retries: bool, policy: Policy, key: str
    ) -> Any:
        """See the manager."""
        find = partial(self._find, agent_id, policy, key)
        found = await find()
        if not retries:
            return await bounded_call(agent_id, lambda: self._ask(found, task), timeout_s)
        return await bounded_call(agent_id, lambda: self._run(agent_id, find, found, task), timeout_s)

    async def _ask(self, found: Found, task: Any) -> Any:
        handle, instance_id = found
        with self._outstanding.call(instance_id):
            return await session.ask(handle, "execute_task", task)

    async def _run(self, agent_id: str, find: Callable[[], Awaitable[Found]], found: Found, task: Any) -> Any:
        for _ in range(self._times.reruns):
            try:
                return await self._ask(found, task)
            except ActorUnavailableError as error:
                self._evict(agent_id)
                logger.info("runs a task again: %s", first_line(error), extra={"logical_id": agent_id})
                found = await self._restarted(find)
            except ActorDiedError:
                self._evict(agent_id)
                found = await find()
        return await self._ask(found, task)

    async def _restarted(self, find: Callable[[], Awaitable[Found]]) -> Found:
        """The handle of an agent whose actor Ray restarts: tried until it answers, for a bounded time."""
        ends_s = self._clock.monotonic() + self._times.restart_s
        backoff = Backoff(self._times.pause_s, self._times.longest_pause_s)
        while True:
            is_over = self._clock.monotonic() > ends_s
            try:
                found = await find()
            except (NotResolvableError, CannotKnowError):
                # between its death and its new registration it is not routable
                if is_over:
                    raise
            else:
                # a call before it answers would only fail again
                if is_over or await probe(found[0], self._probe_timeout_s) is Proof.YES:
                    return found
            await asyncio.sleep(backoff.next_s())
