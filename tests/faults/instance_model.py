"""An instance as a sequential object, with the database's history as its final word, and the check of a whole history.

The object is small: a status, the number of the agent's last change, and how much of the database's history has
happened. A register or set_status that changes the status must be the next row of that history; one that was sent
before, or that asks for the status that there is, leaves no row. At the end all of the history must have happened. So a
change that was acknowledged and is not in it, one that is in it twice, in another order than it was acknowledged in, or
that no client made, has no place.

Objects are checked one by one: a history is linearizable if that of each of its objects is (Herlihy and Wing, 1990).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from seedcore.core.lifecycle import Status, is_allowed
from tests.faults.history import Call, History, Outcome, Seen, Source, Step
from tests.faults.linearizability import Operation, check


class Kind(StrEnum):
    """What happens to an instance."""

    REGISTER = "register"
    SET_STATUS = "set_status"
    READ = "read"
    """The tables show it with this status and number; None: they do not have it."""
    DECIDED = "decided"
    """A change that the agent did not send: a death that the registry declared."""
    END = "end"
    """The run is over: the history is complete, and the row is as its last change left it."""


@dataclass(frozen=True, slots=True)
class Change:
    """One call of the object."""

    kind: Kind
    seq: int | None = None
    status: Status | None = None

    def __str__(self) -> str:
        return f"{self.kind}({self.seq}, {self.status})"


@dataclass(frozen=True, slots=True)
class State:
    """`status` None: it is not registered. `happened` rows of the database's history have happened; `numbers` are those
    of the agent's changes that have."""

    status: Status | None = None
    seq: int = 0
    happened: int = 0
    numbers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class InstanceModel:
    """Implements linearizability.Model. `rows` is the database's history of the instance since `before`."""

    rows: tuple[Step, ...]
    before: State = State()

    def initial(self) -> State:
        """As the run found it."""
        return self.before

    def after(self, state: State, call: Change) -> Iterable[State]:
        """At most one state: the object leaves no choice."""
        following = self._following(state, call)
        return () if following is None else (following,)

    def _following(self, state: State, call: Change) -> State | None:
        if call.kind is Kind.READ:
            return state if (state.status, state.seq) == (call.status, call.seq or 0) else None
        if call.kind is Kind.END:
            is_whole = state.happened == len(self.rows)
            return state if is_whole and (state.status, state.seq) == (call.status, call.seq or 0) else None
        assert call.status is not None
        if call.kind is Kind.DECIDED:
            return self._with_row(state, None, call.status)
        assert call.seq is not None
        if call.kind is Kind.REGISTER:
            return self._registered(state, call.seq, call.status)
        return self._changed(state, call.seq, call.status)

    def _registered(self, state: State, seq: int, status: Status) -> State | None:
        if state.status is None:
            return self._with_row(state, seq, status)
        if state.status is Status.DEAD:
            return None
        if status is Status.ALIVE and seq > state.seq:
            return self._changed(state, seq, status)
        return State(state.status, max(state.seq, seq), state.happened, state.numbers | {seq})

    def _changed(self, state: State, seq: int, wanted: Status) -> State | None:
        if state.status is None:
            return None
        if seq <= state.seq:
            # it was sent before, or the run began after it: then the number is not known here
            was_there = seq in state.numbers or seq <= self.before.seq
            return state if was_there else None
        if state.status is wanted:
            return State(state.status, seq, state.happened, state.numbers | {seq})
        return self._with_row(state, seq, wanted) if is_allowed(state.status, wanted) else None

    def _with_row(self, state: State, seq: int | None, status: Status) -> State | None:
        """The change is the next row of the history, or did not happen here."""
        if state.happened == len(self.rows) or state.status is Status.DEAD:
            return None
        row = self.rows[state.happened]
        if (row.seq, row.status) != (seq, status):
            return None
        if seq is None:
            return State(status, state.seq, state.happened + 1, state.numbers)
        return State(status, seq, state.happened + 1, state.numbers | {seq})


@dataclass(frozen=True, slots=True)
class Checked:
    """What was checked of a history: so many instances, with so many operations. `skipped` have holds, which the model
    does not know."""

    violations: tuple[str, ...]
    instances: int
    operations: int
    skipped: int = 0


def check_instances(history: History) -> Checked:
    """Check every instance of a history."""
    calls: dict[str, list[Call]] = defaultdict(list)
    for call in history.calls:
        if call.is_write and call.instance_id is not None:
            calls[call.instance_id].append(call)
    looks = [call for call in history.calls if call.source is Source.DATABASE and call.outcome is Outcome.ANSWERED]
    steps: dict[str, list[Step]] = defaultdict(list)
    for step in history.steps:
        steps[step.instance_id].append(step)
    before = {seen.instance_id: seen for seen in history.before}
    after = {seen.instance_id: seen for seen in history.after}
    found: list[str] = []
    operations = skipped = 0
    instance_ids = sorted({*calls, *steps, *before, *after})
    for instance_id in instance_ids:
        rows = steps[instance_id]
        if any(step.is_hold for step in rows):
            skipped += 1
            continue
        model = InstanceModel(tuple(rows), _state_of(before.get(instance_id)))
        known = [
            *_writes(calls[instance_id], refusals_are_final=history.refusals_are_final),
            *_reads(instance_id, looks),
            *(
                Operation(Change(Kind.DECIDED, None, step.status), history.began_s, history.ended_s)
                for step in rows
                if step.seq is None
            ),
            _end(after.get(instance_id), history),
        ]
        operations += len(known)
        verdict = check(model, known)
        if not verdict.is_linearizable:
            stuck = ", ".join(map(str, dict.fromkeys(verdict.stuck)))
            found.append(
                f"instance {instance_id} is not linearizable: after {' '.join(map(str, verdict.order)) or 'nothing'} "
                f"none of {stuck} is possible; the database has {_text(rows)}"
            )
    return Checked(tuple(found), len(instance_ids), operations, skipped)


def _state_of(seen: Seen | None) -> State:
    return State() if seen is None else State(seen.status, seen.seq or 0)


def _writes(calls: Sequence[Call], *, refusals_are_final: bool) -> Iterable[Operation[Change]]:
    for call in calls:
        if call.outcome is Outcome.REFUSED and refusals_are_final:
            continue
        change = Change(Kind(call.name), call.seq, call.status)
        yield Operation(change, call.began_s, call.ended_s if call.is_durable else None)


def _reads(instance_id: str, looks: Sequence[Call]) -> Iterable[Operation[Change]]:
    """The looks into the tables. One that lists all and does not show it shows that it is not there."""
    for look in looks:
        seen = next((seen for seen in look.seen if seen.instance_id == instance_id), None)
        if seen is not None:
            yield Operation(Change(Kind.READ, seen.seq, seen.status), look.began_s, look.ended_s)
        elif look.lists_all:
            yield Operation(Change(Kind.READ), look.began_s, look.ended_s)


def _end(seen: Seen | None, history: History) -> Operation[Change]:
    change = Change(Kind.END) if seen is None else Change(Kind.END, seen.seq, seen.status)
    return Operation(change, history.ended_s, history.ended_s)


def _text(rows: Sequence[Step]) -> str:
    return " ".join(f"({row.seq}, {row.status})" for row in rows) or "no row"
