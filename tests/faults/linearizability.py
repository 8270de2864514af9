"""A linearizability checker of Wing and Gong's kind, with the memory of Lowe ("Testing for linearizability", 2017).

A history is linearizable if every operation can be given one moment between its beginning and its end, so that a
sequential model, run through these moments, gives every answer that was given. An operation whose outcome is not known
takes effect at any moment after its beginning, or never.

The search gives a moment to one operation after another, goes back where the model refuses an answer, and never enters
the same pair of (operations that have their moment, state of the model) twice.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)
C = TypeVar("C", bound=Hashable)
C_contra = TypeVar("C_contra", bound=Hashable, contravariant=True)

MAX_VISITED = 500_000


class Model(Protocol[S, C_contra]):
    """One object, used by one caller at a time. States and calls are values."""

    def initial(self) -> S:
        """The state before the first operation."""
        ...

    def after(self, state: S, call: C_contra) -> Iterable[S]:
        """The states that the call may leave; none where the object would not have given its answer."""
        ...


@dataclass(frozen=True, slots=True)
class Operation(Generic[C]):
    """A call with its answer. `ended` None: the outcome is not known."""

    call: C
    began: float
    ended: float | None


@dataclass(frozen=True, slots=True)
class Verdict(Generic[S, C]):
    """`order` is the order found, or, where there is none, the longest that was tried; `state` is the model's after it.
    `stuck` are then the operations of which none could follow."""

    is_linearizable: bool
    order: tuple[C, ...]
    state: S
    stuck: tuple[C, ...] = ()


class UndecidedError(Exception):
    """The search was given up: the history has too many concurrent operations."""


@dataclass(slots=True)
class _Node(Generic[S, C]):
    """A partial order: the operations that have their moment, as bits, and how it was reached."""

    done: int
    state: S
    before: _Node[S, C] | None
    call: C | None

    def calls(self) -> tuple[C, ...]:
        found: list[C] = []
        node: _Node[S, C] | None = self
        while node is not None:
            if node.call is not None:
                found.append(node.call)
            node = node.before
        return tuple(reversed(found))


def check(model: Model[S, C], operations: Iterable[Operation[C]], max_visited: int = MAX_VISITED) -> Verdict[S, C]:
    """Whether a history is linearizable. Raises UndecidedError after `max_visited` partial orders."""
    known = sorted(operations, key=lambda operation: operation.began)
    required = sum(1 << place for place, operation in enumerate(known) if operation.ended is not None)
    start: _Node[S, C] = _Node(0, model.initial(), None, None)
    visited = {(start.done, start.state)}
    deepest, depth = start, 0
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node.done & required == required:
            return Verdict(True, node.calls(), node.state)
        if (node.done & required).bit_count() > depth:
            deepest, depth = node, (node.done & required).bit_count()
        following = list(_following(model, known, node))
        # the one that began first is tried first
        for child in reversed(following):
            key = (child.done, child.state)
            if key not in visited:
                visited.add(key)
                waiting.append(child)
        if len(visited) > max_visited:
            raise UndecidedError(f"more than {max_visited} partial orders of {len(known)} operations")
    stuck = tuple(known[place].call for place in _candidates(known, deepest.done))
    return Verdict(False, deepest.calls(), deepest.state, stuck)


def _following(model: Model[S, C], known: Sequence[Operation[C]], node: _Node[S, C]) -> Iterator[_Node[S, C]]:
    tried: set[C] = set()
    for place in _candidates(known, node.done):
        operation = known[place]
        is_optional = operation.ended is None
        # of two equal calls without an end it does not matter which one has taken effect
        if is_optional and operation.call in tried:
            continue
        if is_optional:
            tried.add(operation.call)
        for state in model.after(node.state, operation.call):
            # without an effect it need not have a moment
            if not is_optional or state != node.state:
                yield _Node(node.done | 1 << place, state, node, operation.call)


def _candidates(known: Sequence[Operation[C]], done: int) -> list[int]:
    """The operations that may be next: none that is left ended before they began."""
    horizon = math.inf
    found = []
    for place, operation in enumerate(known):
        if operation.began > horizon:
            break
        if not done >> place & 1:
            found.append(place)
            if operation.ended is not None:
                horizon = min(horizon, operation.ended)
    return [place for place in found if known[place].began <= horizon]
