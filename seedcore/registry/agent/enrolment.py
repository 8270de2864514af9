"""What an agent registers as: its registration, completed with what Ray knows of this process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from seedcore.core.answers import Receipt
from seedcore.core.backoff import Backoff
from seedcore.core.changes import Registration, new_instance_id
from seedcore.core.clock import Clock
from seedcore.registry.agent.identity import Identity
from seedcore.registry.ray_support import session
from seedcore.settings import Settings

Identifier = Callable[[str | None, str, float], Awaitable[Identity]]
NewId = Callable[[], str]


class Enrolment:
    """The registration of one agent. Ray is asked again until it knows this process, and in each Ray session: another
    cluster knows the process by another node."""

    def __init__(
        self,
        registration: Registration,
        settings: Settings,
        identifier: Identifier,
        *,
        clock: Clock,
        pause_max_s: float,
        new_id: NewId = new_instance_id,
    ) -> None:
        """`registration` is what the agent itself has stated; `pause_max_s` the longest pause between two questions."""
        self.registration = registration
        self.epoch: str | None = None
        """The epoch of its instance, once the registry has named it."""
        self._actor_name = registration.actor_name
        self._settings = settings
        self._identifier = identifier
        self._clock = clock
        self._new_id = new_id
        self._pauses = Backoff(settings.beat_interval_s, pause_max_s)
        self._asks_at_s = 0.0
        self._is_identified = False
        self._asked_in: session.Session | None = None

    @property
    def is_due(self) -> bool:
        """Whether Ray has to be asked now: at once in another Ray session, and ever more seldom within one."""
        if self._is_in_another_session():
            return True
        return not self._is_identified and self._clock.monotonic() >= self._asks_at_s

    async def identify(self) -> None:
        """Ask Ray, unless it has answered in this session."""
        if self._is_identified and not self._is_in_another_session():
            return
        began = session.current()
        identity = await self._identifier(self._actor_name, self._settings.namespace, self._settings.probe_timeout_s)
        self.registration = replace(
            self.registration,
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

    async def identify_again(self) -> bool:
        """Ask Ray once more. Returns whether the registration has changed."""
        if self._is_in_another_session():
            self._pauses.reset()
        self._asks_at_s = self._clock.monotonic() + self._pauses.next_s()
        before = self.registration
        await self.identify()
        return self.registration != before

    def set_endpoints(self, endpoints: Mapping[str, str]) -> bool:
        """Register with other endpoints from now on. Returns whether they differ. Raises InvalidInputError."""
        changed = replace(self.registration, endpoints=endpoints).validated()
        if changed == self.registration:
            return False
        # the caller may go on changing its own
        self.registration = replace(changed, endpoints=dict(endpoints))
        return True

    def begin_new_instance(self) -> None:
        """Register as a new instance from now on."""
        self.registration = replace(self.registration, instance_id=self._new_id())
        self.epoch = None

    def note_epoch(self, receipt: Receipt) -> None:
        """Stay in the epoch that the registry has the agent in; once that is durable, whichever epoch is current when
        it registers again."""
        self.epoch = receipt.epoch or self.epoch
        if receipt.durable and receipt.epoch is not None and self.registration.cluster_epoch is None:
            self.registration = replace(self.registration, started_epoch=receipt.epoch)

    def _is_in_another_session(self) -> bool:
        now = session.current()
        return now is not None and now is not self._asked_in
