"""One agent's side of the registry: numbers its changes, keeps each until it is durable, registers again when lost.

It runs no loop: `reporter.py` beats by itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self

from seedcore.core.answers import BeatAnswer, Receipt
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import HoldChange, Registration, new_instance_id
from seedcore.core.clock import Clock
from seedcore.core.comebacks import Comebacks
from seedcore.core.errors import InstanceDeadError, RegistryError, RetiredEpochError
from seedcore.core.holds import HoldKind
from seedcore.core.lifecycle import Status
from seedcore.core.limits import Json, check_detail, check_status
from seedcore.core.loops import LoopsLock
from seedcore.registry.agent.delivery import Delivery
from seedcore.registry.agent.enrolment import Enrolment, Identifier, NewId
from seedcore.registry.agent.identity import identify, process_epoch
from seedcore.registry.agent.outages import Outages, of_process
from seedcore.registry.agent.pending import PendingChanges
from seedcore.registry.agent.processes import Dependencies, unwatched, watched
from seedcore.registry.agent.readiness import Readiness
from seedcore.registry.agent.times import AgentTimes
from seedcore.registry.protocol.connection import RegistryConnection, shared_connection
from seedcore.registry.ray_support.directory import check_not_ours
from seedcore.settings import Settings, get_settings


class RegistryClient:
    """Registers one agent, changes its status, renews its lease.

    A change is kept until the registry confirms that it is durable, and sent again, with its number, by the next call.
    An instance that the registry does not know registers again; one that was declared dead comes back as a new instance
    (`instance_id` changes). After its own `dead` an agent does not come back: make another client. Call `beat()` every
    `beat_interval_s` seconds.
    It belongs to one epoch: the one that it insists on, or else that of its first registration. One that ended with its
    epoch does not come back: its calls raise RetiredEpochError.
    Callers of several event loops may share it: their calls run one after the other.

    `async with` registers it, and reports `dead` at the end.
    """

    def __init__(
        self,
        logical_id: str,
        actor_name: str | None = None,
        cluster_epoch: str | None = None,
        *,
        organ_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        metadata: Mapping[str, Json] | None = None,
        serve_route: str | None = None,
        endpoints: Mapping[str, str] | None = None,
        settings: Settings | None = None,
        connection: RegistryConnection | None = None,
        identifier: Identifier = identify,
        clock: Clock | None = None,
        times: AgentTimes | None = None,
        outages: Outages = of_process,
        new_id: NewId = new_instance_id,
    ) -> None:
        """Raises InvalidInputError for a value beyond its limits. Tries no connection."""
        self._settings = settings if settings is not None else get_settings()
        self._connection = (
            connection
            if connection is not None
            else shared_connection(self._settings.namespace, self._settings.call_timeout_s)
        )
        insisted = cluster_epoch if cluster_epoch is not None else self._settings.cluster_epoch
        of_actor = process_epoch() if insisted is None else None
        if of_actor is not None and of_actor.is_insisted:
            insisted, of_actor = of_actor.name, None
        given = Registration(
            instance_id=new_id(),
            logical_id=check_not_ours("logical_id", logical_id),
            actor_name=None if actor_name is None else check_not_ours("actor_name", actor_name),
            cluster_epoch=insisted,
            started_epoch=None if of_actor is None else of_actor.name,
            organ_id=organ_id,
            labels=labels if labels is not None else {},
            metadata=metadata if metadata is not None else {},
            serve_route=serve_route,
            endpoints=endpoints if endpoints is not None else {},
            node_id=self._settings.node_id,
            ip_address=self._settings.ip_address,
        ).validated()
        # the caller may go on changing its own
        given = replace(
            given, labels=dict(given.labels), metadata=dict(given.metadata), endpoints=dict(given.endpoints)
        )
        self._clock = clock = clock if clock is not None else Clock()
        self.times = times if times is not None else AgentTimes()
        self.outages = outages
        self._enrolment = Enrolment(
            given,
            self._settings,
            identifier,
            clock=clock,
            pause_max_s=self.times.identify_max_s,
            new_id=new_id,
        )
        self._is_completed = False
        self._pending = PendingChanges()
        self._readiness = Readiness()
        self._delivery = Delivery(
            self._connection,
            self._enrolment,
            self._pending,
            Comebacks(self.times.comeback_first_s, self.times.comeback_longest_s),
            clock,
            outages,
        )
        self._calls = LoopsLock()

    async def __aenter__(self) -> Self:
        await self.register()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.set_status(Status.DEAD, "stopped" if error is None else f"ended by {type(error).__name__}")

    @property
    def logical_id(self) -> str:
        """The agent's stable name."""
        return self._enrolment.registration.logical_id

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

    @property
    def connection(self) -> RegistryConnection:
        """The connection that it calls."""
        return self._connection

    @property
    def pending(self) -> int:
        """Changes that are not known to be durable."""
        return len(self._pending)

    @property
    def has_more_to_send(self) -> bool:
        """Whether its next beat has more to send than the beat; not while a call is under way."""
        if self._calls.locked():
            return False
        return bool(self._pending) or self._is_completed or self.status is None or self._is_to_complete()

    @property
    def beat_interval_s(self) -> float:
        """How often to beat, in seconds: what the registry has asked for last. Until it has answered, the setting, but
        at most `times.unanswered_max_s`: it may have taken a registration whose answer was lost."""
        if self._delivery.beat_interval_s is not None:
            return self._delivery.beat_interval_s
        return min(self.times.unanswered_max_s, self._settings.beat_interval_s)

    @property
    def is_answered(self) -> bool:
        """Whether the registry has ever answered, and so decides the interval."""
        return self._delivery.beat_interval_s is not None

    async def register(self) -> Receipt:
        """Register this instance as `starting`. Returns also where nothing is committed: see `durable` of the receipt,
        or call its `raise_unless_durable()`.

        With durable=False registry or database is away: the registration is kept and sent again by the next call, and a
        warning is logged once for the outage. Repeating it is harmless. Raises RetiredEpochError, EpochLimitError or
        InstanceConflictError: those do not heal by waiting; InstanceDeadError after our own `dead`.
        """
        async with self._calls:
            self._require_life()
            await self._enrolment.identify()
            before = self._pending.wanted
            if before.status is None:
                self._pending.register(self.registration)
            elif self._pending.is_refused:
                self._pending.register_again(self.registration, as_new=False)
            try:
                return await self._delivery.deliver(self)
            except RegistryError:
                self._pending.wanted = before
                raise

    async def set_status(self, status: Status | str, reason: str | None = None) -> Receipt:
        """Change the status. Returns also where nothing is committed, as `register()`; raises as that, and
        InvalidInputError or ForbiddenTransitionError.

        `reason` is recorded as the detail of a cause of kind `agent`. `dead` repeated delivers what is not
        durable yet, and changes nothing.
        """
        wanted, detail = check_status(status), check_detail(reason)
        cause = None if detail is None else Cause(CauseKind.AGENT, detail)
        async with self._calls:
            if wanted is Status.DEAD and self.status is Status.DEAD:
                return await self._delivery.deliver(self)
            self._require_life()
            before = self._pending.wanted
            if before.status is None:
                await self._enrolment.identify()
                self._pending.register(self.registration)
            try:
                self._pending.set_status(self.instance_id, wanted, cause)
                return await self._delivery.deliver(self)
            except RegistryError:
                self._pending.wanted = before
                raise

    async def set_endpoints(self, endpoints: Mapping[str, str]) -> Receipt | None:
        """Replace the URLs at which other programs reach the agent. It is a change like a status: kept until it is
        durable, and applied after the changes before it. None before the registration, which then has these.

        Raises InvalidInputError, or as `set_status`.
        """
        async with self._calls:
            self._require_life()
            before = self.registration.endpoints
            is_changed = self._enrolment.set_endpoints(endpoints)
            if self.status is None:
                return None
            change = None
            try:
                if is_changed:
                    change = self._pending.change_details(self.registration)
                return await self._delivery.deliver(self)
            except RegistryError:
                is_kept = change is not None and change in self._pending
                if not is_kept and (change is None or change.instance_id == self.instance_id):
                    # it is refused for good: later registrations must not repeat it
                    self._enrolment.set_endpoints(before)
                raise

    async def set_ready(self, ready: bool, reason: str | None = None) -> Receipt:
        """Report whether the agent accepts work. While it is not ready it lives and is not resolved: it has a hold of
        kind `readiness` with this reason, whatever status it reports. Returns and raises as `set_status()`.

        Before `register()` it is kept, and sent with the registration.
        """
        async with self._calls:
            self._require_life()
            return await self._report_readiness(self._readiness.said(ready, reason))

    async def note_probe(self, name: str, problem: str | None) -> Receipt:
        """Report what a probe of this name finds: a problem, with which the agent is not ready, or None. As
        `set_ready()`, beside which it counts."""
        async with self._calls:
            self._require_life()
            return await self._report_readiness(self._readiness.probed(name, problem))

    async def _report_readiness(self, now: Readiness) -> Receipt:
        before = self._readiness, self._pending.wanted
        try:
            self._pending.hold(now.change(self.instance_id, self._clock.utc()))
            self._readiness = now
            return await self._sent_or_kept()
        except RegistryError:
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
        had_it = any(one.name == name for one in self.registration.dependencies)
        self._enrolment.registration = replace(self.registration, dependencies=dependencies)
        if self.status is not None:
            self._pending.change_details(self.registration)
            if had_it:
                # the registry places it again while another one has ended
                self._pending.hold(HoldChange(self.instance_id, HoldKind.PROCESS, cause=Cause(CauseKind.AGENT, name)))
        return await self._sent_or_kept()

    async def _sent_or_kept(self) -> Receipt:
        if self.status is None:
            return self._delivery.kept("it is sent with the registration")
        return await self._delivery.deliver(self)

    async def beat(self) -> BeatAnswer:
        """Renew the lease, and first deliver what is not durable yet.

        Acts on the answer: an instance that the registry does not know registers again, a dead one comes back as
        a new one. Raises RegistryUnavailableError where the registry cannot be asked, RegistrationDelayedError in the
        pause before a new instance, RetiredEpochError for one that is dead with its epoch, and what `register()`
        raises.
        """
        async with self._calls:
            if self._is_to_complete():
                self._is_completed |= await self._enrolment.identify_again()
            if self._pending:
                await self._delivery.deliver(self)
                self._delivery.require_comeback()
            answer = await self._connection.beat_many([self.instance_id])
            self.note_terms(answer)
            if self.instance_id in answer.retired and self.status is not Status.DEAD:
                self._pending.is_refused = True
                raise RetiredEpochError(answer.retired[self.instance_id])
            if not answer.unknown and not answer.dead:
                # a registry that does not know the instance, as in another cluster, needs its status too, and one that
                # is still recovering cannot answer whether it knows the instance
                if self._is_completed and not answer.is_recovering:
                    self._is_completed = False
                    self._pending.change_details(self.registration)
                    await self._delivery.deliver(self)
                return answer
            self._is_completed = False
            if self.status is not Status.DEAD:
                await self._enrolment.identify()
                if answer.dead:
                    self._delivery.come_back("its instance was declared dead")
                else:
                    self._delivery.register_again()
                await self._delivery.deliver(self)
                self._delivery.require_comeback()
            return answer

    def note_terms(self, answer: Receipt | BeatAnswer) -> None:
        """Take over the interval and the lease that the registry asks for, if it has answered."""
        self._delivery.note_terms(answer)

    def _is_to_complete(self) -> bool:
        return not self._pending and self.status not in {None, Status.DEAD} and self._enrolment.is_due

    def _require_life(self) -> None:
        # declared dead by the registry it comes back as a new instance, after its own `dead` it does not
        if self.status is Status.DEAD:
            raise InstanceDeadError(self.instance_id, self._pending.wanted.cause)
