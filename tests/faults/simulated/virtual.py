"""An event loop whose time passes only when nothing is left to do, and whose components can hang or die.

A component is everything that runs under one value of COMPONENT. A frozen one does nothing until it thaws, as a
stopped process; a dead one does nothing any more, without any clean-up, as a killed one.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

COMPONENT: contextvars.ContextVar[str] = contextvars.ContextVar("component", default="world")
_INSTANT_S = 1e-9


class _Selector(selectors.SelectSelector):
    """Waits for nothing: what it was asked to wait, it adds to the loop's time, and at least an instant, as any clock
    would: a wait too short for a float to add would never end."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("every task waits, and no timer is set")
        self.loop.now_s += max(_INSTANT_S, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module. `now_s` may be moved forward by hand: then the whole world was paused."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.loop = self
        self.now_s = 0.0
        self._thaws_s: dict[str, float] = {}
        self._dead: set[str] = set()
        self._serial = 0
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s

    def freeze(self, component: str, seconds: float) -> None:
        """Stop a component for so long."""
        self._thaws_s[component] = max(self._thaws_s.get(component, 0.0), self.now_s + seconds)

    def kill(self, component: str) -> None:
        """End a component, as SIGKILL would."""
        self._dead.add(component)

    def run_in(self, component: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start work as a part of a component."""
        context = contextvars.copy_context()
        context.run(COMPONENT.set, component)
        return context.run(self.create_task, work)

    def close(self) -> None:
        """End what is left, of the dead too."""
        self._dead.clear()
        self._thaws_s.clear()
        self.set_exception_handler(lambda *_: None)
        for _ in range(20):
            for task in asyncio.all_tasks(self):
                task.cancel()
            self.call_soon(self.stop)
            self.run_forever()
        for task in asyncio.all_tasks(self):
            # it waits for a step that died with its component; the handler above drops asyncio's report of it
            with contextlib.suppress(RuntimeError):
                task.get_coro().close()
        super().close()

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        if not self._dead and not self._thaws_s:
            return super().call_soon(callback, *args, context=context)
        component = COMPONENT.get() if context is None else context.get(COMPONENT, "world")
        if component in self._dead:
            handle = asyncio.Handle(callback, args, self, context)
            handle.cancel()
            return handle
        thaws_s = self._thaws_s.get(component, 0.0)
        if thaws_s > self.now_s:
            return self._delay(thaws_s, self._next_place(), component, [], callback, args, context)
        return super().call_soon(callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        component = COMPONENT.get() if context is None else context.get(COMPONENT, "world")
        cell: list[asyncio.TimerHandle] = []
        handle = super().call_at(when, self._fire, None, component, cell, callback, args, context=context)
        cell.append(handle)
        return handle

    def _fire(
        self,
        place: int | None,
        component: str,
        cell: list[asyncio.TimerHandle],
        callback: Callable[..., object],
        args: tuple[Any, ...],
    ) -> None:
        if component in self._dead or cell[0].cancelled():
            return
        thaws_s = self._thaws_s.get(component, 0.0)
        if thaws_s > self.now_s:
            self._delay(thaws_s, self._next_place() if place is None else place, component, cell, callback, args, None)
        else:
            callback(*args)

    def _next_place(self) -> int:
        self._serial += 1
        return self._serial

    def _delay(
        self,
        thaws_s: float,
        place: int,
        component: str,
        cell: list[asyncio.TimerHandle],
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context | None,
    ) -> asyncio.TimerHandle:
        """Call it when the component goes on, in its place: also where that is put off again."""
        when_s = thaws_s + place * _INSTANT_S
        handle = super().call_at(when_s, self._fire, place, component, cell, callback, args, context=context)
        if not cell:
            cell.append(handle)
        return handle
