"""Owns what a database that lost commits has to get of one instance: the difference between what memory has of it and
what the database has. Memory wins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from seedcore.core.causes import Cause, CauseKind
from seedcore.core.changes import Change, HoldChange, RegisterChange, Registration, StatusChange
from seedcore.core.clock import Clock
from seedcore.core.holds import AGENTS_KINDS, Hold
from seedcore.core.instances import Instance, LiveState
from seedcore.core.lifecycle import Status
from seedcore.core.members import Members
from seedcore.registry.server.backlog import Backlog


class Remembered:
    """What memory has. `has_whole_history`: the journal had every lost commit, and they are written again."""

    def __init__(self, members: Members, backlog: Backlog, clock: Clock, *, has_whole_history: bool) -> None:
        self._members = members
        self._backlog = backlog
        self._clock = clock
        self._has_whole_history = has_whole_history

    def differences(self, state: LiveState) -> Iterator[Change]:
        """What the database has to get of an instance that it has."""
        instance_id, number = state.instance_id, self._backlog.next_number
        known = self._members.get(instance_id)
        if known is None:
            if instance_id in self._members.deaths:
                yield StatusChange(instance_id, Status.DEAD, None, self._members.deaths.cause_of(instance_id), number())
            return
        # also where a change is under way: it may not be the one that is lost, and it counts once
        if LiveState.of(known) == state:
            return
        # the agent may have told another registry more since
        is_new, is_old = known.seq > state.seq, known.seq < state.seq
        if is_new or (not is_old and not state.has_details_of(known)):
            # the last change that is lost may be a registration with other details
            yield RegisterChange(registration_of(known), state.seq, is_update=True)
        yield from self._holds_again(known, state.holds, is_new=is_new, is_old=is_old)
        if is_new or (not is_old and known.reported_status is not state.reported_status):
            yield StatusChange(
                instance_id,
                known.reported_status,
                known.seq if is_new else None,
                _cause_of(known),
                None if is_new else number(),
            )

    def registered_again(self, known: Instance) -> Iterator[Change]:
        """What the database has to get of an instance that it does not have."""
        age_s = max(0.0, (self._clock.utc() - known.started_at).total_seconds())
        yield RegisterChange(registration_of(known), 0, age_s)
        if known.reported_status is not Status.STARTING or known.seq > 0:
            # one that reports in SQL has no number of its own
            number = None if known.seq else self._backlog.next_number()
            yield StatusChange(known.instance_id, known.reported_status, known.seq or None, _cause_of(known), number)
        yield from self._holds_again(known, (), is_new=True)

    def _holds_again(
        self, known: Instance, stored: Sequence[Hold], *, is_new: bool, is_old: bool = False
    ) -> Iterator[Change]:
        """`is_new`: the agent has reported something that the database does not have. `is_old`: the other way round, so
        that the holds which the agent decides are right there."""
        theirs = AGENTS_KINDS if is_old else frozenset()
        has = {hold.kind: hold for hold in stored if hold.kind not in theirs}
        for hold in known.holds:
            if hold.kind in theirs:
                continue
            if not hold.is_same(has.pop(hold.kind, None)):
                yield HoldChange(known.instance_id, hold.kind, hold, self._backlog.next_number())
        for kind in has:
            # with a whole journal a lost release is made again, and what is left was placed in SQL since: it stays. But
            # the agent's own release may be under way, and its number is written here
            if self._has_whole_history and not (is_new and kind in AGENTS_KINDS):
                continue
            yield HoldChange(
                known.instance_id, kind, None, self._backlog.next_number(), Cause(CauseKind.RESTORED, "it was released")
            )


def _cause_of(known: Instance) -> Cause | None:
    # the cause that memory has is the last one: of a hold, where there are any
    return Cause(CauseKind.RESTORED) if known.holds else known.cause


def registration_of(known: Instance) -> Registration:
    """The registration that makes an instance as it is known."""
    details: dict[str, Any] = {field.name: getattr(known, field.name, None) for field in fields(Registration)}
    return Registration(**details)
