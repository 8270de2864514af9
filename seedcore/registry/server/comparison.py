"""Memory and database compared, and healed where they differ.

Owns the rule of which of the two is right. An instance with a change under way is left alone: the change settles it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from itertools import islice

from seedcore.core.answers import Outcome, OutcomeKind
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Change, HoldChange, RegisterChange, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.holds import AGENTS_KINDS
from seedcore.core.instances import Instance, LiveState
from seedcore.core.lifecycle import Status
from seedcore.core.members import Members
from seedcore.core.paging import decode_cursor
from seedcore.core.rules import apply_hold, apply_registration, apply_status
from seedcore.registry.server.backlog import Backlog, Key
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.database import DatabaseSession
from seedcore.registry.server.remembered import registration_of

logger = logging.getLogger(__name__)

_PAGE = 1000
_READS = 4


class Comparison:
    """Compares every `compare_s` seconds, and after the database was away. Use it from the write loop."""

    def __init__(
        self, config: RegistryConfig, members: Members, backlog: Backlog, database: DatabaseSession, clock: Clock
    ) -> None:
        self._config = config
        self._members = members
        self._backlog = backlog
        self._database = database
        self._clock = clock
        self._next_s = 0.0
        self.healed = 0
        self.compared_at: datetime | None = None

    def request(self) -> None:
        """Compare in the next round of the write loop."""
        self._next_s = 0.0

    async def compare_if_due(self, between_pages: Callable[[], Awaitable[None]]) -> None:
        """Compare where it is time to. `between_pages` runs after each page, so that nothing waits long."""
        now_s = self._clock.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + self._config.compare_s
        before = self.healed
        await self._compare(between_pages)
        self.compared_at = self._clock.utc()
        if self.healed > before:
            logger.warning("memory and database differed and were healed", extra={"instances": self.healed - before})

    async def correct(self, instance_id: str, without: Key | None = None) -> None:
        """Replace the state of an instance in memory by the database's, and what waits to be committed on top of it;
        `without` a change that has been settled there. It is read again if it has changed meanwhile; the next
        comparison corrects one that changes all the time. A death in memory stays: it is on its way."""
        members, backlog = self._members, self._backlog
        for _ in range(_READS):
            if instance_id in members.deaths:
                return
            before = members.get(instance_id), backlog.unsettled(instance_id)
            row = await self._database.writable.read_instance(instance_id)
            if members.get(instance_id) is before[0] and backlog.unsettled(instance_id) == before[1]:
                break
        else:
            self.request()
            return
        if row is None:
            members.forget(instance_id)
        else:
            for change in backlog.waiting_of(instance_id, without):
                row = _after(change, row, self._clock.utc())
            members.overwrite(row, self._clock.monotonic())

    def without_dead(self, changes: Sequence[Change]) -> list[Change]:
        """The changes but for the registrations of instances that memory has dead without a death on its way: it is
        known from the database, which may have lost it since, and would begin a second life. They are settled as it
        had answered. A death that is on its way follows the registration into the history."""
        left: list[Change] = []
        for change in changes:
            instance_id = change.instance_id
            if (
                isinstance(change, RegisterChange)
                and instance_id in self._members.deaths
                and not any(map(_is_death, self._backlog.waiting_of(instance_id)))
            ):
                cause = self._members.deaths.cause_of(instance_id)
                self._backlog.settle(change, Outcome(OutcomeKind.DEAD, Status.DEAD, None, cause))
            else:
                left.append(change)
        return left

    async def _compare(self, between_pages: Callable[[], Awaitable[None]]) -> None:
        only_here = {row.instance_id for row in self._members if not self._backlog.unsettled(row.instance_id)}
        after = decode_cursor(None)
        while True:
            page = await self._database.writable.live_states(after, _PAGE)
            for state in page:
                only_here.discard(state.instance_id)
                await self._heal(state)
            if len(page) < _PAGE:
                break
            after = page[-1][:2]
            await between_pages()
        for instance_id in islice(only_here, self._config.sweep_limit):
            if instance_id in self._members and not self._backlog.unsettled(instance_id):
                await self.correct(instance_id)
                self.healed += 1

    async def _heal(self, state: LiveState) -> None:
        members, backlog, instance_id = self._members, self._backlog, state.instance_id
        if backlog.unsettled(instance_id):
            return
        known = members.get(instance_id)
        if known is not None and LiveState.of(known) == state:
            return
        self.healed += 1
        if known is None and instance_id in members.deaths:
            # dead is final, also where a database restored from a backup has forgotten it
            cause = members.deaths.cause_of(instance_id)
            again = Cause(CauseKind.RESTORED, None if cause is None else str(cause))
            backlog.offer_death(StatusChange(instance_id, Status.DEAD, cause=again, number=backlog.next_number()))
        elif known is not None and known.seq > state.seq:
            self._write_again(known, state)
        else:
            await self.correct(instance_id)

    def _write_again(self, known: Instance, state: LiveState) -> None:
        """Send the database the details and the holds that it lost, and what the agent reported. A hold that only the
        database has stays, since it may have been placed there, unless the agent itself releases such a hold."""
        backlog = self._backlog
        backlog.offer(RegisterChange(registration_of(known), state.seq, is_update=True))
        stored = {hold.kind: hold for hold in state.holds}
        for kind in sorted(stored.keys() & AGENTS_KINDS):
            if known.hold(kind) is None:
                released = Cause(CauseKind.RESTORED, "it was released")
                backlog.offer(HoldChange(known.instance_id, kind, None, backlog.next_number(), released))
        for hold in known.holds:
            if not hold.is_same(stored.get(hold.kind)):
                backlog.offer(HoldChange(known.instance_id, hold.kind, hold, backlog.next_number()))
        # the cause that memory has is the last one: of a hold, where there are any
        cause = Cause(CauseKind.RESTORED) if known.holds else known.cause
        # last: with the number of the agent's last change the database has all of it
        backlog.offer(StatusChange(known.instance_id, known.reported_status, known.seq, cause))


def _is_death(change: Change) -> bool:
    return isinstance(change, StatusChange) and change.status is Status.DEAD


def _after(change: Change, row: Instance, at: datetime) -> Instance:
    """The instance after a change, as memory and the database apply it."""
    if isinstance(change, RegisterChange):
        return apply_registration(row, change, at)[1]
    if isinstance(change, StatusChange):
        return apply_status(row, change, at)[1]
    return apply_hold(row, change, at)[1]
