"""A lock and an event for tasks of several event loops."""

from __future__ import annotations

import asyncio

import pytest

from seedcore.core.loops import LoopsEvent, LoopsLock
from tests.loops import another_loop
from tests.waiting import eventually


async def test_of_all_loops_one_task_at_a_time_holds_the_lock() -> None:
    lock = LoopsLock()
    inside = 0
    most = 0

    async def enter() -> None:
        nonlocal inside, most
        for _ in range(20):
            async with lock:
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1

    with another_loop() as one, another_loop() as two:
        await asyncio.gather(
            *(enter() for _ in range(5)), *(loop.run(enter()) for loop in (one, two) for _ in range(5))
        )
    assert (most, inside, lock.locked()) == (1, 0, False)


async def test_cancelled_waiter_of_another_loop_is_skipped() -> None:
    lock = LoopsLock()

    async def hold() -> str:
        async with lock:
            return "held"

    with another_loop() as other:
        async with lock:
            first, second = other.start(hold()), other.start(hold())
            await eventually(lambda: lock.waiting == 2)
            first.cancel()
        assert await asyncio.wrap_future(second) == "held"
    assert not lock.locked()


async def test_waiter_of_a_loop_that_has_ended_is_skipped() -> None:
    lock = LoopsLock()

    async def hold() -> None:
        async with lock:
            pass

    await lock.__aenter__()
    with another_loop() as other:
        other.start(hold())
        await eventually(lambda: lock.waiting == 1)
        # as where a thread ends without cancelling its tasks
        other.abandon()
    mine = asyncio.create_task(hold())
    await eventually(lambda: lock.waiting == 2)
    await lock.__aexit__()
    await mine
    assert not lock.locked()


@pytest.mark.parametrize("is_passed_on_first", [True, False])
async def test_lock_passed_to_a_cancelled_waiter_is_passed_on(is_passed_on_first: bool) -> None:
    lock = LoopsLock()

    async def hold() -> None:
        async with lock:
            await asyncio.sleep(0)

    await lock.__aenter__()
    cancelled, behind = asyncio.create_task(hold()), asyncio.create_task(hold())
    await eventually(lambda: lock.waiting == 2)
    if not is_passed_on_first:
        cancelled.cancel()
    await lock.__aexit__()
    cancelled.cancel()
    await behind
    await asyncio.wait([cancelled])
    assert cancelled.cancelled()
    assert not lock.locked()


async def test_event_set_in_one_loop_wakes_the_waiters_of_every_loop() -> None:
    event = LoopsEvent()
    with another_loop() as other:
        waiting = [asyncio.create_task(event.wait()), asyncio.wrap_future(other.start(event.wait()))]
        await eventually(lambda: event.waiting == 2)
        other.loop.call_soon_threadsafe(event.set)
        await asyncio.gather(*waiting)
        assert event.is_set()
        event.clear()
        again = other.start(event.wait())
        await eventually(lambda: event.waiting)
        event.set()
        await asyncio.wrap_future(again)
