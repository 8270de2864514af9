"""One agent's side of the registry: numbers its changes, keeps each until it is durable, registers again when lost.

It runs no loop: `reporter.py` beats by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self

from seedcore.core.answers import BeatAnswer, Receipt
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Change, Registration, new_instance_id
from seedcore.core.clock import Clock
from seedcore.core.comebacks import Comebacks
from seedcore.core.errors import RegistryError, RetiredEpochError
from seedcore.core.lifecycle import Status
from seedcore.core.limits import Json, check_detail, check_status
from seedcore.registry.agent.delivery import Delivery
from seedcore.registry.agent.enrolment import Enrolment, Identifier, NewId
from seedcore.registry.agent.identity import identify, process_epoch
from seedcore.registry.agent.outages import Outages, of_process
from seedcore.registry.agent.pending import PendingChanges
from seedcore.registry.agent.reports import AgentReports
from seedcore.registry.agent.times import AgentTimes
from seedcore.registry.protocol.connection import RegistryConnection, shared_connection
from seedcore.registry.ray_support.directory import check_not_ours
from seedcore.settings import Settings, get_settings


class RegistryClient(AgentReports):
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
        clock = clock if clock is not None else Clock()
        self.times = times if times is not None else AgentTimes()
        self.outages = outages
        enrolment = Enrolment(
            given,
            self._settings,
            identifier,
            clock=clock,
            pause_max_s=self.times.identify_max_s,
            new_id=new_id,
        )
        self._is_completed = False
        pending = PendingChanges()
        comebacks = Comebacks(self.times.comeback_first_s, self.times.comeback_longest_s)
        delivery = Delivery(self._connection, enrolment, pending, comebacks, clock, outages)
        super().__init__(enrolment, pending, delivery, clock)

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
            change: Change | None = None
            try:
                if before.status is None and wanted is Status.ALIVE and cause is None and not before.holds:
                    change = self._pending.register_alive(self.registration)
                else:
                    if before.status is None:
                        self._pending.register(self.registration)
                    change = self._pending.set_status(self.instance_id, wanted, cause)
                return await self._delivery.deliver(self)
            except RegistryError:
                # the error may be of a change before it
                if change not in self._pending:
                    self._pending.wanted = before
                raise

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
