"""Delays between retries, and the loop that uses them: every background loop of SeedCore is one `supervise`."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

_DOUBLINGS = 32


class Backoff:
    """Delays in seconds: each about twice the one before, from `first_s` up to `longest_s`, minus a random share of
    up to `jitter`, so that many clients do not retry in step."""

    def __init__(
        self,
        first_s: float,
        longest_s: float,
        jitter: float = 0.5,
        uniform: Callable[[float, float], float] | None = None,
    ) -> None:
        """`uniform` draws the jitter; the default is random.uniform."""
        self._first_s = first_s
        self._longest_s = longest_s
        self._jitter = jitter
        self._uniform = uniform if uniform is not None else random.uniform
        self.failures = 0

    def next_s(self) -> float:
        """Note a failure. Returns the delay before the next try."""
        delay_s = min(self._longest_s, self._first_s * 2.0**self.failures)
        self.failures = min(self.failures + 1, _DOUBLINGS)
        return delay_s * self._uniform(1.0 - self._jitter, 1.0)

    def reset(self) -> None:
        """Note a success: the next delay is about `first_s` again."""
        self.failures = 0


async def supervise(
    step: Callable[[], Awaitable[float]],
    backoff: Backoff,
    name: str,
    *,
    on_failure: Callable[[Exception], None] | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Run `step` again and again, until cancelled. `step` returns the seconds to wait before it runs again.

    An exception does not end the loop: it is logged with its traceback, passed to `on_failure`, and followed by a delay
    of `backoff`. A step that returns resets the backoff.
    """
    while True:
        try:
            pause_s = await step()
            backoff.reset()
        except Exception as error:
            pause_s = backoff.next_s()
            logger.exception("%s failed and will be tried again in %.1f s", name, pause_s)
            if on_failure is not None:
                on_failure(error)
        await sleep(pause_s)
