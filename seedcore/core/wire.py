"""Values that are sent between processes of different versions of this package.

They are pickled in the order of their fields. So fields are only appended, each with a default that keeps the previous
behaviour. A receiver drops fields that it does not know, and uses the defaults of fields that it did not receive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from operator import attrgetter
from typing import Any, TypeVar

T = TypeVar("T")


def wire(cls: type[T]) -> type[T]:
    """Make a frozen dataclass with slots readable by older and newer versions of itself."""
    members = fields(cls)  # type: ignore[arg-type]
    setters = list(setters_of(cls).values())
    # of one name, attrgetter returns no tuple
    values = attrgetter(*(member.name for member in members), "__class__")

    def __getstate__(self: Any) -> tuple[Any, ...]:
        return values(self)[:-1]

    def __setstate__(self: Any, state: Sequence[Any]) -> None:
        for put, value in zip(setters, state, strict=False):
            put(self, value)
        for member in members[len(state) :]:
            object.__setattr__(self, member.name, default_of(cls, member))

    for method in (__getstate__, __setstate__):
        setattr(cls, method.__name__, method)
    return cls


def setters_of(cls: type) -> dict[str, Callable[[Any, Any], None]]:
    """What sets each field of a frozen dataclass with slots, which refuses its own attributes: their descriptors."""
    return {member.name: getattr(cls, member.name).__set__ for member in fields(cls)}


def default_of(cls: type, member: Field[Any]) -> Any:
    """The value of a field that was not sent. Raises TypeError where it has no default."""
    value = member.default if member.default_factory is MISSING else member.default_factory()
    if value is MISSING:
        raise TypeError(f"{cls.__name__}.{member.name} was not sent and has no default")
    return value
