"""Waiting for what must happen, with a deadline, instead of for time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")


@overload
async def eventually(question: Callable[[], Awaitable[T]], within_s: float = ..., every_s: float = ...) -> T: ...
@overload
async def eventually(question: Callable[[], T], within_s: float = ..., every_s: float = ...) -> T: ...
async def eventually(question: Callable[[], Any], within_s: float = 60.0, every_s: float = 0.05) -> Any:
    """The first true answer to `question`, asked again until it is; fails with its last answer or error."""
    deadline_s = time.monotonic() + within_s
    while True:
        problem: Exception | None = None
        answer: Any = None
        try:
            asked = question()
            answer = (await asked) if inspect.isawaitable(asked) else asked
        except Exception as error:  # noqa: BLE001 - not true yet, whatever it is; the last one is shown
            problem = error
        if answer:
            return answer
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {within_s:g} s; last answer: {answer!r}, last error: {problem!r}")
        await asyncio.sleep(every_s)
