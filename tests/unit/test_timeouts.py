"""Bounded waits."""

from __future__ import annotations

import asyncio

import pytest

from seedcore.core.timeouts import end, is_running, within
from tests.loops import another_loop
from tests.waiting import eventually


class Work:
    """Work that ends when `may_end` is set, and records a cancellation."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.has_ended = asyncio.Event()
        self.was_cancelled = False

    async def __call__(self) -> str:
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        finally:
            self.has_ended.set()
        return "done"


@pytest.mark.parametrize("timeout_s", [None, 5.0])
async def test_work_within_the_time_returns_its_result(timeout_s: float | None) -> None:
    work = Work()
    work.may_end.set()
    assert await within(work(), timeout_s) == "done"


async def test_error_of_the_work_is_raised_to_the_caller() -> None:
    async def fail() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        await within(fail(), 5.0)


async def test_late_work_is_cancelled_and_raises_a_timeout() -> None:
    work = Work()
    with pytest.raises(asyncio.TimeoutError):
        await within(work(), 0.001)
    await work.has_ended.wait()
    assert work.was_cancelled


async def test_cancellation_of_the_caller_cancels_the_work_and_is_not_lost() -> None:
    work = Work()
    waiter = asyncio.ensure_future(within(work(), 5.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    await work.has_ended.wait()
    assert work.was_cancelled


async def test_timeout_does_not_wait_for_work_that_ignores_its_cancellation() -> None:
    may_end, has_ended = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()
            has_ended.set()

    with pytest.raises(asyncio.TimeoutError):
        await within(stubborn(), 0.001)
    assert not has_ended.is_set()
    may_end.set()
    await has_ended.wait()


async def test_error_of_abandoned_work_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    has_ended = asyncio.Event()

    async def fail_late() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            has_ended.set()
            raise LookupError("too late")

    with pytest.raises(asyncio.TimeoutError):
        await within(fail_late(), 0.001)
    await has_ended.wait()
    await asyncio.sleep(0)
    assert "too late" not in caplog.text


async def test_end_waits_until_the_tasks_have_ended() -> None:
    work = Work()

    async def run() -> None:
        await work()

    task = asyncio.create_task(run())
    await asyncio.sleep(0)
    await end(task, None)
    assert task.cancelled()
    assert work.was_cancelled
    await end(task)
    await end()


async def test_task_of_another_loop_is_cancelled_there() -> None:
    async def waits() -> asyncio.Task[None]:
        return asyncio.create_task(asyncio.sleep(3600))

    with another_loop() as other:
        task, left = await other.run(waits()), await other.run(waits())
        assert is_running(task)
        await end(task)
        await eventually(task.cancelled)
    assert not is_running(left)
    await end(left)
