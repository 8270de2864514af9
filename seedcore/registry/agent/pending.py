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
        # the number of the last registration with other details; 0: there is none
        self._details_seq = 0

    def __len__(self) -> int:
        return len(self._changes)

    def __contains__(self, change: object) -> bool:
        return change in self._changes

    def __iter__(self) -> Iterator[Change]:
        return iter(tuple(self._changes))

    def register(self, registration: Registration) -> None:
        """Queue a registration. The status stays as it is, or becomes `starting`."""
        if self.wanted.status is None:
            self.wanted = Wanted(Status.STARTING)
        self._changes.append(RegisterChange(registration, self._next_seq()))

    def change_details(self, registration: Registration) -> Change:
        """Queue a registration with other details, behind all changes. It replaces one that is last in the queue, since
        it has all details. Returns the change. Raises BacklogFullError."""
        last = self._changes[-1] if self._changes else None
        if not isinstance(last, RegisterChange) and len(self._changes) >= self._limit:
            raise BacklogFullError(self._limit)
        is_update = True
        if isinstance(last, RegisterChange):
            is_update = last.is_update
            self._changes.pop()
        self._details_seq = self._next_seq()
        self._changes.append(RegisterChange(registration, self._details_seq, is_update=is_update))
        return self._changes[-1]

    @property
    def has_predecessor(self) -> bool:
        """Whether the first change in the queue may only follow those before it. Each change of a status says all that
        the one before it said, until the details change, too: then a registry that lacks the last of either kind would
        take the number of the other for both."""
        first = self._changes[0] if self._changes else None
        return self._details_seq > 0 and not (isinstance(first, RegisterChange) and not first.is_update)

    def before_first(self, registration: Registration) -> list[Change]:
        """The last status and the last registration with other details, if they come before the first change in the
        queue."""
        first = self._changes[0] if self._changes else None
        if not isinstance(first, (RegisterChange, StatusChange)) or first.seq is None:
            return []
        wanted = self.wanted
        known: dict[int, Change] = {self._details_seq: RegisterChange(registration, self._details_seq, is_update=True)}
        if wanted.status is not None:
            known[wanted.seq] = StatusChange(registration.instance_id, wanted.status, wanted.seq, wanted.cause)
        return [known[seq] for seq in sorted(known) if 0 < seq < first.seq]

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
        """Note a refusal, which sending again does not change: the change leaves the queue, and after the first
        registration all others do."""
        if isinstance(change, RegisterChange) and not change.is_update:
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
        So the last details are also sent under their own number if that is higher: a database that the registry has not
        read yet may have the instance with earlier ones.
        """
        updates = {change.seq for change in self._changes if isinstance(change, RegisterChange)} | {self._details_seq}
        statuses = [change for change in self._changes if isinstance(change, StatusChange)]
        if self.wanted.status is None:
            self.wanted = Wanted(Status.STARTING)
        wanted, instance_id = self.wanted, registration.instance_id
        if not statuses and wanted.status is not None and wanted.status is not Status.STARTING:
            statuses = [StatusChange(instance_id, wanted.status, wanted.seq, wanted.cause)]
        if as_new:
            self.seq = 1
            statuses = [StatusChange(instance_id, change.status, self._next_seq(), change.cause) for change in statuses]
            self.wanted, updates = Wanted(wanted.status, wanted.cause, self.seq), set()
            self._details_seq = 0
        numbered = {change.seq: change for change in statuses if change.seq is not None}
        first_seq = min(numbered) - 1 if numbered else max({1, *updates})
        later = {seq: RegisterChange(registration, seq, is_update=True) for seq in updates if seq > first_seq}
        behind: dict[int, Change] = {**numbered, **later}
        self._changes = [RegisterChange(registration, first_seq), *(behind[seq] for seq in sorted(behind))]
        # a first beat may come before any change: the next one needs a number of its own
        self.seq = max(self.seq, 1)

    def _next_seq(self) -> int:
        self.seq += 1
        return self.seq
