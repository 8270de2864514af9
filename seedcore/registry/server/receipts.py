"""Receipts: the answers to changes, when they are committed or when the wait for that is over.

Owns their contents. The backlog has the outcomes, the members the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from seedcore.core.answers import Outcome, OutcomeKind, Receipt
from seedcore.core.changes import Change, HoldChange, RegisterChange, StatusChange
from seedcore.core.errors import (
    EpochLimitError,
    ForbiddenTransitionError,
    InstanceConflictError,
    InstanceDeadError,
    RegistryError,
    RetiredEpochError,
    UnknownInstanceError,
)
from seedcore.core.holds import effective_status
from seedcore.core.instances import Instance
from seedcore.core.lease import BeatRate
from seedcore.core.lifecycle import Status
from seedcore.core.members import Members
from seedcore.registry.server.backlog import Settled, key_of
from seedcore.registry.server.writer import Writer


class Receipts:
    """Makes receipts for one registry."""

    def __init__(self, members: Members, writer: Writer, rate: BeatRate) -> None:
        self._members = members
        self._writer = writer
        self._rate = rate

    async def when_settled(self, taken: Sequence[Change | Receipt | RegistryError]) -> list[Receipt | RegistryError]:
        """The receipts of accepted changes: durable once they are committed, not durable after the bounded wait. A
        refusal of the database is the answer. What is a receipt or an error already stays in its place."""
        waiting = [key_of(one) for one in taken if not isinstance(one, (Receipt, RegistryError))]
        settled = await self._writer.backlog.settled(waiting, self._writer.database.patience_s) if waiting else {}
        return [
            one if isinstance(one, (Receipt, RegistryError)) else self._answer(one, settled.get(key_of(one)))
            for one in taken
        ]

    async def when_one_settled(self, change: Change) -> Receipt:
        """As `when_settled`, of one change. Raises the refusal."""
        (answer,) = await self.when_settled([change])
        if isinstance(answer, RegistryError):
            raise answer
        return answer

    def _answer(self, change: Change, settled: Settled | None) -> Receipt | RegistryError:
        if isinstance(settled, RegistryError):
            return settled
        if settled is not None:
            refused = refusal(change, settled)
            if refused is not None:
                return refused
        known = self._members.get(change.instance_id)
        status = settled.status if settled is not None and settled.status is not None else _wanted(change)
        return self._receipt(
            change.instance_id,
            known.status if known is not None else status,
            change.seq or 0,
            durable=settled is not None,
            epoch=known.cluster_epoch if known is not None else None,
        )

    def of_replay(self, known: Instance, seq: int) -> Receipt:
        """The receipt of a change that the instance has had already."""
        durable = self.is_settled(known.instance_id)
        return self._receipt(known.instance_id, known.status, seq, durable=durable, epoch=known.cluster_epoch or None)

    def is_settled(self, instance_id: str) -> bool:
        """Whether the database has everything that memory has of an instance."""
        return self._writer.database.is_joined and not self._writer.backlog.unsettled(instance_id)

    def _receipt(self, instance_id: str, status: Status, seq: int, *, durable: bool, epoch: str | None) -> Receipt:
        return Receipt(
            instance_id=instance_id,
            status=status,
            seq=seq,
            durable=durable,
            epoch=epoch,
            why=None if durable else (self._writer.problem or "the database is slow"),
            registry=self._members.feed.stream,
            beat_interval_s=self._rate.asked.beat_interval_s,
            lease_s=self._rate.asked.lease_s,
        )


def raise_refusal(change: Change, outcome: Outcome) -> None:
    """Raise the error of an outcome that changed nothing."""
    refused = refusal(change, outcome)
    if refused is not None:
        raise refused


def refusal(change: Change, outcome: Outcome) -> RegistryError | None:
    """The error of an outcome that changed nothing; None for one that is no refusal."""
    instance_id = change.instance_id
    kind = outcome.kind
    if kind is OutcomeKind.APPLIED or kind is OutcomeKind.UNCHANGED:
        return None
    if kind is OutcomeKind.UNKNOWN:
        return UnknownInstanceError(instance_id)
    if kind is OutcomeKind.DEAD:
        return InstanceDeadError(instance_id, outcome.cause)
    if kind is OutcomeKind.FORBIDDEN:
        return ForbiddenTransitionError(instance_id, str(outcome.status), str(_wanted(change)))
    if kind is OutcomeKind.CONFLICT:
        assert isinstance(change, RegisterChange)
        return InstanceConflictError(instance_id, change.registration.logical_id)
    if kind is OutcomeKind.RETIRED_EPOCH:
        return RetiredEpochError(str(outcome.cluster_epoch))
    if kind is OutcomeKind.EPOCH_LIMIT:
        return EpochLimitError(str(outcome.cluster_epoch))
    assert_never(kind)


def _wanted(change: Change) -> Status:
    if isinstance(change, HoldChange):
        return Status.ALIVE if change.hold is None else effective_status(Status.ALIVE, [change.kind])
    if isinstance(change, StatusChange):
        return change.status
    return Status.ALIVE if change.is_alive else Status.STARTING
