"""A subclass of RayAgent that could not work is refused when it is made, in one line that says what to write."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest

from seedcore.agents import RayAgent
from seedcore.core.errors import InvalidInputError
from seedcore.settings import Settings
from tests.loops import another_loop
from tests.waiting import eventually

SETTINGS = Settings(registry_enabled=False)


def sync(self: Any, *_: Any) -> None:
    """Not async."""


async def no_task(self: Any) -> None:
    """Takes no task."""


async def wants_more(self: Any, one: int, two: int, three: int) -> None:
    """Takes more than it is given."""


async def yields(self: Any, task: Any) -> Any:
    yield task


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"handle_task": sync}, "Mine.handle_task: is not async; write `async def handle_task(self, task)`"),
        ({"handle_task": no_task}, "too many positional arguments; write `async def handle_task"),
        ({"handle_task": wants_more}, "missing a required argument: 'two'"),
        ({"handle_task": yields}, "must return its result"),
        ({"handle_task": staticmethod(no_task)}, None),
        ({"handle_task": classmethod(sync)}, "is not async"),
        ({"start": sync}, "Mine.start: is not async; write `async def start(self)`"),
        ({"start": wants_more}, "cannot be called"),
        ({"stop": sync}, "Mine.stop: is not async"),
        ({"drain": sync}, "Mine.drain: is not async"),
        ({"execute_task": sync}, "Mine.execute_task: is not async"),
        ({"get_heartbeat": sync}, "Mine.get_heartbeat: is not async"),
    ],
)
def test_override_that_cannot_be_called_is_refused(overrides: dict[str, Any], why: str | None) -> None:
    if why is None:
        type("Mine", (RayAgent,), overrides)
        return
    with pytest.raises(InvalidInputError) as refused:
        type("Mine", (RayAgent,), overrides)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_override_by_a_mixin_is_checked_too() -> None:
    mixin = type("Mixin", (), {"start": sync})
    with pytest.raises(InvalidInputError, match=r"Mine\.start: is not async"):
        type("Mine", (mixin, RayAgent), {})


def test_what_can_be_called_is_taken() -> None:
    def logged(method: Any) -> Any:
        @functools.wraps(method)
        def wrapper(*args: Any) -> Any:
            return method(*args)

        return wrapper

    class Decorated(RayAgent):
        @logged
        async def handle_task(self, task: Any) -> Any:
            return task

    class Grandchild(Decorated):
        async def start(self, *_: Any, is_slow: bool = False) -> None:
            await super().start()

        def report(self) -> str:
            return "its own methods are its own"

    assert Grandchild("a", settings=SETTINGS).report()


async def test_constructor_that_does_not_call_ours_is_named_at_the_first_use() -> None:
    class Forgetful(RayAgent):
        def __init__(self, agent_id: str) -> None:
            self.own = agent_id

    agent = Forgetful("a")
    assert agent.own == "a"
    for use in (agent.start, agent.drain, agent.stop, agent.get_id, agent.get_heartbeat, agent.get_summary_stats):
        with pytest.raises(InvalidInputError, match=r"Forgetful\.__init__: does not call super\(\)\.__init__"):
            await use()
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = agent.other  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = RayAgent("b", settings=SETTINGS).other  # type: ignore[attr-defined]


async def test_task_that_returns_at_once_is_named_when_it_runs() -> None:
    class Hidden(RayAgent):
        handle_task = functools.partialmethod(lambda self, task: task)

    agent = Hidden("a", settings=SETTINGS)
    await agent.start()
    with pytest.raises(InvalidInputError, match=r"Hidden\.handle_task: is not async"):
        await agent.execute_task("work")


class Waits(RayAgent):
    """Works until `may_end` is set."""

    may_end: asyncio.Event

    async def handle_task(self, task: Any) -> Any:
        self.may_end = asyncio.Event()
        await self.may_end.wait()
        return task


async def test_drain_in_one_loop_ends_with_the_last_task_of_another() -> None:
    agent = Waits("a", settings=SETTINGS)
    await agent.start()
    with another_loop() as other:
        running = other.start(agent.execute_task("work"))
        await eventually(lambda: hasattr(agent, "may_end"))
        assert not await agent.drain(timeout_s=0.01)
        draining = asyncio.create_task(agent.drain(timeout_s=3600))
        other.loop.call_soon_threadsafe(agent.may_end.set)
        assert await draining
        assert await asyncio.wrap_future(running) == "work"
    stats = await agent.get_summary_stats()
    assert (stats.tasks_done, stats.tasks_running) == (1, 0)


async def test_tasks_of_many_loops_are_all_counted() -> None:
    class Quick(RayAgent):
        async def handle_task(self, task: Any) -> Any:
            await asyncio.sleep(0)

    agent = Quick("a", settings=SETTINGS)
    await agent.start()

    async def work() -> None:
        for _ in range(100):
            await agent.execute_task(None)

    with another_loop() as one, another_loop() as two:
        await asyncio.gather(one.run(work()), two.run(work()), work())
    stats = await agent.get_summary_stats()
    assert (stats.tasks_done, stats.tasks_failed, stats.tasks_running) == (300, 0, 0)
    assert await agent.drain(timeout_s=0)
