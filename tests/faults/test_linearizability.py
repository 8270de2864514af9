"""The checker of linearizability, against histories that are known, and against every order of tiny ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seedcore.core.lifecycle import Status
from tests.faults.history import Step
from tests.faults.instance_model import Change, InstanceModel, Kind
from tests.faults.linearizability import Model, Operation, UndecidedError, check

Write = tuple[str, int]


class Register:
    """A register of one number: ("write", n), ("read", n), and ("add", n), which counts twice if it happens twice."""

    def initial(self) -> int:
        return 0

    def after(self, state: int, call: Write) -> Iterable[int]:
        name, number = call
        if name == "read":
            return (state,) if state == number else ()
        return (number,) if name == "write" else (state + number,)


def op(name: str, number: int, began: float, ended: float | None) -> Operation[Write]:
    return Operation((name, number), began, ended)


LINEARIZABLE = {
    "nothing": [],
    "one after the other": [op("write", 1, 0, 1), op("read", 1, 2, 3), op("write", 2, 4, 5), op("read", 2, 6, 7)],
    "a concurrent read sees the old": [op("write", 1, 0, 4), op("read", 0, 1, 2)],
    "a concurrent read sees the new": [op("write", 1, 0, 4), op("read", 1, 1, 2)],
    "two concurrent writes in the other order": [op("write", 1, 0, 3), op("write", 2, 1, 4), op("read", 1, 5, 6)],
    "an unknown write took effect": [op("write", 1, 0, None), op("read", 1, 5, 6)],
    "an unknown write took no effect": [op("write", 1, 0, None), op("read", 0, 5, 6)],
    "an unknown write took effect late": [op("write", 1, 0, None), op("read", 0, 5, 6), op("read", 1, 7, 8)],
    "of two unknown additions one took effect": [op("add", 1, 0, None), op("add", 1, 0, None), op("read", 1, 2, 3)],
    "of two unknown additions both took effect": [op("add", 1, 0, None), op("add", 1, 0, None), op("read", 2, 2, 3)],
}
NOT_LINEARIZABLE = {
    "lost update": [op("write", 1, 0, 1), op("write", 2, 2, 3), op("read", 1, 4, 5)],
    "stale read": [op("write", 1, 0, 1), op("read", 0, 2, 3)],
    "double apply": [op("add", 1, 0, 1), op("read", 2, 2, 3)],
    "reordered": [op("write", 1, 0, 1), op("write", 2, 2, 3), op("read", 2, 4, 5), op("read", 1, 6, 7)],
    "the new and then the old": [op("write", 1, 0, 9), op("read", 1, 1, 2), op("read", 0, 3, 4)],
    "an unknown write before it began": [op("read", 1, 0, 1), op("write", 1, 2, None)],
    "an unknown write that is undone": [op("write", 1, 0, None), op("read", 1, 1, 2), op("read", 0, 3, 4)],
    "an unknown addition that is applied twice": [op("add", 1, 0, None), op("read", 2, 1, 2)],
}


@pytest.mark.parametrize("history", LINEARIZABLE.values(), ids=LINEARIZABLE.keys())
def test_a_history_with_an_order_is_accepted(history: list[Operation[Write]]) -> None:
    verdict = check(Register(), history)
    assert verdict.is_linearizable
    assert {operation.call for operation in history if operation.ended is not None} <= set(verdict.order)


@pytest.mark.parametrize("history", NOT_LINEARIZABLE.values(), ids=NOT_LINEARIZABLE.keys())
def test_a_history_without_an_order_is_refused(history: list[Operation[Write]]) -> None:
    verdict = check(Register(), history)
    assert not verdict.is_linearizable
    assert verdict.stuck


def test_a_history_with_too_many_orders_is_undecided() -> None:
    history = [op("add", 2**number, 0, 1) for number in range(12)]
    with pytest.raises(UndecidedError):
        check(Register(), [*history, op("read", 1, 2, 3)], max_visited=1000)


def has_an_order(model: Model[int, Write], history: Sequence[Operation[Write]]) -> bool:
    """By the definition: whether some order of all that ended and of some that did not fits the times and the model."""
    optional = [operation for operation in history if operation.ended is None]
    required = [operation for operation in history if operation.ended is not None]
    return any(
        _fits(model, order)
        for count in range(len(optional) + 1)
        for chosen in combinations(optional, count)
        for order in permutations([*required, *chosen])
    )


def _fits(model: Model[int, Write], order: Sequence[Operation[Write]]) -> bool:
    for earlier, later in combinations(order, 2):
        if later.ended is not None and later.ended < earlier.began:
            return False
    states = {model.initial()}
    for operation in order:
        states = {after for state in states for after in model.after(state, operation.call)}
    return bool(states)


OPERATIONS = st.builds(
    lambda name, number, began, length: op(name, number, began, None if length is None else began + length),
    st.sampled_from(["write", "read", "add"]),
    st.integers(0, 2),
    st.integers(0, 6),
    st.none() | st.integers(0, 4),
)


@given(st.lists(OPERATIONS, max_size=5))
def test_the_search_agrees_with_every_order(history: list[Operation[Write]]) -> None:
    assert check(Register(), history).is_linearizable is has_an_order(Register(), history)


# Instances


ROWS = ((1, Status.STARTING), (2, Status.ALIVE), (3, Status.DRAINING))


def model(*rows: tuple[int | None, Status]) -> InstanceModel:
    return InstanceModel(tuple(Step("i", seq, status) for seq, status in rows))


def sent(*ended: float | None) -> list[Operation[Change]]:
    """The calls of ROWS, one after the other; `ended`: when each was acknowledged."""
    kinds = (Kind.REGISTER, Kind.SET_STATUS, Kind.SET_STATUS)
    return [
        Operation(Change(kind, seq, status), 10.0 * place, end)
        for place, (kind, (seq, status), end) in enumerate(zip(kinds, ROWS, ended, strict=True))
    ]


def at_the_end(seq: int | None, status: Status | None) -> Operation[Change]:
    return Operation(Change(Kind.END, seq, status), 99.0, 99.0)


ALL = (1.0, 11.0, 21.0)
DONE = at_the_end(3, Status.DRAINING)
DEATH: Operation[Change] = Operation(Change(Kind.DECIDED, None, Status.DEAD), 0.0, 99.0)
LOOK: Operation[Change] = Operation(Change(Kind.READ, 2, Status.ALIVE), 15.0, 16.0)
LATE_LOOK: Operation[Change] = Operation(Change(Kind.READ, 2, Status.ALIVE), 25.0, 26.0)
REPEATED: Operation[Change] = Operation(Change(Kind.SET_STATUS, 2, Status.ALIVE), 30.0, 31.0)


@pytest.mark.parametrize(
    ("instance", "history"),
    [
        (model(*ROWS), [*sent(*ALL), DONE]),
        (model(*ROWS), [*sent(*ALL), LOOK, REPEATED, DONE]),
        (model(*ROWS), [*sent(1.0, None, None), DONE]),
        (model(*ROWS[:2]), [*sent(1.0, 11.0, None), at_the_end(2, Status.ALIVE)]),
        (model(), [*sent(None, None, None), at_the_end(None, None)]),
        (model(*ROWS, (None, Status.DEAD)), [*sent(*ALL), DEATH, at_the_end(3, Status.DEAD)]),
    ],
    ids=["acknowledged", "looked at, repeated", "unknown, and there", "unknown, and lost", "never there", "died"],
)
def test_a_life_that_the_database_has_is_accepted(instance: InstanceModel, history: list[Operation[Change]]) -> None:
    assert check(instance, history).is_linearizable


@pytest.mark.parametrize(
    ("instance", "history"),
    [
        (model(*ROWS[:2]), [*sent(*ALL), at_the_end(2, Status.ALIVE)]),
        (model(*ROWS, (4, Status.ALIVE)), [*sent(*ALL), at_the_end(4, Status.ALIVE)]),
        (model(*ROWS, ROWS[1]), [*sent(*ALL), REPEATED, at_the_end(2, Status.ALIVE)]),
        (model(ROWS[0], ROWS[2], ROWS[1]), [*sent(*ALL), at_the_end(2, Status.ALIVE)]),
        (model(*ROWS), [*sent(*ALL), LATE_LOOK, DONE]),
        (model(*ROWS), [*sent(*ALL), at_the_end(2, Status.ALIVE)]),
        (model(*ROWS[:2], (None, Status.DEAD), ROWS[2]), [*sent(*ALL), DEATH, DONE]),
    ],
    ids=["lost update", "sent by none", "double apply", "reordered", "stale look", "row goes back", "after death"],
)
def test_a_life_that_the_database_lost_or_made_up_is_refused(
    instance: InstanceModel, history: list[Operation[Change]]
) -> None:
    assert not check(instance, history).is_linearizable
