"""Shorter calls of the contract's methods, for a connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from seedcore.core.answers import BeatAnswer, InstanceFilter, Listing, Receipt
from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import RegisterChange, Registration, SequencedChange, StatusChange
from seedcore.core.lifecycle import Status
from seedcore.core.limits import check_detail, check_status, check_statuses
from seedcore.registry.protocol.api import RegistryApi


class Shorthands:
    """Calls that build a change or a filter and pass it through its one door, of a class with RegistryApi."""

    async def register(self: RegistryApi, registration: Registration, seq: int = 1) -> Receipt:
        """`take` a registration."""
        return await self.take(SequencedChange(RegisterChange(registration, seq)))

    async def set_status(
        self: RegistryApi,
        instance_id: str,
        status: Status | str,
        seq: int,
        cause: str | None = None,
        *,
        after: str | None = None,
    ) -> Receipt:
        """`take` a change of status, with the agent's number `seq` and its own words for the cause. An operator uses
        `drain`, `undrain` or `deregister`."""
        reported = None if cause is None else Cause(CauseKind.AGENT, check_detail(cause))
        return await self.take(SequencedChange(StatusChange(instance_id, check_status(status), seq, reported), after))

    async def beat(self: RegistryApi, instance_id: str) -> BeatAnswer:
        """Renew one lease."""
        return await self.beat_many([instance_id])

    async def list_active(
        self: RegistryApi,
        statuses: Sequence[Status | str] | None = (Status.ALIVE,),
        organ_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        limit: int = 100,
        cursor: str | None = None,
        *,
        epoch: str | None = None,
        logical_id: str | None = None,
        fresh_only: bool = True,
        endpoint: str | None = None,
    ) -> Listing:
        """A `page` of instances, by default of the current epoch. `statuses` None means every live one."""
        wanted = InstanceFilter(
            statuses=check_statuses(statuses),
            organ_id=organ_id,
            labels=labels if labels is not None else {},
            logical_id=logical_id,
            epoch=epoch,
            fresh_only=fresh_only,
            endpoint=endpoint,
        )
        return await self.page(wanted, limit, cursor)
