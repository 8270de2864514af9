"""One agent's side of the registry: numbers its changes, keeps each until it is durable, comes back when lost.

Owns no loop: `reporter.py` beats by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from seedcore.core.answers import BeatAnswer, Receipt
from seedcore.core.changes import Change, RegisterChange, Registration, StatusChange, new_instance_id
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
from seedcore.core.lifecycle import Status
from seedcore.core.limits import Json, check_cause, check_status
from seedcore.core.loops import LoopsLock
from seedcore.registry.agent import outages
from seedcore.registry.agent.identity import Identity, identify, process_epoch
from seedcore.registry.protocol.connection import RegistryConnection, shared_connection
from seedcore.registry.ray_support import session
from seedcore.registry.ray_support.directory import check_not_ours
from seedcore.settings import Settings, get_settings

MAX_UNDELIVERED = 1000
_MAX_RETURNS = 3
_IDENTIFY_MAX_S = 60.0
_UNTOLD_MAX_S = 5.0
_TRY_LATER = (RegistryUnavailableError, VersionMismatchError, BacklogFullError, RegistryFullError, FencedError)
_HEALS = (UnknownInstanceError, InstanceDeadError, NodeDeadError, *_TRY_LATER)


class RegistryClient:
    """Registers one agent, changes its status, renews its lease.

    A change is retained until the registry says that it is durable, and sent again, with its number, by the
    next call. An unknown instance registers again by itself; one that was declared dead comes back as a new
    instance (`instance_id` changes). Who said `dead` itself is dead for good: make another client. Call `beat()` every
    `beat_interval_s` seconds.
    It belongs to one epoch: the one that it insists on, or else that of its first registration. One that ended with its
    epoch does not come back: its calls raise RetiredEpochError.
    Callers of several event loops may share it: one after the other is served.
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
        settings: Settings | None = None,
        connection: RegistryConnection | None = None,
        identifier: Callable[[str | None, str, float], Awaitable[Identity]] = identify,
    ) -> None:
        """Raises InvalidInputError for a value beyond its limits. Tries no connection."""
        self._settings = settings if settings is not None else get_settings()
        self._connection = (
            connection
            if connection is not None
            else shared_connection(self._settings.namespace, self._settings.call_timeout_s)
        )
        insisted = cluster_epoch if cluster_epoch is not None else self._settings.cluster_epoch
        of_process = process_epoch() if insisted is None else None
        if of_process is not None and of_process.is_insisted:
            insisted, of_process = of_process.name, None
        given = Registration(
            instance_id=new_instance_id(),
            logical_id=check_not_ours("logical_id", logical_id),
            actor_name=None if actor_name is None else check_not_ours("actor_name", actor_name),
            cluster_epoch=insisted,
            started_epoch=None if of_process is None else of_process.name,
            organ_id=organ_id,
            labels=labels if labels is not None else {},
            metadata=metadata if metadata is not None else {},
            serve_route=serve_route,
            node_id=self._settings.node_id,
            ip_address=self._settings.ip_address,
        ).validated()
        # the caller may go on changing its own
        self._registration = replace(given, labels=dict(given.labels), metadata=dict(given.metadata))
        self._given_actor_name = actor_name
        self._identifier = identifier
        self._is_identified = False
        self._asked_in: session.Session | None = None
        self._is_completed = False
        self._identify_pause_s = self._settings.beat_interval_s
        self._identifies_at_s = 0.0
        self._is_refused = False
        self._seq = 0
        self._status_seq = 0
        self._epoch: str | None = None
        self._beat_interval_s: float | None = None
        self._lease_s: float | None = None
        self._status: Status | None = None
        self._cause: str | None = None
        self._undelivered: list[Change] = []
        self._comebacks = Comebacks()
        self._delivering = LoopsLock()

    @property
    def logical_id(self) -> str:
        """The agent's stable name."""
        return self._registration.logical_id

    @property
    def instance_id(self) -> str:
        """This incarnation; another one after the registry declared it dead."""
        return self._registration.instance_id

    @property
    def status(self) -> Status | None:
        """The status last asked for; None before `register()`."""
        return self._status

    @property
    def connection(self) -> RegistryConnection:
        """What it speaks through."""
        return self._connection

    @property
    def has_more_to_say(self) -> bool:
        """Whether its next beat has more to it than the beat; not while that is being said."""
        if self._delivering.locked():
            return False
        return bool(self._undelivered) or self._status is None or self._is_to_complete()

    @property
    def beat_interval_s(self) -> float:
        """How often to beat, in seconds: what the registry has asked for last. Until it has answered, the setting, but
        at most 5 s: it may have taken a registration whose answer was lost."""
        if self._beat_interval_s is not None:
            return self._beat_interval_s
        return min(_UNTOLD_MAX_S, self._settings.beat_interval_s)

    @property
    def is_answered(self) -> bool:
        """Whether the registry has ever answered, and so decides the interval."""
        return self._beat_interval_s is not None

    @property
    def undelivered(self) -> int:
        """Changes that are not known to be durable."""
        return len(self._undelivered)

    async def register(self) -> Receipt:
        """Register this instance as `starting`. Returns also where nothing is committed: see `durable` of the receipt,
        or call its `raise_unless_durable()`.

        With durable=False registry or database is away: the registration is kept and sent again by the next call, and a
        warning is logged once for the outage. Repeating it is harmless. Raises RetiredEpochError, EpochLimitError or
        InstanceConflictError: those do not heal by waiting; InstanceDeadError after our own `dead`.
        """
        async with self._delivering:
            self._require_life()
            await self._identify()
            before = self._status
            if before is None:
                self._status = Status.STARTING
                self._undelivered.append(RegisterChange(self._registration, self._next_seq()))
            elif self._is_refused:
                self._come_back(as_new=False)
            try:
                return await self._deliver()
            except RegistryError:
                self._status = before
                raise

    async def set_status(self, status: Status | str, cause: str | None = None) -> Receipt:
        """Change the status. Returns also where nothing is committed, as `register()`; raises as that, and
        InvalidInputError or ForbiddenTransitionError.

        `dead` said again delivers what is not durable yet, and changes nothing.
        """
        wanted, cause = check_status(status), check_cause(cause)
        async with self._delivering:
            if wanted is Status.DEAD and self._status is Status.DEAD:
                return await self._deliver()
            self._require_life()
            if self._status is None:
                await self._identify()
                self._undelivered.append(RegisterChange(self._registration, self._next_seq()))
            if len(self._undelivered) >= MAX_UNDELIVERED:
                raise BacklogFullError(MAX_UNDELIVERED)
            before = self._status, self._cause, self._status_seq
            self._status, self._cause, self._status_seq = wanted, cause, self._next_seq()
            self._undelivered.append(StatusChange(self.instance_id, wanted, self._status_seq, cause))
            try:
                return await self._deliver()
            except RegistryError:
                self._status, self._cause, self._status_seq = before
                raise

    async def beat(self) -> BeatAnswer:
        """Renew the lease, and first deliver what is not durable yet.

        Acts on the answer: an instance the registry does not know registers again, a dead one comes back as
        a new one. Raises RegistryUnavailableError where the registry cannot be asked, RegistrationDelayedError in the
        pause before a new instance, RetiredEpochError for one that is dead with its epoch, and what `register()`
        raises.
        """
        async with self._delivering:
            await self._complete_registration()
            if self._undelivered:
                await self._deliver()
                self._require_comeback()
            answer = await self._connection.beat(self.instance_id)
            self.note_terms(answer)
            if self.instance_id in answer.retired and self._status is not Status.DEAD:
                self._is_refused = True
                raise RetiredEpochError(answer.retired[self.instance_id])
            is_completed, self._is_completed = self._is_completed, False
            if not answer.unknown and not answer.dead:
                # to a registry that does not know the instance, as in another cluster, its status has to be said too
                if is_completed:
                    self._undelivered.append(RegisterChange(self._registration, self._next_seq()))
                    await self._deliver()
            else:
                if self._status is None:
                    self._status = Status.STARTING
                if self._status is not Status.DEAD:
                    await self._identify()
                    if answer.dead:
                        self._come_back_as_new("its instance was declared dead")
                    else:
                        self._register_again()
                    await self._deliver()
                    self._require_comeback()
            return answer

    def _require_life(self) -> None:
        # the registry's word brings us back as a new instance, our own does not
        if self._status is Status.DEAD:
            raise InstanceDeadError(self.instance_id, self._cause)

    async def _identify(self) -> None:
        """Complete the registration with what Ray knows of this process; again until Ray is connected, and in each Ray
        session: another cluster knows it by another node."""
        if self._knows_itself():
            return
        began = session.current()
        identity = await self._identifier(
            self._given_actor_name, self._settings.namespace, self._settings.probe_timeout_s
        )
        self._registration = replace(
            self._registration,
            actor_name=identity.actor_name,
            actor_id=identity.actor_id,
            namespace=identity.namespace,
            node_id=self._settings.node_id or identity.node_id,
            ip_address=self._settings.ip_address or identity.ip_address,
            pid=identity.pid,
            process_key=identity.process_key,
        )
        self._is_identified = identity.is_complete
        self._asked_in = began

    def _knows_itself(self) -> bool:
        return self._is_identified and not self._is_in_another_session()

    def _is_in_another_session(self) -> bool:
        now = session.current()
        return now is not None and now is not self._asked_in

    async def _complete_registration(self) -> None:
        """Register again with what Ray did not know at the registration. Asks at once in another Ray session, and ever
        more seldom within one."""
        if not self._is_to_complete():
            return
        if self._is_in_another_session():
            self._identify_pause_s = self._settings.beat_interval_s
        self._identifies_at_s = _now_s() + self._identify_pause_s
        self._identify_pause_s = min(_IDENTIFY_MAX_S, 2 * self._identify_pause_s)
        before = self._registration
        await self._identify()
        self._is_completed |= self._registration != before

    def _is_to_complete(self) -> bool:
        if self._knows_itself() or self._undelivered or self._status in {None, Status.DEAD}:
            return False
        return self._is_in_another_session() or _now_s() >= self._identifies_at_s

    async def _deliver(self) -> Receipt:
        """Send every undelivered change in order. Changes leave only when known to be durable, or refused."""
        outages.reporting.add(self)
        receipt = await self._deliver_all()
        self._note_outage(receipt)
        return receipt

    def _note_outage(self, receipt: Receipt) -> None:
        why, agents = receipt.why or "", len(outages.reporting)
        if receipt.durable and receipt.status is Status.DEAD:
            outages.forget(self)
        elif receipt.registry is not None:
            outages.unreported.clear(self)
            if receipt.durable:
                outages.undurable.clear(self)
            else:
                outages.undurable.note(self, why, self._fields(), agents)
        elif not receipt.durable:
            outages.unreported.note(self, why, self._fields(), agents)

    async def _deliver_all(self) -> Receipt:
        replaced: RegistryReplacedError | None = None
        for _ in range(_MAX_RETURNS):
            pausing = self._comebacks.problem(_now_s())
            if pausing is not None and self._status is Status.DEAD:
                # the instance before is dead already, and this one was never registered
                self._undelivered.clear()
                return self._receipt(durable=True, why=None)
            if pausing is not None:
                return self._receipt(durable=False, why=pausing)
            try:
                return await self._send_all()
            except UnknownInstanceError:
                self._register_again()
            except InstanceDeadError as dead:
                if self._status is Status.DEAD:
                    self._undelivered.clear()
                    return self._receipt(durable=True, why=None)
                self._come_back_as_new(f"its instance was declared dead ({dead.cause})")
            except NodeDeadError as error:
                self._comebacks.note(str(error), _now_s())
            except RetiredEpochError:
                if self._status is not Status.DEAD:
                    raise
                # it ended with its epoch, as it wants
                return self._receipt(durable=True, why=None)
            except RegistryReplacedError as error:
                # the one that came instead gets everything, in order: it may know less than the one before
                replaced = error
            except _TRY_LATER as error:
                return self._receipt(durable=False, why=str(error))
        if replaced is not None:
            return self._receipt(durable=False, why=str(replaced))
        return self._receipt(durable=False, why="the registry loses this instance again and again")

    async def _send_all(self) -> Receipt:
        receipt = self._receipt(durable=True, why=None)
        taken_by: str | None = None
        for change in list(self._undelivered):
            try:
                receipt = await self._send(change, taken_by)
            except _HEALS:
                raise
            except RegistryError:
                if isinstance(change, RegisterChange):
                    self._is_refused = True
                    self._undelivered.clear()
                else:
                    self._undelivered.remove(change)
                raise
            taken_by = receipt.registry
            self._epoch = receipt.epoch or self._epoch
            self.note_terms(receipt)
            self._bind(receipt)
            if isinstance(change, RegisterChange):
                self._is_refused = False
            if receipt.durable:
                # one registry commits an instance's changes in order: what it took before is durable too
                self._undelivered = self._undelivered[self._undelivered.index(change) + 1 :]
        return receipt

    def _bind(self, receipt: Receipt) -> None:
        """Belong to the epoch that the database has us in, whatever is shown when we register again."""
        if receipt.durable and receipt.epoch is not None and self._registration.cluster_epoch is None:
            self._registration = replace(self._registration, started_epoch=receipt.epoch)

    async def _send(self, change: Change, taken_by: str | None) -> Receipt:
        if isinstance(change, RegisterChange):
            return await self._connection.register(change.registration, change.seq)
        return await self._connection.set_status(
            change.instance_id, change.status, change.seq, change.cause, after=taken_by
        )

    def _register_again(self) -> None:
        outages.registered_again.note(self.instance_id, self._fields())
        self._come_back(as_new=False)

    def _come_back_as_new(self, why: str) -> None:
        outages.came_back.note(self.instance_id, self._fields())
        self._comebacks.note(why, _now_s())
        self._come_back(as_new=True)

    def _require_comeback(self) -> None:
        """Raise RegistrationDelayedError in the pause before the instance that is to be registered."""
        pausing = self._comebacks.problem(_now_s())
        if pausing is not None:
            raise RegistrationDelayedError(pausing)

    def _come_back(self, as_new: bool) -> None:
        """Queue a registration and, behind it, what was not durable or else the status we are in.

        As the same instance everything keeps its number: said again, it must not undo what another hand has changed
        since.
        """
        steps = [change for change in self._undelivered if isinstance(change, StatusChange)]
        if not steps and self._status not in {None, Status.STARTING}:
            assert self._status is not None
            steps = [StatusChange(self.instance_id, self._status, self._status_seq, self._cause)]
        if as_new:
            self._registration = replace(self._registration, instance_id=new_instance_id())
            self._epoch = None
            self._seq = 1
            steps = [StatusChange(self.instance_id, change.status, self._next_seq(), change.cause) for change in steps]
            self._status_seq = self._seq
        first_seq = steps[0].seq if steps else None
        self._undelivered = [RegisterChange(self._registration, 1 if first_seq is None else first_seq - 1), *steps]
        # a first beat may come before any change: the next one needs a number of its own
        self._seq = max(self._seq, 1)

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def _receipt(self, durable: bool, why: str | None) -> Receipt:
        status = self._status if self._status is not None else Status.STARTING
        epoch = self._epoch or self._registration.cluster_epoch
        return Receipt(
            instance_id=self.instance_id,
            status=status,
            seq=self._seq,
            durable=durable,
            epoch=epoch,
            why=why,
            beat_interval_s=self._beat_interval_s,
            lease_s=self._lease_s,
        )

    def note_terms(self, told: Receipt | BeatAnswer) -> None:
        """Take over the interval and the lease that the registry asks for; an older one's receipt has none."""
        if told.beat_interval_s is not None:
            self._beat_interval_s, self._lease_s = told.beat_interval_s, told.lease_s

    def _fields(self) -> dict[str, str]:
        return {"logical_id": self.logical_id, "instance_id": self.instance_id}


def _now_s() -> float:
    return asyncio.get_running_loop().time()
