"""Reports an agent's life: registers it, reports it alive, beats with jitter, drains, stops.

It lives in an event loop; see thread_reporter.py for actors whose methods are not async.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Self

from seedcore.core.answers import Receipt
from seedcore.core.errors import RegistryError, RegistryUnavailableError, RetiredEpochError
from seedcore.core.lifecycle import Status
from seedcore.core.limits import Json, check_detail, check_endpoints, check_load
from seedcore.core.loop_thread import LoopThread
from seedcore.core.loops import LoopsLock
from seedcore.registry.agent.beat_loop import BeatLoop, beat_loop
from seedcore.registry.agent.client import RegistryClient
from seedcore.registry.agent.http_probe import HttpProbes, Probe
from seedcore.registry.agent.processes import ended
from seedcore.registry.agent.pulse import Pulse, fields_of
from seedcore.registry.ray_support.session import refuse_forked
from seedcore.settings import Settings, get_settings

logger = logging.getLogger(__name__)

_PROBE_PATIENCE_S = 30.0


def stop_reason(error: BaseException | None) -> str:
    """The reason of a stop at the end of a `with` block."""
    return "stopped" if error is None else f"stopped after {type(error).__name__}"


class Reporter:
    """Owns a RegistryClient, and beats together with the other agents of its event loop. Call it from any event loop.

    An actor owns it in two lines:

        self.reporter = Reporter("my_agent", organ_id="vision")
        await self.reporter.start()

    `async with` starts and stops it. With ENABLE_RUNTIME_REGISTRY=false nothing is ever sent.
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
        endpoints: Mapping[str, str] | None = None,
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
                endpoints=endpoints,
                settings=self._settings,
            )
        )
        self._pulse = Pulse(self._client, self._retire)
        self._probes = HttpProbes(self._report_probe)
        self._is_reporting = False
        self._changing = LoopsLock()
        self._beats: BeatLoop | None = None
        self._on_retired = on_retired
        self._retired_epoch: str | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(stop_reason(error))

    @property
    def client(self) -> RegistryClient:
        """The client it reports through."""
        return self._client

    @property
    def is_reporting(self) -> bool:
        """Whether it has been started and not stopped."""
        return self._is_reporting

    @property
    def is_beating(self) -> bool:
        """Whether it beats: from its start to its stop, unless its event loop has ended."""
        return self._beats is not None and self._pulse in self._beats

    @property
    def is_enabled(self) -> bool:
        """Whether anything is reported at all."""
        return self._settings.registry_enabled

    @property
    def problem(self) -> str | None:
        """Why the last report did not arrive, or None."""
        return self._pulse.problem

    @property
    def retired_epoch(self) -> str | None:
        """The epoch with which the agent ended, and stopped reporting; None: it has not."""
        return self._retired_epoch

    @property
    def load(self) -> float | None:
        """The load that its beats report; None: none. Callers may choose by it (see core.selection.Policy)."""
        return self._pulse.load

    @load.setter
    def load(self, load: float | None) -> None:
        self._pulse.load = None if load is None else check_load(load)

    @property
    def ended_process(self) -> str | None:
        """The name of a fatal process that has ended, without which the agent does not come back; None: all live."""
        found = ended(self._client.registration.dependencies, is_fatal=True)
        return None if found is None else found.name

    async def start(self, status: Status = Status.ALIVE, reason: str | None = None) -> None:
        """Register, report `status`, begin to beat. Idempotent; a second call meanwhile waits for the first.

        Returns within a bounded time whether or not a registry is there; what could not be sent is sent later.
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
            # at once: a change of status from now on is reported, behind the start
            self._is_reporting = True
            try:
                receipt = await self._client.set_status(status, reason)
            except (Exception, asyncio.CancelledError):
                self._is_reporting = False
                raise
            self._pulse.problem = receipt.why
            self._beat_here()

    async def drain(self, reason: str | None = None) -> Receipt | None:
        """Report `draining`: no new work should come. Beats go on. None where nothing is reported."""
        return await self._report(Status.DRAINING, reason)

    async def undrain(self, reason: str | None = None) -> Receipt | None:
        """Report `alive` again after `drain()`."""
        return await self._report(Status.ALIVE, reason)

    async def set_endpoints(self, endpoints: Mapping[str, str]) -> Receipt | None:
        """Replace the URLs at which other programs reach the agent. Before the start the agent gets them for its
        registration. None where nothing is reported. Raises InvalidInputError, and then nothing has changed."""
        check_endpoints(endpoints)
        return await self._also_before_start(lambda: self._client.set_endpoints(endpoints))

    async def set_ready(self, ready: bool, reason: str | None = None) -> Receipt | None:
        """Report whether the agent accepts work: while it is not ready it lives, and is not resolved. Before `start()`
        it is kept: an agent that is not ready then is never resolved before it is. None where nothing is reported."""
        return await self._also_before_start(lambda: self._client.set_ready(ready, reason))

    async def watch_process(
        self,
        pid: int,
        *,
        name: str = "process",
        fatal: bool = True,
        stderr_path: str | os.PathLike[str] | None = None,
    ) -> Receipt | None:
        """See RegistryClient.watch_process. Before `start()` it is kept. None where nothing is reported."""
        return await self._also_before_start(
            lambda: self._client.watch_process(pid, name, fatal=fatal, stderr_path=stderr_path)
        )

    async def unwatch_process(self, name: str) -> Receipt | None:
        """See RegistryClient.unwatch_process."""
        return await self._also_before_start(lambda: self._client.unwatch_process(name))

    def watch_http(
        self, url: str, *, name: str, every_s: float = 5.0, timeout_s: float = 2.0, failures: int = 3
    ) -> None:
        """Probe a URL every so many seconds, on a thread, until `stop()`: at most MAX_PROBES. After so many failures in
        a row the agent is not ready, with the reason, until one success; see `set_ready()`, beside which it counts.

        A failure is no answer within `timeout_s` seconds, the look-up of the name included, or a status from 400.
        Raises InvalidInputError.
        """
        refuse_forked()
        self._probes.add(Probe(url, name, every_s, timeout_s, failures))

    async def unwatch_http(self, name: str) -> Receipt | None:
        """End the probe of this name, and what it has found. Raises InvalidInputError where there is none."""
        self._probes.remove(name)
        return await self._also_before_start(lambda: self._client.note_probe(name, None))

    async def stop(self, reason: str = "stopped") -> Receipt | None:
        """End the beats and report `dead`, within the call timeout. Idempotent. Dead is final.

        None where there is nothing to report, or it could not be sent. Repeated, it delivers a `dead` that is not
        durable yet. Raises InvalidInputError for the reason, and then nothing has changed.
        """
        check_detail(reason)
        refuse_forked()
        async with self._changing:
            self._end_beating()
            self._probes.stop()
            if self._client.status is None or (self._client.status is Status.DEAD and not self._client.pending):
                return None
            try:
                return await self._client.set_status(Status.DEAD, reason)
            except RegistryError as error:
                self._client.outages.not_ended.note(str(error), self._fields())
                return None

    async def _report(self, status: Status, reason: str | None) -> Receipt | None:
        refuse_forked()
        return await self._send(self._client.set_status(status, reason)) if self._is_reporting else None

    @property
    def _has_ended(self) -> bool:
        """Whether it has stopped, or ended with its epoch. A start that was cancelled is repeated."""
        return self._client.status is Status.DEAD or self._retired_epoch is not None

    async def _also_before_start(
        self, report: Callable[[], Coroutine[object, object, Receipt | None]]
    ) -> Receipt | None:
        refuse_forked()
        if not self.is_enabled or (not self._is_reporting and self._has_ended):
            return None
        return await self._send(report())

    async def _send(self, report: Coroutine[object, object, Receipt | None]) -> Receipt | None:
        self._keep_beating()
        try:
            return await report
        except RetiredEpochError as error:
            self._retire(error)
            raise

    def _retire(self, error: RetiredEpochError) -> None:
        """Stop reporting: an agent that ended with its epoch comes back in no other."""
        if not self._is_reporting:
            return
        self._end_beating()
        self._probes.stop()
        self._client.connection.forget(self._client.instance_id)
        self._retired_epoch, self._pulse.problem = error.epoch, str(error)
        logger.warning("epoch %s is retired; its agent has stopped reporting", error.epoch, extra=self._fields())
        if self._on_retired is not None:
            try:
                self._on_retired(error.epoch)
            except Exception:
                logger.exception("on_retired failed", extra=self._fields())

    def _report_probe(self, name: str, problem: str | None, is_wanted: Callable[[], bool]) -> None:
        """Called on the thread of a probe. The event loop of the agent may be stuck: it reports in another."""
        if not self.is_enabled:
            return
        thread = LoopThread.joined()
        try:
            late = RegistryUnavailableError(f"the report of a probe has not ended within {_PROBE_PATIENCE_S:g} s")
            thread.run(self._client.note_probe(name, problem, is_wanted), _PROBE_PATIENCE_S, late)
        finally:
            thread.leave()

    def _end_beating(self) -> None:
        if self._is_reporting:
            self._is_reporting = False
            if self._beats is not None:
                self._beats.leave(self._pulse)

    def _beat_here(self) -> None:
        self._beats = beat_loop(self._client.connection)
        self._beats.join(self._pulse)

    def _keep_beating(self) -> None:
        """Beat in the running event loop where that of the start has ended."""
        if self._beats is not None and not self._beats.is_running:
            self._beat_here()

    def _fields(self) -> dict[str, str]:
        return fields_of(self._client)
