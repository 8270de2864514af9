"""The numbered changes of one agent, each kept until it is durable or refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from seedcore.core.answers import Receipt
from seedcore.core.causes import Cause
from seedcore.core.changes import Change, RegisterChange, Registration, StatusChange
from seedcore.core.errors import BacklogFullError
from seedcore.core.lifecycle import Status

MAX_PENDING = 1000


@dataclass(frozen=True, slots=True)
class Wanted:
    """The status that the agent has asked for last (None: none yet), its cause and the number of that change."""

    status: Status | None = None
    cause: Cause | None = None
    seq: int = 0


class PendingChanges:
    """The queue between an agent and the registry. It sends nothing: the client does, in this order."""

    def __init__(self, limit: int = MAX_PENDING) -> None:
        self.wanted = Wanted()
        self.is_refused = False
        """Whether the registration itself was refused: then it has to be queued again."""
        self.seq = 0
        self._limit = limit
        self._changes: list[Change] = []

    def __len__(self) -> int:
        return len(self._changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(tuple(self._changes))

    def register(self, registration: Registration) -> None:
        """Queue a registration. The status stays as it is, or becomes `starting`."""
        if self.wanted.status is None:
            self.wanted = Wanted(Status.STARTING)
        self._changes.append(RegisterChange(registration, self._next_seq()))

    def set_status(self, instance_id: str, status: Status, cause: Cause | None) -> None:
        """Queue a change of status. Raises BacklogFullError."""
        if len(self._changes) >= self._limit:
            raise BacklogFullError(self._limit)
        self.wanted = Wanted(status, cause, self._next_seq())
        self._changes.append(StatusChange(instance_id, status, self.wanted.seq, cause))

    def settle(self, change: Change, receipt: Receipt) -> None:
        """Note the answer to a change: those that are durable leave the queue."""
        if isinstance(change, RegisterChange):
            self.is_refused = False
        if receipt.durable:
            # a registry commits the changes of an instance in order: those before this one are durable too
            self._changes = self._changes[self._changes.index(change) + 1 :]

    def refuse(self, change: Change) -> None:
        """Note a refusal, which sending again does not change: the change leaves the queue, and after a registration
        all others do."""
        if isinstance(change, RegisterChange):
            self.is_refused = True
            self._changes.clear()
        else:
            self._changes.remove(change)

    def clear(self) -> None:
        """Give up what is queued."""
        self._changes.clear()

    def register_again(self, registration: Registration, *, as_new: bool) -> None:
        """Queue a registration and, behind it, what was queued, or else the status that the agent is in.

        As the same instance every change keeps its number: repeated, it must not undo what others have changed since.
        """
        statuses = [change for change in self._changes if isinstance(change, StatusChange)]
        if self.wanted.status is None:
            self.wanted = Wanted(Status.STARTING)
        wanted, instance_id = self.wanted, registration.instance_id
        if not statuses and wanted.status is not None and wanted.status is not Status.STARTING:
            statuses = [StatusChange(instance_id, wanted.status, wanted.seq, wanted.cause)]
        if as_new:
            self.seq = 1
            statuses = [StatusChange(instance_id, change.status, self._next_seq(), change.cause) for change in statuses]
            self.wanted = Wanted(wanted.status, wanted.cause, self.seq)
        first_seq = statuses[0].seq if statuses else None
        self._changes = [RegisterChange(registration, 1 if first_seq is None else first_seq - 1), *statuses]
        # a first beat may come before any change: the next one needs a number of its own
        self.seq = max(self.seq, 1)

    def _next_seq(self) -> int:
        self.seq += 1
        return self.seq
