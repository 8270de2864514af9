"""Delivers the numbered changes of one agent: in order, again until durable, and behind a new registration where the
registry has lost the instance."""

from __future__ import annotations

from seedcore.core.answers import BeatAnswer, Receipt
from seedcore.core.changes import Change, HoldChange, RegisterChange, SequencedChange
from seedcore.core.clock import Clock
from seedcore.core.comebacks import Comebacks
from seedcore.core.errors import (
    BacklogFullError,
    FencedError,
    InstanceDeadError,
    NodeDeadError,
    RegistrationDelayedError,
    RegistryError,
    RegistryFullError,
    RegistryReplacedError,
    RegistryUnavailableError,
    RetiredEpochError,
    UnknownInstanceError,
    VersionMismatchError,
)
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.lifecycle import Status
from seedcore.registry.agent.enrolment import Enrolment
from seedcore.registry.agent.outages import Outages
from seedcore.registry.agent.pending import PendingChanges
from seedcore.registry.agent.processes import ended
from seedcore.registry.protocol.connection import RegistryConnection

_MAX_RETURNS = 4
_TRY_LATER = (RegistryUnavailableError, VersionMismatchError, BacklogFullError, RegistryFullError, FencedError)
_HEALS = (UnknownInstanceError, InstanceDeadError, NodeDeadError, *_TRY_LATER)


class Delivery:
    """Between the pending changes of an agent and its connection. One call at a time."""

    def __init__(
        self,
        connection: RegistryConnection,
        enrolment: Enrolment,
        pending: PendingChanges,
        comebacks: Comebacks,
        clock: Clock,
        outages: Outages,
    ) -> None:
        self.beat_interval_s: float | None = None
        """How often the registry asks the agent to beat; None before its first answer."""
        self._lease_s: float | None = None
        self._registry: str | None = None
        self._sent: Change | None = None
        self._is_coming_back = False
        self._connection = connection
        self._enrolment = enrolment
        self._pending = pending
        self._comebacks = comebacks
        self._clock = clock
        self._outages = outages

    @property
    def fields(self) -> dict[str, str]:
        """The agent's fields of a log line."""
        registration = self._enrolment.registration
        return {"logical_id": registration.logical_id, "instance_id": registration.instance_id}

    def note_terms(self, answer: Receipt | BeatAnswer) -> None:
        """Take over the interval and the lease that the registry asks for, if it has answered."""
        if answer.beat_interval_s is not None:
            self.beat_interval_s, self._lease_s = answer.beat_interval_s, answer.lease_s

    async def deliver(self, agent: object) -> Receipt:
        """Send every pending change in order. Changes leave only when known to be durable, or refused. `agent` counts
        in the outages of this process."""
        self._outages.reporting.add(agent)
        receipt = await self._deliver_all()
        self._outages.note_receipt(agent, receipt, self.fields)
        return receipt

    def kept(self, why: str) -> Receipt:
        """The receipt of a change that is not sent yet."""
        return self._receipt(durable=False, why=why)

    def register_again(self) -> None:
        """Queue the registration again, as the same instance: the registry does not know it."""
        self._outages.registered_again.note(self._enrolment.registration.instance_id, self.fields)
        self._pending.register_again(self._enrolment.registration, as_new=False)

    def come_back(self, why: str) -> None:
        """Queue a registration as a new instance, for after the pause that its deaths in a row ask for."""
        self._outages.came_back.note(self._enrolment.registration.instance_id, self.fields)
        self._comebacks.note(why, self._clock.monotonic())
        self._connection.forget(self._enrolment.registration.instance_id)
        self._enrolment.begin_new_instance()
        self._is_coming_back = True
        registration = self._enrolment.registration
        process, kind = ended(registration.dependencies, is_fatal=False), HoldKind.PROCESS
        if process is not None:
            # at once: the relay looks at it only after the registration
            hold = Hold(kind, f"{process.name}: pid {process.pid}", None, self._clock.utc())
            self._pending.wanted = self._pending.wanted.with_hold(HoldChange(registration.instance_id, kind, hold))
        self._pending.register_again(registration, as_new=True)

    def require_comeback(self) -> None:
        """Raise RegistrationDelayedError in the pause before the instance that is to be registered."""
        pausing = self._why_paused()
        if pausing is not None:
            raise RegistrationDelayedError(pausing)

    def _why_paused(self) -> str | None:
        """Why no registration is sent now: of several deaths in a row, or without a process that it depends on."""
        pausing = self._comebacks.problem(self._clock.monotonic())
        is_needed = self._is_coming_back or self._pending.wanted.status is not Status.DEAD
        if pausing is not None or not (self._pending.is_to_register and is_needed):
            return pausing
        process = ended(self._enrolment.registration.dependencies, is_fatal=True)
        if process is None:
            return None
        return f"{process.name} (pid {process.pid}), which it depends on, has ended: watch the next one, or none"

    async def _deliver_all(self) -> Receipt:
        replaced: RegistryReplacedError | None = None
        for _ in range(_MAX_RETURNS):
            pausing = self._why_paused()
            if pausing is not None and self._pending.wanted.status is Status.DEAD:
                # the instance before is dead already, and this one was never registered
                return self._ended()
            if pausing is not None:
                return self._receipt(durable=False, why=pausing)
            try:
                return await self._send_all()
            except UnknownInstanceError:
                self.register_again()
            except InstanceDeadError as dead:
                if self._pending.wanted.status is Status.DEAD:
                    return self._ended()
                self.come_back("its instance was declared dead" + (f" ({dead.cause})" if dead.cause else ""))
            except NodeDeadError as error:
                self._comebacks.note(str(error), self._clock.monotonic())
            except RetiredEpochError:
                if self._pending.wanted.status is not Status.DEAD:
                    raise
                # it ended with its epoch, as it wants
                return self._receipt(durable=True, why=None)
            except RegistryReplacedError as error:
                # the registry that replaced it gets the last changes, in order: it may know fewer than the one before
                replaced, self._registry = error, None
                self._pending.repeat(self._enrolment.registration)
            except RegistryFullError as error:
                if not self._gives_up_details():
                    return self._receipt(durable=False, why=str(error))
                raise
            except _TRY_LATER as error:
                return self._receipt(durable=False, why=str(error))
        if replaced is not None:
            return self._receipt(durable=False, why=str(replaced))
        return self._receipt(durable=False, why="the registry loses this instance again and again")

    async def _send_all(self) -> Receipt:
        receipt = self._receipt(durable=True, why=None)
        for change in self._pending:
            self._sent = change
            try:
                receipt = await self._connection.take(SequencedChange(change, self._registry))
            except _HEALS:
                raise
            except RegistryError:
                self._pending.refuse(change)
                raise
            self._registry, self._is_coming_back = receipt.registry, False
            self.note_terms(receipt)
            self._enrolment.note_epoch(receipt)
            self._pending.settle(change, receipt)
        return receipt

    def _gives_up_details(self) -> bool:
        """Whether the change that was sent last had other details, for which there is no room. It is given up: what the
        agent reports behind it must not wait."""
        change = self._sent
        if not (isinstance(change, RegisterChange) and change.is_update and change in self._pending):
            return False
        self._pending.refuse(change)
        return True

    def _ended(self) -> Receipt:
        self._pending.clear()
        return self._receipt(durable=True, why=None)

    def _receipt(self, durable: bool, why: str | None) -> Receipt:
        return Receipt(
            instance_id=self._enrolment.registration.instance_id,
            status=self._pending.wanted.status or Status.STARTING,
            seq=self._pending.seq,
            durable=durable,
            epoch=self._enrolment.epoch or self._enrolment.registration.cluster_epoch,
            why=why,
            beat_interval_s=self.beat_interval_s,
            lease_s=self._lease_s,
        )
