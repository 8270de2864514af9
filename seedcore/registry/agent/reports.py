"""What an agent reports beside its status: its endpoints, its readiness, and the processes that it depends on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace

from seedcore.core.answers import Receipt
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Change, HoldChange, Registration
from seedcore.core.clock import Clock
from seedcore.core.errors import InstanceDeadError, RegistryError
from seedcore.core.holds import HoldKind
from seedcore.core.lifecycle import Status
from seedcore.core.loops import LoopsLock
from seedcore.registry.agent.delivery import Delivery
from seedcore.registry.agent.enrolment import Enrolment
from seedcore.registry.agent.pending import PendingChanges
from seedcore.registry.agent.processes import Dependencies, unwatched, watched
from seedcore.registry.agent.readiness import Readiness


class AgentReports:
    """The reports of one agent; RegistryClient has the others, and its life."""

    def __init__(self, enrolment: Enrolment, pending: PendingChanges, delivery: Delivery, clock: Clock) -> None:
        self._enrolment = enrolment
        self._pending = pending
        self._delivery = delivery
        self._clock = clock
        self._readiness = Readiness()
        self._calls = LoopsLock()

    @property
    def instance_id(self) -> str:
        """This incarnation; another one after the registry declared it dead."""
        return self._enrolment.registration.instance_id

    @property
    def registration(self) -> Registration:
        """What it registers as now."""
        return self._enrolment.registration

    @property
    def status(self) -> Status | None:
        """The status last asked for; None before `register()`."""
        return self._pending.wanted.status

    async def set_endpoints(self, endpoints: Mapping[str, str]) -> Receipt | None:
        """Replace the URLs at which other programs reach the agent. It is a change like a status: kept until it is
        durable, and applied after the changes before it. None before the registration, which then has these.

        Raises InvalidInputError, or as `set_status`.
        """
        async with self._calls:
            self._require_life()
            before = self.registration
            is_changed = self._enrolment.set_endpoints(endpoints)
            if self.status is None:
                return None
            change = self._queue_details(before) if is_changed else None
            return await self._deliver_details(before, change)

    def _queue_details(self, before: Registration) -> Change:
        """Queue the details that the agent has now. Raises BacklogFullError, and then it has those before."""
        try:
            return self._pending.change_details(self.registration)
        except RegistryError:
            self._enrolment.registration = before
            raise

    async def _deliver_details(self, before: Registration, change: Change | None) -> Receipt:
        """Send what is queued. Where `change` is refused for good, later registrations must not repeat it."""
        try:
            return await self._delivery.deliver(self)
        except RegistryError:
            if change is not None and change not in self._pending and self.instance_id == before.instance_id:
                self._enrolment.registration = replace(
                    self.registration, endpoints=before.endpoints, dependencies=before.dependencies
                )
            raise

    async def set_ready(self, ready: bool, reason: str | None = None) -> Receipt:
        """Report whether the agent accepts work. While it is not ready it lives and is not resolved: it has a hold of
        kind `readiness` with this reason, whatever status it reports. Returns and raises as `set_status()`.

        Before `register()` it is kept, and sent with the registration.
        """
        async with self._calls:
            self._require_life()
            return await self._report_readiness(self._readiness.said(ready, reason))

    async def note_probe(self, name: str, problem: str | None, is_wanted: Callable[[], bool] = lambda: True) -> Receipt:
        """Report what a probe of this name finds: a problem, with which the agent is not ready, or None. As
        `set_ready()`, beside which it counts. Where it `is_wanted` no longer in its turn, nothing changes."""
        async with self._calls:
            self._require_life()
            if not is_wanted():
                return self._delivery.kept("the probe has ended")
            return await self._report_readiness(self._readiness.probed(name, problem))

    async def _report_readiness(self, now: Readiness) -> Receipt:
        before, change = (self._readiness, self._pending.wanted), None
        try:
            change = self._pending.hold(now.change(self.instance_id, self._clock.utc()))
            self._readiness = now
            return await self._sent_or_kept()
        except RegistryError:
            # the error may be of a change before it
            if change not in self._pending:
                self._readiness, self._pending.wanted = before
            raise

    async def watch_process(
        self,
        pid: int,
        name: str = "process",
        *,
        fatal: bool = True,
        stderr_path: str | os.PathLike[str] | None = None,
    ) -> Receipt:
        """Depend on another process of this node, at most MAX_DEPENDENCIES: the relay watches it. When it ends the
        instance is dead if it is `fatal`, and comes back only once another process of this `name` is watched, or none.
        Otherwise the instance lives, and is not resolved until then: it has a hold of kind `process`.

        The cause names the process, its signal or exit code, and the last lines of the file at `stderr_path`. Before
        `register()` it is kept, and sent with the registration. Returns and raises as `set_status()`.
        """
        async with self._calls:
            self._require_life()
            known = self.registration.dependencies
            return await self._depend_on(watched(known, pid, name, is_fatal=fatal, stderr_path=stderr_path), name)

    async def unwatch_process(self, name: str) -> Receipt:
        """Depend on the process of this name no longer. As `watch_process()`."""
        async with self._calls:
            self._require_life()
            return await self._depend_on(unwatched(self.registration.dependencies, name), name)

    async def _depend_on(self, dependencies: Dependencies, name: str) -> Receipt:
        self._pending.require_room(2)
        before = self.registration
        self._enrolment.registration = replace(before, dependencies=dependencies)
        if self.status is None:
            return await self._sent_or_kept()
        change = self._queue_details(before)
        if any(one.name == name for one in before.dependencies):
            # the registry places it again while another one has ended
            self._pending.hold(HoldChange(self.instance_id, HoldKind.PROCESS, cause=Cause(CauseKind.AGENT, name)))
        return await self._deliver_details(before, change)

    async def _sent_or_kept(self) -> Receipt:
        if self.status is None:
            return self._delivery.kept("it is sent with the registration")
        return await self._delivery.deliver(self)

    def _require_life(self) -> None:
        # declared dead by the registry it comes back as a new instance, after its own `dead` it does not
        if self.status is Status.DEAD:
            raise InstanceDeadError(self.instance_id, self._pending.wanted.cause)
