"""Keeps the registry actor running: starts it, and starts it again when it is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from seedcore.core.backoff import Backoff, supervise
from seedcore.core.errors import RegistryError, RegistryUnavailableError
from seedcore.registry.protocol.messages import Hello

logger = logging.getLogger(__name__)


class RegistryKeeper:
    """Asks the registry for a sign of life every `period_s` seconds, and starts it if there is none.

    A failed start is logged and tried again, whatever failed. After an unexpected error the delay grows to `longest_s`.
    """

    def __init__(
        self,
        hello: Callable[[], Awaitable[Hello]],
        start_registry: Callable[[], Awaitable[Hello]],
        *,
        period_s: float = 5.0,
        longest_s: float = 30.0,
    ) -> None:
        self._hello = hello
        self._start_registry = start_registry
        self._period_s = period_s
        self._longest_s = longest_s
        self.starts = 0
        self.failures = 0

    def start(self) -> asyncio.Task[None]:
        """Keep the registry until the task is cancelled."""
        backoff = Backoff(self._period_s, self._longest_s)
        return asyncio.create_task(
            supervise(self._step, backoff, "the registry's keeper", on_failure=self._note_failure),
            name="registry-keeper",
        )

    async def _step(self) -> float:
        try:
            await self._hello()
        except RegistryUnavailableError:
            try:
                hello = await self._start_registry()
            except RegistryError as error:
                self.failures += 1
                logger.warning("the registry actor could not be started: %s", error)
            else:
                self.starts += 1
                logger.info("the registry actor runs", extra={"pid": hello.pid, "node_id": hello.node_id})
        return self._period_s

    def _note_failure(self, _error: Exception) -> None:
        self.failures += 1
