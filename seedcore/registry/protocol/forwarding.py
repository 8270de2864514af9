"""Methods of a connection that call the methods of the contract, with their rules and types."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

from seedcore.registry.protocol.api import rules_of

P = ParamSpec("P")
R = TypeVar("R")


def forwarded(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]:
    """The method of a connection that calls this method of the contract, by its rules and with its types."""
    rules = rules_of(method)

    @functools.wraps(method)
    async def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        answer: R = await self._call(rules, *args, **kwargs)
        return answer

    return call
