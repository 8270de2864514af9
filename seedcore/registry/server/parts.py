"""A batch that is written in parts where the store refuses some of its values."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from seedcore.core.causes import Cause
from seedcore.core.changes import Change, StatusChange
from seedcore.core.errors import StoreRejectedError
from seedcore.core.ports import StoreDoubtError

T = TypeVar("T")
R = TypeVar("R")


async def in_parts(
    batch: Sequence[T], write: Callable[[Sequence[T]], Awaitable[R]]
) -> AsyncIterator[tuple[Sequence[T], R | StoreRejectedError | StoreDoubtError]]:
    """Write a batch: its parts as they are taken, each with the answer; alone, found by halving, each value that is
    refused, with the refusal."""
    if not batch:
        return
    try:
        answer = await write(batch)
    except (StoreRejectedError, StoreDoubtError) as error:
        if len(batch) == 1:
            yield batch, error
            return
    else:
        yield batch, answer
        return
    middle = len(batch) // 2
    for half in (batch[:middle], batch[middle:]):
        async for part in in_parts(half, write):
            yield part


def in_plain_words(change: Change) -> StatusChange | None:
    """A change of status with no more of its cause than the kind, which can always be stored: it must not be lost for
    the words of its cause. None where it has no such words."""
    if not isinstance(change, StatusChange) or change.cause is None:
        return None
    plain = replace(change, cause=Cause(change.cause.kind))
    return None if plain == change else plain
