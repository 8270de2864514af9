"""The numbered changes of one agent, each kept until it is durable or refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from seedcore.core.answers import Receipt
from seedcore.core.causes import Cause
from seedcore.core.changes import Change, HoldChange, RegisterChange, Registration, StatusChange
from seedcore.core.errors import BacklogFullError
from seedcore.core.holds import HoldKind
from seedcore.core.lifecycle import Status

MAX_PENDING = 1000


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the agent has asked for last: the status (None: none yet), its cause and the number of that change; and by
    kind the last change of a hold, whose number is None before the registration."""

    status: Status | None = None
    cause: Cause | None = None
    seq: int = 0
    holds: Mapping[HoldKind, HoldChange] = field(default_factory=dict)

    def with_hold(self, change: HoldChange) -> Wanted:
        """The same, with this last change of a hold."""
        return replace(self, holds={**self.holds, change.kind: change})


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
        """Queue a registration. The status stays as it is, or becomes `starting`; behind the first registration come
        the holds from before it."""
        is_first = self.wanted.status is None
        self._changes.append(RegisterChange(registration, self._next_seq()))
        if is_first:
            self.wanted = replace(self.wanted, status=Status.STARTING)
            for change in self.wanted.holds.values():
                self._put_hold(replace(change, instance_id=registration.instance_id))

    def register_alive(self, registration: Registration) -> Change:
        """Queue a first registration that is alive at once. Returns it."""
        self.seq += 2
        self.wanted = replace(self.wanted, status=Status.ALIVE, cause=None, seq=self.seq)
        self._changes.append(RegisterChange(registration, self.seq, is_alive=True))
        return self._changes[-1]

    def require_room(self, count: int) -> None:
        """Raise BacklogFullError unless so many more changes fit."""
        if len(self._changes) + count > self._limit:
            raise BacklogFullError(self._limit)

    @property
    def is_to_register(self) -> bool:
        """Whether a registration is queued, and not only other details."""
        return any(isinstance(change, RegisterChange) and not change.is_update for change in self._changes)

    def change_details(self, registration: Registration) -> Change:
        """Queue a registration with other details, behind all changes. Registrations that are queued get them, too; one
        that is last is replaced. Returns the change. Raises BacklogFullError."""
        last = self._changes[-1] if self._changes else None
        if isinstance(last, RegisterChange) and last.is_alive:
            # its number is that of the status, too
            last = None
        if not isinstance(last, RegisterChange):
            self.require_room(1)
        self._changes = [
            replace(change, registration=registration) if isinstance(change, RegisterChange) else change
            for change in self._changes
        ]
        is_update = True
        if isinstance(last, RegisterChange):
            is_update = last.is_update
            self._changes.pop()
        self._details_seq = self._next_seq()
        self._changes.append(RegisterChange(registration, self._details_seq, is_update=is_update))
        return self._changes[-1]

    def set_status(self, instance_id: str, status: Status, cause: Cause | None) -> Change:
        """Queue a change of status. Returns it. Raises BacklogFullError."""
        self.require_room(1)
        self.wanted = replace(self.wanted, status=status, cause=cause, seq=self._next_seq())
        self._changes.append(StatusChange(instance_id, status, self.wanted.seq, cause))
        return self._changes[-1]

    def hold(self, change: HoldChange) -> HoldChange:
        """Queue a change of a hold, which gets its number here; before the registration only keep it. Returns it.
        Raises BacklogFullError."""
        if self.wanted.status is None:
            self.wanted = self.wanted.with_hold(change)
            return change
        self.require_room(1)
        return self._put_hold(change)

    def _put_hold(self, change: HoldChange) -> HoldChange:
        numbered = replace(change, seq=self._next_seq())
        self.wanted = self.wanted.with_hold(numbered)
        self._changes.append(numbered)
        return numbered

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

    def repeat(self, registration: Registration) -> None:
        """Queue the last changes again, in the order of their numbers: a database may have lost those that were
        durable, and a later number would hide that."""
        if self.wanted.status is None or self.is_refused:
            return
        queued = self._registrations()
        changes: list[Change] = [*queued, *self._last_changes(registration.instance_id)]
        if self._details_seq and self._details_seq not in {change.seq for change in queued}:
            changes.append(RegisterChange(registration, self._details_seq, is_update=True))
        self._changes = sorted(changes, key=lambda change: change.seq or 0)

    def register_again(self, registration: Registration, *, as_new: bool) -> None:
        """Queue a registration and, behind it in the order of their numbers, what was queued, and the status and the
        holds that the agent asked for last where they were not.

        As the same instance every change keeps its number: repeated, it must not undo what others have changed since.
        So the last details are also sent under their own number if that is higher: a database that the registry has not
        read yet may have the instance with earlier ones.
        """
        if self.wanted.status is None:
            # a first beat may come before any change
            self.register(registration)
            return
        changes = self._last_changes(registration.instance_id)
        updates = {change.seq for change in self._registrations()} | {self._details_seq}
        if as_new:
            changes, updates = self._as_of_new(changes), set()
            self._details_seq = 0
        first_seq = (changes[0].seq or 1) - 1 if changes else max({1, *updates})
        later = [RegisterChange(registration, seq, is_update=True) for seq in updates if seq > first_seq]
        behind: list[Change] = sorted([*changes, *later], key=lambda change: change.seq or 0)
        self._changes = [RegisterChange(registration, first_seq), *behind]
        self.seq = max(self.seq, first_seq, *(change.seq or 0 for change in behind))

    def _registrations(self) -> list[RegisterChange]:
        """Those that are queued, without the status that one may have."""
        return [change.alone() for change in self._changes if isinstance(change, RegisterChange)]

    def _last_changes(self, instance_id: str) -> list[StatusChange | HoldChange]:
        """What is queued but for registrations, and the last status and holds, each once, by their numbers."""
        wanted = self.wanted
        changes = {change.seq: change for change in self._changes if not isinstance(change, RegisterChange)}
        if wanted.status is not None and wanted.status is not Status.STARTING:
            changes.setdefault(wanted.seq, StatusChange(instance_id, wanted.status, wanted.seq, wanted.cause))
        for change in wanted.holds.values():
            changes.setdefault(change.seq, change)
        last = sorted(changes.values(), key=lambda change: change.seq or 0)
        return [replace(change, instance_id=instance_id) for change in last]

    def _as_of_new(self, changes: list[StatusChange | HoldChange]) -> list[StatusChange | HoldChange]:
        """The changes of an instance as those of a new one. The holds that it still has come first, so that it is never
        alive without them."""
        self.seq = 1
        last = {change.seq for change in self.wanted.holds.values() if change.hold is not None}
        kept = [change for change in changes if isinstance(change, HoldChange) and change.seq in last]
        holds = [replace(change, seq=self._next_seq()) for change in kept]
        statuses = [replace(change, seq=self._next_seq()) for change in changes if isinstance(change, StatusChange)]
        self.wanted = replace(self.wanted, seq=self.seq, holds={change.kind: change for change in holds})
        return [*holds, *statuses]

    def _next_seq(self) -> int:
        self.seq += 1
        return self.seq
