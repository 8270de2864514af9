"""What operators do to instances: they drain, undrain and deregister them.

Owns the operator's hold. A drain places it and an undrain releases it, whatever the agent reports meanwhile; only a
deregistration ends an instance.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeAlias

from seedcore.core.answers import NotResolved, OutcomeKind, Receipt
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import HoldChange, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.errors import InvalidInputError, NotResolvableError, RegistryError
from seedcore.core.holds import Hold, HoldKind
from seedcore.core.instances import Instance
from seedcore.core.lease import BeatRate
from seedcore.core.lifecycle import Status
from seedcore.core.limits import (
    MAX_ID_CHARS,
    MAX_PAGE,
    check_duration_s,
    check_instance_id,
    check_key,
    check_reason,
    check_text,
)
from seedcore.core.members import Members
from seedcore.registry.protocol.messages import Hello, OperationResult
from seedcore.registry.server.config import RegistryConfig
from seedcore.registry.server.expiry import Expiry
from seedcore.registry.server.queries import Queries
from seedcore.registry.server.receipts import Receipts, raise_refusal
from seedcore.registry.server.writer import Writer

Operated: TypeAlias = HoldChange | StatusChange


class Operations(Queries):
    """The operators' side of the registry."""

    def __init__(
        self,
        config: RegistryConfig,
        clock: Clock,
        members: Members,
        writer: Writer,
        expiry: Expiry,
        rate: BeatRate,
        hello: Hello,
    ) -> None:
        super().__init__(config, clock, members, writer, expiry, rate, hello)
        self._receipts = Receipts(members, writer, rate)

    async def drain(
        self,
        logical_ids: Sequence[str] = (),
        reason: str | None = None,
        by: str | None = None,
        duration_s: float | None = None,
        *,
        instance_ids: Sequence[str] = (),
    ) -> list[OperationResult]:
        """See RegistryApi.drain."""
        cause = _operators_cause(reason, by)
        now = self._clock.utc()
        expires_at = None if duration_s is None else now + timedelta(seconds=check_duration_s(duration_s))
        hold = Hold(HoldKind.OPERATOR, cause.detail, cause.by, now, expires_at)

        def place(instance_id: str, number: int) -> Operated:
            return HoldChange(instance_id, hold.kind, hold, number)

        return await self._operate(place, logical_ids, instance_ids)

    async def undrain(
        self,
        logical_ids: Sequence[str] = (),
        reason: str | None = None,
        by: str | None = None,
        *,
        instance_ids: Sequence[str] = (),
    ) -> list[OperationResult]:
        """See RegistryApi.undrain."""
        cause = _operators_cause(reason, by)

        def release(instance_id: str, number: int) -> Operated:
            return HoldChange(instance_id, HoldKind.OPERATOR, None, number, cause)

        return await self._operate(release, logical_ids, instance_ids)

    async def deregister(
        self,
        logical_ids: Sequence[str] = (),
        reason: str | None = None,
        by: str | None = None,
        *,
        instance_ids: Sequence[str] = (),
    ) -> list[OperationResult]:
        """See RegistryApi.deregister."""
        cause = _operators_cause(reason, by)

        def end(instance_id: str, number: int) -> Operated:
            return StatusChange(instance_id, Status.DEAD, None, cause, number)

        return await self._operate(end, logical_ids, instance_ids)

    async def _operate(
        self, make: Callable[[str, int], Operated], logical_ids: Sequence[str], instance_ids: Sequence[str]
    ) -> list[OperationResult]:
        """Make a change, of an instance id and a number, of each of these instances. It waits until the database has
        been read: the holds that it has count, too."""
        for name, ids in (("logical_ids", logical_ids), ("instance_ids", instance_ids)):
            if not isinstance(ids, (list, tuple)) or len(ids) > MAX_PAGE:
                raise InvalidInputError(name, f"must be a list of at most {MAX_PAGE} ids")
        for logical_id in logical_ids:
            check_key("logical_id", logical_id)
        for instance_id in instance_ids:
            check_instance_id(instance_id)
        await self.writer.require_read()
        rows = {logical_id: self.members.instances_of(logical_id) for logical_id in logical_ids}
        results = [
            OperationResult(
                None,
                logical_id,
                error=NotResolvableError(logical_id, NotResolved.NOT_REGISTERED, "no live instance is registered"),
            )
            for logical_id, found in rows.items()
            if not found
        ]
        wanted = [row.instance_id for found in rows.values() for row in found]
        operated = (self._operated(make, one) for one in dict.fromkeys([*wanted, *instance_ids]))
        return results + await asyncio.gather(*operated)

    async def _operated(self, make: Callable[[str, int], Operated], instance_id: str) -> OperationResult:
        # numbered only now: changes are committed in the order of their numbers
        change = make(instance_id, self.writer.backlog.next_number())
        known = self.members.get(instance_id)
        logical_id = None if known is None else known.logical_id
        try:
            receipt = await self._changed(change)
        except RegistryError as error:
            return OperationResult(instance_id, logical_id, error=error)
        why = receipt.why
        known = self.members.get(instance_id)
        if receipt.durable and isinstance(change, HoldChange) and change.hold is None and known is not None:
            why = _why_not_alive(known)
        return OperationResult(instance_id, logical_id, receipt.status, receipt.durable, why)

    async def _changed(self, change: Operated) -> Receipt:
        backlog, at = self.writer.backlog, self._clock.utc()
        backlog.require_room()
        if isinstance(change, HoldChange):
            outcome = self.members.hold(change, at)
        else:
            outcome = self.members.set_status(change, self._clock.monotonic(), at)
        raise_refusal(change, outcome)
        known = self.members.get(change.instance_id)
        is_settled = self._receipts.is_settled(change.instance_id)
        if outcome.kind is OutcomeKind.UNCHANGED and known is not None and is_settled:
            return self._receipts.of_replay(known, known.seq)
        # also one that changes nothing here: it is committed after those that wait, or the database knows more
        backlog.offer(change)
        return await self._receipts.when_one_settled(change)


def _operators_cause(reason: str | None, by: str | None) -> Cause:
    return Cause(CauseKind.OPERATOR, check_reason(reason), None if by is None else check_text("by", by, MAX_ID_CHARS))


def _why_not_alive(known: Instance) -> str | None:
    """Why an instance is not alive after the operator's hold on it was released."""
    if known.status is Status.ALIVE:
        return None
    if known.reported_status is Status.DRAINING:
        return "the agent itself reports draining, until it reports alive"
    if known.reported_status is Status.STARTING:
        return "the agent has not reported alive yet"
    return "it has other holds: " + ", ".join(hold.kind.value for hold in known.holds)
