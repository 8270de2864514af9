"""Reports an agent's life: registers, says alive, beats with jitter, drains, stops.

`Reporter` lives in an event loop; `ThreadReporter` brings its own, for actors whose methods are not async.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from seedcore.core.errors import RegistryError, RegistryUnavailableError, VersionMismatchError
from seedcore.core.lifecycle import Status
from seedcore.core.model import Json, Receipt
from seedcore.core.waiting import end
from seedcore.registry.client import RegistryClient
from seedcore.settings import Settings, get_settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

_JITTER = 0.1
_REFUSED_SLOWDOWN = 6.0
_THREAD_PATIENCE_S = 30.0


class Reporter:
    """Owns a RegistryClient and the task that beats. An actor owns it in two lines:

        self.reporter = Reporter("my_agent", organ_id="vision")
        await self.reporter.start()

    With ENABLE_RUNTIME_REGISTRY=false nothing is ever sent.
    """

    def __init__(
        self,
        logical_id: str,
        *,
        actor_name: str | None = None,
        organ_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, Json] | None = None,
        serve_route: str | None = None,
        settings: Settings | None = None,
        client: RegistryClient | None = None,
    ) -> None:
        """Raises InvalidInputError for a value beyond its limits. Tries no connection."""
        self._settings = settings if settings is not None else get_settings()
        self._client = (
            client
            if client is not None
            else RegistryClient(
                logical_id,
                actor_name,
                organ_id=organ_id,
                labels=labels,
                metadata=metadata,
                serve_route=serve_route,
                settings=self._settings,
            )
        )
        self._interval_s = self._settings.beat_interval_s
        self._beating: asyncio.Task[None] | None = None
        self._problem: str | None = None

    @property
    def client(self) -> RegistryClient:
        """The client it reports through."""
        return self._client

    @property
    def is_enabled(self) -> bool:
        """Whether anything is reported at all."""
        return self._settings.registry_enabled

    @property
    def problem(self) -> str | None:
        """Why the last report did not arrive, or None."""
        return self._problem

    async def start(self) -> None:
        """Register, say alive, begin to beat. Idempotent.

        Returns within a bounded time whether or not a registry is there; what could not be said is said later.
        Raises what does not heal by waiting: RetiredEpochError, EpochLimitError.
        """
        if not self.is_enabled or self._beating is not None:
            return
        # the beat task first, so that two starts cannot make two
        ready = asyncio.Event()
        self._beating = asyncio.create_task(self._beat_loop(ready), name=f"beats-{self._client.logical_id}")
        try:
            receipt = await self._client.set_status(Status.ALIVE)
            self._note(receipt.why)
        except RegistryError:
            await self._end_beating()
            raise
        ready.set()

    async def drain(self, cause: str | None = None) -> Receipt | None:
        """Say that no new work should come; beats go on. None where nothing is reported."""
        return await self._say(Status.DRAINING, cause)

    async def undrain(self, cause: str | None = None) -> Receipt | None:
        """Take new work again after `drain()`."""
        return await self._say(Status.ALIVE, cause)

    async def stop(self, cause: str = "stopped") -> Receipt | None:
        """End the beats and say dead, within the call timeout. Idempotent. Dead is final."""
        if self._beating is None:
            return None
        await self._end_beating()
        try:
            return await self._client.set_status(Status.DEAD, cause)
        except RegistryError as error:
            logger.warning("could not say that the agent stopped: %s", error, extra=self._fields())
            return None

    async def _say(self, status: Status, cause: str | None) -> Receipt | None:
        if self._beating is None:
            return None
        return await self._client.set_status(status, cause)

    async def _end_beating(self) -> None:
        task, self._beating = self._beating, None
        await end(task)

    async def _beat_loop(self, ready: asyncio.Event) -> None:
        await ready.wait()
        slowdown = 1.0
        while True:
            await asyncio.sleep(self._interval_s * slowdown * random.uniform(1 - _JITTER, 1 + _JITTER))
            slowdown = 1.0
            try:
                answer = await self._client.beat()
                self._interval_s = answer.beat_interval_s
                self._note("a newer registry has taken the database over" if answer.is_fenced else None)
            except (RegistryUnavailableError, VersionMismatchError) as error:
                self._note(str(error))
            except RegistryError as error:
                # does not heal by waiting; someone may mend it all the same
                slowdown = _REFUSED_SLOWDOWN
                self._note(str(error))
            except Exception:
                logger.exception("a beat failed; the agent goes on", extra=self._fields())

    def _note(self, problem: str | None) -> None:
        if problem is not None and self._problem is None:
            logger.warning("not reported, will try again: %s", problem, extra=self._fields())
        elif problem is None and self._problem is not None:
            logger.info("reported again", extra=self._fields())
        self._problem = problem

    def _fields(self) -> dict[str, str]:
        return {"logical_id": self._client.logical_id, "instance_id": self._client.instance_id}


class ThreadReporter:
    """A Reporter on a thread of its own, for classes whose methods block:

        self.reporter = ThreadReporter("my_agent")
        self.reporter.start()

    Its beats say that the process lives, not that its methods answer.
    """

    def __init__(self, logical_id: str, **options: Any) -> None:
        """`options` as for Reporter."""
        self._logical_id = logical_id
        self._options = options
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._reporter: Reporter | None = None

    @property
    def reporter(self) -> Reporter | None:
        """The reporter on the thread, once started."""
        return self._reporter

    def start(self) -> None:
        """As Reporter.start, blocking."""
        if self._loop is not None:
            return
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"reporter-{self._logical_id}", daemon=True)
        self._thread.start()
        try:
            self._run(self._start())
        except RegistryError:
            self._end_thread()
            raise

    def drain(self, cause: str | None = None) -> Receipt | None:
        """As Reporter.drain, blocking."""
        return self._run(self._reporter.drain(cause)) if self._reporter is not None else None

    def stop(self, cause: str = "stopped") -> Receipt | None:
        """As Reporter.stop, blocking; ends the thread."""
        if self._reporter is None:
            return None
        try:
            return self._run(self._reporter.stop(cause))
        finally:
            self._reporter = None
            self._end_thread()

    async def _start(self) -> None:
        self._reporter = Reporter(self._logical_id, **self._options)
        await self._reporter.start()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_THREAD_PATIENCE_S)

    def _end_thread(self) -> None:
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(_THREAD_PATIENCE_S)
            loop.close()
