"""Reports an agent's life: registers, says alive, beats with jitter, drains, stops.

`Reporter` lives in an event loop; `ThreadReporter` brings its own, for actors whose methods are not async.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from seedcore.core.answers import BeatAnswer, Receipt
from seedcore.core.errors import (
    BacklogFullError,
    ForkedProcessError,
    RegistrationDelayedError,
    RegistryError,
    RegistryUnavailableError,
    RetiredEpochError,
    VersionMismatchError,
)
from seedcore.core.lifecycle import Status
from seedcore.core.limits import Json, check_cause, check_load
from seedcore.core.loops import LoopsLock
from seedcore.core.timeouts import end
from seedcore.registry.agent import outages
from seedcore.registry.agent.beat_loop import BeatLoop, beat_loop
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.ray_support.session import refuse_forked
from seedcore.settings import Settings, get_settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

_REFUSED_SLOWDOWN = 6.0
_FIRST_RETRY_S = 1.0
_THREAD_PATIENCE_S = 30.0
_OF_PARENT = "this reporter runs in the process that this one was forked from: make another reporter in this process"
_CALLS_PER_STEP = 6  # to find the registry, shake hands and speak, and once more with the one that replaced it


class Reporter:
    """Owns a RegistryClient, and beats with everybody else of its event loop. Call it from any event loop.

    An actor owns it in two lines:

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
        on_retired: Callable[[str], object] | None = None,
    ) -> None:
        """Raises InvalidInputError for a value beyond its limits. Tries no connection.

        `on_retired` is called once, with the epoch's name, in the reporter's event loop, when the agent's epoch is
        retired: the reporter has stopped by then, and the process goes on unless the hook ends it.
        """
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
        self._unanswered_s = min(_FIRST_RETRY_S, self._client.beat_interval_s)
        self._slowdown = 1.0
        self._load: float | None = None
        self._is_reporting = False
        self._changing = LoopsLock()
        self._beats: BeatLoop | None = None
        self._problem: str | None = None
        self._on_retired = on_retired
        self._retired_epoch: str | None = None

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

    @property
    def retired_epoch(self) -> str | None:
        """The epoch that the agent ended with, and reports no more since; None: it has not."""
        return self._retired_epoch

    async def start(self, status: Status = Status.ALIVE, cause: str | None = None) -> None:
        """Register, say `status`, begin to beat. Idempotent; who starts it meanwhile waits for the same.

        Returns within a bounded time whether or not a registry is there; what could not be said is said later.
        Raises what does not heal by waiting, and then has not started: RetiredEpochError, EpochLimitError,
        InstanceDeadError after `stop()`, ForkedProcessError. Cancelled, it has not started either.
        """
        if not self.is_enabled:
            return
        refuse_forked()
        async with self._changing:
            if self._is_reporting:
                self._keep_beating()
                return
            # at once: what is said from now on is reported, behind the start
            self._is_reporting = True
            try:
                receipt = await self._client.set_status(status, cause)
            except (Exception, asyncio.CancelledError):
                self._is_reporting = False
                raise
            self._problem = receipt.why
            self._beat_here()

    async def drain(self, cause: str | None = None) -> Receipt | None:
        """Say that no new work should come; beats go on. None where nothing is reported."""
        return await self._say(Status.DRAINING, cause)

    async def undrain(self, cause: str | None = None) -> Receipt | None:
        """Take new work again after `drain()`."""
        return await self._say(Status.ALIVE, cause)

    async def stop(self, cause: str = "stopped") -> Receipt | None:
        """End the beats and say dead, within the call timeout. Idempotent. Dead is final.

        None where there is nothing to say, or it could not be said. Said again, it delivers a `dead` that is not
        durable yet. Raises InvalidInputError for the cause, and then nothing has changed.
        """
        check_cause(cause)
        refuse_forked()
        async with self._changing:
            self._end_beating()
            if self._client.status is None or (self._client.status is Status.DEAD and not self._client.undelivered):
                return None
            try:
                return await self._client.set_status(Status.DEAD, cause)
            except RegistryError as error:
                outages.not_ended.note(str(error), self._fields())
                return None

    async def _say(self, status: Status, cause: str | None) -> Receipt | None:
        refuse_forked()
        if not self._is_reporting:
            return None
        self._keep_beating()
        try:
            return await self._client.set_status(status, cause)
        except RetiredEpochError as error:
            self._retire(error)
            raise

    def _retire(self, error: RetiredEpochError) -> None:
        """Report no more: an agent that ended with its epoch comes back in no other."""
        if not self._is_reporting:
            return
        self._end_beating()
        self._retired_epoch, self._problem = error.epoch, str(error)
        logger.warning("epoch %s is retired; its agent reports no more", error.epoch, extra=self._fields())
        if self._on_retired is not None:
            try:
                self._on_retired(error.epoch)
            except Exception:
                logger.exception("on_retired failed", extra=self._fields())

    def _end_beating(self) -> None:
        if self._is_reporting:
            self._is_reporting = False
            if self._beats is not None:
                self._beats.leave(self)

    def _beat_here(self) -> None:
        self._beats = beat_loop(self._client.connection)
        self._beats.join(self)

    def _keep_beating(self) -> None:
        """Beat in the running event loop where that of the start has ended."""
        if self._beats is not None and not self._beats.is_running:
            self._beat_here()

    # What the beat loop asks of an agent: see beat_loop.Beater

    @property
    def instance_id(self) -> str:
        """This incarnation."""
        return self._client.instance_id

    @property
    def pause_s(self) -> float:
        """Seconds to its next beat: what the registry asked for, longer where it refuses the agent. Before its first
        answer a pause that grows, so that an agent whose registration was taken is in time."""
        interval_s = self._client.beat_interval_s if self._client.is_answered else self._unanswered_s
        return interval_s * self._slowdown

    @property
    def load(self) -> float | None:
        """What its beats tell of its load; None: nothing. Callers may choose by it (see core.selection.Policy)."""
        return self._load

    @load.setter
    def load(self, load: float | None) -> None:
        self._load = None if load is None else check_load(load)

    @property
    def has_more_to_say(self) -> bool:
        """Whether its next beat has more to it than the beat."""
        return self._client.has_more_to_say

    async def beat_alone(self) -> None:
        """Beat, and say what is not durable yet."""
        try:
            refuse_forked()
            self.take_answer(await self._client.beat())
        except RetiredEpochError as error:
            self._retire(error)
        except RegistryError as error:
            self.take_failure(error)
        except Exception:
            logger.exception("a beat failed; the agent goes on", extra=self._fields())

    def take_answer(self, answer: BeatAnswer) -> None:
        """The lease is renewed."""
        self._client.note_terms(answer)
        self._slowdown = 1.0
        outages.refused.clear(self._client)
        if answer.is_fenced:
            self._problem = "a newer registry has taken the database over"
            outages.unreported.note(self._client, self._problem, self._fields(), len(outages.reporting))
        else:
            self._problem = None
            outages.unreported.clear(self._client)

    def take_failure(self, error: RegistryError) -> None:
        """The beat was not taken. What does not heal by waiting, someone may mend all the same: try more rarely."""
        # the client itself paces what it waits for
        heals = (RegistryUnavailableError, VersionMismatchError, BacklogFullError, RegistrationDelayedError)
        self._slowdown = 1.0 if isinstance(error, heals) else _REFUSED_SLOWDOWN
        self._unanswered_s = min(2 * self._unanswered_s, self._client.beat_interval_s)
        self._problem = str(error)
        if isinstance(error, heals):
            outages.unreported.note(self._client, self._problem, self._fields(), len(outages.reporting))
        else:
            outages.refused.note(self._client, self._problem, self._fields())

    def _fields(self) -> dict[str, str]:
        return {"logical_id": self._client.logical_id, "instance_id": self._client.instance_id}


class ThreadReporter:
    """A Reporter on a thread beside the caller's, for classes whose methods block:

        self.reporter = ThreadReporter("my_agent")
        self.reporter.start()

    Its beats say that the process lives, not that its methods answer. Use it from any thread; one call at a time
    is served, the others wait for it. All of a process share one thread, which ends with the last of them.
    """

    def __init__(self, logical_id: str, **options: Any) -> None:
        """`options` as for Reporter, and refused as there."""
        self._make = partial(Reporter, logical_id, **options)
        self._thread: _LoopThread | None = None
        self._turn = threading.Lock()
        self._pid = os.getpid()
        self._reporter: Reporter | None = None
        # a wrong option is told here; each start makes a reporter of its own, since dead is final
        settings = self._make()._settings
        self._patience_s = max(_THREAD_PATIENCE_S, _CALLS_PER_STEP * settings.call_timeout_s)

    @property
    def reporter(self) -> Reporter | None:
        """The reporter on the thread, while it runs."""
        return self._reporter

    def start(self) -> None:
        """As Reporter.start, blocking. After `stop()` it begins again, as a new instance."""
        with self._alone():
            if self._reporter is not None and self._thread is not None:
                # raises where it has stopped since its epoch is retired
                self._thread.run(self._reporter.start(), self._patience_s)
                return
            reporter, thread = self._make(), _LoopThread.joined()
            try:
                thread.run(reporter.start(), self._patience_s)
            except BaseException:
                thread.leave()
                raise
            self._reporter, self._thread = reporter, thread

    def drain(self, cause: str | None = None) -> Receipt | None:
        """As Reporter.drain, blocking."""
        return self._say(lambda reporter: reporter.drain(cause))

    def undrain(self, cause: str | None = None) -> Receipt | None:
        """As Reporter.undrain, blocking."""
        return self._say(lambda reporter: reporter.undrain(cause))

    def stop(self, cause: str = "stopped") -> Receipt | None:
        """As Reporter.stop, blocking."""
        check_cause(cause)
        with self._alone():
            reporter, thread = self._reporter, self._thread
            if reporter is None or thread is None:
                return None
            self._reporter, self._thread = None, None
            try:
                return thread.run(reporter.stop(cause), self._patience_s)
            finally:
                thread.leave()

    def _say(self, words: Callable[[Reporter], Coroutine[Any, Any, T]]) -> T | None:
        with self._alone():
            if self._reporter is None or self._thread is None:
                return None
            return self._thread.run(words(self._reporter), self._patience_s)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        refuse_forked()
        if self._pid != os.getpid():
            if self._thread is not None:
                raise ForkedProcessError(_OF_PARENT)
            # one that only was made before the fork; a thread that is not here may have held its turn
            self._pid, self._turn = os.getpid(), threading.Lock()
        # bounded, since a signal's handler may call while the call that it interrupted holds the turn
        if not self._turn.acquire(timeout=self._patience_s):
            raise RegistryUnavailableError("another call to this reporter has not ended")
        try:
            yield
        finally:
            self._turn.release()


class _LoopThread:
    """An event loop on a thread of its own, for all reporters of the process; it ends when the last one leaves."""

    _shared: _LoopThread | None = None
    _door = threading.RLock()  # a signal's handler may come in while its thread is inside

    def __init__(self) -> None:
        self._users = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="seedcore-reporters", daemon=True)
        self._thread.start()

    @classmethod
    def joined(cls) -> _LoopThread:
        """The thread, with one user more."""
        with cls._door:
            if cls._shared is None:
                cls._shared = cls()
            cls._shared._users += 1
            return cls._shared

    def leave(self) -> None:
        """One user less."""
        with self._door:
            self._users -= 1
            if self._users > 0:
                return
            if _LoopThread._shared is self:
                _LoopThread._shared = None
        self._end()

    def run(self, work: Coroutine[Any, Any, T], patience_s: float) -> T:
        """The result of `work` on the thread. Raises RegistryUnavailableError after `patience_s` seconds."""
        asked = asyncio.run_coroutine_threadsafe(work, self._loop)
        done, _ = wait([asked], patience_s)
        if not done:
            asked.cancel()
            raise RegistryUnavailableError(f"the reporter's thread has not answered within {patience_s:g} s")
        return asked.result()

    def _end(self) -> None:
        """Cancel what runs on it, and end it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_THREAD_PATIENCE_S)

    def _serve(self) -> None:
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._end_tasks())
        finally:
            self._loop.close()

    async def _end_tasks(self) -> None:
        await end(*(asyncio.all_tasks() - {asyncio.current_task()}))

    @classmethod
    def _note_fork(cls) -> None:
        # a forked child has none of its parent's threads, and one of them may have held the door
        cls._shared, cls._door = None, threading.RLock()


os.register_at_fork(after_in_child=_LoopThread._note_fork)
